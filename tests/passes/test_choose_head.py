"""Ops behind the last attention run for the nodes of rows that are read themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import radix_compile
from radix_compile.ir.graph import Form, facts
from radix_compile.ir.value import module_of
from radix_compile.passes.fold import Fold
from tests.end_to_end.test_read_rows import OPTIONS, SEQ, batch, labels_of, log_probabilities, shifted_loss
from tests.models import build

radix = torch.ops.radix


def folds_of(program: Callable[..., Any], *args: Tensor, **options: Any) -> list[Fold]:
    """The folds of a program in training."""
    folds: dict[int, Fold] = {}

    def observe(after: str, gm: torch.fx.GraphModule, fold: Fold | None = None) -> None:
        if fold is not None:
            folds[id(fold)] = fold

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        radix_backend = radix_compile.RadixBackend()
        return radix_backend.compile(gm, inputs, radix_backend.options.updated(OPTIONS | options), observe)

    torch.compile(program, backend=backend)(*args)
    return list(folds.values())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("Qwen3")


def last_token(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def run(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, use_cache=False).logits[torch.arange(len(ids)), mask.sum(1) - 1]

    return run


def modules(fold: Fold) -> set[str]:
    """The modules with a product in the head."""
    return {module_of(node) for node in fold.head if node.target is torch.ops.aten.linear.default}


def test_what_is_in_the_head(model: nn.Module) -> None:
    fold = folds_of(last_token(model), *batch())[0]
    own = {name.split("model.")[-1] for name in modules(fold)}
    last = {f"layers.1.{name}" for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    assert own == last | {"lm_head"}
    forms = {facts(node).form for node in fold.program.graph.nodes}
    assert {Form.FULL, Form.COMPACT, Form.HEAD} <= forms


@pytest.mark.parametrize("fold_attention", [True, False])
def test_values_are_picked_once(fold_attention: bool, model: nn.Module) -> None:
    """The result of the last attention, and the residual stream, are what the head takes from all nodes."""
    fold = folds_of(last_token(model), *batch(), fold_attention=fold_attention)[0]
    nodes = fold.program.graph.find_nodes(op="call_function", target=radix.fold_rows.default)
    picks = [node for node in nodes if node.args[1].name == "radix_head_nodes"]
    from_rows = [node for node in nodes if node.args[1].name == "radix_head_fold"]
    assert (len(picks), len(from_rows)) == ((2, 0) if fold_attention else (1, 1))


PROGRAMS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "returns every row too": lambda model: (
        lambda ids, mask: (
            (logits := model(ids, attention_mask=mask, use_cache=False).logits)[:, -1],
            logits,
        )
    ),
    "a mean over the rows that attention sees": lambda model: (
        lambda ids, mask: (
            model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state * mask[..., None]
        ).sum(1)
    ),
    "no product behind the last attention": lambda model: (
        lambda ids, mask: F.scaled_dot_product_attention(
            *[model.lm_head(model.model.embed_tokens(ids))[:, None]] * 3, is_causal=True
        )[:, 0, -1]
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_head(name: str, model: nn.Module) -> None:
    assert not folds_of(PROGRAMS[name](model), *batch())[0].head


def test_how_many_nodes_it_has(model: nn.Module) -> None:
    ids, mask = batch()
    compiled = torch.compile(last_token(model), backend="radix", options=OPTIONS | {"verify": True})
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, mask), last_token(model)(ids, mask))
    stats = radix_compile.stats()
    assert stats.head_tokens == len(
        {tuple(row[: int(seen.sum())].tolist()) for row, seen in zip(ids, mask, strict=True)}
    )


@pytest.mark.parametrize("loss", [shifted_loss, log_probabilities])
def test_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Every weight, among them those that the head and the other layers share: the embedding."""
    model = build("GPT2", tie_word_embeddings=True).double()
    ids, mask = batch()
    labels = labels_of(ids, mask, prompt=SEQ - 4)

    def run(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return loss(model(ids, attention_mask=mask, use_cache=False).logits, labels)

    weights = list(model.parameters())
    ours = torch.autograd.grad(torch.compile(run, backend="radix", options=OPTIONS)(ids, mask, labels), weights)
    for gradient, expected in zip(ours, torch.autograd.grad(run(ids, mask, labels), weights), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    assert 0 < radix_compile.stats().head_tokens < radix_compile.stats().compact_tokens


def test_one_row_is_read(model: nn.Module) -> None:
    """Torch would broadcast a size of one, so there are at least two entries."""
    ids, mask = batch()

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, use_cache=False).logits[0, 8]

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(run, backend="radix", options=OPTIONS)(ids, mask), run(ids, mask))
    assert (radix_compile.stats().head_tokens, radix_compile.stats().folded_calls) == (1, 1)

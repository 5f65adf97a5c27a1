"""The folded program: where it folds and scatters, how wide, and what it does to shapes and constants."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from radix_compile.ir.graph import Form, source_of_fold, tokens_of
from tests.graphs import calls, fold_of, folded, scattered
from tests.models import VOCABULARY, build, shared_batch

aten, radix = torch.ops.aten, torch.ops.radix


def width(gm: fx.GraphModule, moved: fx.Node) -> int:
    """Features of the value that is folded or scattered: those of the captured node it stands for."""
    captured = {n.name: n for n in source_of_fold(gm).graph.nodes}
    value = captured[moved.name].meta["val"]
    return value.numel() // (4 * 12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_layers_of_qwen(dynamic: bool) -> None:
    """Token ids and two attention outputs are folded; two of Q, K, V and the logits are scattered."""
    gm = folded(build("Qwen3"), shared_batch(4, 12, 8), dynamic=dynamic, use_cache=False, on_rows=True)
    assert len(calls(gm, radix.fold_rows.default)) == 3
    assert len(scattered(gm)) == 7
    assert len(calls(gm, radix.gather_columns.default)) == 2  # cos and sin, for both layers


@pytest.mark.parametrize("dynamic", [False, True])
def test_two_layers_of_qwen_with_attention_on_the_tree(dynamic: bool) -> None:
    """Token ids are folded, the logits are scattered: nothing between them runs on rows."""
    gm = folded(build("Qwen3"), shared_batch(4, 12, 8), dynamic=dynamic, use_cache=False)
    assert len(calls(gm, radix.tree_attention.default)) == 2
    assert len(calls(gm, radix.fold_rows.default)) == 1
    assert [width(gm, node) for node in scattered(gm)] == [VOCABULARY]


def test_narrow_keys_and_values_are_scattered() -> None:
    """Grouped-query attention repeats K and V: what is scattered is what stands before the repetition."""
    gm = folded(build("Qwen3", num_hidden_layers=1), shared_batch(4, 12, 8), use_cache=False, on_rows=True)
    assert sorted(width(gm, node) for node in scattered(gm)) == [16, 16, 32, VOCABULARY]
    (fold, _) = sorted(calls(gm, radix.fold_rows.default), key=lambda node: node.args[0].op == "placeholder")
    assert width(gm, fold.args[0]) == 32


def test_a_cache_comes_back_in_full_form_at_no_extra_scatter() -> None:
    with_cache = folded(build("Qwen3", num_hidden_layers=1), shared_batch(4, 12, 8), use_cache=True, on_rows=True)
    assert len(scattered(with_cache)) == 4


def test_no_fold_of_a_scatter_is_made() -> None:
    for kind in ("Qwen3", "GPT2"):
        ids = shared_batch(4, 12, 8)
        gm = folded(build(kind), ids, attention_mask=torch.ones_like(ids), use_cache=False)
        for fold in calls(gm, radix.fold_rows.default):
            source = fold.args[0].args[0] if fold.args[0].target is operator.getitem else fold.args[0]
            assert source.target not in (radix.scatter_rows.default, radix.foreach_scatter_rows.default)
        torch._dynamo.reset()


def test_masks_are_made_in_full_form() -> None:
    ids = shared_batch(4, 12, 8)
    fold = fold_of(build("Qwen3", attention="eager"), ids, attention_mask=torch.ones_like(ids), use_cache=False)
    runs = fold.wanted.runs
    masks = [node for node in runs if node.target is aten.where.ScalarOther]
    assert masks
    assert all(runs[node] == {Form.FULL} for node in masks)


class Table(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.table = nn.Parameter(torch.randn(*shape))
        self.use = use
        self.head = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.use(self.embedding(ids), self.table))


def test_a_table_by_column_is_gathered() -> None:
    gm = folded(Table(lambda x, t: x + t, 12, 16), shared_batch(4, 12, 8))
    assert len(calls(gm, radix.gather_columns.default)) == 1


def test_a_vector_of_features_is_not() -> None:
    gm = folded(Table(lambda x, t: x + t, 16), shared_batch(4, 16, 8))
    assert not calls(gm, radix.gather_columns.default)


def test_a_table_by_sequence_tells_sequences_apart() -> None:
    with pytest.raises(Exception, match="equal prefixes get different values"):
        folded(Table(lambda x, t: x * t, 4, 1, 16), shared_batch(4, 12, 8))


def test_a_value_used_in_both_forms_is_computed_once() -> None:
    model = Table(lambda x, t: x * t, 16)

    def program(ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.embedding(ids) * model.table
        return hidden, model.head(hidden)

    gm = folded(program, shared_batch(4, 12, 8))
    assert len(calls(gm, aten.mul.Tensor)) == 1
    assert len(scattered(gm)) == 2


RESHAPES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "merge rows": (lambda x: x.reshape(-1, 16) + 1, True),
    "and split again": (lambda x: (x.reshape(-1, 16) + 1).view(4, 12, 16), True),
    "split features": (lambda x: x.view(4, 12, 4, 4).sum(-1).repeat(1, 1, 4), True),
    "heads first": (lambda x: x.view(4, 12, 4, 4).transpose(1, 2).reshape(16, 12, 4) * 2, True),
    "sequence first": (lambda x: x.transpose(0, 1).contiguous().view(12, 4, 2, 8).flip(-1).reshape(12, 4, 16), True),
    "features over columns": (lambda x: x.reshape(4, 24, 8) + 1, True),
    "columns cut in two": (lambda x: x.reshape(4, 6, 32) + 1, False),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_reshapes_are_followed(name: str) -> None:
    function, follows = RESHAPES[name]
    model = Table(lambda x, t: x * t, 16)

    def program(ids: Tensor) -> Any:
        return function(model.head(model.embedding(ids)))

    gm = folded(program, shared_batch(4, 12, 8))
    assert len(scattered(gm)) == 1
    refusals = tokens_of(gm).refusals
    assert bool(refusals) != follows

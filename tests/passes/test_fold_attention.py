"""Which attentions run on the tree, what the op is given of them, and why others stay in full form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import radix_compile
from radix_compile import plan_inputs
from radix_compile.op_rules.table import argument
from radix_compile.passes import fold_graph
from tests.graphs import calls, folded
from tests.models import VOCABULARY, build, shared_batch

aten, radix = torch.ops.aten, torch.ops.radix
B, S, H, E = 4, 12, 4, 6

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Token-wise layers with one attention between them, ``attend(q, k, v)``, all ``[B, H, S, E]``."""

    def __init__(self, attend: Attend, heads: int = H) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, H * E)
        self.q, self.k, self.v = (nn.Linear(H * E, n * E) for n in (H, heads, heads))
        self.attend = attend
        self.after = nn.Sequential(nn.Linear(H * E, 8 * E), nn.GELU(), nn.Linear(8 * E, H * E))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (layer(x).view(B, S, -1, E).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.after(self.attend(q, k, v).transpose(1, 2).reshape(B, S, -1))


def causal() -> Tensor:
    return torch.arange(S)[:, None] >= torch.arange(S)


def within(window: int) -> Tensor:
    return causal() & (torch.arange(S) > torch.arange(S)[:, None] - window)


def written(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    cap: float | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    scores = q @ k.mT / math.sqrt(E) if scores is None else scores
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return torch.where(causal() if mask is None else mask, scores, -math.inf).softmax(-1) @ v


SINKS = torch.arange(1.0, H + 1, dtype=torch.float64)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, dim: int = -3) -> Tensor:
    scores = torch.where(causal(), q @ k.mT * 0.3, torch.finfo(q.dtype).min)
    shape = [-1 if d == dim else 1 for d in range(-4, 0)]
    more = len(sinks) if dim == -1 else 1
    scores = torch.cat([scores, sinks.to(q).view(shape).expand(B, H, S, more)], -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return scores.softmax(-1)[..., :S] @ v


def repeated(tensor: Tensor) -> Tensor:
    return tensor[:, :, None].expand(B, 2, 2, S, E).reshape(B, H, S, E)


def the_op(model: nn.Module) -> fx.Node:
    """The op of the folded program, which has no attention in full form, and which is right."""
    ids = shared_batch(B, S, 8)
    gm = folded(model, ids)
    (node,) = calls(gm, radix.tree_attention.default)
    assert not calls(gm, aten.scaled_dot_product_attention.default)
    assert not calls(gm, aten.softmax.int)
    model = model.double()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="radix", options={"inner": "eager", "threshold": 1.0, "strict": True})
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-9, atol=1e-9)
    assert radix_compile.stats().folded_calls == 1
    return node


def carried(node: fx.Node) -> tuple[Any, Any, Any]:
    return tuple(argument(node, name) for name in ("scale", "window", "softcap"))  # type: ignore[return-value]


TREE: dict[str, tuple[Attend, tuple[Any, Any, Any]]] = {
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (E**-0.5, None, None)),
    "a mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, causal(), scale=0.2), (0.2, None, None)),
    "a window": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, within(3)), (E**-0.5, 3, None)),
    "a mask to add": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, torch.zeros(S, S).to(q).masked_fill(~causal(), -math.inf)
        ),
        (E**-0.5, None, None),
    ),
    "written out": (written, (E**-0.5, None, None)),
    "written out, a window": (lambda q, k, v: written(q, k, v, within(5)), (E**-0.5, 5, None)),
    "a soft cap": (lambda q, k, v: written(q, k, v, cap=3.0), (E**-0.5, None, 3.0)),
    "scaled before and after": (
        lambda q, k, v: (torch.where(causal(), (q @ k.mT * 0.5), -math.inf) / 2).softmax(-1) @ v,
        (0.25, None, None),
    ),
    "heads merged with sequences": (
        lambda q, k, v: written(*(one.reshape(B * H, S, E) for one in (q, k, v))).view(B, H, S, E),
        (E**-0.5, None, None),
    ),
    "queries transposed first": (
        lambda q, k, v: written(q, k.permute(0, 1, 3, 2).contiguous().mT, v),
        (E**-0.5, None, None),
    ),
}


@pytest.mark.parametrize("name", TREE)
def test_on_the_tree(name: str) -> None:
    attend, expected = TREE[name]
    assert carried(the_op(Model(attend))) == pytest.approx(expected)


def test_keys_are_not_repeated_for_the_heads_of_a_group() -> None:
    node = the_op(Model(lambda q, k, v: written(q, repeated(k), repeated(v)), heads=2))
    _, key, value = node.args[:3]
    assert [one.meta["origin"].meta["val"].shape[1] for one in (key, value)] == [2, 2]


def test_groups_of_heads_in_attention_as_one_op() -> None:
    node = the_op(Model(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 2))
    assert [one.meta["origin"].meta["val"].shape[1] for one in node.args[:3]] == [H, 2, 2]


def test_keys_and_values_have_as_many_heads() -> None:
    """Here the values are one head's, and the keys are not."""
    node = the_op(Model(lambda q, k, v: written(q, k, v[:, :1].expand(B, H, S, E).contiguous())))
    assert node.args[2].meta["origin"].meta["val"].shape[1] == H


def test_sinks() -> None:
    class WithSinks(Model):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: with_sinks(q, k, v, self.sinks))
            self.sinks = nn.Parameter(torch.randn(H))

    node = the_op(WithSinks())
    assert argument(node, "sinks") is not None
    assert argument(node, "scale") == pytest.approx(0.3)


FULL: dict[str, tuple[Attend, str]] = {
    "a bias": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, written_bias(q)), "adds a bias"),
    "a bias, written out": (
        lambda q, k, v: torch.where(causal(), q @ k.mT + written_bias(q).clamp(min=-9), -math.inf).softmax(-1) @ v,
        "adds a bias",
    ),
    "weights are scaled": (
        lambda q, k, v: (torch.where(causal(), q @ k.mT, -math.inf).softmax(-1) / 2) @ v,
        "its weights go through",
    ),
    "an equation": (
        lambda q, k, v: torch.einsum("bhqk,bhke->bhqe", torch.where(causal(), q @ k.mT, -math.inf).softmax(-1), v),
        "it ends in",
    ),
    "heads of a group that are not side by side": (
        lambda q, k, v: written(
            q.view(B, 2, 2, S, E), k.view(B, 2, 2, S, E)[:, :1], v.view(B, 2, 2, S, E)[:, :1]
        ).reshape(B, H, S, E),
        "heads do not fit",
    ),
    "a mask under a soft cap": (
        lambda q, k, v: written(q, k, v, scores=torch.where(within(3), q @ k.mT, -math.inf), cap=2.0),
        "not all that its masks hide",
    ),
    "a floor that is lifted": (
        lambda q, k, v: written(q, k, v, scores=torch.where(within(3), q @ k.mT, torch.finfo(q.dtype).min) / 2 / 2),
        "not all that its masks hide",
    ),
    "sinks that heads share": (lambda q, k, v: with_sinks(q, k, v, SINKS[:1]), "not one number for each head"),
    "several sinks, as many as heads": (lambda q, k, v: with_sinks(q, k, v, SINKS, dim=-1), "not one number for each"),
    "sinks by query": (
        lambda q, k, v: with_sinks(q, k, v, torch.arange(1.0, S + 1, dtype=torch.float64), dim=-2),
        "not one number for each head",
    ),
    "a negative factor": (
        lambda q, k, v: torch.where(causal(), q @ k.mT * -0.5, -math.inf).softmax(-1) @ v,
        "not a positive number",
    ),
}


def written_bias(like: Tensor) -> Tensor:
    distance = (torch.arange(S)[:, None] - torch.arange(S)).to(like)
    return torch.where(causal(), -0.1 * distance, -math.inf)


@pytest.mark.parametrize("name", FULL)
def test_in_full_form_with_a_reason(name: str) -> None:
    attend, reason = FULL[name]
    model, ids = Model(attend).double(), shared_batch(B, S, 8)
    with torch.no_grad():
        explanation = radix_compile.explain(model, ids)
        (attention,) = explanation.graphs[0].attentions
        assert attention.causal
        assert "in full form" in attention.status
        assert reason in attention.status
        assert explanation.folded
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="radix", options={"inner": "eager", "threshold": 1.0})
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-9, atol=1e-9)


def test_the_option() -> None:
    ids = shared_batch(B, S, 8)
    with torch.no_grad():
        on = radix_compile.explain(build("Qwen3"), ids)
        off = radix_compile.explain(build("Qwen3"), ids, options={"fold_attention": False})
    assert {one.status for one in on.graphs[0].attentions} == {"proved causal; runs on the prefix tree"}
    assert {one.status for one in off.graphs[0].attentions} == {
        "proved causal; runs in full form: the option fold_attention is off"
    }


@pytest.mark.parametrize(("attention", "programs"), [("sdpa", 1), ("eager", 2)])
def test_rows_that_see_no_key_have_a_program_where_they_need_one(attention: str, programs: int) -> None:
    model, ids = build("Qwen3", attention=attention), shared_batch(B, S, 8)
    compiled = torch.compile(model, backend="radix", options={"inner": "eager", "threshold": 1.0})
    for padded in (0, 3):
        mask = torch.ones_like(ids)
        mask[:, :padded] = 0  # on the left, so that those rows see no key
        with torch.no_grad():
            ours, plain = (run(ids, attention_mask=mask, use_cache=False).logits for run in (compiled, model))
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert radix_compile.stats().folded_compiles == programs
    assert radix_compile.stats().folded_calls == 2


def test_the_lists_of_tiles_go_through_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with new sizes of everything in the second call, and no second compilation for them."""
    for module in (fold_graph, plan_inputs):
        monkeypatch.setattr(module, "needs_tiles", lambda captured: True)
    model = build("Qwen3", num_hidden_layers=1)
    compiled = torch.compile(model, backend="radix", options={"threshold": 1.0, "strict": True})
    for shared in (8, 300):
        ids = shared_batch(B, 320, shared)
        with torch.no_grad():
            ours, plain = (run(ids, use_cache=False).logits for run in (compiled, model))
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert radix_compile.stats().folded_calls == 2
    assert radix_compile.stats().folded_compiles == 1

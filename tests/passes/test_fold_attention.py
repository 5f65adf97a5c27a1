"""Which attentions run on the tree, what the op is given of them, and why others stay in full form."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import radix_compile
from radix_compile.analysis.arguments import argument
from radix_compile.ir.graph import facts
from radix_compile.passes import fold_graph
from tests.graphs import calls, folded
from tests.models import DEVICE, VOCABULARY, build, shared_batch

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


def behind() -> Tensor:
    return torch.arange(S)[:, None] - torch.arange(S)


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


def with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, dim: int = -3, factor: float = 1, centred: bool = False
) -> Tensor:
    scores = torch.where(causal(), q @ k.mT * 0.3, torch.finfo(q.dtype).min)
    scores = scores - scores.max(-1, keepdim=True).values if centred else scores
    shape = [-1 if d == dim else 1 for d in range(-4, 0)]
    more = len(sinks) if dim == -1 else 1
    scores = torch.cat([scores, sinks.to(q).view(shape).expand(B, H, S, more)], -1)
    scores = scores - scores.max(-1, keepdim=True).values if factor == 1 else scores * factor
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
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "eager", "fold": "always", "strict": True}
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-9, atol=1e-9)
    assert radix_compile.stats().folded_calls == 1
    return node


def score_options(node: fx.Node) -> tuple[Any, Any, Any]:
    return tuple(argument(node, name) for name in ("scale", "window", "softcap"))  # type: ignore[return-value]


TREE: dict[str, tuple[Attend, tuple[Any, Any, Any]]] = {
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (E**-0.5, None, None)),
    "a mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, causal(), scale=0.2), (0.2, None, None)),
    "a window": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, within(3)), (E**-0.5, 3, None)),
    "distances": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (behind() >= 0) & (behind() < 4)),
        (E**-0.5, 4, None),
    ),
    "distances the other way": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (-1 + behind().mT < 0) & (behind().mT > -2)),
        (E**-0.5, 2, None),
    ),
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


def equations(scores: str, values: str) -> Attend:
    """Attention in two of them, on queries, keys and values ``[B, S, H, E]``."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        if "r" in scores:
            q = q.view(B, S, 2, 2, E)
        if scores.count("h") < 3 and "h" in scores:
            k, v = k[:, :, 0], v[:, :, 0]
        product = torch.einsum(scores, q, k) * 0.3
        weights = torch.where(causal(), product, -math.inf).softmax(-1)
        return torch.einsum(values, weights, v).reshape(B, S, H, E).transpose(1, 2)

    return attend


@pytest.mark.parametrize(
    ("scores", "values", "heads"),
    [
        ("bqhe,bkhe->bhqk", "bhqk,bkhe->bqhe", H),
        ("bqhe,bke->bhqk", "bhqk,bke->bqhe", 1),
        ("bqgre,bkge->bgrqk", "bgrqk,bkge->bqgre", 2),
    ],
)
def test_equations(scores: str, values: str, heads: int) -> None:
    node = the_op(Model(equations(scores, values), heads))
    assert score_options(node) == (pytest.approx(0.3), None, None)


def test_an_equation_of_keys_and_queries() -> None:
    """The other way round, and heads in front of sequences in the second one."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        product = torch.einsum("bhke,bhqe->bhqk", k, q) * 0.3
        weights = torch.where(causal(), product, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bhke->bqhe", weights, v).transpose(1, 2)

    assert score_options(the_op(Model(attend))) == (pytest.approx(0.3), None, None)


@pytest.mark.parametrize("name", TREE)
def test_on_the_tree(name: str) -> None:
    attend, expected = TREE[name]
    assert score_options(the_op(Model(attend))) == pytest.approx(expected)


def test_keys_are_not_repeated_for_the_heads_of_a_group() -> None:
    node = the_op(Model(lambda q, k, v: written(q, repeated(k), repeated(v)), heads=2))
    _, key, value = node.args[:3]
    assert [facts(one).origin.meta["val"].shape[1] for one in (key, value)] == [2, 2]


def test_groups_of_heads_in_attention_as_one_op() -> None:
    node = the_op(Model(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 2))
    assert [facts(one).origin.meta["val"].shape[1] for one in node.args[:3]] == [H, 2, 2]


def test_keys_and_values_have_as_many_heads() -> None:
    """Here the values are one head's, and the keys are not."""
    node = the_op(Model(lambda q, k, v: written(q, k, v[:, :1].expand(B, H, S, E).contiguous())))
    assert facts(node.args[2]).origin.meta["val"].shape[1] == H


def test_sinks() -> None:
    class WithSinks(Model):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: with_sinks(q, k, v, self.sinks))
            self.sinks = nn.Parameter(torch.randn(H))

    node = the_op(WithSinks())
    assert argument(node, "sinks") is not None
    assert argument(node, "scale") == pytest.approx(0.3)


def slopes(like: Tensor) -> Tensor:
    return 0.5 ** torch.arange(1, H + 1).to(like)[:, None, None]


def by_distance(like: Tensor) -> Tensor:
    return slopes(like) * (torch.arange(S) - torch.arange(S)[:, None]).to(like)


def merged(*tensors: Tensor) -> list[Tensor]:
    """Sequences and heads in one dimension."""
    return [one.reshape(B * H, S, -1) for one in tensors]


def by_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Bloom does."""
    bias = (slopes(q) * torch.arange(S).to(q)).expand(B, H, 1, S).reshape(B * H, 1, S)
    q, k, v = merged(q, k, v)
    scores = torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.25).view(B, H, S, S)
    weights = torch.where(causal(), scores, -math.inf).softmax(-1).view(B * H, S, S)
    return torch.bmm(weights, v).view(B, H, S, E)


BIASED: dict[str, tuple[Attend, list[int]]] = {
    "one op, by pair": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, written_bias(q)), [1, 1, S, S]),
    "one op, by head and pair": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, by_distance(q) + written_bias(q)),
        [1, H, S, S],
    ),
    "added": (lambda q, k, v: written(q, k, v, scores=q @ k.mT + by_distance(q)), [1, H, S, S]),
    "added, then scaled": (lambda q, k, v: written(q, k, v, scores=(q @ k.mT + by_distance(q)) / 3), [1, H, S, S]),
    "added behind a soft cap": (
        lambda q, k, v: written(q, k, v, scores=2 * torch.tanh(q @ k.mT / 2) + by_distance(q)),
        [1, H, S, S],
    ),
    "by key, in a product": (by_key, [B, H, 1, S]),
    "keys for one reason or the other": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, within(2) | (within(7) & ~within(4))),
        [1, 1, S, S],
    ),
    "that mask written out, and a bias": (
        lambda q, k, v: written(q, k, v, within(2) | (within(7) & ~within(4)), scores=q @ k.mT + by_distance(q)),
        [1, H, S, S],
    ),
}


@pytest.mark.parametrize("name", BIASED)
def test_what_is_read_in_full_form(name: str) -> None:
    attend, shape = BIASED[name]
    bias = argument(the_op(Model(attend)), "bias")
    assert isinstance(bias, fx.Node)
    assert bias.args[1] == shape if bias.target is aten.reshape.default else name.startswith("that mask")


def test_a_bias_by_row() -> None:
    """As Bloom's, from the padding mask: of another row, another bias."""

    class WithPadding(Model):
        def forward(self, ids: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
            self.attend = lambda q, k, v: by_place(q, k, v, padding)
            return super().forward(ids)

    def by_place(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        place = ((padding.cumsum(-1) - 1) * padding)[:, None, None, :]
        itself = torch.arange(S)[:, None] == torch.arange(S)
        seen = causal() & ((padding != 0)[:, None, None, :] | itself)
        return written(q, k, v, seen, scores=q @ k.mT + slopes(q) * place)

    model, ids = WithPadding(written).double(), shared_batch(B, S, 8)
    padding = torch.ones_like(ids)
    padding[1:3, 4:6] = 0
    assert radix_compile.explain(model, ids, padding).graphs[0].attentions[0].full_form == ""
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "eager", "fold": "always", "strict": True}
    )
    for one in (padding, padding.roll(1, 0)):
        torch.testing.assert_close(compiled(ids, one), model(ids, one), rtol=1e-9, atol=1e-9)
    assert radix_compile.stats().tree_pairs


FULL: dict[str, tuple[Attend, str]] = {
    "a bias that is computed at some cost": (
        lambda q, k, v: torch.where(causal(), q @ k.mT + (q @ v.mT).tanh(), -math.inf).softmax(-1) @ v,
        "adds one product to another",
    ),
    "a bias under a soft cap": (
        lambda q, k, v: written(q, k, v, scores=q @ k.mT + by_distance(q), cap=2.0),
        "adds a bias under a soft cap",
    ),
    "a number": (lambda q, k, v: written(q, k, v, scores=q @ k.mT + 1.5), "adds a number"),
    "a bias by query": (
        lambda q, k, v: written(q, k, v, scores=q @ k.mT + slopes(q) * torch.arange(S)[:, None]),
        "no entry for each key",
    ),
    "a bias for groups of heads": (
        lambda q, k, v: written(
            *(one.view(B, 2, 2, S, E) for one in (q, k, v)),
            scores=q.view(B, 2, 2, S, E) @ k.view(B, 2, 2, S, E).mT + by_distance(q).view(2, 2, S, S)[:1],
        ).reshape(B, H, S, E),
        "groups of heads",
    ),
    "weights are scaled": (
        lambda q, k, v: (torch.where(causal(), q @ k.mT, -math.inf).softmax(-1) / 2) @ v,
        "its weights go through",
    ),
    "an equation that sums over two dimensions": (
        lambda q, k, v: torch.einsum(
            "bqk,bhke->bqhe", torch.where(causal(), torch.einsum("bhqe,bhke->bqk", q, k), -math.inf).softmax(-1), v
        ).transpose(1, 2),
        "not a product of weights and values",
    ),
    "heads of a group that are not side by side": (
        lambda q, k, v: written(
            q.view(B, 2, 2, S, E), k.view(B, 2, 2, S, E)[:, :1], v.view(B, 2, 2, S, E)[:, :1]
        ).reshape(B, H, S, E),
        "heads do not match",
    ),
    "a mask under a soft cap": (
        lambda q, k, v: written(q, k, v, scores=torch.where(within(3), q @ k.mT, -math.inf), cap=2.0),
        "a later op may show what its mask hides",
    ),
    "a floor that is lifted": (
        lambda q, k, v: written(q, k, v, scores=torch.where(within(3), q @ k.mT, torch.finfo(q.dtype).min) * 1e-306),
        "a later op may show what its mask hides",
    ),
    "sinks that are scaled": (lambda q, k, v: with_sinks(q, k, v, SINKS, factor=0.5), "its sinks are scaled"),
    "sinks behind scores whose largest was subtracted": (
        lambda q, k, v: with_sinks(q, k, v, SINKS, centred=True),
        "the row maximum is subtracted from",
    ),
    "sinks that heads share": (lambda q, k, v: with_sinks(q, k, v, SINKS[:1]), "not one number for each head"),
    "several sinks, as many as heads": (lambda q, k, v: with_sinks(q, k, v, SINKS, dim=-1), "not one number for each"),
    "sinks by query": (
        lambda q, k, v: with_sinks(q, k, v, torch.arange(1.0, S + 1, dtype=torch.float64), dim=-2),
        "not one number for each head",
    ),
    "a negative factor": (
        lambda q, k, v: torch.where(causal(), q @ k.mT * -0.5, -math.inf).softmax(-1) @ v,
        "a number that is not positive",
    ),
}


def written_bias(like: Tensor) -> Tensor:
    distance = (torch.arange(S)[:, None] - torch.arange(S)).to(like)
    return torch.where(causal(), -0.1 * distance, -math.inf)


def test_a_bias_that_is_trained() -> None:
    class WithTable(Model):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: written(q, k, v, scores=q @ k.mT + self.table))
            self.table = nn.Parameter(torch.randn(H, S, S).clamp(-3, 3))

    model, ids = WithTable(), shared_batch(B, S, 8)
    for trained, reason in ((False, ""), (True, "it adds a bias that has a gradient")):
        with torch.set_grad_enabled(trained):
            (attention,) = radix_compile.explain(model, ids).graphs[0].attentions
        assert attention.full_form == reason


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
        compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"})
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-9, atol=1e-9)


def test_the_option() -> None:
    ids = shared_batch(B, S, 8)
    with torch.no_grad():
        on = radix_compile.explain(build("Qwen3"), ids)
        off = radix_compile.explain(build("Qwen3"), ids, options={"fold_attention": False})
    tiles = "proved causal; runs on the prefix tree, in tiles (on a CPU)"
    assert {one.status for one in on.graphs[0].attentions} == {tiles}
    assert {one.status for one in off.graphs[0].attentions} == {
        "proved causal; runs in full form: the option fold_attention is off"
    }


@pytest.mark.parametrize(("attention", "programs"), [("sdpa", 1), ("eager", 2)])
def test_rows_that_see_no_key_have_a_program_where_they_need_one(attention: str, programs: int) -> None:
    model, ids = build("Qwen3", attention=attention), shared_batch(B, S, 8)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"})
    for padded in (0, 3):
        mask = torch.ones_like(ids)
        mask[:, :padded] = 0  # on the left, so that those rows see no key
        with torch.no_grad():
            ours, plain = (run(ids, attention_mask=mask, use_cache=False).logits for run in (compiled, model))
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert radix_compile.stats().folded_compiles == programs
    assert radix_compile.stats().folded_calls == 2


@pytest.mark.parametrize(
    ("floor", "scale", "on_tree"),
    [(-math.inf, 1.0, True), (-1.7e308, 1.0, True), (-1.7e308, -1.0, False), (3.0, -1.0, True), (3.0, 1e9, False)],
)
def test_biases_that_may_be_large(floor: float, scale: float, on_tree: bool) -> None:
    """A factor below zero turns the floor of a mask into the largest numbers of all."""

    class Biased(Model):
        def forward(self, ids: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
            x = self.embedding(ids)
            x = x + self.after(x)
            bias = torch.zeros(B, 1, S, dtype=x.dtype).masked_fill(padding[:, None] == 0, floor)
            scores = torch.baddbmm(bias.expand(B, S, S), x, x.mT, beta=scale)
            return self.after(torch.where(causal(), scores, -math.inf).softmax(-1) @ x)

    model, ids = Biased(written).double(), shared_batch(B, S, 8)
    padding = torch.ones_like(ids)
    padding[:, -3:] = 0
    options = {"inner_backend": "eager", "fold": "always"}
    compiled, weights = torch.compile(model, backend="radix", options=options), list(model.after.parameters())
    ours, plain = (torch.autograd.grad(run(ids, padding).pow(2).sum(), weights) for run in (compiled, model))
    for gradient, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    assert bool(radix_compile.stats().tree_pairs) == on_tree


@pytest.mark.parametrize(
    ("code", "scale", "trains", "on_tree"),
    [
        ("torch", 1e4, True, True),
        ("triton", 1e4, False, True),
        ("triton", 1e4, True, False),
        ("triton", 1.0, True, True),
    ],
)
def test_scores_that_are_scaled_by_much(
    monkeypatch: pytest.MonkeyPatch, code: str, scale: float, trains: bool, on_tree: bool
) -> None:
    """The gradient of the Triton kernels starts from log-sum-exp, which has no digits left for such scores."""
    module = sys.modules["radix_compile.passes.fold_attention"]
    monkeypatch.setattr(module, "code_for", lambda query, value: code)

    class Scaled(Model):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.after(self.embedding(ids))
            scores = (x @ x.mT * scale).masked_fill(~causal(), -math.inf)
            return self.after(scores.softmax(-1) @ x)

    with torch.set_grad_enabled(trains):
        explanation = radix_compile.explain(Scaled(written), shared_batch(B, S, 8))
    (attention,) = explanation.graphs[0].attentions
    assert ("scaled by so much" in attention.status) != on_tree
    assert ("runs on the prefix tree" in attention.status) == on_tree


def test_rows_that_see_no_key_count_though_attention_is_only_wanted_in_full_form() -> None:
    """What follows it mixes rows. Its own result does not, and runs on the tree."""

    class Mixed(Model):
        def forward(self, ids: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
            x = self.after(self.embedding(ids))
            q, k, v = (layer(x).view(B, S, -1, E).transpose(1, 2) for layer in (self.q, self.k, self.v))
            mask = causal() & (padding != 0)[:, None, None, :]
            y = torch.where(mask, q @ k.mT, torch.finfo(q.dtype).min).softmax(-1) @ v
            return y + y.flip(2)

    model, ids = Mixed(written).double(), shared_batch(B, S, 8)
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "eager", "fold": "always", "strict": True}
    )
    for padded in (0, 3):
        padding = torch.ones_like(ids)
        padding[:, :padded] = 0
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids, padding), model(ids, padding), rtol=1e-9, atol=1e-9)
    assert radix_compile.stats().folded_calls == 2
    assert radix_compile.stats().tree_pairs


def test_the_lists_of_tiles_go_through_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with new sizes of everything in the second call, and no second compilation for them."""
    if DEVICE == "cpu":  # then the interpreter runs the kernels of a GPU
        monkeypatch.setattr(fold_graph, "code_for", lambda query, value: "triton")
    model = build("Qwen3", num_hidden_layers=1).to(DEVICE)
    compiled = torch.compile(model, backend="radix", options={"fold": "always", "strict": True})
    for shared in (8, 70):
        ids = shared_batch(B, 80, shared).to(DEVICE)
        with torch.no_grad():
            ours, plain = (run(ids, use_cache=False).logits for run in (compiled, model))
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert radix_compile.stats().folded_calls == 2
    assert radix_compile.stats().folded_compiles == 1

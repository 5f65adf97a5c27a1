"""What is wrong with a graph, or with a call, is found, and the message says where it began."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import radix_compile
import radix_compile.passes.fold_cross_entropy as losses
from radix_compile.analysis.op_info import OP_INFO
from radix_compile.ir.axes import plain_axes
from radix_compile.ir.value import Value, value_of
from radix_compile.passes.verify import InvariantError, verify_graph
from radix_compile.runtime.verify_calls import CallVerifier
from tests.graphs import calls, folded
from tests.models import build, shared_batch

aten, radix = torch.ops.aten, torch.ops.radix
IDS = shared_batch(3, 8, shared=5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.up, self.down = nn.Embedding(97, 16), nn.Linear(16, 32), nn.Linear(32, 97)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.up(self.embedding(ids))
        hidden = hidden.flip(1)
        return self.down(hidden.tanh())


def by_row(node: fx.Node, layout: object) -> Value:
    """What a rule must not say of an op that reads other rows."""
    return Value(value_of(node.args[0]).axes)  # type: ignore[arg-type]


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    settings = {"inner_backend": "aot_eager", "fold": "always", "verify": True, "strict": True, **options}
    return torch.compile(model, backend="radix", options=settings)


def test_a_mistake_in_a_pass_does_not_lose_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain program runs, with a warning; it is an error with ``strict``, and with ``verify``."""

    def broken(gm: fx.GraphModule) -> fx.GraphModule:
        raise KeyError("lost")

    monkeypatch.setattr("radix_compile.passes.pipeline.ANALYSES", (broken,))
    monkeypatch.setattr("radix_compile.passes.pipeline.ALWAYS_VERIFY", False)
    monkeypatch.setattr("radix_compile.passes.pipeline.RAISE_MISTAKES", False)
    model = Net()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="nothing folds: broken failed: KeyError: 'lost'"):
            ours = compiled(model, verify=False, strict=False)(IDS)
        torch.testing.assert_close(ours, model(IDS))
        for options in ({"verify": False}, {"strict": False}):
            torch._dynamo.reset()
            with pytest.raises(Exception, match="lost"):
                compiled(model, **options)(IDS)


# ------------------------------------------------------------------------------------------------------------ graphs


def mlp(ids: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*[F.embedding(ids, table)[:, None] @ weight] * 3, is_causal=True) @ weight


@pytest.fixture
def gm() -> fx.GraphModule:
    result = folded(mlp, IDS, torch.randn(97, 16), torch.randn(16, 16), on_rows=True)
    verify_graph(result)
    return result


def test_a_node_in_the_wrong_form(gm: fx.GraphModule) -> None:
    scatter = calls(gm, radix.scatter_rows.default)[0]
    scatter.replace_all_uses_with(scatter.args[0])  # type: ignore[arg-type]
    with pytest.raises(InvariantError, match=r"scaled_dot_product_attention.*its shape is .*1000003"):
        verify_graph(gm)


def test_both_forms_in_one_op(gm: fx.GraphModule) -> None:
    product = calls(gm, aten.matmul.default)[-1]
    full = next(n for n in gm.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    with gm.graph.inserting_after(product):
        both = gm.graph.call_function(aten.add.Tensor, (product, full))
    product.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)
    with pytest.raises(InvariantError, match=r"aten.add.Tensor.*in compact and .* in full form"):
        verify_graph(gm)


def test_the_plan_mixed_up(gm: fx.GraphModule) -> None:
    fold = calls(gm, radix.fold_rows.default)[0]
    fold.args = (fold.args[0], fold.args[2], fold.args[1], *fold.args[3:])
    with pytest.raises(InvariantError, match="takes radix_scatter for the plan's fold"):
        verify_graph(gm)


def test_the_tree_mixed_up() -> None:
    gm = folded(mlp, IDS, torch.randn(97, 16), torch.randn(16, 16))
    verify_graph(gm)
    (attention,) = calls(gm, radix.tree_attention.default)
    *rows, fold, scatter, begin, end = attention.args[:7]
    attention.args = (*rows, fold, scatter, end, begin, *attention.args[7:])
    with pytest.raises(InvariantError, match="takes radix_end for the plan's begin"):
        verify_graph(gm)


def test_another_dtype(gm: fx.GraphModule) -> None:
    product = calls(gm, aten.matmul.default)[-1]
    with gm.graph.inserting_after(product):
        wide = gm.graph.call_function(aten._to_copy.default, (product,), {"dtype": torch.float64})
    product.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    with pytest.raises(InvariantError, match=r"its dtype is torch.float64, not torch.float32"):
        verify_graph(gm)


def test_what_does_not_even_run(gm: fx.GraphModule) -> None:
    product = calls(gm, aten.matmul.default)[-1]
    product.args = (product.args[1], product.args[0])
    with pytest.raises(InvariantError, match="the folded graph does not run"):
        verify_graph(gm)


def test_other_outputs(gm: fx.GraphModule) -> None:
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        output.args = ((gm.graph.call_function(aten.unsqueeze.default, (output.args[0][0], 0)),),)
    with pytest.raises(InvariantError, match="as an output it is"):
        verify_graph(gm)


def test_axes_that_are_not_those_of_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_more(node: fx.Node, layout: object) -> Value:
        return Value((*plain_axes(node), ()))

    monkeypatch.setitem(OP_INFO, aten.matmul.default, replace(OP_INFO[aten.matmul.default], rule=one_more))
    with pytest.raises(Exception, match=r"its axes .* are not those of its shape"):
        folded(mlp, IDS, torch.randn(97, 16), torch.randn(16, 16))


# ------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("padding", ["exact", "skip"])
def test_right_calls_pass(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    original = CallVerifier._largest_error

    def counted(self: CallVerifier, *args: Any) -> float:
        compared.append(original(self, *args))
        return compared[-1]

    monkeypatch.setattr(CallVerifier, "_largest_error", counted)
    model = build("Qwen3")
    run = compiled(model, padding=padding)
    mask = torch.ones_like(IDS)
    mask[1, 6:] = mask[2, 5:] = 0
    for _ in range(5):
        run(IDS, attention_mask=mask, use_cache=False)
    assert radix_compile.stats().folded_calls == 5
    assert len(compared) == 3  # the first, the second and the fourth
    assert max(compared) < 1e-5


def test_right_losses_pass() -> None:
    model = build("Qwen3", num_hidden_layers=1).train()
    run = compiled(model)
    run(IDS, labels=IDS, use_cache=False).loss.backward()
    assert radix_compile.stats().folded_calls == 1


def test_a_wrong_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OP_INFO, aten.flip.default, replace(OP_INFO[aten.flip.default], rule=by_row))
    with pytest.raises(radix_compile.WrongFold, match=r"compact form: aten.flip.default.*hidden = hidden.flip\(1\)"):
        compiled(Net())(IDS)
    without = compiled(Net(), verify=False)(IDS)
    assert (without - Net()(IDS)).abs().max() > 0.01  # it was wrong indeed


def test_a_wrong_inner_backend_is_named() -> None:
    def inner(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        off = 0.1 if any(node.name == "radix_fold" for node in gm.graph.nodes) else 0.0
        return lambda *args: [result + off for result in gm(*args)]

    class Model(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return self.down(self.up(self.embedding(ids)))

    with pytest.raises(radix_compile.WrongFold, match="what the inner backend compiled from it is not"):
        compiled(Model(), inner_backend=inner)(IDS)


def test_a_wrong_loss_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = losses._token_nll

    def negated(*args: Any, **kwargs: Any) -> fx.Node:
        right = original(*args, **kwargs)
        return right.graph.call_function(aten.neg.default, (right,))

    monkeypatch.setattr(losses, "_token_nll", negated)
    with pytest.raises(radix_compile.WrongFold, match="It is in what replaces the loss"):
        compiled(build("Qwen3", num_hidden_layers=1))(IDS, labels=IDS, use_cache=False)


def test_random_numbers_are_not_compared() -> None:
    class Random(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return F.dropout(self.down(self.up(self.embedding(ids)).tanh()), 0.5)

    compiled(Random())(IDS)
    assert radix_compile.stats().folded_calls == 1


class Writing(nn.Module):
    """Two equal results, in another order in memory, and a table that is first read where no gradients are recorded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.up = nn.Embedding(97, 16), nn.Linear(16, 32)
        self.positions = nn.Parameter(torch.randn(8, 16))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embedding(ids)
        with torch.no_grad():
            reference = self.up(x + self.positions)
        y = self.up(x + self.positions) - reference.cos()
        heads = y.view(*ids.shape, 4, 8).transpose(1, 2).contiguous() * 2
        return y * 2, y * 2, heads, heads[:, 1]


def test_gradients_and_memory_are_compared() -> None:
    model = Writing()
    ours, expected = compiled(model)(IDS), model(IDS)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert radix_compile.stats().folded_calls == 1


@pytest.mark.parametrize(
    ("where", "wrong", "message"),
    [
        (
            "fold_graph.grad_modes",
            lambda graph, outside: dict.fromkeys(graph.nodes, True),
            r"the gradient of L\['self'\]\S*positions\S* has none",
        ),
        ("merge_duplicates.outputs_of", lambda graph: [], "result 1 and result 0 share memory, unlike in plain"),
        (
            "fold_graph._Rewriter._lies_as_captured",
            lambda self, node: True,
            r"result 2 has the strides \(256, 8, 32, 1",
        ),
        (
            "choose_cuts.views_to_keep",
            lambda graph, hints: [],
            "result 3 has the strides|result 3 and result 2 do not share memory",
        ),
    ],
)
def test_what_a_caller_would_notice_later_is_named(
    where: str, wrong: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"radix_compile.passes.{where}", wrong)
    with pytest.raises(radix_compile.WrongFold, match=message):
        compiled(Writing())(IDS)


def test_a_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where results are right: the sum of what the rows of a node want is what they have in common."""
    monkeypatch.setattr("radix_compile.kernels.reference.sum_rows", mean_rows)
    with pytest.raises(radix_compile.WrongFold, match=r"the gradient of L\['self'\]\S* differs by"):
        compiled(Writing())(IDS)


def mean_rows(full: Tensor, scatter: Tensor, fold: Tensor, *rest: Any) -> Tensor:
    return radix.fold_rows(full, fold, scatter, *rest[-2:])

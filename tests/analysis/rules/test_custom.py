"""Rules that a user registers: the op folds then, and not before; what it gets wrong is said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import radix_compile
from radix_compile.analysis.op_info import OP_INFO
from radix_compile.ir.value import Value, value_of
from radix_compile.testing import Recorder, check_rule, compact, full
from tests.models import VOCABULARY, shared_batch


@torch.library.custom_op("radix_tests::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x.contiguous(), x.shape[-1:], weight)


@torch.library.custom_op("radix_tests::gate", mutates_args=())
def gate(x: Tensor, y: Tensor) -> Tensor:
    return x * y.sigmoid()


@torch.library.custom_op("radix_tests::scan", mutates_args=())
def scan(x: Tensor, decay: Tensor) -> Tensor:
    state, outputs = torch.zeros_like(x[:, 0]), []
    for row in x.unbind(1):
        state = state * decay + row
        outputs.append(state)
    return torch.stack(outputs, 1)


@torch.library.custom_op("radix_tests::reverse", mutates_args=())
def reverse(x: Tensor) -> Tensor:
    return x.flip(1)


@torch.library.custom_op("radix_tests::split", mutates_args=())
def split(x: Tensor) -> list[Tensor]:
    return [x[..., :4].clone(), x[..., 4:].clone()]


@torch.library.custom_op("radix_tests::writes", mutates_args=("x",))
def writes(x: Tensor) -> None:
    x.zero_()


norm.register_fake(lambda x, weight: x.new_empty(x.shape))
gate.register_fake(lambda x, y: torch.empty_like(x))
scan.register_fake(lambda x, decay: x.new_empty(x.shape))
reverse.register_fake(lambda x: torch.empty_like(x))
split.register_fake(lambda x: [x.new_empty(*x.shape[:-1], 4), x.new_empty(*x.shape[:-1], x.shape[-1] - 4)])
OPS = torch.ops.radix_tests


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    before = dict(OP_INFO)
    yield
    OP_INFO.clear()
    OP_INFO.update(before)


class Model(nn.Module):
    def __init__(self, op: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.last = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.decay = nn.Parameter(torch.full((8,), 0.5))
        self.op = op

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.embedding(ids))
        moved = self.op(x, self.decay)
        return self.last(moved)


PROGRAMS = {
    "rowwise": (OPS.norm.default, lambda x, weight: OPS.norm(x, weight)),
    "pointwise": (OPS.gate.default, lambda x, weight: OPS.gate(x, x + 1)),
    "causal": (OPS.scan.default, lambda x, weight: OPS.scan(x, weight)),
}


def compact_share(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        compiled = torch.compile(model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always"})
        torch.testing.assert_close(compiled(ids), model(ids))
        (graph,) = radix_compile.explain(model, ids).graphs
    return graph.foldable_share


@pytest.mark.parametrize("kind", PROGRAMS)
def test_folds_with_a_rule_and_stops_without(kind: str) -> None:
    op, call = PROGRAMS[kind]
    ids = shared_batch(4, 12, 8)
    assert compact_share(Model(call), ids) == 0.5
    radix_compile.register_rule(op, kind)
    assert compact_share(Model(call), ids) == 1


def test_a_rule_may_be_a_function_and_have_several_results() -> None:
    def halves(node: Any, layout: Any) -> Any:
        *rows, _ = value_of(node.args[0]).axes
        return tuple(Value((*rows, *value_of(node.args[0]).axes[-1:])) for _ in range(2))

    radix_compile.register_rule(OPS.split.default, "rowwise")
    assert compact_share(Model(lambda x, _: torch.cat(OPS.split(x)[::-1], -1)), shared_batch(4, 12, 8)) == 1
    del OP_INFO[OPS.split.default]
    radix_compile.register_rule(OPS.split.default, halves)
    assert OP_INFO[OPS.split.default].rule is halves


def test_a_registered_rule_can_be_checked() -> None:
    def scanned(t: Recorder, op: Any) -> fx.Node:
        return t(op, *(t(torch.ops.aten.detach.default, one) for one in (t.x, t.bias)))  # it has no gradient

    radix_compile.register_rule(OPS.scan.default, "causal")
    check_rule(OPS.scan.default, full(scanned))
    with pytest.raises(AssertionError, match="verdict is 'full', expected 'compact'"):
        check_rule(OPS.scan.default, compact(scanned))


def test_a_registered_rule_that_is_wrong_is_found() -> None:
    radix_compile.register_rule(OPS.reverse.default, "rowwise")
    with pytest.raises(AssertionError, match=r"radix_tests\.reverse\.default.* claimed to be determined .* is not"):
        check_rule(OPS.reverse.default, compact(lambda t, op: t(op, t(torch.ops.aten.detach.default, t.x))))


@pytest.mark.parametrize("op", [OPS.norm, OPS.norm.default])
def test_a_sample_has_the_op_in_it(op: Any) -> None:
    with pytest.raises(ValueError, match=r"the sample does not record radix_tests\.norm"):
        check_rule(op, compact(lambda t, _: t.x))


@pytest.mark.parametrize(
    ("kind", "program", "reason"),
    [
        ("rowwise", lambda x, _: OPS.norm(x.transpose(1, 2), x.new_ones(12)).transpose(1, 2), "reads along the seq"),
        ("rowwise", lambda x, _: OPS.norm(x, x[0, 0]), "weights differ|takes one entry of"),
        ("causal", lambda x, w: OPS.scan(x.transpose(0, 1), w).transpose(0, 1), r"not \[batch, sequence"),
    ],
)
def test_what_does_not_fit_the_rule_is_refused(kind: str, program: Any, reason: str) -> None:
    op = OPS.norm.default if kind == "rowwise" else OPS.scan.default
    radix_compile.register_rule(op, kind)
    model = Model(program)
    assert compact_share(model, shared_batch(4, 12, 8)) == 0.5
    with torch.no_grad():
        (refusal, *_) = radix_compile.explain(model, shared_batch(4, 12, 8)).refusals
    assert re.search(reason, refusal.reason)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("norm", "rowwise"), TypeError, "op must be an overload"),
        ((OPS.norm, "rowwise"), TypeError, "op must be an overload"),
        ((OPS.writes.default, "rowwise"), ValueError, "must not write"),
        ((torch.ops.aten.linear.default, "rowwise"), ValueError, "has a rule already"),
        ((OPS.norm.default, "row-wise"), ValueError, "must be one of 'pointwise', 'rowwise', 'causal'"),
        ((OPS.norm.default, 3), TypeError, "a name or a function"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        radix_compile.register_rule(*arguments)
    assert OPS.norm.default not in OP_INFO

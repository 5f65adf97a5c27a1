"""The rules of row numbers, executed: entries do not change if other rows than those of their numbers become zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.op_info import OP_INFO, info_of
from radix_compile.analysis.row_numbers import HIDDEN, NO_MORE_ROWS, NumbersProgram, RowNumbers
from radix_compile.analysis.rules.row_numbers import same
from radix_compile.ir.value import is_row
from radix_compile.passes.pipeline import annotate
from radix_compile.testing import Sample, recorded
from radix_compile.testing.recorder import BATCH, SEQ, Recorder, sample_inputs
from radix_compile.torch_internals import OpOverload, val
from tests.analysis.rules.samples import POINTWISE, SAMPLES

aten = torch.ops.aten
ROWS = BATCH * SEQ


def _labels(t: Recorder) -> fx.Node:
    """``[B, S]``: the ids, ignored where they are 1 or padding is."""
    ignored = t(aten.logical_or.default, t(aten.eq.Scalar, t.ids, 1), t(aten.eq.Scalar, t.padding, 0))
    return t(aten.masked_fill.Scalar, t(aten.remainder.Scalar, t.ids, 3), ignored, -100)


def _mask(t: Recorder) -> fx.Node:
    return t(aten.unsqueeze.default, t(aten.mul.Tensor, t.padding, t(aten.remainder.Scalar, t.ids, 2)), 2)


def _is_shown(t: Recorder) -> fx.Node:
    return t(aten.ne.Scalar, _mask(t), 0)


def _logits(t: Recorder) -> fx.Node:
    return t(aten.reshape.default, t.x, [ROWS, -1])


def _last(t: Recorder) -> fx.Node:
    return t(aten.sub.Tensor, t(aten.sum.dim_IntList, t(aten.ne.Scalar, t.padding, 0), [1]), 1)


def _loss(reduction: int) -> Callable[[Recorder, Any], fx.Node]:
    def build(t: Recorder, op: Any) -> fx.Node:
        labels = t(aten.reshape.default, _labels(t), [ROWS])
        return t(op, _logits(t), labels, None, reduction, -100)

    return build


def _log_probabilities(t: Recorder) -> fx.Node:
    return t(aten.log_softmax.int, _logits(t), 1)


PROGRAMS: dict[OpOverload, list[Callable[[Recorder, Any], fx.Node]]] = {
    aten.cross_entropy_loss.default: [_loss(0), _loss(1), _loss(2)],
    aten.nll_loss_nd.default: [
        lambda t, op: t(op, _log_probabilities(t), t(aten.reshape.default, _labels(t), [ROWS]), None, 1, -100),
        lambda t, op: t(op, t(aten.transpose.int, t.x, 1, 2), _labels(t), None, 2, -100),
    ],
    aten.nll_loss.default: [
        lambda t, op: t(op, _log_probabilities(t), t(aten.reshape.default, _labels(t), [ROWS]), None, 0, -100),
    ],
    aten.mul.Tensor: [lambda t, op: t(op, t.x, _mask(t)), lambda t, op: t(op, _mask(t), t.x)],
    aten.where.self: [
        lambda t, op: t(op, _is_shown(t), t.x, t(aten.full.default, [], 0.5, dtype=torch.float64)),
        lambda t, op: t(op, _is_shown(t), t(aten.full.default, [], 0.5, dtype=torch.float64), t.x),
    ],
    aten.where.ScalarOther: [lambda t, op: t(op, _is_shown(t), t.x, 2.0)],
    aten.where.ScalarSelf: [lambda t, op: t(op, _is_shown(t), 2.0, t.x)],
    aten.masked_fill.Scalar: [lambda t, op: t(op, t.x, _is_shown(t), 2.0)],
    aten.slice.Tensor: [lambda t, op: t(op, t.x, 1, 1, -1), lambda t, op: t(op, t.heads, 2, -2, 100, 1)],
    aten.select.int: [lambda t, op: t(op, t.x, 1, -1), lambda t, op: t(op, t.x, 0, 1), lambda t, op: t(op, t.x, 2, 0)],
    aten.index.Tensor: [
        lambda t, op: t(op, t.x, [t(aten.arange.default, BATCH), _last(t)]),
        lambda t, op: t(op, t.heads, [t(aten.arange.default, BATCH), None, _last(t)]),
        lambda t, op: t(op, t.x, [None, t(aten.arange.default, 2)]),
    ],
    aten.index_select.default: [lambda t, op: t(op, t.x, 1, _last(t)), lambda t, op: t(op, _logits(t), 0, _last(t))],
    aten.gather.default: [
        lambda t, op: t(
            op,
            t.x,
            1,
            t(aten.expand.default, t(aten.reshape.default, _last(t), [BATCH, 1, 1]), [-1, 2, val(t.x).shape[2]]),
        ),
    ],
    aten.reshape.default: [
        lambda t, op: t(op, t.x, [ROWS, -1]),
        lambda t, op: t(op, t(aten.slice.Tensor, t.x, 1, 1, SEQ), [BATCH * (SEQ - 1), 1, -1]),
    ],
    aten.sum.dim_IntList: [lambda t, op: t(op, t.heads, [1, 3]), lambda t, op: t(op, t.x, [2], True)],
}
"""Programs behind the last layer, in which the op may have lost the axes of rows."""

SEVERAL_RESULTS = {aten.frexp.Tensor}
"""Ops about which nothing is said, though torch tags them as pointwise."""


def cases() -> Iterator[tuple[OpOverload, Callable[[Recorder, Any], fx.Node]]]:
    for op, samples in {**SAMPLES, **POINTWISE}.items():
        if isinstance(op, OpOverload) and info_of(op).row_numbers is not None:
            yield from ((op, sample.build) for sample in samples)
    yield from ((op, build) for op, builds in PROGRAMS.items() for build in builds)


def claims(op: OpOverload, build: Callable[[Recorder, Any], fx.Node]) -> Iterator[str]:
    """Check the claims of the rule about an op in a program. Yields what it says about each argument."""
    graph, node = recorded(op, Sample(build, "compact"))
    annotate(graph)
    values = fx.Interpreter(graph, garbage_collect_values=False)
    values.run(*sample_inputs().values())
    for rows in filter(is_tensor, node.all_input_nodes if is_tensor(node) else ()):
        numbered = followed(rows)
        if numbered is None:
            continue
        program = NumbersProgram(graph)
        source = numbered(program)
        result = None if source is None else info_of(op).row_numbers(node, rows, source, program)
        if source is None or result is None:
            yield "any rows"
            continue
        yield check(node, rows, source, result, program, values.env)


def followed(rows: fx.Node) -> Callable[[NumbersProgram], RowNumbers | None] | None:
    """How the numbers of an argument are found: it has rows, or an op before it has picked some of them."""
    if is_row(rows):
        return lambda program: program.all_rows(rows) if program.all_rows(rows).node is not None else None
    rule = info_of(rows.target).row_numbers
    before = rows.args[0] if rows.args else None
    if rule is None or not isinstance(before, fx.Node) or not is_row(before):
        return None
    return lambda program: rule(rows, before, program.all_rows(before), program)


def check(
    node: fx.Node,
    rows: fx.Node,
    source: RowNumbers,
    result: RowNumbers,
    program: NumbersProgram,
    env: dict[fx.Node, Any],
) -> str:
    everything = result is NO_MORE_ROWS
    outputs = [source.node, *program.read] if everything else [source.node, result.node]
    program.graph.output(outputs)
    inputs = list(sample_inputs().values())
    own, *found = fx.GraphModule({}, program.graph)(BATCH, SEQ, torch.device("cpu"), *inputs)
    x = env[rows]
    torch.manual_seed(0)  # dropout
    y = node.target(*fx.node.map_arg(node.args, env.__getitem__), **fx.node.map_arg(node.kwargs, env.__getitem__))
    assert own.ndim == x.ndim
    own.expand_as(x)  # it fits
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.2, 0.5, 0.8):
        kept = torch.rand(ROWS, generator=generator) < share
        if everything:
            read = torch.cat([numbers.flatten() for numbers in found])
            kept[read[read != HIDDEN]] = True
        changed = {**env, rows: torch.where(kept[own], x, torch.zeros_like(x))}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), changed.__getitem__)
        torch.manual_seed(0)
        after = node.target(*args, **kwargs)
        if everything:
            torch.testing.assert_close(after, y, rtol=1e-12, atol=1e-12)
            continue
        (numbers,) = found
        assert numbers.ndim == y.ndim == result.rank
        assert {dim for dim in range(y.ndim) if numbers.shape[dim] != 1} <= result.dims
        stays = ((numbers == HIDDEN) | kept[numbers]).expand_as(y)
        torch.testing.assert_close(after[stays], y[stays], rtol=1e-12, atol=1e-12, equal_nan=True)
    return "some rows" if not result.is_whole else "all rows"


@pytest.mark.parametrize("op", sorted({op for op, _ in cases()}, key=str), ids=str)
def test_other_rows_do_not_matter(op: OpOverload) -> None:
    said = [what for other, build in cases() if other is op for what in claims(op, build)]
    assert op in SEVERAL_RESULTS or set(said) - {"any rows"}, said


def test_every_op_is_executed() -> None:
    with_rule = {op for op, info in OP_INFO.items() if isinstance(op, OpOverload) and info.row_numbers is not None}
    assert with_rule <= {op for op, _ in cases()}


@pytest.mark.parametrize("op", PROGRAMS, ids=str)
def test_rows_are_picked_or_hidden(op: OpOverload) -> None:
    """Each of the programs behind the last layer."""
    for build in PROGRAMS[op]:
        assert set(claims(op, build)) & {"some rows", "all rows"}


@pytest.mark.parametrize("op", [op for op, info in OP_INFO.items() if info.finite_at_zero], ids=str)
def test_what_is_finite_at_zero(op: OpOverload) -> None:
    """Zeros for other rows become nothing infinite, nor do their gradients."""
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    needed = [parameter for parameter in op._schema.arguments[1:] if not parameter.has_default_value()]
    result = op(x, *(torch.tensor(2.0) if str(parameter.type) == "Tensor" else 2.0 for parameter in needed))
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert result.isfinite().all()
    assert gradient.isfinite().all()


def test_a_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OP_INFO, aten.flip.default, replace(OP_INFO[aten.flip.default], row_numbers=same))
    with pytest.raises(AssertionError, match="not close"):
        list(claims(aten.flip.default, lambda t, op: t(op, t.x, [1])))


def test_hidden_rows_keep_no_number() -> None:
    def numbers(build: Callable[[Recorder, Any], fx.Node], op: OpOverload) -> Tensor:
        graph, node = recorded(op, Sample(build, "compact"))
        annotate(graph)
        program = NumbersProgram(graph)
        rows = next(arg for arg in node.all_input_nodes if val(arg).is_floating_point())
        result = info_of(op).row_numbers(node, rows, program.all_rows(rows), program)
        program.graph.output(result.node)
        found: Tensor = fx.GraphModule({}, program.graph)(BATCH, SEQ, torch.device("cpu"), *sample_inputs().values())
        return found

    inputs = sample_inputs()
    shown = (inputs["padding"] * (inputs["ids"] % 2)) != 0
    assert shown.any()
    assert not shown.all()
    found = numbers(PROGRAMS[aten.mul.Tensor][0], aten.mul.Tensor)
    expected = torch.arange(ROWS).view(BATCH, SEQ).where(shown, HIDDEN)
    assert torch.equal(found[..., 0], expected)

"""Every row of the rule table is executed against its op: wrong rules and rows without a sample are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from radix_compile.op_rules import rule_for
from radix_compile.op_rules.elementwise import elementwise
from radix_compile.op_rules.table import RULES
from radix_compile.passes.choose_cuts import Form, values_of
from radix_compile.pipeline import run_pipeline
from radix_compile.plan_inputs import plan_inputs
from radix_compile.token_axes import SEQ, value_of
from tests.op_rules.recorder import SEQ as COLUMNS
from tests.op_rules.recorder import Recorder, sample_inputs, shuffle_later
from tests.op_rules.samples import NEVER_FOLDS, NEVER_REFUSED, POINTWISE, SAMPLES, Sample

aten = torch.ops.aten
FOLDS = ("compact", "full", "pair", "constant", "arranged")


def _cases() -> Iterator[Any]:
    for op, samples in {**SAMPLES, **POINTWISE}.items():
        for number, sample in enumerate(samples):
            yield pytest.param(op, sample, id=f"{op}-{number}-{sample.verdict}")


CASES = list(_cases())
FULL_CASES = [case for case in CASES if case.values[1].verdict == "full"]


def test_every_row_has_a_sample() -> None:
    assert not [str(op) for op in RULES if not SAMPLES.get(op)], "rows without a sample"
    assert not [str(op) for op in SAMPLES if op not in RULES], "samples without a row"
    for op, samples in SAMPLES.items():
        verdicts = {sample.verdict for sample in samples}
        assert (op in NEVER_FOLDS) != bool(verdicts & set(FOLDS)), f"{op} needs a sample that folds"
        assert (op in NEVER_REFUSED) != ("refused" in verdicts), f"{op} needs a sample that is refused"


def is_op(target: Any, op: OpOverload | str) -> bool:
    return target == op or (isinstance(target, OpOverload) and target.name() == op)


def recorded(op: OpOverload | str, sample: Sample) -> tuple[fx.GraphModule, fx.Node]:
    """The sample's graph and the node under test; its result is also added to itself, in compact form if it may be."""
    t = Recorder(sample_inputs())
    result = sample.build(t, op)
    node = [node for node in t.graph.nodes if is_op(node.target, op)][-1]
    return t.finish(result, t(aten.add.Tensor, result, result), t.x), node


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_verdict_and_numbers(op: OpOverload, sample: Sample) -> None:
    """The rule says what is expected of it, and the folded graph computes what the plain one does, gradients too."""
    graph, node = recorded(op, sample)
    folded = run_pipeline(graph)
    _assert_verdict(node, sample)
    if sample.verdict == "compact":
        runs = graph.meta["wanted"].runs
        users = [user for user in node.users if Form.COMPACT in runs.get(user, ())]
        assert Form.COMPACT in runs[node] or users, "the op under test never ran compact"
    inputs = sample_inputs()
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    args = tuple(inputs.values())
    planned = plan_inputs(graph)
    plan = planned.plan(args)
    assert plan.compact_tokens < args[0].numel()
    torch.manual_seed(0)
    ours = folded(*args, *planned.arrays(plan, torch.device("cpu")))
    torch.manual_seed(0)
    _assert_same(ours, graph(*args), args)


def _assert_verdict(node: fx.Node, sample: Sample) -> None:
    for value in values_of(node):
        if sample.verdict == "refused":
            assert value.mixed is not None, f"not refused: {value}"
            assert sample.reason in value.mixed.reason
            continue
        assert value.mixed is None, str(value.mixed)
        if sample.verdict == "arranged":
            assert value.is_arranged
            continue
        assert value.is_constant == (sample.verdict == "constant")
        assert value.is_pair == (sample.verdict == "pair")
        assert value.full_only == (sample.verdict == "full")
        _assert_axes(node, value)


def _assert_axes(node: fx.Node, value: Any) -> None:
    """The axes multiply to the shape."""
    values, outputs = values_of(node), node.meta["val"]
    output = outputs[values.index(value)] if isinstance(outputs, tuple | list) else outputs
    layout = node.graph.owning_module.meta["tokens"].layout
    assert [layout.axis_size(axis) for axis in value.axes] == list(output.shape)


def _assert_same(ours: tuple[Tensor, ...], plain: tuple[Tensor, ...], args: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    weights = [args[0].cos() if one.shape == args[0].shape else one.detach().cos() for one in plain]
    sums = [
        sum((one * weight).sum() for one, weight in zip(results, weights, strict=True) if one.requires_grad)
        for results in (ours, plain)
    ]
    floats = [tensor for tensor in args if tensor.requires_grad]
    for one, other in zip(*(torch.autograd.grad(total, floats, allow_unused=True) for total in sums), strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("op", "sample"), FULL_CASES)
def test_later_rows_do_not_reach_earlier_ones(op: OpOverload, sample: Sample) -> None:
    graph, _ = recorded(op, sample)
    run_pipeline(graph)
    (results,) = graph.graph.output_node().args
    axes = value_of(results[0]).axes
    along = axes.index((SEQ,))
    inputs = sample_inputs()
    before = graph(*inputs.values())[0]
    for column in range(1, COLUMNS):
        after = graph(*shuffle_later(inputs, column).values())[0]
        torch.testing.assert_close(
            after.narrow(along, 0, column), before.narrow(along, 0, column), rtol=1e-12, atol=1e-12
        )
    if op not in (aten.diff.default,):  # a sample that never reads the ids proves nothing
        assert not torch.equal(after, before)


def overloads() -> Iterator[OpOverload]:
    for name in dir(aten):
        packet = getattr(aten, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            yield from (getattr(packet, overload) for overload in packet.overloads())


def test_the_default_is_for_pure_elementwise_ops_only() -> None:
    by_default = {op for op in overloads() if not {op, op.name()} & set(RULES) and rule_for(op) is not None}
    assert len(by_default) > 100
    assert set(POINTWISE) <= by_default
    for op in by_default:
        assert rule_for(op) is elementwise
        assert torch.Tag.pointwise in op.tags
        assert torch.Tag.nondeterministic_seeded not in op.tags, op
        assert not op._schema.is_mutable, op


def test_random_and_writing_ops_exist_that_torch_tags_pointwise() -> None:
    """So that the test above is about something."""
    pointwise = [op for op in overloads() if torch.Tag.pointwise in op.tags]
    assert any(torch.Tag.nondeterministic_seeded in op.tags for op in pointwise)
    assert any(op._schema.is_mutable for op in pointwise)


@pytest.mark.parametrize("op", [aten.relu_.default, aten.add.out, aten.bernoulli.default, aten.rand_like.default])
def test_no_rule(op: OpOverload) -> None:
    assert rule_for(op) is None

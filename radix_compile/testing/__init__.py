"""The check of a rule: is what it says of the op true of the numbers that the op returns?

``check_rule`` executes the rule on a sample, a small program with the op in it and the verdict that is expected:

    check_rule(torch.ops.aten.glu.default, compact(lambda t, op: t(op, t.x, -1)))
    check_rule(torch.ops.aten.glu.default, refused("gates along", lambda t, op: t(op, t.x, 1)))

A position-wise rule says that rows of equal path have equal results, whatever the other rows are; so the op is run on
the rows of the nodes alone, which leaves rows out, brings together rows of different sequences and repeats them for
others, and the result has to be that of the plain run, gradients and strides too. A causal rule says that later rows do
not matter; so they are exchanged. What a rule says besides (what is uniform, which formula a mask is, ...) is held
against the numbers (``claims``). All in float64, on sizes that collide on purpose (see ``recorder``), and in variants:
on uniform tables, rows with columns in them, buffers longer than the sequence, floors of float16, integers that wrap
around, and in regions without gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from radix_compile.ir.axes import SEQ
from radix_compile.ir.graph import Form, tokens_of
from radix_compile.ir.value import value_of, values_of
from radix_compile.options import Options
from radix_compile.passes.fold import FOLD_OFF_THE_TREE, FULL_FOLD
from radix_compile.passes.pipeline import annotate, fold_as
from radix_compile.runtime.call_planner import NeedsFullAttention, plan_inputs
from radix_compile.testing.claims import check_claims
from radix_compile.testing.recorder import BATCH, HEADS, Recorder, Variant, sample_inputs, shuffle_later
from radix_compile.testing.recorder import SEQ as COLUMNS
from radix_compile.testing.sample import Sample, arranged, compact, constant, full, pair, refused
from radix_compile.torch_internals import OpOverload, val

__all__ = [
    "Recorder",
    "RuleError",
    "Sample",
    "arranged",
    "check_rule",
    "compact",
    "constant",
    "full",
    "pair",
    "refused",
]

aten = torch.ops.aten
Op = OpOverload | str
"""An op, or the name of one that is not always registered."""


class RuleError(AssertionError):
    """The rule says something of the sample that is not so. The message is what."""


def check_rule(op: Op, sample: Sample) -> None:
    """Raise ``AssertionError`` if the rule of ``op``, or what the rewrite makes of it, is wrong for the sample.

    The message says what is wrong: the verdict is another one, an annotation is not true of the numbers, a result, a
    stride or a gradient is not that of the plain run. A sample that folds is also built in every :class:`Variant`, in
    which it may fold or not. A sample in which ``op`` is not recorded is a ``ValueError``.
    """
    graph, node = recorded(op, sample)
    _expect_as_plain(graph, node if sample.verdict == "compact" else None)
    check_verdict(node, sample)
    if sample.verdict == "full":
        _expect_causal(op, sample)
    for variant in Variant:
        if variant is not Variant.AS_WRITTEN and sample.verdict != "refused":
            graph, _ = recorded(op, sample, variant)
            _expect_as_plain(graph)


def _expect_as_plain(graph: fx.GraphModule, node: fx.Node | None = None) -> None:
    """Claims, results, strides and gradients. ``node`` has to run compact, or be read so."""
    annotate(graph)
    fold = fold_as(FULL_FOLD, graph, Options())
    if node is not None:
        runs = fold.wanted.runs
        users = [user for user in node.users if Form.COMPACT in runs.get(user, ())]
        _expect(Form.COMPACT in runs[node] or bool(users), "the op under test never ran compact")
    inputs = sample_inputs()
    check_claims(graph, list(inputs.values()), list(shuffle_later(inputs, 0).values()))
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    args = tuple(inputs.values())
    try:
        planned = plan_inputs(fold)
        plan = planned.plan(args)
    except NeedsFullAttention:
        fold = fold_as(FOLD_OFF_THE_TREE, graph, Options())
        planned = plan_inputs(fold)
        plan = planned.plan(args)
    _expect(plan.compact_tokens < args[0].numel(), "nothing is shared in the sample")
    torch.manual_seed(0)
    ours = fold.program(*args, *planned.arrays(plan, args, torch.device("cpu")))
    torch.manual_seed(0)
    _expect_same(ours, graph(*args), args)


def recorded(op: Op, sample: Sample, variant: Variant = Variant.AS_WRITTEN) -> tuple[fx.GraphModule, fx.Node]:
    """The sample's graph and the node under test; its result is also added to itself, in compact form if it may be."""
    t = Recorder(sample_inputs(), variant)
    more: list[fx.Node] = []
    if variant in (Variant.UNIFORM, Variant.TABLES):
        with t.without_gradients():
            more = [sample.build(t, op)]
    if variant is Variant.TABLES:
        more += [t.heads_in_a_row, t(aten.as_strided.default, t.heads_in_a_row, [BATCH, HEADS, COLUMNS], [1, 3, 7])]
    result = sample.build(t, op)
    nodes = [node for node in t.graph.nodes if _is_op(node.target, op)]
    if not nodes:
        raise ValueError(f"sample must record op, an overload such as aten.glu.default, got a sample without {op}")
    return t.finish(result, t(aten.add.Tensor, result, result), t.x, *more), nodes[-1]


def _is_op(target: object, op: Op) -> bool:
    return target == op or (isinstance(target, OpOverload) and target.name() == op)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuleError(otherwise)


def check_verdict(node: fx.Node, sample: Sample) -> None:
    """Raises unless the rule came to the sample's verdict, and the axes it gave multiply to the shape."""
    graph = node.graph.owning_module
    assert graph is not None
    for value in values_of(node):
        if sample.verdict == "refused":
            refusal = value.mixed or tokens_of(graph).scans.get(node)  # of a scan, what the rule said of it
            reason = "" if refusal is None else refusal.reason
            _expect(refusal is not None, f"not refused: {value}")
            _expect(sample.reason in reason, f"refused because it {reason!r}, not {sample.reason!r}")
            continue
        _expect(value.mixed is None, f"refused: {value.mixed}")
        if sample.verdict == "arranged":
            _expect(value.is_arranged, f"not arranged: {value}")
            continue
        kinds = {"constant": value.is_constant, "pair": value.is_pair, "full": value.full_only, "compact": True}
        said = next(kind for kind, holds in kinds.items() if holds)
        _expect(said == sample.verdict, f"said to be {said}, and it is {sample.verdict}")
        values, outputs = values_of(node), val(node)
        output = outputs[values.index(value)] if isinstance(outputs, tuple | list) else outputs
        layout = tokens_of(graph).layout
        sizes = [layout.axis_size(axis) for axis in value.axes]
        _expect(sizes == list(output.shape), f"the axes {value.axes} are not those of {list(output.shape)}")


def _expect_same(ours: tuple[Tensor, ...], plain: tuple[Tensor, ...], args: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)
        steps = zip(one.shape, one.stride(), other.stride(), strict=True)
        _expect(all(size == 1 or a == b for size, a, b in steps), "a result does not lie in memory as the plain one")
    weights = [args[0].cos() if one.shape == args[0].shape else one.detach().cos() for one in plain]
    sums = [
        torch.stack([(r * w).sum() for r, w in zip(results, weights, strict=True) if r.requires_grad]).sum()
        for results in (ours, plain)
    ]
    floats = [tensor for tensor in args if tensor.requires_grad]
    for one, other in zip(*(torch.autograd.grad(total, floats, allow_unused=True) for total in sums), strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, equal_nan=True)


def _expect_causal(op: Op, sample: Sample) -> None:
    """Later rows are exchanged, and earlier ones stay as they are."""
    graph, _ = recorded(op, sample)
    annotate(graph)
    result: fx.Node = graph.graph.output_node().args[0][0]  # type: ignore[index, assignment]
    along = value_of(result).axes.index((SEQ,))
    inputs = sample_inputs()
    before = graph(*inputs.values())[0]
    for column in range(1, COLUMNS):
        after = graph(*shuffle_later(inputs, column).values())[0]
        torch.testing.assert_close(
            after.narrow(along, 0, column), before.narrow(along, 0, column), rtol=1e-12, atol=1e-12
        )
    _expect(not torch.equal(after, before), "the sample reads neither ids nor positions, and proves nothing")

"""Tests for rules: run an op on a sample, and compare the results with the claims of its rule.

A sample is a small program with the op in it, and the expected verdict:

    check_rule(torch.ops.aten.glu.default, compact(lambda t, op: t(op, t.x, -1)))
    check_rule(torch.ops.aten.glu.default, refused("gates along", lambda t, op: t(op, t.x, 1)))

The folded program of the sample must return the results, gradients and strides of the plain one. If the rule says that
an op is causal, later rows are changed, and earlier results must stay the same. The other claims of the rule (uniform
dimensions, formulas of masks, ...) are compared with the numbers (see ``claims``). All runs are in float64, with sizes
that collide on purpose (see ``recorder``), and in variants: with uniform tables, rows that depend on their column,
buffers that are longer than the sequence, float16 floors, integers that wrap around, and regions without gradients.
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
"""An op, or the name of an op that may not be registered."""


class RuleError(AssertionError):
    """The rule is wrong for the sample. The message says in what way."""


def check_rule(op: Op, sample: Sample) -> None:
    """Check the rule of ``op``, and the folded program, on a sample.

    Raises ``AssertionError`` if the verdict is not the expected one, if a claim of the rule is not true of the numbers,
    or if a result, stride or gradient differs from that of the plain program. Raises ``ValueError`` if the sample does
    not record ``op``. A sample that folds is also run in every :class:`Variant`, in which it need not fold.
    """
    graph, node = recorded(op, sample)
    _check_fold(graph, node if sample.verdict == "compact" else None)
    check_verdict(node, sample)
    if sample.verdict == "full":
        _check_causal(op, sample)
    for variant in Variant:
        if variant is not Variant.AS_WRITTEN and sample.verdict != "refused":
            graph, _ = recorded(op, sample, variant)
            _check_fold(graph)


def _check_fold(graph: fx.GraphModule, node: fx.Node | None = None) -> None:
    """Check claims, results, strides and gradients, and that ``node`` or a user of it runs compact."""
    annotate(graph)
    fold = fold_as(FULL_FOLD, graph, Options())
    if node is not None:
        runs = fold.wanted.runs
        users = [user for user in node.users if Form.COMPACT in runs.get(user, ())]
        _expect(Form.COMPACT in runs[node] or bool(users), "neither the op under test nor a user of it runs compact")
    inputs = sample_inputs()
    check_claims(graph, list(inputs.values()), list(shuffle_later(inputs, 0).values()))
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    args = tuple(inputs.values())
    try:
        inputs_of_plan = plan_inputs(fold)
        plan = inputs_of_plan.plan(args)
    except NeedsFullAttention:
        fold = fold_as(FOLD_OFF_THE_TREE, graph, Options())
        inputs_of_plan = plan_inputs(fold)
        plan = inputs_of_plan.plan(args)
    _expect(plan.compact_tokens < args[0].numel(), "the sequences of the sample share nothing")
    torch.manual_seed(0)
    folded = fold.program(*args, *inputs_of_plan.arrays(plan, args, torch.device("cpu")))
    torch.manual_seed(0)
    _expect_same(folded, graph(*args), args)


def recorded(op: Op, sample: Sample, variant: Variant = Variant.AS_WRITTEN) -> tuple[fx.GraphModule, fx.Node]:
    """Return the sample's graph and the node under test. The graph also returns twice the result, and ``t.x``."""
    t = Recorder(sample_inputs(), variant)
    other_results: list[fx.Node] = []
    if variant in (Variant.UNIFORM, Variant.TABLES):
        with t.without_gradients():
            other_results = [sample.build(t, op)]
    if variant is Variant.TABLES:
        strided = t(aten.as_strided.default, t.heads_in_a_row, [BATCH, HEADS, COLUMNS], [1, 3, 7])
        other_results += [t.heads_in_a_row, strided]
    result = sample.build(t, op)
    nodes = [node for node in t.graph.nodes if _is_op(node.target, op)]
    if not nodes:
        raise ValueError(f"the sample does not record {op}; op must be an overload such as aten.glu.default")
    return t.finish(result, t(aten.add.Tensor, result, result), t.x, *other_results), nodes[-1]


def _is_op(target: object, op: Op) -> bool:
    return target == op or (isinstance(target, OpOverload) and target.name() == op)


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise RuleError(problem)


def check_verdict(node: fx.Node, sample: Sample) -> None:
    """Raise :class:`RuleError` unless the verdict is the expected one, and the axes have the sizes of the shape."""
    graph = node.graph.owning_module
    assert graph is not None
    for value in values_of(node):
        if sample.verdict == "refused":
            refusal = value.mixed or tokens_of(graph).scans.get(node)  # the rule's verdict on a scan that is causal
            reason = "" if refusal is None else refusal.reason
            _expect(refusal is not None, f"not refused: {value}")
            _expect(sample.reason in reason, f"refused with the reason {reason!r}, expected {sample.reason!r}")
            continue
        _expect(value.mixed is None, f"refused: {value.mixed}")
        if sample.verdict == "arranged":
            _expect(value.is_arranged, f"not arranged: {value}")
            continue
        kinds = {"constant": value.is_constant, "pair": value.is_pair, "full": value.full_only, "compact": True}
        verdict = next(kind for kind, holds in kinds.items() if holds)
        _expect(verdict == sample.verdict, f"the rule's verdict is {verdict!r}, expected {sample.verdict!r}")
        values, outputs = values_of(node), val(node)
        output = outputs[values.index(value)] if isinstance(outputs, tuple | list) else outputs
        layout = tokens_of(graph).layout
        sizes = [layout.axis_size(axis) for axis in value.axes]
        _expect(sizes == list(output.shape), f"the axes {value.axes} are not those of the shape {list(output.shape)}")


def _expect_same(folded: tuple[Tensor, ...], plain: tuple[Tensor, ...], args: tuple[Tensor, ...]) -> None:
    for actual, expected in zip(folded, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        strides = zip(actual.shape, actual.stride(), expected.stride(), strict=True)
        _expect(all(size == 1 or a == b for size, a, b in strides), "a result has other strides than the plain one")
    weights = [args[0].cos() if result.shape == args[0].shape else result.detach().cos() for result in plain]
    sums = [
        torch.stack([(r * w).sum() for r, w in zip(results, weights, strict=True) if r.requires_grad]).sum()
        for results in (folded, plain)
    ]
    leaves = [tensor for tensor in args if tensor.requires_grad]
    gradients = (torch.autograd.grad(total, leaves, allow_unused=True) for total in sums)
    for actual, expected in zip(*gradients, strict=True):
        if actual is not None or expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


def _check_causal(op: Op, sample: Sample) -> None:
    """Change later rows, and check that earlier results stay the same."""
    graph, _ = recorded(op, sample)
    annotate(graph)
    result: fx.Node = graph.graph.output_node().args[0][0]  # type: ignore[index, assignment]
    dim = value_of(result).axes.index((SEQ,))
    inputs = sample_inputs()
    before = graph(*inputs.values())[0]
    for column in range(1, COLUMNS):
        after = graph(*shuffle_later(inputs, column).values())[0]
        torch.testing.assert_close(after.narrow(dim, 0, column), before.narrow(dim, 0, column), rtol=1e-12, atol=1e-12)
    _expect(not torch.equal(after, before), "the sample reads neither ids nor positions, so it tests nothing")

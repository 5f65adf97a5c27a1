"""Every row of the rule table, executed: is what the rule says of the op true of its numbers?

A position-wise rule says that rows of equal path have equal results, whatever the other rows are; so the op is run on
the rows of the nodes alone, which leaves rows out, brings together rows of different sequences and repeats them for
others, and the result has to be that of the plain run, gradients and strides too. A causal rule says that later rows do
not matter; so they are exchanged. What a rule says besides (what is uniform, which formula a mask is, ...) is held
against the numbers (``claims``). All in float64, on sizes that collide on purpose (see ``recorder``), and in variants:
on uniform tables, rows with columns in them, buffers longer than the sequence, floors of float16, integers that wrap
around, and in regions without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, fx

from radix_compile.analysis.op_info import OP_INFO, info_of
from radix_compile.ir.axes import SEQ
from radix_compile.ir.graph import Form
from radix_compile.ir.value import value_of, values_of
from radix_compile.passes.fold_attention import fold_attention
from radix_compile.passes.pipeline import run_pipeline
from radix_compile.runtime.call_planner import NeedsFullAttention, plan_inputs
from radix_compile.testing.claims import check_claims
from radix_compile.testing.recorder import BATCH, HEADS, Recorder, Variant, sample_inputs, shuffle_later
from radix_compile.testing.recorder import SEQ as COLUMNS
from radix_compile.testing.samples import NEVER_FOLDS, NEVER_REFUSED, NO_RULE, POINTWISE, SAMPLES, Sample
from radix_compile.torch_internals import OpOverload

aten = torch.ops.aten
FOLDS = ("compact", "full", "pair", "constant", "arranged")
Op = OpOverload | str
"""An op, or the name of one that is not always registered."""


class RuleError(AssertionError):
    """The rule says something of the sample that is not so. The message is what."""


@dataclass(frozen=True)
class Case:
    op: Op
    number: int
    sample: Sample

    def __str__(self) -> str:
        return f"{self.op}-{self.number}-{self.sample.verdict}"


def cases() -> Iterator[Case]:
    """Every sample of every row, and of some of the ops that need no row."""
    table: dict[Any, list[Sample]] = {**SAMPLES, **POINTWISE}
    for op, samples in table.items():
        for number, sample in enumerate(samples):
            yield Case(op, number, sample)


def gaps() -> list[str]:
    """What is missing: rows without a sample, samples without a row, rows that are never seen to fold or to refuse."""
    found = [f"{op}: no sample" for op in with_rule() if not SAMPLES.get(op)]
    found += [f"{op}: samples, but no rule" for op in SAMPLES if op not in with_rule()]
    for op, samples in SAMPLES.items():
        verdicts = {sample.verdict for sample in samples}
        if (op in NEVER_FOLDS) == bool(verdicts & set(FOLDS)):
            found.append(f"{op}: no sample that folds")
        if (op in NEVER_REFUSED) == ("refused" in verdicts):
            found.append(f"{op}: no sample that is refused")
    return found


def with_rule() -> list[Op]:
    """The rows with a rule. (No sample can record flex_attention.)"""
    return [op for op, info in OP_INFO.items() if isinstance(op, OpOverload | str) and info.rule is not None]


def used_ops() -> list[str]:
    """The ops that were seen in the graphs of the models on the compatibility page."""
    return resources.files(__package__).joinpath("used_ops.txt").read_text().split()


def used_without_rule() -> dict[str, str]:
    """Those of them at which folding stops, and why that is so; an empty reason is a gap in the table."""
    return {name: NO_RULE.get(name, "") for name in used_ops() if info_of(named(name)).rule is None}


def named(name: str) -> OpOverload | None:
    """The op called ``aten.add.Tensor``, if there is one."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, OpOverload) else None


def check(case: Case) -> None:
    """Raise :class:`RuleError` if the rule, or what the rewrite makes of it, is wrong for the sample.

    A sample that folds is also built in every :class:`Variant`, in which it may fold or not.
    """
    graph, node = recorded(case)
    _expect_as_plain(graph, node if case.sample.verdict == "compact" else None)
    check_verdict(node, case.sample)
    if case.sample.verdict == "full":
        _expect_causal(case)
    for variant in Variant:
        if variant is not Variant.AS_WRITTEN and case.sample.verdict != "refused":
            graph, _ = recorded(case, variant)
            _expect_as_plain(graph)


def _expect_as_plain(graph: fx.GraphModule, compact: fx.Node | None = None) -> None:
    """Claims, results, strides and gradients. ``compact`` is a node that has to run compact, or be read so."""
    folded = run_pipeline(graph)
    if compact is not None:
        runs = graph.meta["wanted"].runs
        users = [user for user in compact.users if Form.COMPACT in runs.get(user, ())]
        _expect(Form.COMPACT in runs[compact] or bool(users), "the op under test never ran compact")
    inputs = sample_inputs()
    check_claims(graph, list(inputs.values()), list(shuffle_later(inputs, 0).values()))
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    args = tuple(inputs.values())
    try:
        planned = plan_inputs(graph)
        plan = planned.plan(args)
    except NeedsFullAttention:
        graph.meta.update(keys_visible=False, apart=False)
        folded = run_pipeline(graph, first=fold_attention)
        planned = plan_inputs(graph)
        plan = planned.plan(args)
    _expect(plan.compact_tokens < args[0].numel(), "nothing is shared in the sample")
    torch.manual_seed(0)
    ours = folded(*args, *planned.arrays(plan, args, torch.device("cpu")))
    torch.manual_seed(0)
    _expect_same(ours, graph(*args), args)


def recorded(case: Case, variant: Variant = Variant.AS_WRITTEN) -> tuple[fx.GraphModule, fx.Node]:
    """The sample's graph and the node under test; its result is also added to itself, in compact form if it may be."""
    t = Recorder(sample_inputs(), variant)
    more: list[fx.Node] = []
    if variant in (Variant.UNIFORM, Variant.TABLES):
        with t.without_gradients():
            more = [case.sample.build(t, case.op)]
    if variant is Variant.TABLES:
        more += [t.heads_in_a_row, t(aten.as_strided.default, t.heads_in_a_row, [BATCH, HEADS, COLUMNS], [1, 3, 7])]
    result = case.sample.build(t, case.op)
    node = [node for node in t.graph.nodes if _is_op(node.target, case.op)][-1]
    return t.finish(result, t(aten.add.Tensor, result, result), t.x, *more), node


def _is_op(target: object, op: Op) -> bool:
    return target == op or (isinstance(target, OpOverload) and target.name() == op)


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuleError(otherwise)


def check_verdict(node: fx.Node, sample: Sample) -> None:
    """What the rule said of an annotated node is the sample's verdict, and its axes multiply to the shape."""
    graph = node.graph.owning_module
    assert graph is not None
    for value in values_of(node):
        if sample.verdict == "refused":
            refusal = value.mixed or graph.meta["tokens"].scans.get(node)  # of a scan, what the rule said of it
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
        values, outputs = values_of(node), node.meta["val"]
        output = outputs[values.index(value)] if isinstance(outputs, tuple | list) else outputs
        layout = graph.meta["tokens"].layout
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


def _expect_causal(case: Case) -> None:
    """Later rows are exchanged, and earlier ones stay as they are."""
    graph, _ = recorded(case)
    run_pipeline(graph)
    result: fx.Node = graph.graph.output_node().args[0][0]  # type: ignore[index, assignment]
    along = value_of(result).axes.index((SEQ,))
    inputs = sample_inputs()
    before = graph(*inputs.values())[0]
    for column in range(1, COLUMNS):
        after = graph(*shuffle_later(inputs, column).values())[0]
        torch.testing.assert_close(
            after.narrow(along, 0, column), before.narrow(along, 0, column), rtol=1e-12, atol=1e-12
        )
    if case.op is not aten.diff.default:  # its sample reads the positions alone
        _expect(not torch.equal(after, before), "the sample never reads the ids, and proves nothing")

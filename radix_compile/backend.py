"""The backend: capture, rewrite, compile both programs, and choose between them for each call."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.inspection.tracing import trace_report, trace_rewrite
from radix_compile.ir.errors import CannotFold, RefusalCode
from radix_compile.kernels import embedding, index_ops, token_nll
from radix_compile.options import Options
from radix_compile.passes.capture import CaptureError, capture, first_line
from radix_compile.passes.fold_attention import fold_attention
from radix_compile.passes.lower_index_ops import lower_index_ops
from radix_compile.passes.pipeline import Observer, PassFailed, run_pass, run_pipeline
from radix_compile.passes.report import GraphReport, report_on
from radix_compile.passes.skip_padding import PaddingIsRead, skip_padding
from radix_compile.plan.arrays import as_multiple
from radix_compile.runtime.calibration import Measurements, calibration_file, fingerprint
from radix_compile.runtime.call_planner import PlanInputs, advice_on_padding, plan_inputs
from radix_compile.runtime.cost_model import CostModel, Work
from radix_compile.runtime.counters import COUNTERS
from radix_compile.runtime.dispatch import Choice, Folded, PerCall, Program
from radix_compile.runtime.verify_calls import CallVerifier

log = logging.getLogger(__name__)

LEAST_SHARE = 0.25
"""Fold only if at least this share of a graph's arithmetic can run compact: the index ops and the plan cost too."""

PLAN_SIZES = 64
"""For CUDA graphs, numbers of nodes are multiples of the rows by about this many, if the user does not say of what."""


class RadixBackend:
    """A ``torch.compile`` backend that runs token-wise work once per distinct prefix of the batch.

    ``torch.compile(model, backend=RadixBackend(threshold=0.9))``, or by name with
    ``torch.compile(model, backend="radix", options={"threshold": 0.9})``. The keyword arguments are those of
    :class:`~radix_compile.options.Options`. Backends with equal options are equal, so that Dynamo does not compile
    again for a second one.
    """

    __name__ = "radix"

    def __init__(self, **options: Any) -> None:
        self.options = Options().updated(options)
        self.predicts_for: Options | None = None
        self._warned: set[str] = set()

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Program:
        """Compile one graph that Dynamo captured. ``mode`` and ``options`` are what ``torch.compile`` was given."""
        return self.compile(gm, example_inputs, self.options.updated(options, mode))

    def compile(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, observe: Observer | None = None
    ) -> Program:
        COUNTERS.add(graphs=1)
        report = GraphReport(folded=False)
        try:
            captured, rewritten, inputs = rewrite(gm, example_inputs, options, report, observe)
            options = _with_rounded_plan_sizes(options, captured)
            trace_rewrite(captured, rewritten, report)
            name = "full fold" if inputs.tree is not None else "position-wise fold"
            folded = [_compile_folded(name, captured, rewritten, inputs, example_inputs, options)]
            # On a GPU, attention in full form may be faster: with short paths, and a kernel that is dense.
            always = inputs.tiles and options.threshold is None
            if always or inputs.may_leave_the_tree:
                less = ("fold_attention",) if always else ("keys_visible", "apart", "listed")
                captured.meta.update(dict.fromkeys(less, False))
                rewritten, inputs = _rewrite_again(captured, options, observe)
                name = "position-wise fold" if always else "fold off the tree"
                one = _compile_folded(name, captured, rewritten, inputs, example_inputs, options)
                folded.append(replace(one, always=always))
        except (CaptureError, CannotFold, PassFailed) as refusal:
            report.folded, report.reason, report.code = False, str(refusal), refusal.code
            if isinstance(refusal, PassFailed):
                log.error("a mistake in radix_compile: please report it", exc_info=refusal)
            trace_report(report)
            self._say_so(report, options, expected=getattr(refusal, "expected", False))
            self.report(report)
            return _compile_plain(gm, example_inputs, options)
        self.report(report)
        plain = _compile_plain(gm, example_inputs, options)
        kept = _measurements(captured, self.predicts_for or options)
        model = CostModel({one.name: one.work for one in folded}, [] if kept is None else kept.load())
        said = report.model, report.place, partial(self.chose, report)
        call = PerCall(plain, folded, options, model, kept, captured.meta["wrapped"], *said)
        return call.__call__  # a function, which is what tools that look at compiled code expect

    def report(self, report: GraphReport) -> None:
        """Called with the report of every graph; ``explain`` listens here."""

    def chose(self, report: GraphReport, choice: Choice) -> None:
        """Called with what is decided about each call of a graph that can fold; listened to, too."""

    def _say_so(self, report: GraphReport, options: Options, expected: bool) -> None:
        details = "".join(f"\n  {refusal}" for refusal in report.refusals)
        log.info("not folded: %s%s", report.reason, details)
        if expected:
            return
        if options.strict:
            raise RuntimeError(f"radix: nothing folds: {report.reason}{details}")
        if report.reason not in self._warned:
            self._warned.add(report.reason)
            warnings.warn(f"radix: nothing folds: {report.reason}", stacklevel=2)

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset()``."""
        self._warned.clear()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.options == other.options

    def __hash__(self) -> int:
        return hash((type(self), self.options))

    def __repr__(self) -> str:
        return f"RadixBackend({self.options})"


radix = RadixBackend()
"""The entry point ``radix`` of the group ``torch_dynamo_backends``."""


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    report: GraphReport,
    observe: Observer | None = None,
) -> tuple[fx.GraphModule, fx.GraphModule, PlanInputs]:
    """The captured graph, its folded form and how to plan a call; ``report`` is filled in on the way.

    Raises ``CaptureError``, ``CannotFold`` or ``PassFailed``; ``gm`` is left as it was.
    """
    captured = capture(gm, example_inputs)
    if observe is not None:
        observe("capture", captured)
    captured.meta["fold_attention"] = options.fold_attention
    folded = run_pipeline(captured, observe, options.verify)
    found = report_on(captured)
    report.__dict__.update(found.__dict__)
    if not report.folded or report.foldable_share < LEAST_SHARE:
        report.folded = False
        reason, code = "there is no token-wise arithmetic in it", RefusalCode.NO_ARITHMETIC
        if report.refusals:
            reason, code = str(report.refusals[0]), report.refusals[0].code
        if found.folded:
            reason = f"only {report.foldable_share:.0%} of the arithmetic is token-wise: {reason}"
        raise CannotFold(reason, code)
    inputs = _finish(captured, folded, options, report, observe)
    if advice := advice_on_padding(captured, internals.flatten_subclasses(example_inputs)):
        report.notes.append(advice)
    return captured, folded, inputs


def _rewrite_again(
    captured: fx.GraphModule, options: Options, observe: Observer | None = None
) -> tuple[fx.GraphModule, PlanInputs]:
    """As :func:`rewrite`, of what it captured: another folded form, with less attention on the tree."""
    folded = run_pipeline(captured, observe, options.verify, first=fold_attention)
    return folded, _finish(captured, folded, options, GraphReport(folded=True), observe)


def _finish(
    captured: fx.GraphModule, folded: fx.GraphModule, options: Options, report: GraphReport, observe: Observer | None
) -> PlanInputs:
    """What is done to a folded graph because of options, and how to plan a call."""
    captured.meta.pop("padding", None)  # another folded form may leave it out where this one cannot
    if options.padding == "skip":
        try:
            skip_padding(folded)
        except PaddingIsRead as verdict:
            report.notes.append(f'padding="skip" is off: {verdict}')
            log.info(report.notes[-1])
    run_pass(lower_index_ops, folded, observe, options.verify)
    return plan_inputs(captured)


def _compile_plain(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Program:
    COUNTERS.add(plain_compiles=1)
    try:
        return internals.compile_with(options.inner, gm, example_inputs, options.mode, dict(options.inner_options))
    except internals.RUNS_EAGERLY as error:
        warnings.warn(f"radix: the inner backend stops at {error}, and torch.compile runs it eagerly", stacklevel=2)
        raise


def _measurements(captured: fx.GraphModule, options: Options) -> Measurements | None:
    """Of the graph's programs; None if they cannot be timed one by one, as other processes take part in them."""
    nodes = captured.graph.nodes
    if any(getattr(node.target, "namespace", "").endswith(("c10d", "c10d_functional")) for node in nodes):
        return None
    ids = captured.meta["tokens"].keys[0].meta["val"]
    inner = options.inner if isinstance(options.inner, str) else getattr(options.inner, "__qualname__", "a callable")
    compiled_by = inner, options.mode, options.inner_options, options.padding, options.fold_attention
    key = fingerprint(captured, ids.device, compiled_by)
    about = {"torch": torch.__version__, "device": ids.device.type, "inner": inner}
    file = Path(options.calibration) if options.calibration else calibration_file()
    return Measurements(file, key, about)


def _with_rounded_plan_sizes(options: Options, captured: fx.GraphModule) -> Options:
    """CUDA graphs are recorded for sizes, of which hardly any would come again if plans had all that there are."""
    ids = captured.meta["tokens"].keys[0].meta["val"]
    graphs = internals.records_cuda_graphs(options.inner, options.mode, dict(options.inner_options))
    if options.pad_multiple_of is not None or ids.device.type != "cuda" or not graphs:
        return options
    rows = internals.size_hint(ids.shape[0]) * internals.size_hint(ids.shape[1])
    return replace(options, pad_multiple_of=max(1 << (rows // PLAN_SIZES).bit_length() >> 1, 1))


def _compile_folded(
    name: str,
    captured: fx.GraphModule,
    folded: fx.GraphModule,
    plan: PlanInputs,
    example_inputs: Sequence[Any],
    options: Options,
) -> Folded:
    plan = replace(plan, filled_up=options.pad_multiple_of is not None)
    verify = CallVerifier(captured, _copied(folded)) if options.verify else None  # the inner backend may write to it
    # The fake ids, whose sizes are symbols where the real ones' are numbers: a number here would pin the batch.
    ids = captured.meta["tokens"].keys[0].meta["val"]
    COUNTERS.add(folded_compiles=1)
    rows = ids.shape[0] * ids.shape[1]
    bound = internals.upper_bound(rows)
    multiple = min(as_multiple(options.pad_multiple_of), bound)
    most = -(-bound // multiple) * multiple
    arrays = internals.unbacked_plan_inputs(rows, most, ids.device, plan.tree is not None, plan.tiles, plan.lists)
    inputs = [*internals.flatten_subclasses(example_inputs), *arrays]
    internals.present_as_dynamos(folded, captured)
    try:
        cached = internals.cache_unless(captured.meta["checkpointed"])
        with cached, internals.backward_compiled_ahead(), internals.backward_may_run_again():
            inner_options = dict(options.inner_options)
            ours = {**index_ops.decompositions(ids.device), **token_nll.DECOMPOSITIONS, **embedding.DECOMPOSITIONS}
            program = internals.compile_with(options.inner, folded, inputs, options.mode, inner_options, ours)
            hint = [internals.size_hint(size) for size in ids.shape[:2]]
            return Folded(name, program, plan, verify, Work.of(report_on(captured), *hint))
    except (RuntimeError, *internals.RUNS_EAGERLY) as error:
        if internals.must_propagate(error):
            raise
        # Nothing is lost: the plain program runs, and the warning says so (with strict, it is an error).
        raise CannotFold(
            f"the inner backend cannot compile the folded program: {first_line(error)}", RefusalCode.INNER_BACKEND
        ) from error


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)

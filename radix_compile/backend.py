"""The backend: capture, rewrite, compile both programs, and choose between them for each call."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Unpack

import torch
from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.inspection.tracing import trace_report, trace_rewrite
from radix_compile.ir.errors import CannotFold, RefusalCode
from radix_compile.ir.graph import graph_facts, tokens_of
from radix_compile.ir.plan_arrays import plan_arrays
from radix_compile.kernels import embedding, index_ops, token_nll
from radix_compile.options import Options, RadixOptions
from radix_compile.passes.capture import CaptureError, capture, first_line
from radix_compile.passes.fold import FOLD_OFF_THE_TREE, FULL_FOLD, POSITION_WISE_FOLD, Fold, FoldVariant, Starts
from radix_compile.passes.pipeline import Observer, PassFailed, annotate, fold_as
from radix_compile.passes.report import GraphReport, report_on
from radix_compile.plan.arrays import as_multiple
from radix_compile.runtime.calibration import Measurements, calibration_file, fingerprint
from radix_compile.runtime.call_planner import PlanInputs, advice_on_padding, plan_inputs
from radix_compile.runtime.cost_model import CostModel, Work
from radix_compile.runtime.counters import COUNTERS
from radix_compile.runtime.dispatch import Choice, Folded, PerCall, Program
from radix_compile.runtime.verify_calls import CallVerifier
from radix_compile.torch_internals import val

log = logging.getLogger(__name__)

LEAST_SHARE = 0.25
"""Fold only if at least this share of a graph's arithmetic can run compact: the index ops and the plan cost too."""

PLAN_SIZES = 64
"""For CUDA graphs, plans have about this many different numbers of nodes, unless ``pad_multiple_of`` is set."""


class Listener(Protocol):
    """Receives the reports and the choices of a :class:`RadixBackend`. Errors of its methods reach the caller."""

    def on_report(self, report: GraphReport) -> None:
        """Called once for each graph that is compiled, folded or not, before ``strict`` raises."""

    def on_choice(self, report: GraphReport, choice: Choice) -> None:
        """Called when a program is chosen for a call, before it runs; not for calls that can only run plain.

        ``report`` is the object that ``on_report`` was called with for the graph.
        """


class RadixBackend:
    """A ``torch.compile`` backend that runs token-wise work once per distinct prefix of the batch.

    ``torch.compile(model, backend=RadixBackend(fold=0.9))``, or by name with
    ``torch.compile(model, backend="radix", options={"fold": 0.9})``. The keyword arguments are those of
    :class:`~radix_compile.options.Options`, and ``listener``. Backends with equal options and the same listener are
    equal, so that Dynamo does not compile again for a second one.
    """

    __name__ = "radix"

    def __init__(self, *, listener: Listener | None = None, **options: Unpack[RadixOptions]) -> None:
        self.options = Options().updated(options)
        self.listener = listener
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
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        observe: Observer | None = None,
        predict_as: Options | None = None,
    ) -> Program:
        """Compile one graph with ``options`` in place of the backend's own. ``observe`` is given it after each pass.

        With ``predict_as``, what is predicted is what was measured with those options, and nothing is timed.
        """
        COUNTERS.add(graphs=1)
        report = GraphReport(folded=False)
        try:
            if options.fold == "never":
                raise CannotFold('the option fold is "never"', RefusalCode.SWITCHED_OFF, expected=True)
            captured = capture_and_annotate(gm, example_inputs, options, observe)
            fold = fold_as(FULL_FOLD if options.fold_attention else POSITION_WISE_FOLD, captured, options, observe)
            report = report_on(fold)  # from here on, a refusal keeps what was found
            expect_enough(report)
            inputs = plan_inputs(fold)
            if advice := advice_on_padding(fold, inputs, internals.flatten_subclasses(example_inputs)):
                report.notes.append(advice)
                if observe is None:  # explain shows the note
                    self._warn(advice)
            options = _with_rounded_plan_sizes(options, captured)
            trace_rewrite(captured, fold.program, report)
            folded = [_compile_folded(fold, inputs, example_inputs, options)]
            for variant in _further_variants(inputs, options):
                further = fold_as(variant, captured, options, observe)
                if variant is FOLD_OFF_THE_TREE or _shifts_as(fold, further):
                    folded.append(_compile_folded(further, plan_inputs(further), example_inputs, options))
        except (CaptureError, CannotFold, PassFailed) as refusal:
            report.folded, report.reason, report.code = False, str(refusal), refusal.code
            if isinstance(refusal, PassFailed):
                log.error("a mistake in radix_compile: please report it", exc_info=refusal)
            trace_report(report)
            self._report(report)
            self._warn_or_raise(report, options, refusal)
            return _compile_plain(gm, example_inputs, options)
        self._report(report)
        plain = _compile_plain(gm, example_inputs, options)
        known = _measurements(captured, predict_as or options)
        model = CostModel({one.name: one.work for one in folded}, [] if known is None else known.load())
        kept = known if predict_as is None else None
        chose = None if self.listener is None else partial(self.listener.on_choice, report)
        wraps = graph_facts(captured).has_wrapped_inputs
        call = PerCall(plain, folded, options, model, kept, wraps, report.model, report.place, chose)
        return call.__call__  # a function, which is what tools that look at compiled code expect

    def _report(self, report: GraphReport) -> None:
        if self.listener is not None:
            self.listener.on_report(report)

    def _warn_or_raise(
        self, report: GraphReport, options: Options, verdict: CaptureError | CannotFold | PassFailed
    ) -> None:
        details = "".join(f"\n  {refusal}" for refusal in report.refusals)
        log.info("not folded: %s%s", report.reason, details)
        if isinstance(verdict, CannotFold) and verdict.expected:
            return
        if options.strict:
            raise CannotFold(f"radix: nothing folds: {report.reason}{details}", verdict.code) from verdict
        self._warn(f"nothing folds: {report.reason}")

    def _warn(self, message: str) -> None:
        """Warn the first time that there is this message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"radix: {message}", stacklevel=2)

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset()``."""
        self._warned.clear()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.options == other.options and self.listener is other.listener

    def __hash__(self) -> int:
        return hash((type(self), self.options))

    def __repr__(self) -> str:
        return f"RadixBackend({self.options})"


radix = RadixBackend()
"""The entry point ``radix`` of the group ``torch_dynamo_backends``."""


def capture_and_annotate(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, observe: Observer | None = None
) -> fx.GraphModule:
    """The captured graph with its facts. ``gm`` is left as it was.

    Raises ``CaptureError``, ``CannotFold`` or ``PassFailed``.
    """
    captured = capture(gm, example_inputs)
    if observe is not None:
        observe("capture", captured)
    annotate(captured, observe, options.verify)
    return captured


def expect_enough(report: GraphReport) -> None:
    """Raises ``CannotFold`` if so little of a graph's arithmetic runs compact that it cannot pay."""
    if report.folded and report.foldable_share >= LEAST_SHARE:
        return
    reason, code = "there is no token-wise arithmetic in it", RefusalCode.NO_ARITHMETIC
    if report.refusals:
        reason, code = str(report.refusals[0]), report.refusals[0].code
    if report.folded:
        reason = f"only {report.foldable_share:.0%} of the arithmetic is token-wise: {reason}"
    raise CannotFold(reason, code)


def _further_variants(inputs: PlanInputs, options: Options) -> tuple[FoldVariant, ...]:
    """The variants in which a graph is folded as well, given how calls of its first folded program are planned."""
    if "triton" in inputs.groups and options.fold == "auto":
        # On a GPU, attention in full form may be faster: with short paths, and a kernel that is dense.
        return (POSITION_WISE_FOLD,)
    return (FOLD_OFF_THE_TREE,) if inputs.may_leave_the_tree else ()


def _shifts_as(first: Fold, other: Fold) -> bool:
    """May a plan that is made for the first fold be used for the other one, as to where paths start?"""
    return first.starts == Starts() or first.starts == other.starts


def _compile_plain(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Program:
    COUNTERS.add(plain_compiles=1)
    try:
        return internals.compile_with(
            options.inner_backend, gm, example_inputs, options.mode, dict(options.inner_options)
        )
    except internals.RUNS_EAGERLY as error:
        warnings.warn(f"radix: the inner backend stops at {error}, and torch.compile runs it eagerly", stacklevel=2)
        raise


def _measurements(captured: fx.GraphModule, options: Options) -> Measurements | None:
    """The measurements of the graph's programs; None if other processes take part in them: none can be timed then."""
    nodes = captured.graph.nodes
    if any(getattr(node.target, "namespace", "").endswith(("c10d", "c10d_functional")) for node in nodes):
        return None
    ids = val(tokens_of(captured).keys[0])
    backend = options.inner_backend
    inner = backend if isinstance(backend, str) else getattr(backend, "__qualname__", "a callable")
    inner_options = tuple(sorted(options.inner_options.items()))
    compiled_by = inner, options.mode, inner_options, options.padding, options.fold_attention
    key = fingerprint(captured, ids.device, compiled_by)
    about = {"torch": torch.__version__, "device": ids.device.type, "inner_backend": inner}
    file = Path(options.calibration) if options.calibration else calibration_file()
    return Measurements(file, key, about)


def _with_rounded_plan_sizes(options: Options, captured: fx.GraphModule) -> Options:
    """Round plan sizes up so that recorded CUDA graphs are reused."""
    ids = val(tokens_of(captured).keys[0])
    graphs = internals.records_cuda_graphs(options.inner_backend, options.mode, options.inner_options)
    if options.pad_multiple_of is not None or ids.device.type != "cuda" or not graphs:
        return options
    rows = internals.size_hint(ids.shape[0]) * internals.size_hint(ids.shape[1])
    return replace(options, pad_multiple_of=max(1 << (rows // PLAN_SIZES).bit_length() >> 1, 1))


def _compile_folded(fold: Fold, plan: PlanInputs, example_inputs: Sequence[Any], options: Options) -> Folded:
    captured, folded = fold.captured, fold.program
    plan = replace(plan, filled_up=options.pad_multiple_of is not None)
    verify = CallVerifier(captured, _copied(folded)) if options.verify else None  # the inner backend may write to it
    # The fake ids, whose sizes are symbols where the real ones' are numbers: a number here would pin the batch.
    ids = val(tokens_of(captured).keys[0])
    COUNTERS.add(folded_compiles=1)
    rows = ids.shape[0] * ids.shape[1]
    bound = internals.upper_bound(rows)
    multiple = min(as_multiple(options.pad_multiple_of), bound)
    most = -(-bound // multiple) * multiple
    specs = [(array.shape, array.dtype) for array in plan_arrays(plan.groups)]
    arrays = internals.unbacked_plan_inputs(specs, rows, most, ids.device)
    inputs = [*internals.flatten_subclasses(example_inputs), *arrays]
    internals.present_as_dynamos(folded, captured)
    try:
        cached = internals.cache_unless(graph_facts(captured).has_checkpoints)
        with cached, internals.backward_compiled_ahead(), internals.backward_may_run_again():
            inner_options = dict(options.inner_options)
            ours = {**index_ops.decompositions(ids.device), **token_nll.DECOMPOSITIONS, **embedding.DECOMPOSITIONS}
            program = internals.compile_with(options.inner_backend, folded, inputs, options.mode, inner_options, ours)
            hint = [internals.size_hint(size) for size in ids.shape[:2]]
            name = POSITION_WISE_FOLD.name if fold.variant is FULL_FOLD and plan.tree is None else fold.variant.name
            runs_all_calls = fold.variant is not FOLD_OFF_THE_TREE
            return Folded(name, program, plan, verify, Work.of(report_on(fold), *hint), runs_all_calls)
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

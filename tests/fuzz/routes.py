"""Two routes to a folded program: running the passes directly, and ``torch.compile``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

import radix_compile
from radix_compile import backend
from radix_compile.analysis.row_numbers import NumbersProgram, number_rows
from radix_compile.ir.errors import CannotFold, RunsPlain
from radix_compile.ir.graph import tokens_of
from radix_compile.ir.value import values_of
from radix_compile.options import Options
from radix_compile.passes.capture import capture
from radix_compile.passes.fold import FOLD_OFF_THE_TREE, FULL_FOLD
from radix_compile.passes.pipeline import annotate, fold_as
from radix_compile.passes.report import report_on
from radix_compile.runtime.call_planner import PlanInputs, plan_inputs
from radix_compile.testing.claims import check_claims
from tests.fuzz.compare import assert_same, assert_same_writes
from tests.fuzz.example import Batch, Call, Example, Module, Outcome

FALLBACKS = ("cannot compile the folded program", " failed: ")
"""Parts of the backend's warnings that a program ran plain because of a bug."""

RUNS_EAGERLY = "torch.compile runs it eagerly"
"""Part of the warning that the inner backend cannot compile the plain program either."""


def _compare(
    ours: tuple[Tensor, ...], call: Call, plain: Module, kept: Sequence[Tensor | None] = (), twice: bool = False
) -> None:
    """Compare the results of a call in every way. This overwrites ``ours``."""
    weights, tolerance = list(plain.parameters()), plain.tolerance
    assert_same(ours, call.expected, weights, kept, twice, tolerance)
    if not kept:
        assert_same_writes(ours, plain(**call.batch), [*weights, *call.batch.values()], tolerance)


# ---------------------------------------------------------------------------------------------- through the passes


def captured(module: Module, batch: Batch) -> fx.GraphModule:
    """The captured graph, made without Dynamo: capture traces a graph whose only op is the program."""
    names = [name for name, _ in module.named_parameters()]

    def program(*args: Any) -> tuple[Tensor, ...]:
        weights = SimpleNamespace(**dict(zip(names, args[len(batch) :], strict=True)))
        return module.run(weights, *args[: len(batch)])

    args = [*batch.values(), *module.parameters()]
    graph = fx.Graph()
    graph.output(graph.call_function(program, tuple(graph.placeholder(f"input_{i}") for i in range(len(args)))))
    with tracing(TracingContext(FakeTensorMode(static_shapes=True))):
        return capture(fx.GraphModule({}, graph), args)


def check_passes(example: Example, plain: Module, calls: list[Call], outcome: Outcome) -> None:
    source = captured(plain, example.batches[0])
    options = Options(padding="skip" if example.skip else "exact")
    try:
        annotate(source)
        folds = [fold_as(FULL_FOLD, source, options)]
        programs = [(folds[0].program, plan_inputs(folds[0]))]
    except CannotFold as verdict:
        if not verdict.expected:
            raise
        outcome.add(refused=1)
        return
    outcome.add(folded=report_on(folds[0]).folded, refused=bool(tokens_of(source).refusals))
    outcome.add(unread=folds[0].read_rows is not None)
    if not programs[0][1].keys:  # nothing runs compact
        return
    if programs[0][1].may_leave_the_tree:
        folds.append(fold_as(FOLD_OFF_THE_TREE, source, options))
        programs.append((folds[1].program, plan_inputs(folds[1])))
    for call in calls:
        compared = [_check_call(source, *program, plain, call, example.skip, outcome) for program in programs]
        if any(compared) and all(result.isfinite().all() for result in call.expected):
            other_batch = next((other.batch for other in calls if other is not call), call.batch)
            args, other_args = ([*batch.values(), *plain.parameters()] for batch in (call.batch, other_batch))
            with contextlib.suppress(RunsPlain):  # an unused mask from the caller may be invalid
                check_claims(source, args, other_args)


def _check_call(
    source: fx.GraphModule,
    folded: fx.GraphModule,
    inputs: PlanInputs,
    plain: Module,
    call: Call,
    skip: bool,
    outcome: Outcome,
) -> bool:
    """Compare a call, if it folds. Returns whether it does."""
    args = [*call.batch.values(), *plain.parameters()]
    try:
        plan = inputs.plan(args)
    except RunsPlain:
        return False
    if not plan.compact_tokens:
        return False
    outcome.add(tokens=len(plan.scatter), compact_tokens=plan.compact_tokens)
    scatter = plan.scatter if plan.head is None else plan.head.plan.scatter  # zero also where others need a node
    kept = _kept(source, torch.from_numpy(scatter >= 0), call.batch["ids"]) if skip else []
    arrays = inputs.arrays(plan, args, torch.device("cpu"))
    _compare(folded(*args, *arrays), call, plain, kept=kept)
    return True


def _kept(source: fx.GraphModule, has_node: Tensor, ids: Tensor) -> list[Tensor | None]:
    """For each result that has an entry for each row, where the row has a node; else it is zero with padding="skip"."""
    program = NumbersProgram(source)
    (output,) = source.graph.find_nodes(op="output")
    kept: list[Tensor | None] = []
    for node in output.args[0]:
        numbers = program.all_rows(node).node if values_of(node)[0].is_row else None
        kept.append(None if numbers is None else has_node[number_rows(*ids.shape, ids.device, numbers.args[-1])])
    return kept


# --------------------------------------------------------------------------------------------- through torch.compile


def check_compiled(example: Example, plain: Module, calls: list[Call], outcome: Outcome) -> None:
    torch._dynamo.reset()
    before = radix_compile.stats()
    options = {"inner_backend": example.route, "fold": "always"}
    compiled = torch.compile(plain, backend="radix", options=options, dynamic=example.dynamic or None)
    with (
        warnings.catch_warnings(record=True) as caught,
        mock.patch.object(backend, "LEAST_SHARE", 0.0),
        _faster_inductor(example.route),
    ):
        warnings.simplefilter("always")
        for call in calls:
            _compare(compiled(**call.batch), call, plain, twice=True)
    messages = [str(warning.message) for warning in caught]
    if not any(RUNS_EAGERLY in message for message in messages):
        assert not [message for message in messages if any(fallback in message for fallback in FALLBACKS)], messages
    after = radix_compile.stats()
    folded = after.folded_calls - before.folded_calls
    outcome.add(folded=folded > 0, refused=folded == 0)
    outcome.add(tokens=after.tokens - before.tokens, compact_tokens=after.compact_tokens - before.compact_tokens)


@contextlib.contextmanager
def _faster_inductor(inner: str) -> Iterator[None]:
    """Save compile time: inductor compiles only the folded program, and without vector instructions."""
    if inner != "inductor":
        yield
        return
    plain = mock.patch.object(backend, "_compile_plain", lambda gm, inputs, options: gm)
    with plain, torch._inductor.config.patch({"cpp.simdlen": 1}):
        yield


def fails_by_itself(example: Example, plain: Module, calls: list[Call]) -> bool:
    """Does the inner backend fail without radix?"""
    if example.route == "passes":
        return False
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend=example.route, dynamic=example.dynamic or None)
    try:
        for call in calls:
            _compare(compiled(**call.batch), call, plain, twice=True)
    except (AssertionError, RuntimeError):
        return True
    return False

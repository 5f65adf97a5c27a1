"""Plan a call, choose a program for it, and run that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from radix_compile import torch_internals as internals
from radix_compile.ir.errors import Declined, RunsPlain
from radix_compile.options import Options
from radix_compile.plan.prefix_plan import PrefixPlan
from radix_compile.runtime.calibration import Measurements, time_programs
from radix_compile.runtime.call_inputs import CallInputs
from radix_compile.runtime.call_planner import NeedsFullAttention, PlanInputs
from radix_compile.runtime.cost_model import MOST_WORK, PLAIN, CostModel, Counts, Point, Timed, Work, fastest
from radix_compile.runtime.counters import COUNTERS
from radix_compile.runtime.verify_calls import CallVerifier

Program = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Choice:
    """A decision about a call: the name of its program, the predicted seconds by name, and the plan it was made for.

    ``ids`` are the token ids, or what else is the first of the rows' keys.
    """

    program: str
    predicted: Mapping[str, float] | None
    plan: PrefixPlan
    ids: torch.Tensor


@dataclass(frozen=True)
class Folded:
    """A folded program, how to plan its calls and check them, and its FLOPs.

    ``runs_all_calls``, not only those in which the programs in front of it raise ``NeedsFullAttention``.
    """

    name: str
    program: Program
    inputs: PlanInputs
    verify: CallVerifier | None
    work: Work
    runs_all_calls: bool = True

    def run(self, plan: PrefixPlan, args: Sequence[Any], device: torch.device) -> Any:
        return self.program(*args, *self.inputs.arrays(plan, args, device))


class _Call(NamedTuple):
    """A call as it came, and with the tensors that wrappers hold; its plan, and what may run it."""

    wrapped: Sequence[Any]
    args: CallInputs
    device: torch.device
    plan: PrefixPlan
    counts: Counts
    candidates: list[Folded]


@dataclass(frozen=True)
class PerCall:
    """The programs of a graph, called as it was.

    ``model`` chooses among them if ``options.fold`` is "auto". If it cannot tell, programs are timed, and
    ``measurements`` keeps what was found; neither if that is None. ``name`` is the model's, ``place`` says what of
    it is folded, and ``chose`` is told of each choice.
    """

    plain: Program
    folded: Sequence[Folded]
    options: Options
    model: CostModel
    measurements: Measurements | None
    takes_wrapped: bool
    name: str
    place: str
    chose: Callable[[Choice], None] | None

    def __call__(self, *wrapped: Any) -> Any:
        args = CallInputs(internals.flatten_subclasses(wrapped) if self.takes_wrapped else wrapped)
        ids = args[self.folded[0].inputs.keys[0]]
        batch, seq = ids.shape[:2]
        if batch * seq < self.options.min_tokens:
            return self._run_plain(wrapped, "fewer rows than min_tokens")
        started = time.perf_counter()
        try:
            plan, candidates = self._planned(args)
        except RunsPlain as reason:
            return self._run_plain(wrapped, str(reason))
        counts = Counts.of(plan, batch, seq)
        chosen = self._choose(_Call(wrapped, args, ids.device, plan, counts, candidates))
        if isinstance(chosen, Declined):
            COUNTERS.add(self.name, plan_seconds=time.perf_counter() - started)
            return self._run_plain(wrapped, chosen.reason)
        arrays = chosen.inputs.arrays(plan, args, ids.device)
        self._count(chosen, counts, plan, time.perf_counter() - started)
        with torch.profiler.record_function(f"radix: {self.place}, {counts.rows} -> {plan.compact_tokens} rows"):
            results = chosen.program(*args, *arrays)
        if chosen.verify is not None:
            chosen.verify(results, args, arrays, wrapped, chosen.program, self.plain)
        return results

    def _count(self, chosen: Folded, counts: Counts, plan: PrefixPlan, seconds: float) -> None:
        on_the_tree = {"pairs": counts.pairs, "tree_pairs": counts.tree_pairs} if chosen.inputs.tree is not None else {}
        COUNTERS.folded(
            self.name,
            counts.rows,
            plan.compact_tokens,
            read_tokens=plan.tokens,
            head_tokens=counts.head,
            plan_seconds=seconds,
            moved_bytes=chosen.work.moved(counts),
            flops_saved=chosen.work.flops(counts.unshared) - chosen.work.flops(counts),
            **on_the_tree,
        )

    def _run_plain(self, wrapped: Sequence[Any], reason: str) -> Any:
        COUNTERS.ran_plain(self.name, reason)
        return self.plain(*wrapped)

    def _planned(self, args: Sequence[Any], share_nothing: bool = False) -> tuple[PrefixPlan, list[Folded]]:
        """A plan, and the programs that it is for. Raises ``RunsPlain`` if there is none."""
        *others, last = self.folded
        for i, one in enumerate(others):
            try:
                plan = one.inputs.plan(args, self.options.pad_multiple_of, share_nothing)
            except NeedsFullAttention:
                continue
            return plan, [one, *(other for other in self.folded[i + 1 :] if other.runs_all_calls)]
        return last.inputs.plan(args, self.options.pad_multiple_of, share_nothing), [last]

    def _choose(self, call: _Call) -> Folded | Declined:
        """One of the candidates, or why none of them runs."""
        fold, counts = self.options.fold, call.counts
        by_name = {one.name: one for one in call.candidates}
        if counts.nodes <= 1:  # which is not compiled for
            return Declined("too little is shared")
        kept = self.measurements if fold == "auto" and self.options.calibrate else None
        if kept is not None and self.model.needs_timing(counts, list(by_name)):
            self.model.timed.append(self._timed(call))
            kept.save(self.model.timed)
        predicted = self.model.predict(counts, list(by_name))
        reason = "too little is shared"
        if fold == "auto" and predicted is not None:
            name, reason = fastest(predicted), "the plain program is predicted to be as fast"
        else:
            first = call.candidates[0]
            name = first.name if self._pays(first, counts) else PLAIN
        if self.chose is not None:
            self.chose(Choice(name, predicted, call.plan, call.args[self.folded[0].inputs.keys[0]]))
        return Declined(reason) if name == PLAIN else by_name[name]

    def _pays(self, program: Folded, counts: Counts) -> bool:
        """Does a call fold, if nothing is predicted?"""
        fold = self.options.fold
        if fold == "auto":
            return program.work.share(counts) <= MOST_WORK
        return counts.nodes <= (1.0 if isinstance(fold, str) else fold) * counts.rows

    def _timed(self, call: _Call) -> Timed:
        """All programs, the folded ones with the call's plan and with one that shares nothing."""
        unshared, _ = self._planned(call.args, share_nothing=True)
        batch, seq = call.args[self.folded[0].inputs.keys[0]].shape[:2]
        plans = {"shared": call.plan, "unshared": unshared}
        runs: dict[tuple[str, str], Callable[[], object]] = {(PLAIN, ""): partial(self.plain, *call.wrapped)}
        for one in call.candidates:
            runs |= {(one.name, which): partial(one.run, of, call.args, call.device) for which, of in plans.items()}
        took = time_programs(runs, call.device)
        COUNTERS.add(self.name, timed_calls=1)
        work = {which: Counts.of(of, batch, seq) for which, of in plans.items()}
        points: dict[str, tuple[Point, ...]] = {
            one.name: tuple((one.work.flops(of), took[one.name, which]) for which, of in work.items())
            for one in call.candidates
        }
        points[PLAIN] = ((call.candidates[0].work.flops(call.counts.unshared), took[PLAIN, ""]),)
        return Timed(call.counts.rows, points)

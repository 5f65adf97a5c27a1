"""Predict the seconds that each program would take for a call, from the counts of its plan and a few timed runs.

Work is counted in FLOPs, but how long a FLOP takes depends on the device, the model, the compiler and the size of the
call. So the programs themselves are timed, on the inputs of an ordinary call: the plain one, and each folded one twice,
with the plan of the call and with one that shares nothing. Between and near these points time is linear in work. Sizes
that are not near have points of their own, unless the nearest ones leave no doubt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from radix_compile.passes.report import GraphReport
from radix_compile.plan.prefix_plan import PrefixPlan

PLAIN = "plain"

GAIN = 0.97
"""A folded program has to take at most this share of the plain one's predicted time: predictions err, too."""
MOST_WORK = 0.95
"""With a larger share of the plain program's token-wise work there is nothing to gain, and nothing is timed."""
NEAR = 2.0
"""Sizes by whose ratio of rows at most a timed call is near another."""
IN_REACH = 8.0
"""The same for one that still says something."""
DOUBT = 1.35
"""Between this ratio of predicted times and its inverse, a size that is not near has to be timed itself."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of a plan: ``head`` nodes of rows that are read themselves, ``pairs`` of a query and a key of its
    sequence, ``tree_pairs`` of a node and an ancestor of it, or itself.
    """

    rows: int
    nodes: int
    head: int
    pairs: int
    tree_pairs: int

    @classmethod
    def of(cls, plan: PrefixPlan, batch: int, seq: int) -> Counts:
        nodes = plan.compact_tokens
        return cls(
            batch * seq, nodes, plan.head.plan.compact_tokens if plan.head else nodes, batch * seq * seq, plan.pairs
        )

    @property
    def unshared(self) -> Counts:
        """The work of the plain program."""
        return Counts(self.rows, self.rows, self.rows, self.pairs, self.pairs)


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of a folded program: token-wise ones by node or by node of the head, of attention on the tree by pair
    there, the rest by pair.

    ``folded`` and ``scattered`` are the bytes of what goes from rows to nodes and back, by node and by row.
    """

    by_node: float
    by_head_node: float
    by_tree_pair: float
    by_pair: float
    folded: float = 0.0
    scattered: float = 0.0

    @classmethod
    def of(cls, report: GraphReport, batch: int, seq: int) -> Work:
        """From the report of a graph that was captured with these sizes."""
        rows, pairs = batch * seq, batch * seq * seq
        by_node = (report.flops_compact - report.flops_head) / rows, report.flops_head / rows
        flops = *by_node, report.flops_tree / pairs, report.flops_full / pairs
        return cls(*flops, report.bytes_folded / rows, report.bytes_scattered / rows)

    def flops(self, counts: Counts) -> float:
        by_node = self.by_node * counts.nodes + self.by_head_node * counts.head
        return by_node + self.by_tree_pair * counts.tree_pairs + self.by_pair * counts.pairs

    def share(self, counts: Counts) -> float:
        """The token-wise work of a call as a share of that of the plain program: nodes per row, fewer for the head."""
        by_row = self.by_node + self.by_head_node
        if not by_row:
            return counts.nodes / counts.rows
        return (self.by_node * counts.nodes + self.by_head_node * counts.head) / (by_row * counts.rows)

    def moved(self, counts: Counts) -> int:
        """Bytes read and written between rows and nodes."""
        return round(2 * (self.folded * counts.nodes + self.scattered * counts.rows))


Point = tuple[float, float]
"""FLOPs, and the seconds that they took."""


@dataclass(frozen=True)
class Timed:
    """A call of so many rows whose programs were timed: ``points`` by the name of the program.

    The first point of a folded program is the call's own, the second, if there is one, that of a plan without sharing.
    A program that ran out of memory has taken infinitely long.
    """

    rows: int
    points: Mapping[str, tuple[Point, ...]]

    def seconds(self, program: str, flops: float, rows: int) -> float:
        """Predicted for so much work and so many rows. What does not depend on work is taken to depend on rows."""
        (own, took), *others = self.points[program]
        if not math.isfinite(took):
            return took
        slope = took / own
        for more, longer in others:
            if math.isfinite(longer) and more > 1.05 * own:
                slope = min(max((longer - took) / (more - own), 0.0), slope)
        return (took - slope * own) * rows / self.rows + slope * flops


def predict(timed: Timed, work: Mapping[str, Work], counts: Counts) -> dict[str, float]:
    """Seconds by program, the plain one included."""
    unshared = next(iter(work.values())).flops(counts.unshared)
    found = {PLAIN: timed.seconds(PLAIN, unshared, counts.rows)}
    found |= {name: timed.seconds(name, one.flops(counts), counts.rows) for name, one in work.items()}
    return found


def fastest(seconds: Mapping[str, float]) -> str:
    """The plain program, unless a folded one is predicted to take clearly less."""
    folded = min((name for name in seconds if name != PLAIN), key=seconds.__getitem__)
    return folded if seconds[folded] < GAIN * seconds[PLAIN] else PLAIN


class CostModel:
    """Of one graph: ``work`` are the FLOPs of its folded programs by name, ``timed`` the calls that were timed."""

    def __init__(self, work: Mapping[str, Work], timed: list[Timed]) -> None:
        self.work = dict(work)
        self.timed = timed

    def predict(self, counts: Counts, programs: list[str]) -> dict[str, float] | None:
        """Seconds by program, the plain one included, from the nearest size; None if none in reach was timed."""
        nearest = self._nearest(counts, programs)
        if nearest is None or _ratio(nearest.rows, counts.rows) > IN_REACH:
            return None
        return predict(nearest, {name: self.work[name] for name in programs}, counts)

    def needs_timing(self, counts: Counts, programs: list[str]) -> bool:
        """Is it in doubt which program is the fastest, and does it matter?"""
        if all(self.work[name].share(counts) > MOST_WORK for name in programs):
            return False
        nearest, predicted = self._nearest(counts, programs), self.predict(counts, programs)
        if nearest is None or predicted is None:
            return True
        gain = predicted[PLAIN] / min(predicted[name] for name in programs)
        return _ratio(nearest.rows, counts.rows) > NEAR and 1 / DOUBT < gain < DOUBT

    def _nearest(self, counts: Counts, programs: list[str]) -> Timed | None:
        known = [one for one in self.timed if {PLAIN, *programs} <= one.points.keys()]
        return min(known, key=lambda one: _ratio(one.rows, counts.rows), default=None)


def _ratio(one: int, other: int) -> float:
    return max(one, other) / max(min(one, other), 1)

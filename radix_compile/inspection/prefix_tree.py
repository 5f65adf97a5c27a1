"""The prefix tree of a batch, for the page: which columns are shared by how many sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from radix_compile.plan.prefix_plan import PrefixPlan


@dataclass(frozen=True)
class Edge:
    """Columns ``start`` to ``stop`` that ``count`` sequences have in common, from the ``first`` on in sorted order."""

    start: int
    stop: int
    first: int
    count: int


def edges_of(plan: PrefixPlan) -> list[Edge]:
    """The edges of the tree of a batch. Rows left out are in none."""
    kept = (plan.scatter >= 0).cumsum()
    counts = kept[plan.bounds[1:] - 1] - kept[plan.bounds[:-1] - 1] * (plan.bounds[:-1] > 0)
    return edges(counts[plan.order].tolist(), plan.shared.tolist())


def edges(lengths: Sequence[int], shared: Sequence[int]) -> list[Edge]:
    """The edges of a tree, from left to right and from top to bottom as it is drawn.

    Args:
        lengths: of the sequences, in lexicographic order.
        shared: the length of the prefix that each has in common with the one before it; 0 for the first.
    """
    closed: list[Edge] = []
    still_open: list[tuple[int, int, int]] = []

    def close(down_to: int, sequences: int) -> None:
        """No later sequence goes through what is open behind column ``down_to``."""
        while still_open and still_open[-1][1] > down_to:
            start, stop, first = still_open.pop()
            parts = max(start, down_to)
            closed.append(Edge(parts, stop, first, sequences - first))
            if start < parts:
                still_open.append((start, parts, first))

    for place, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        close(common, place)
        if length > common:
            still_open.append((common, length, place))
    close(0, len(lengths))
    return sorted(closed, key=lambda edge: (edge.first, edge.start))


def depth_and_fan_out(tree: Sequence[Edge]) -> tuple[int, float]:
    """How often the tree parts on the way to a leaf at most, and into how many edges where it does, on average.

    That sequences begin with different tokens is the first time.
    """
    ways: Counter[Edge | None] = Counter()
    above: list[Edge] = []
    depth = 0
    for edge in tree:
        while above and not (above[-1].stop <= edge.start and edge.first < above[-1].first + above[-1].count):
            above.pop()
        ways[above[-1] if above else None] += 1
        depth = max(depth, len(above))
        above.append(edge)
    several = [count for count in ways.values() if count > 1]
    return depth + (ways[None] > 1), sum(several) / len(several) if several else 1.0

"""The edges of a batch's prefix tree, for the page and for ``radix-compile estimate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from radix_compile.plan.prefix_plan import PrefixPlan


@dataclass(frozen=True)
class Edge:
    """Columns ``start`` to ``stop``, which are equal in the ``count`` sequences from ``first`` on in sorted order."""

    start: int
    stop: int
    first: int
    count: int


def edges_of(plan: PrefixPlan) -> list[Edge]:
    """Return the edges of the prefix tree of a plan. Skipped rows are in no edge."""
    kept = (plan.scatter >= 0).cumsum()
    counts = kept[plan.bounds[1:] - 1] - kept[plan.bounds[:-1] - 1] * (plan.bounds[:-1] > 0)
    return edges(counts[plan.order].tolist(), plan.shared.tolist())


def edges(lengths: Sequence[int], shared: Sequence[int]) -> list[Edge]:
    """Return the edges of a prefix tree, sorted by first sequence and start column.

    Args:
        lengths: of the sequences, in lexicographic order.
        shared: the length of the common prefix of each sequence and the sequence before; 0 for the first.
    """
    closed_edges: list[Edge] = []
    open_edges: list[tuple[int, int, int]] = []  # start, stop, first sequence

    def close(column: int, next_sequence: int) -> None:
        """End the open edges at ``column``: ``next_sequence`` and those after it do not share what lies behind."""
        while open_edges and open_edges[-1][1] > column:
            start, stop, first = open_edges.pop()
            branch = max(start, column)
            closed_edges.append(Edge(branch, stop, first, next_sequence - first))
            if start < branch:
                open_edges.append((start, branch, first))

    for sequence, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        close(common, sequence)
        if length > common:
            open_edges.append((common, length, sequence))
    close(0, len(lengths))
    return sorted(closed_edges, key=lambda edge: (edge.first, edge.start))


def depth_and_fan_out(tree: Sequence[Edge]) -> tuple[int, float]:
    """Return the largest number of branchings from root to leaf, and the mean number of branches of a branching.

    The root is a branching if sequences begin with different tokens.
    """
    num_children: Counter[Edge | None] = Counter()
    ancestors: list[Edge] = []
    depth = 0
    for edge in tree:
        while ancestors and not (
            ancestors[-1].stop <= edge.start and edge.first < ancestors[-1].first + ancestors[-1].count
        ):
            ancestors.pop()
        num_children[ancestors[-1] if ancestors else None] += 1
        depth = max(depth, len(ancestors))
        ancestors.append(edge)
    branchings = [count for count in num_children.values() if count > 1]
    return depth + (num_children[None] > 1), sum(branchings) / len(branchings) if branchings else 1.0

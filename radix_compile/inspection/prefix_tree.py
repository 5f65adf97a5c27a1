"""The prefix tree of a batch, for drawing: which columns are shared by how many sequences."""

from __future__ import annotations

from dataclasses import dataclass

from radix_compile.prefix_plan import PrefixPlan


@dataclass(frozen=True)
class Edge:
    """Columns ``start`` to ``stop`` that ``count`` sequences have in common, from the ``first`` on in sorted order."""

    start: int
    stop: int
    first: int
    count: int


def edges_of(plan: PrefixPlan) -> list[Edge]:
    """The edges of the tree, from left to right and from top to bottom as it is drawn. Rows left out are in none."""
    kept = (plan.scatter >= 0).cumsum()
    counts = kept[plan.bounds[1:] - 1] - kept[plan.bounds[:-1] - 1] * (plan.bounds[:-1] > 0)
    edges: list[Edge] = []
    open_edges: list[tuple[int, int, int]] = []

    def close(down_to: int, sequences: int) -> None:
        """No later sequence goes through what is open behind column ``down_to``."""
        while open_edges and open_edges[-1][1] > down_to:
            start, stop, first = open_edges.pop()
            parts = max(start, down_to)
            edges.append(Edge(parts, stop, first, sequences - first))
            if start < parts:
                open_edges.append((start, parts, first))

    for place, (sequence, shared) in enumerate(zip(plan.order.tolist(), plan.shared.tolist(), strict=True)):
        close(shared, place)
        if counts[sequence] > shared:
            open_edges.append((shared, int(counts[sequence]), place))
    close(0, len(plan.order))
    return sorted(edges, key=lambda edge: (edge.first, edge.start))

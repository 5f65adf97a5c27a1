"""The edges of the prefix tree that are drawn: together they are the nodes, and with their sequences the rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radix_compile.inspection.prefix_tree import Edge, edges_of
from radix_compile.plan.prefix_plan import PrefixPlan


def test_two_levels() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 9, 9, 9], [7, 7, 7, 7]])
    assert edges_of(PrefixPlan.from_rows(ids)) == [
        Edge(0, 1, 0, 3),
        Edge(1, 3, 0, 2),
        Edge(3, 4, 0, 1),
        Edge(3, 4, 1, 1),
        Edge(1, 4, 2, 1),
        Edge(0, 4, 3, 1),
    ]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 10_000), st.booleans())
def test_edges_are_the_nodes(batch: int, seq: int, seed: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2, (batch, seq), generator=generator)
    lengths = torch.randint(1, seq + 1, (batch, 1), generator=generator)
    skip = torch.arange(seq) >= lengths
    plan = PrefixPlan.from_rows(ids, skip.long(), needed=~skip) if padded else PrefixPlan.from_rows(ids)
    edges = edges_of(plan)
    assert sum(edge.stop - edge.start for edge in edges) == plan.compact_tokens
    assert sum((edge.stop - edge.start) * edge.count for edge in edges) == plan.tokens

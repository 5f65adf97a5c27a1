"""Scatters that can move together are one op, and nothing is read before it is there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.graphs import calls, folded, scattered
from tests.models import VOCABULARY, build, shared_batch

aten, radix = torch.ops.aten, torch.ops.radix


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_scatter_for_each_layer(attention: str) -> None:
    gm = folded(build("Qwen3", attention=attention), shared_batch(4, 12, 8), use_cache=False, on_rows=True)
    together = calls(gm, radix.foreach_scatter_rows.default)
    assert [len(node.args[0]) for node in together] == [3, 3]
    assert len(calls(gm, radix.scatter_rows.default)) == 1  # the logits
    assert len(scattered(gm)) == 7


def test_what_waits_for_another_scatter_is_apart() -> None:
    embedding, first, second = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def program(ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = first(embedding(ids))
        return hidden.flip(1), second(hidden.cumsum(1)).flip(1)

    gm = folded(program, shared_batch(4, 12, 8))
    positions = {node: i for i, node in enumerate(gm.graph.nodes)}
    moved = calls(gm, radix.scatter_rows.default) + calls(gm, radix.foreach_scatter_rows.default)
    assert len(scattered(gm)) == 2
    assert len(moved) == 2  # the second is computed from a running sum over the rows of the first
    for node in moved:
        assert all(positions[user] > positions[node] for user in node.users)


def test_nothing_moves_over_the_border_of_a_region() -> None:
    """What is computed under autocast is computed there, though a scatter outside could wait for it."""
    embedding, linear = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)

    def program(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = embedding(ids)
        before = linear(hidden).flip(1)
        with torch.autocast("cpu", torch.bfloat16):
            inside = linear(hidden).flip(1)
        return before, inside, (linear(hidden) * 2).flip(1)

    ids = shared_batch(4, 12, 8)
    gm = folded(program, ids)
    assert len(scattered(gm)) == 3
    assert len(calls(gm, radix.scatter_rows.default)) == 3  # each in its own region
    options = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
    with torch.no_grad():
        ours, plain = torch.compile(program, backend="radix", options=options)(ids), program(ids)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other)

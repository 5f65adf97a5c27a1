"""What a plan needs of a call besides its tokens, computed by a few ops of the graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from radix_compile.runtime.call_planner import RowProgram


def test_what_depends_on_sizes_alone_is_computed_once_for_each() -> None:
    """On a GPU it would be launches, and a wait for them, in front of every call."""
    ran: list[int] = []

    def positions(length: int) -> torch.Tensor:
        ran.append(length)
        return torch.arange(length)[None]

    program = RowProgram(positions, (1,), is_constant=True)
    ids = torch.zeros(3, 5, dtype=torch.long)
    first = program((ids, 5), (3, 5))
    np.testing.assert_array_equal(first, np.tile(np.arange(5), (3, 1)))
    assert program((ids, 5), (3, 5)) is first
    assert ran == [5]
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    np.testing.assert_array_equal(program((ids, 4), (3, 4)), np.tile(np.arange(4), (3, 1)))
    np.testing.assert_array_equal(program((ids, 4), (2, 4)), np.tile(np.arange(4), (2, 1)))
    assert ran == [5, 4, 4]
    np.testing.assert_array_equal(program((ids, 5), (3, 5)), first)


def test_what_depends_on_tensors_is_computed_in_every_call() -> None:
    program = RowProgram(lambda mask: mask + 1, (0,))
    mask = torch.zeros(3, 5, dtype=torch.long)
    assert program((mask,), (3, 5)).max() == 1
    mask[1, 2] = 6
    assert program((mask,), (3, 5)).max() == 7

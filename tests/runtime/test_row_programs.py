"""What a plan needs of a call besides its tokens, computed by a few ops of the graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radix_compile.runtime import call_inputs
from radix_compile.runtime.call_inputs import CallInputs
from radix_compile.runtime.call_planner import plan_inputs
from radix_compile.runtime.row_programs import RowProgram, RowPrograms
from tests.graphs import calls, fold_of

aten = torch.ops.aten


def test_what_depends_on_sizes_alone_is_computed_once_for_each() -> None:
    """On a GPU it would be launches, and a wait for them, in front of every call."""
    ran: list[int] = []

    def positions(length: int) -> Tensor:
        ran.append(length)
        return torch.arange(length)[None]

    program = RowProgram(positions, (1,), on_host=True, is_constant=True)

    def rows_of(batch: int, length: int) -> np.ndarray:
        return program(CallInputs((torch.zeros(batch, length), length)), (batch, length))

    first = rows_of(3, 5)
    np.testing.assert_array_equal(first, np.tile(np.arange(5), (3, 1)))
    assert rows_of(3, 5) is first
    assert ran == [5]
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    np.testing.assert_array_equal(rows_of(3, 4), np.tile(np.arange(4), (3, 1)))
    np.testing.assert_array_equal(rows_of(2, 4), np.tile(np.arange(4), (2, 1)))
    assert ran == [5, 4, 4]
    np.testing.assert_array_equal(rows_of(3, 5), first)


def test_what_depends_on_tensors_is_computed_once_in_every_call() -> None:
    ran: list[int] = []

    def one_more(mask: Tensor) -> Tensor:
        ran.append(1)
        return mask + 1

    program = RowProgram(one_more, (0,), on_host=True, is_constant=False)
    mask = torch.zeros(3, 5, dtype=torch.long)
    inputs = CallInputs((mask,))
    assert program(inputs, (3, 5)).max() == 1
    assert program(inputs, (3, 5)) is program(inputs, (3, 5))
    mask[1, 2] = 6
    assert program(CallInputs((mask,)), (3, 5)).max() == 7
    assert len(ran) == 2


table, weight = torch.randn(10, 8), torch.randn(8, 8)


def masked(ids: Tensor, mask: Tensor, read: Tensor | None = None) -> Tensor:
    """Attention with a padding mask, and the sum of the rows that are read: by default, those that are no padding."""
    x = F.embedding(ids, table) @ weight
    seq = ids.shape[1]
    i = torch.arange(seq, device=ids.device)
    shown = (i[None] <= i[:, None]) & (mask != 0)[:, None, :]
    y = torch.softmax((x @ x.transpose(1, 2)).masked_fill(~shown, -torch.inf), -1) @ x
    return ((y @ weight) * (mask if read is None else read.long())[..., None]).sum(1)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 3, 5, 6]])
    return ids, (ids != 0).long()


def test_inputs_are_copied_to_the_host_together(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = call_inputs._copied

    def count(given: list[Tensor]) -> list[Tensor]:
        copied.append(len(given))
        return copy(given)

    monkeypatch.setattr(call_inputs, "_copied", count)
    ids, mask = batch()
    fold = fold_of(masked, ids, mask, ids > 2)
    inputs = plan_inputs(fold)
    read_on_host = [ids, mask, ids > 2]
    placeholders = fold.captured.graph.find_nodes(op="placeholder")
    assert len(inputs.on_host) == len(read_on_host)
    found = iter(read_on_host)
    given = CallInputs([next(found) if place in inputs.on_host else table for place in range(len(placeholders))])
    plan = inputs.plan(given)
    inputs.arrays(plan, given, torch.device("cpu"))
    assert [count for count in copied if count] == [len(read_on_host)]


def test_programs_for_the_host_create_their_tensors_there() -> None:
    captured = fold_of(masked, *batch()).captured
    (columns,) = calls(captured, aten.arange.default)
    columns.update_kwarg("device", torch.device("cuda"))
    program = RowPrograms(captured).of(columns)
    assert program.on_host
    np.testing.assert_array_equal(program(CallInputs(batch()), (2, 5)), [[0, 1, 2, 3, 4]] * 2)


@pytest.mark.parametrize("values", [torch.float32, torch.long])
def test_floating_point_stays_on_the_device(values: torch.dtype) -> None:
    """Its results may differ in the last bit."""

    def half(ids: Tensor, mask: Tensor) -> Tensor:
        return (
            masked(ids, torch.where(mask.to(values) * 0.3 > 0.2, 1, 0))
            if values.is_floating_point
            else masked(ids, mask)
        )

    inputs = plan_inputs(fold_of(half, *batch()))
    assert inputs.read is not None
    assert inputs.read.on_host is not values.is_floating_point


def test_large_tensors_stay_on_the_device() -> None:
    def wide(ids: Tensor, mask: Tensor) -> Tensor:
        return masked(ids, mask[..., None].repeat(1, 1, 64).amax(-1))

    ((program, _, _),) = plan_inputs(fold_of(wide, *batch())).fully_masked
    assert not program.on_host

"""Rows get equal numbers exactly if they are equal bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from radix_compile.ir.errors import RunsPlain
from radix_compile.runtime import row_contents
from radix_compile.runtime.row_contents import row_numbers

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int32)


def batch(dtype: torch.dtype, features: tuple[int, ...] = (5,)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 7, *features, generator=generator).mul(50)
    rows = drawn.to(dtype)
    rows[1:, :4] = rows[0, :4]
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [(5,), (8,), (1,), (2, 3), (16,)], ids=str)
def test_equal_where_rows_are(dtype: torch.dtype, features: tuple[int, ...]) -> None:
    rows = batch(dtype, features)
    numbers = row_numbers(rows)
    assert numbers.shape == (3, 7)
    assert numbers.dtype == np.int64
    flat = rows.reshape(21, -1)
    equal = (flat[:, None] == flat[None]).all(-1).numpy()
    assert np.array_equal(numbers.reshape(-1, 1) == numbers.reshape(1, -1), equal)
    assert 1 < len(np.unique(numbers)) < 21


def test_one_bit_tells_rows_apart() -> None:
    rows = torch.ones(1, 2, 64)
    rows[0, 1, 63] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert len(np.unique(row_numbers(rows))) == 2


def test_by_bits() -> None:
    """NaN is itself, and the two zeros are two."""
    rows = torch.tensor([[[float("nan")], [float("nan")], [0.0], [-0.0]]])
    nan, same, zero, negative = row_numbers(rows)[0]
    assert nan == same
    assert zero != negative


def test_entries_that_change_places() -> None:
    rows = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]])
    assert len(np.unique(row_numbers(rows))) == 2


def test_not_contiguous() -> None:
    rows = batch(torch.float32)
    assert np.array_equal(row_numbers(rows.transpose(0, 1).contiguous().transpose(0, 1)), row_numbers(rows))


def test_a_checksum_that_two_rows_share_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_contents, "_factors", lambda count, device: torch.zeros(count, dtype=torch.int64))
    with pytest.raises(RunsPlain, match="same checksum"):
        row_numbers(batch(torch.float32))

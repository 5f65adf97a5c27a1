"""Rows told apart by what they hold: numbers for the rows of an embedded input, in place of token ids."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_compile.ir.errors import RunsPlain


def row_numbers(rows: Tensor) -> NDArray[np.int64]:
    """Numbers ``[B, S]``, equal for rows of ``[B, S, ...]`` that are equal bit by bit, and different for others.

    One pass sums each row's bits with random factors, on the tensor's device; a second one compares each row with the
    first of its number. Raises :class:`RunsPlain` if two rows that differ got the same sum.
    """
    batch, seq = rows.shape[:2]
    bits = _as_integers(rows.detach().reshape(batch * seq, -1))
    sums = (bits * _factors(bits.shape[1], bits.device)).sum(-1)
    _, first, numbers = np.unique(sums.numpy(force=True), return_index=True, return_inverse=True)
    same_as = torch.from_numpy(first[numbers]).to(bits.device)
    if not torch.equal(bits, bits[same_as]):
        raise RunsPlain("two different rows of the embedded input have the same checksum")
    return numbers.astype(np.int64).reshape(batch, seq)


def _as_integers(rows: Tensor) -> Tensor:
    """``[N, F]`` as int64 ``[N, G]`` with the same bits, several entries in one where they fill it."""
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(1)
    width = rows.shape[1] * rows.element_size()
    if width % 8 == 0:
        return rows.contiguous().view(torch.uint8).view(torch.int64)
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return rows.contiguous().view(sizes[rows.element_size()]).long()


@functools.lru_cache(maxsize=8)
def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers, the same ones every time."""
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randint(-(2**62), 2**62, (count,), generator=generator, dtype=torch.int64)
    return (2 * drawn + 1).to(device)

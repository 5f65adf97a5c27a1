"""Checks, by value and in every call, of what was assumed when a graph was compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_compile.ir.errors import RunsPlain
from radix_compile.ir.triangles import Triangle, same_numbers


def rows_seen(mask: Tensor) -> NDArray[np.int64] | None:
    """Numbers ``[B, S]``, equal for rows of a mask ``[B, H, S, S]`` that see the same columns; None if B is one.

    Raises :class:`RunsPlain` unless a bool mask shows (and a float mask leaves at zero) nothing behind a row and the
    row itself, and a float mask hides with one number, the lowest of its dtype or nearly, or minus infinity.
    """
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool:
        hidden = mask[~visible]
        if hidden.numel() and not (hidden[0] <= torch.finfo(mask.dtype).min / 2 and (hidden == hidden[0]).all()):
            raise RunsPlain("the given attention mask is not of zeros and one number near the lowest of its dtype")
    if visible.triu(1).any():
        raise RunsPlain("the given attention mask lets a token see later ones")
    if not visible.diagonal(dim1=-2, dim2=-1).all():
        raise RunsPlain("the given attention mask hides a token from itself")
    if mask.shape[0] == 1:
        return None
    batch, _, seq, _ = mask.shape
    bits = np.packbits(visible.transpose(1, 2).reshape(batch * seq, -1).numpy(force=True), axis=1)
    _, numbers = np.unique(bits.view(f"V{bits.shape[1]}").ravel(), return_inverse=True)
    return numbers.astype(np.int64).reshape(batch, seq)


@dataclass(frozen=True)
class TriangleCheck:
    """Checks that inputs still hold the triangles that they did, as far as sequences go. It waits for a GPU once."""

    triangles: tuple[tuple[int, Triangle], ...]
    whole: bool

    def __call__(self, args: Sequence[Tensor], seq: int) -> bool:
        expected: dict[object, Tensor] = {}  # layers have equal ones
        results = []
        for place, triangle in self.triangles:
            size = args[place].shape[-1] if self.whole else seq
            part = args[place][..., :size, :size]
            about = triangle, part.shape, part.dtype, part.device
            if about not in expected:
                expected[about] = triangle.of(*about[1:])
            results.append(same_numbers(part, expected[about]))
        return bool(torch.stack([result.to(results[0].device) for result in results]).all())

"""Causal masks that a module keeps in a buffer: one number on one side of the diagonal and zero on the other.

The contents of a buffer are not part of the graph, and Dynamo does not guard them. So the buffer is read when the graph
is compiled, and checked in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from radix_compile import torch_internals as internals

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


@dataclass(frozen=True)
class Triangle:
    """``tril(full(number))``, or ``triu(full(number), 1)`` if ``upper``. Its shape is ``[1, ..., 1, N, N]``."""

    upper: bool
    number: float | int | bool

    def of(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the triangle as a tensor of that shape."""
        filled = torch.full(shape, self.number, dtype=dtype, device=device)
        return filled.triu(1) if self.upper else filled.tril()

    def cast(self, dtype: torch.dtype) -> Triangle:
        """Return the triangle after a cast to that dtype."""
        exact = torch.float64 if isinstance(self.number, float) else None
        return Triangle(self.upper, torch.tensor(self.number, dtype=exact).to(dtype).item())


def read_triangle(tensor: Tensor) -> Triangle | None:
    """Return the triangle that a buffer holds, or None if it holds something else."""
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided or not internals.has_values(tensor):
        return None
    if (
        tensor.requires_grad
        or not tensor.is_contiguous()
        or tensor.ndim < 2
        or tensor.shape[-1] != tensor.shape[-2]
        or tensor.shape[-1] < 2
    ):
        return None
    if any(size != 1 for size in tensor.shape[:-2]):
        return None
    corners = tensor.flatten(0, -2)[:: tensor.shape[-1] - 1, -1]
    above, diagonal = corners.tolist()
    if (above == 0) == (diagonal == 0):
        return None
    triangle = Triangle(diagonal == 0, above or diagonal)
    return triangle if same_numbers(tensor, triangle.of(tensor.shape, tensor.dtype, tensor.device)) else None


def same_numbers(left: Tensor, right: Tensor) -> Tensor:
    """Return whether all entries and their signs are equal, as a bool tensor on the device, without synchronising.

    ``1 / mask`` depends on the sign of zeros.
    """
    return ((left == right) & (torch.signbit(left) == torch.signbit(right))).all()

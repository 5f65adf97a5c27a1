"""Causal masks that a module keeps in a buffer: one number on one side of the diagonal and zero on the other.

What a buffer holds is no part of a graph, and Dynamo does not guard it. So it is read when a graph is compiled, and
again in every call.
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
    """``tril(full(number))``, or ``triu(full(number), 1)`` if ``upper``: ``[..., N, N]``, what is in front being 1."""

    upper: bool
    number: float | int | bool

    def of(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The triangle as a tensor of that shape."""
        filled = torch.full(shape, self.number, dtype=dtype, device=device)
        return filled.triu(1) if self.upper else filled.tril()

    def cast(self, dtype: torch.dtype) -> Triangle:
        """The triangle after a cast to that dtype."""
        exact = torch.float64 if isinstance(self.number, float) else None
        return Triangle(self.upper, torch.tensor(self.number, dtype=exact).to(dtype).item())


def read_triangle(tensor: Tensor) -> Triangle | None:
    """The triangle that a buffer holds, if it holds one."""
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
    found = Triangle(diagonal == 0, above or diagonal)
    return found if same_numbers(tensor, found.of(tensor.shape, tensor.dtype, tensor.device)) else None


def same_numbers(one: Tensor, other: Tensor) -> Tensor:
    """As a bool tensor, for which nothing waits. Zeros have the same sign, too: ``1 / mask`` would tell."""
    return ((one == other) & (torch.signbit(one) == torch.signbit(other))).all()

"""Plans to move rows by, and strided tensors to move."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from radix_compile.plan.prefix_plan import PrefixPlan


class Plan(NamedTuple):
    """The index arrays of a batch, on one device."""

    batch: int
    seq: int
    fold: Tensor
    scatter: Tensor
    rows: Tensor
    starts: Tensor
    pieces: Tensor

    @property
    def lists(self) -> tuple[Tensor, ...]:
        """As the sums take them."""
        return self.scatter, self.fold, self.rows, self.starts, self.pieces

    @property
    def nodes(self) -> int:
        return len(self.fold)


def plan_of(ids: Tensor, needed: Tensor | None = None, pad: int | None = None, device: str = "cpu") -> Plan:
    plan = PrefixPlan.from_rows(ids, needed=needed, pad_multiple_of=pad)
    arrays = [plan.fold, plan.scatter, *plan.row_lists()]
    return Plan(*ids.shape, *(torch.from_numpy(array).to(device) for array in arrays))


def shared(batch: int, seq: int, prefix: int, **options: object) -> Plan:
    """All sequences share their first ``prefix`` columns and nothing else."""
    ids = torch.arange(batch * seq).view(batch, seq)
    ids[:, :prefix] = ids[0, :prefix]
    return plan_of(ids, **options)  # type: ignore[arg-type]


def tree(batch: int, seq: int, seed: int = 0, **options: object) -> Plan:
    """Sequences of few different tokens: a tree with nodes of every size."""
    ids = torch.randint(0, 3, (batch, seq), generator=torch.Generator().manual_seed(seed))
    return plan_of(ids, **options)  # type: ignore[arg-type]


def values(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random, of any dtype; small integers for the integer ones."""
    generator = torch.Generator().manual_seed(len(shape))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return torch.randint(-5, 6, shape, generator=generator).to(device, dtype)


def tolerance(parts: int, dtype: torch.dtype) -> dict[str, float]:
    """For a sum of ``parts`` values of size one: one rounding of the result, and those of adding up in float32."""
    summed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * parts
    return {"rtol": torch.finfo(dtype).eps, "atol": summed * parts**0.5}

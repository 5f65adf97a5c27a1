"""``sum_same_target`` as a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Rows of one program."""
AHEAD = 16
"""Rows of the same node that each of them looks at together."""


@triton.jit
def _sum_same_target(
    result, values, target, scatter, rows, starts, count, SUM: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    node = tl.load(scatter + row, mask=inside, other=0)
    own = tl.load(target + row, mask=inside, other=-1)
    begin = tl.load(starts + node, mask=inside, other=0)
    end = tl.load(starts + node + 1, mask=inside, other=0)
    total = tl.zeros([ROWS, AHEAD], SUM)
    longest = tl.max(end - begin, 0)
    done = 0
    while done < longest:
        at = (begin + done)[:, None] + tl.arange(0, AHEAD)[None, :]
        listed = at < end[:, None]
        other = tl.load(rows + at, mask=listed, other=0)
        same = listed & (tl.load(target + other, mask=listed, other=-2) == own[:, None])
        total += tl.load(values + other, mask=same, other=0).to(SUM)
        done += AHEAD
    tl.store(result + row, tl.sum(total, 1), mask=inside)


def sum_same_target(values: Tensor, target: Tensor, scatter: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    values, target = values.contiguous(), target.contiguous()
    result = torch.empty_like(values)
    if values.numel():
        total = tl.float64 if values.dtype == torch.float64 else tl.float32
        with torch.cuda.device_of(values):
            grid = (triton.cdiv(values.numel(), ROWS),)
            _sum_same_target[grid](
                result, values, target, scatter, rows, starts, values.numel(), SUM=total, ROWS=ROWS, AHEAD=AHEAD
            )
    return result

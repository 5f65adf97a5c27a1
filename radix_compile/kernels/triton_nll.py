"""The gradient of ``token_nll`` as a Triton kernel: one pass over the nodes' logits, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_compile.kernels import triton_rows

COLUMNS = 2048
"""Logits of one node that one program takes."""
AHEAD = 8
"""Rows whose targets are looked at together."""
WARPS = 8


@triton.jit
def _nll_gradient(
    result, grad, total, logits, lse, target, rows, starts, stride, width, COLUMNS: tl.constexpr, AHEAD: tl.constexpr
):
    """``softmax(logits[n]) * total[n]`` less ``grad[t]`` at ``target[t]`` of the rows ``t`` of node ``n``."""
    node = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = column < width
    value = tl.load(logits + node * stride + column, mask=wanted, other=0)
    log_sum = tl.load(lse + node)
    begin = tl.load(starts + node)
    end = tl.load(starts + node + 1)
    slope = tl.exp(value.to(log_sum.dtype) - log_sum) * tl.load(total + node)
    for at in range(begin, end, AHEAD):
        entry = at + tl.arange(0, AHEAD)
        row = tl.load(rows + entry, mask=entry < end, other=0)
        hit = tl.load(target + row, mask=entry < end, other=-1)[:, None] == column[None, :]
        slope -= tl.sum(tl.where(hit, tl.load(grad + row)[:, None], 0), 0)
    tl.store(result + node * width + column, slope.to(result.dtype.element_ty), mask=wanted)


def token_nll_backward(
    grad: Tensor,
    logits: Tensor,
    lse: Tensor,
    target: Tensor,
    scatter: Tensor,
    fold: Tensor,
    rows: Tensor,
    starts: Tensor,
) -> Tensor:
    nodes, width = logits.shape
    (total,) = triton_rows.foreach_sum_rows([grad[None]], scatter, fold, rows, starts, [0], [1])
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    result = logits.new_empty(logits.shape)
    if result.numel():
        with torch.cuda.device_of(logits):
            _nll_gradient[nodes, triton.cdiv(width, COLUMNS)](
                result, grad.contiguous(), total, logits, lse, target.contiguous(), rows, starts, logits.stride(0), width,
                COLUMNS=COLUMNS, AHEAD=AHEAD, num_warps=WARPS,
            )  # fmt: skip
    return result

"""The negative log-likelihood of a target for each row, from the logits of the nodes.

``nll[t] = logsumexp(logits[scatter[t]]) - logits[scatter[t], target[t]]``: the wide part once for each node, and no
``[T, vocabulary]`` tensor, neither here nor for the gradient, which for node ``n`` with rows ``t`` is
``softmax(logits[n]) * sum(grad[t])`` less ``grad[t]`` at each ``target[t]``. Importing this module registers the ops:

``token_nll(logits, target, scatter, fold, rows, starts, pieces) -> (nll, lse)``
    ``logits`` ``[T', V]`` of any floating dtype, ``target`` ``[T]`` in ``[0, V)``, the plan as in ``index_ops`` (the
    last four are for the gradient only). A row without a node gets the loss of node 0, which must not be read, nor
    have a gradient. ``nll`` ``[T]`` and ``lse`` ``[T']``, both float32, float64 for such logits.
    ``lse`` is there to be saved and has no gradient.
``sum_same_target(values, target, scatter, rows, starts) -> Tensor``
    For each row the sum of ``values`` ``[T]`` over the rows of its node with its target: ``[T]``, without atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radix_compile.ir.plan_arrays import schema
from radix_compile.kernels.index_ops import LISTS, has_triton, library

radix = torch.ops.radix


def token_nll(
    logits: Tensor,
    target: Tensor,
    scatter: Tensor,
    fold: Tensor | None = None,
    rows: Tensor | None = None,
    starts: Tensor | None = None,
    pieces: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(logits.dtype, torch.float32)
    lse = torch.logsumexp(logits.to(exact), -1)
    # A negative target is out of range, as for cross-entropy, and does not count from the end.
    column = torch.where(target < 0, logits.shape[1], target)
    node = scatter.clamp(min=0)
    return lse.index_select(0, node) - logits[node, column].to(exact), lse


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, *rest = inputs
    ctx.save_for_backward(logits, *output, *rest)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    """In ops that a compiler makes one pass over the logits, and a look at one entry for each row.

    That pass is the only reader of the logits, so that it can be in place: the probability of a target is taken from
    ``nll``. The entries at the targets are computed apart and written over: rounded to the dtype of the logits once,
    as all others are. Rows of one node with the same target write the same number.
    """
    logits, nll, lse, target, scatter, fold, rows, starts, pieces = ctx.saved_tensors
    if fold is None or rows is None or starts is None or pieces is None:
        raise RuntimeError("the gradient of token_nll needs lists: pass `fold`, `rows`, `starts` and `pieces`")
    total = radix.sum_rows(grad.unsqueeze(0), scatter, fold, rows, starts, pieces, 0, 1).squeeze(0)
    slope = torch.exp(logits.to(lse.dtype) - lse.unsqueeze(1)) * total.unsqueeze(1)
    node = scatter.clamp(min=0)  # a row without a node writes what is right for its target at node 0
    at_target = torch.exp(-nll) * total[node] - radix.sum_same_target(grad, target, node, rows, starts)
    result = slope.to(logits.dtype).index_put((node, target), at_target.to(logits.dtype))
    return result, None, None, None, None, None, None


def _sum_same_target(values: Tensor, target: Tensor, scatter: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    if values.is_cuda and has_triton():
        from radix_compile.kernels import triton_nll

        return triton_nll.sum_same_target(values, target, scatter, rows, starts)
    return sum_same_target(values, target, scatter, rows, starts)


def sum_same_target(values: Tensor, target: Tensor, scatter: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """The torch reference."""
    key = scatter * (target.max() + 1) + target
    key, order = torch.sort(key, stable=True)
    _, group, sizes = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    ends = F.pad(sizes.cumsum(0), (1, 0))
    sums = F.embedding_bag(order, values.unsqueeze(1), ends, mode="sum", include_last_offset=True).squeeze(1)
    result = torch.empty_like(values)
    result[order] = sums[group]
    return result


def _fake(logits: Tensor, target: Tensor, *plan: Tensor) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(target.shape, dtype=exact), logits.new_empty(logits.shape[:1], dtype=exact)


library.define(
    f"token_nll(Tensor logits, Tensor target, Tensor scatter, {schema(LISTS, optional=['always', 'lists'])})"
    " -> (Tensor nll, Tensor lse)"
)
library.define(f"sum_same_target(Tensor values, Tensor target, {schema(['scatter', 'rows', 'starts'])}) -> Tensor")
library.impl("token_nll", token_nll, "CompositeExplicitAutograd")
library.impl("sum_same_target", _sum_same_target, "CompositeExplicitAutograd")
torch.library.register_fake("radix::token_nll", _fake, lib=library)
torch.library.register_fake("radix::sum_same_target", lambda values, *_: torch.empty_like(values), lib=library)
torch.library.register_autograd("radix::token_nll", _backward, setup_context=_keep, lib=library)

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {radix.token_nll.default: token_nll}
"""A reduction and two gathers, which a compiler makes one pass over the logits."""

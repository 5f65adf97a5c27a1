"""The negative log-likelihood of a target for each row, from the logits of the nodes.

``nll[t] = logsumexp(logits[scatter[t]]) - logits[scatter[t], target[t]]``: the wide part once for each node, and no
``[T, vocabulary]`` tensor, neither here nor for the gradient. Importing this module registers the ops:

``token_nll(logits, target, scatter, fold, rows, starts) -> (nll, lse)``
    ``logits`` ``[T', V]`` of any floating dtype, ``target`` ``[T]`` in ``[0, V)``, the plan as in ``index_ops`` (the
    last three are for the gradient only). ``nll`` ``[T]`` and ``lse`` ``[T']``, both float32, float64 for such logits.
    ``lse`` is there to be saved and has no gradient.
``token_nll_backward(grad, logits, lse, target, scatter, fold, rows, starts) -> Tensor``
    The gradient of ``logits``, in its dtype: for node ``n`` with rows ``t`` it is
    ``softmax(logits[n]) * sum(grad[t])`` less ``grad[t]`` at each ``target[t]``. Added up in the order of the row
    lists, in float32 at least.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radix_compile.kernels import reference
from radix_compile.kernels.index_ops import has_triton, library

radix = torch.ops.radix


def token_nll(
    logits: Tensor,
    target: Tensor,
    scatter: Tensor,
    fold: Tensor | None = None,
    rows: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(logits.dtype, torch.float32)
    lse = torch.logsumexp(logits.to(exact), -1)
    return lse.index_select(0, scatter) - logits[scatter, target].to(exact), lse


def _backward_reference(
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
    plan = scatter, fold, rows, starts
    total = reference.sum_rows(grad[None], *plan, 0, 1)[0]
    result = logits.new_empty(logits.shape)
    # The rows of a node with the same target are one entry: sorting is stable, so they are added in row order.
    entries, order = torch.sort(scatter * width + target, stable=True)
    entries, counts = torch.unique_consecutive(entries, return_counts=True)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    at_target = torch.nn.functional.embedding_bag(order, grad[:, None], ends, mode="sum", include_last_offset=True)
    node, column = entries // width, entries % width
    # As many nodes at a time as stay in the cache.
    step = max(1, 2**16 // max(width, 1))
    cuts = torch.searchsorted(node, torch.arange(0, nodes + step, step, device=node.device)).tolist()
    for part, start in enumerate(range(0, nodes, step)):
        here = slice(start, start + step)
        some = torch.exp(logits[here].to(lse.dtype) - lse[here, None]).mul_(total[here, None])
        of_part = slice(cuts[part], cuts[part + 1])
        some[node[of_part] - start, column[of_part]] -= at_target[of_part, 0]
        result[here] = some
    return result


def _backward(grad: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
    if logits.is_cuda and has_triton():
        from radix_compile.kernels import triton_nll

        return triton_nll.token_nll_backward(grad, logits, *rest)
    return _backward_reference(grad, logits, *rest)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, *rest = inputs
    ctx.save_for_backward(logits, output[1], *rest)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    if any(tensor is None for tensor in ctx.saved_tensors):
        raise RuntimeError("the gradient of token_nll needs the row lists: pass `fold`, `rows` and `starts`")
    return (radix.token_nll_backward(grad, *ctx.saved_tensors), None, None, None, None, None)


def _fake(logits: Tensor, target: Tensor, *plan: Tensor) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(target.shape, dtype=exact), logits.new_empty(logits.shape[:1], dtype=exact)


_PLAN = "Tensor scatter, Tensor? fold, Tensor? rows, Tensor? starts"
library.define(f"token_nll(Tensor logits, Tensor target, {_PLAN}) -> (Tensor nll, Tensor lse)")
library.define(
    "token_nll_backward(Tensor grad, Tensor logits, Tensor lse, Tensor target,"
    f" {_PLAN.replace('Tensor?', 'Tensor')}) -> Tensor"
)
library.impl("token_nll", token_nll, "CompositeExplicitAutograd")
library.impl("token_nll_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("radix::token_nll", _fake, lib=library)
torch.library.register_fake(
    "radix::token_nll_backward", lambda grad, logits, *_: logits.new_empty(logits.shape), lib=library
)
torch.library.register_autograd("radix::token_nll", _differentiate, setup_context=_keep, lib=library)

DECOMPOSITIONS = {radix.token_nll.default: token_nll}
"""A reduction and two gathers, which a compiler makes one pass over the logits."""

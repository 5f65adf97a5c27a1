"""Causal attention in compact form: each node of the prefix tree attends to its ancestors and itself.

The schema, shapes and gradient of the op, and which code runs it (:func:`lowering`).

    query ``[1, H, T', E]``, key ``[1, Hkv, T', E]``, value ``[1, Hkv, T', V]``; ``H`` is a multiple of ``Hkv``
    the plan: ``TreeArrays``, of which the lists are for "triton"; what else is carried over: ``ScoreOptions``

The results are ``[1, H, T', V]`` and the logarithm of the sum of exponentials of each node's scores, ``[H, T']`` in
float32 (float64 for float64). A node that sees no key is zero, and its sum infinite.

That the keys of a stretch of nodes are the ancestors of the first and the stretch itself is what depth-first numbering
is for: any other ancestor would be between the two. So neither lowering looks at more than the keys that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from radix_compile import torch_internals as internals
from radix_compile.kernels import attention_tiles
from radix_compile.kernels.index_ops import has_triton
from radix_compile.kernels.tree_arguments import ScoreOptions, TreeArrays, heads_inside, row_bytes

radix = torch.ops.radix

_LISTS = "Tensor? runs, Tensor? run_starts, Tensor? keys, Tensor? key_starts, Tensor? parts, Tensor? divided"
_PLAN = f"Tensor fold, Tensor scatter, Tensor begin, Tensor end, {_LISTS}"
PLAN = len(TreeArrays._fields)
"""How many arguments of the op are the plan."""
_CARRIED = "Tensor? sinks, Tensor? bias, float scale, int? window, float? softcap"
_SCHEMAS = (
    f"tree_attention(Tensor query, Tensor key, Tensor value, {_PLAN}, {_CARRIED}) -> (Tensor, Tensor)",
    "tree_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor result, Tensor total,"
    f" {_PLAN}, {_CARRIED}) -> (Tensor, Tensor, Tensor)",
)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHARED_MEMORY = {256: 53 * 1024, 512: 101 * 1024}
"""What a block of the Triton kernels needs at least, in bytes, by the width of a head's row, in bytes too."""


def lowering(query: Tensor, value: Tensor) -> str:
    """The code that runs the op: "triton", kernels that read keys where they are, or "tiles", in torch."""
    return "triton" if why_tiles(query, value) is None else "tiles"


def why_tiles(query: Tensor, value: Tensor) -> str | None:
    """Why the Triton kernels cannot run the op; None if they can."""
    if query.device.type != "cuda":
        return f"on a {query.device.type.upper()}"
    if not has_triton():
        return "without Triton"
    if query.dtype not in FLOATS:
        return f"of {str(query.dtype).removeprefix('torch.')}"
    width = row_bytes(query, value)
    needed = next((room for widest, room in SHARED_MEMORY.items() if width <= widest), None)
    if needed is None or needed > internals.shared_memory(query.device):
        return "with heads that the GPU has too little shared memory for"
    return None


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    given = query, key, value, TreeArrays(*rest[:PLAN]), ScoreOptions(*rest[PLAN:])
    if lowering(query, value) == "triton":
        from radix_compile.kernels import triton_attention

        with torch.cuda.device_of(query):
            return triton_attention.tree_attention(*given)
    with torch.autocast(query.device.type, enabled=False):
        return attention_tiles.tree_attention(*given)


def _gradients(grad: Tensor, query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = grad, query, *rest[:4], TreeArrays(*rest[4 : 4 + PLAN]), ScoreOptions(*rest[4 + PLAN :])
    if lowering(query, rest[1]) == "triton":
        from radix_compile.kernels import triton_attention_backward

        with torch.cuda.device_of(query):
            return triton_attention_backward.tree_attention_backward(*given)
    with torch.autocast(query.device.type, enabled=False):
        return attention_tiles.tree_attention_backward(*given)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    heads, nodes = query.shape[1:3]
    total = query.new_empty((heads, nodes), dtype=torch.promote_types(query.dtype, torch.float32))
    return heads_inside(query, value.shape[3]), total


def _fake_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(map(heads_inside, (query, key, value)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, window, softcap = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.score_options = scale, window, softcap
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    query, key, value, result, total, *plan, sinks, bias = ctx.saved_tensors
    if bias is not None and ctx.needs_input_grad[3 + PLAN + 1]:
        raise RuntimeError("tree_attention has no gradient for its bias")
    gradients = radix.tree_attention_backward(
        grad, query, key, value, result, total, *plan, sinks, bias, *ctx.score_options
    )
    by_sink = None
    if sinks is not None and ctx.needs_input_grad[3 + PLAN]:
        shares = (sinks.to(total.dtype)[:, None] - total).exp()
        by_sink = -(shares * (grad[0] * result[0]).sum(-1, dtype=total.dtype)).sum(1).to(sinks.dtype)
    return (*gradients, *[None] * PLAN, by_sink, None, None, None, None)


library = torch.library.Library("radix", "FRAGMENT")
_CODE: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
    (_forward, _fake_forward),
    (_gradients, _fake_gradients),
)
for _schema, (_real, _fake) in zip(_SCHEMAS, _CODE, strict=True):
    _name = _schema.split("(")[0]
    library.define(_schema)
    library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"radix::{_name}", _fake, lib=library)
torch.library.register_autograd("radix::tree_attention", _backward, setup_context=_keep, lib=library)

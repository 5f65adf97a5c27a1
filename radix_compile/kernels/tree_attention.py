"""Causal attention in compact form: each node of the prefix tree attends to its ancestors and itself.

The schema, shapes and gradient of the op, and which code is to run it (:func:`code_for`).

    query ``[1, H, T', E]``, key ``[1, Hkv, T', E]``, value ``[1, Hkv, T', V]``; ``H`` is a multiple of ``Hkv``
    the plan: ``TreeArrays``, with the tiles of one code; what else is carried over: ``ScoreOptions``

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
from radix_compile.ir.calls import parameters
from radix_compile.ir.plan_arrays import Code, schema
from radix_compile.kernels import torch_attention
from radix_compile.kernels.index_ops import has_triton
from radix_compile.kernels.tree_arguments import ScoreOptions, TreeArrays, heads_inside, row_bytes

radix = torch.ops.radix

_PLAN = schema(TreeArrays._fields, optional=["torch", "triton"])
_CARRIED = "Tensor? sinks, Tensor? bias, float scale, int? window, float? softcap"
_SCHEMAS = (
    f"tree_attention(Tensor query, Tensor key, Tensor value, {_PLAN}, {_CARRIED}) -> (Tensor, Tensor)",
    "tree_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor result, Tensor total,"
    f" {_PLAN}, {_CARRIED}) -> (Tensor, Tensor, Tensor)",
)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHARED_MEMORY = {256: 53 * 1024, 512: 101 * 1024}
"""The bytes of shared memory that a block of the Triton kernels needs at least, by the bytes of a head's row."""


def code_for(query: Tensor, value: Tensor) -> Code:
    """The code that is to run attention of these tensors. The op runs the code whose tiles it is given."""
    return "triton" if why_not_triton(query, value) is None else "torch"


def why_not_triton(query: Tensor, value: Tensor) -> str | None:
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


def _split(given: dict[str, Any]) -> tuple[dict[str, Any], TreeArrays, ScoreOptions]:
    """The tensors, the plan and the options among the arguments of an op."""
    plan = TreeArrays(**{name: given.pop(name) for name in TreeArrays._fields})
    options = ScoreOptions(**{name: given.pop(name) for name in ScoreOptions._fields})
    return given, plan, options


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    tensors, plan, options = _split(dict(zip(_NAMES["tree_attention"], args, strict=True)))
    if plan.code == "triton":
        from radix_compile.kernels import triton_attention

        with torch.cuda.device_of(tensors["query"]):
            return triton_attention.tree_attention(**tensors, plan=plan, score_options=options)
    with torch.autocast(tensors["query"].device.type, enabled=False):
        return torch_attention.tree_attention(**tensors, plan=plan, score_options=options)


def _gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, plan, options = _split(dict(zip(_NAMES["tree_attention_backward"], args, strict=True)))
    if plan.code == "triton":
        from radix_compile.kernels import triton_attention_backward

        with torch.cuda.device_of(tensors["query"]):
            return triton_attention_backward.tree_attention_backward(**tensors, plan=plan, score_options=options)
    with torch.autocast(tensors["query"].device.type, enabled=False):
        return torch_attention.tree_attention_backward(**tensors, plan=plan, score_options=options)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    heads, nodes = query.shape[1:3]
    total = query.new_empty((heads, nodes), dtype=torch.promote_types(query.dtype, torch.float32))
    return heads_inside(query, value.shape[3]), total


def _fake_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(map(heads_inside, (query, key, value)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = dict(zip(_NAMES["tree_attention"], inputs, strict=True))
    numbers = ("scale", "window", "softcap")
    ctx.numbers = {name: given.pop(name) for name in numbers}
    tensors = given | {"result": output[0], "total": output[1]}
    ctx.names = list(tensors)
    ctx.save_for_backward(*tensors.values())
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    names = _NAMES["tree_attention"]
    given = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | ctx.numbers
    wanted = dict(zip(names, ctx.needs_input_grad, strict=True))
    if given["bias"] is not None and wanted["bias"]:
        raise RuntimeError("tree_attention has no gradient for its bias")
    arguments = (given[name] for name in _NAMES["tree_attention_backward"] if name != "grad")
    found = dict(zip(("query", "key", "value"), radix.tree_attention_backward(grad, *arguments), strict=True))
    sinks, result, total = given["sinks"], given["result"], given["total"]
    if sinks is not None and wanted["sinks"]:
        shares = (sinks.to(total.dtype)[:, None] - total).exp()
        found["sinks"] = -(shares * (grad[0] * result[0]).sum(-1, dtype=total.dtype)).sum(1).to(sinks.dtype)
    return tuple(found.get(name) for name in names)


library = torch.library.Library("radix", "FRAGMENT")
_NAMES: dict[str, list[str]] = {}
"""The names of the arguments of each op."""
_CODE: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
    (_forward, _fake_forward),
    (_gradients, _fake_gradients),
)
for _schema, (_real, _fake) in zip(_SCHEMAS, _CODE, strict=True):
    _name = _schema.split("(")[0]
    library.define(_schema)
    _NAMES[_name] = parameters(getattr(radix, _name).default)
    library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"radix::{_name}", _fake, lib=library)
torch.library.register_autograd("radix::tree_attention", _backward, setup_context=_keep, lib=library)

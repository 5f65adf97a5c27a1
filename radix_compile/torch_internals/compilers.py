"""Inner backends: compiling with inductor or another Dynamo backend, torch's compile caches, and backward passes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table

from radix_compile.torch_internals.inductor_patches import UNBACKED_SIZE_SETTINGS

PACKAGE = Path(__file__).parents[1]


def compile_with(
    inner: str | Callable[..., Any],
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: dict[str, Any],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Compile with another Dynamo backend, in the current tracing context.

    ``decompositions`` of our ops are for inductor, which fuses the result; other backends run the ops as they are.

    May raise one of :data:`RUNS_EAGERLY`.
    """
    compiler = lookup_backend(inner) if isinstance(inner, str) else inner
    settings: dict[str, Any] = {}
    if inner == "inductor":
        patches = _inductor_settings(mode, options)
        if decompositions:
            patches = UNBACKED_SIZE_SETTINGS | patches
        if patches:
            settings["config_patches"] = patches
        if decompositions:
            settings["decompositions"] = {**select_decomp_table(), **decompositions}
        compiler = compile_fx
    else:
        settings.update({"mode": mode} if mode else {}, **({"options": options} if options else {}))
    with _cache_key(decompositions):
        compiled: Callable[..., Any] = compiler(gm, list(example_inputs), **settings)
    return compiled


def _inductor_settings(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    return {**(torch._inductor.list_mode_options(mode) if mode else {}), **options}


def records_cuda_graphs(inner: str | Callable[..., Any], mode: str | None, options: Mapping[str, Any]) -> bool:
    """Does the inner backend record CUDA graphs on a GPU (one for each tuple of sizes)?"""
    settings = _inductor_settings(mode, options) if inner == "inductor" else {}
    recorded: bool = settings.get("triton.cudagraphs", inner == "inductor" and inductor_config.triton.cudagraphs)
    return recorded


@functools.cache
def _source_hash() -> str:
    files = sorted(PACKAGE.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _cache_key(decompositions: Mapping[Any, Any] | None) -> contextlib.AbstractContextManager[Any]:
    """Add to torch's cache keys our source, the decompositions and whether backward may write to saved tensors.

    Torch's own keys hold the graph, not the decompositions and gradients of our ops; inductor's ignores the last.
    """
    if not decompositions:
        return contextlib.nullcontext()
    names = ",".join(sorted(map(str, decompositions)))
    donates = torch._functorch.config.donated_buffer
    tag = f"{torch.compiler.config.cache_key_tag}radix_compile {_source_hash()} {donates} {names}"
    patch: contextlib.AbstractContextManager[Any] = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    return patch


def cache_unless(tagged: bool) -> contextlib.AbstractContextManager[Any]:
    """Turn AOTAutograd's cache off for graphs with recompute tags, which its key ignores."""
    if tagged:
        patch: contextlib.AbstractContextManager[Any] = torch._functorch.config.patch(enable_autograd_cache=False)
        return patch
    return contextlib.nullcontext()


def backward_compiled_ahead() -> contextlib.AbstractContextManager[Any]:
    """Compile backward passes with the forward pass, not when they first run, so that errors are raised in time."""
    patch: contextlib.AbstractContextManager[Any] = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    return patch


@contextlib.contextmanager
def backward_may_run_again() -> Iterator[None]:
    """Let programs compiled inside be differentiated twice (``retain_graph=True``), as plain programs may be.

    AOTAutograd lets a backward pass write to saved tensors, which avoids a copy of the logits. A backward pass compiled
    lazily does not write if the graph is retained. A backward pass with symbolic sizes such as T' is compiled ahead of
    time and raises. Here it gets copies of the tensors it writes to if the graph is retained.
    """
    before = set(torch.autograd.Function.__subclasses__())
    yield
    for function in set(torch.autograd.Function.__subclasses__()) - before:
        if getattr(function, "compiled_bw", None) is not None:
            _copy_donated_if_retained(function)


def _copy_donated_if_retained(function: Any) -> None:
    donated = list(function.metadata.bw_donated_idxs or ())
    if not donated:
        return
    run = function._backward_impl

    def backward(ctx: Any, args: list[Any]) -> Any:
        if torch._C._autograd._get_current_graph_task_keep_graph():
            for i in donated:
                args[i] = _copy_with_strides(args[i])
        return run(ctx, args)

    function._backward_impl = staticmethod(backward)
    function.metadata.bw_donated_idxs.clear()  # AOTAutograd raises if donated buffers meet retain_graph


def _copy_with_strides(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with exactly the same strides, for which the backward pass was compiled."""
    if tensor.numel() == 0:
        return tensor
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((last + 1,), (1,)).clone()
    return flat.as_strided(tensor.shape, tensor.stride(), 0)

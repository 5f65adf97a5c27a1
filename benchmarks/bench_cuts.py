"""Time folds and scatters as indexing that inductor fuses with the ops around it, and as kernels.

Run as `python -m benchmarks.bench_cuts`. Inductor compiles each program twice: with the index op decomposed to plain
indexing, which it fuses, and with the op as an extern kernel, which is ours (on a CPU torch's `index_select`).
`radix_compile.kernels.index_ops.decompositions` is the choice made from these figures.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table

from benchmarks.bench_index_kernels import Case, seconds_of
from benchmarks.demo import UsageError, check_toolchain, machine, pick_device, positive
from radix_compile.kernels import index_ops, reference

radix = torch.ops.radix
NAMES = ("fold_rows", "place_rows", "scatter_rows", "foreach_scatter_rows")
AS_INDEXING = {getattr(radix, name).default: getattr(reference, name) for name in NAMES}

Cut = tuple[str, Callable[..., Any], tuple[Tensor, ...]]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def cuts(case: Case, device: torch.device, dtype: torch.dtype, width: int, heads: tuple[int, int]) -> list[Cut]:
    """Return the name, the program and its inputs of each cut in one layer of a model of these sizes."""
    fold, scatter, *_ = case.indices(device)
    batch, seq, nodes = case.batch, case.seq, len(fold)
    query_heads, key_heads = heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def attention_inputs(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        q, k, v = (tensor.unflatten(-1, (-1, 128)) for tensor in (q, k, v))
        q, k, v = (tensor.transpose(1, 2) for tensor in (rms_norm(q, weight), rms_norm(k, weight), v))
        compact = [rotated(q, cos, sin), rotated(k, cos, sin), v]
        result: list[Tensor] = radix.foreach_scatter_rows(
            compact, scatter, *[None] * 4, batch, seq, [0] * 3, [2] * 3, False
        )
        return result

    def scattered(x: Tensor) -> Tensor:
        return radix.scatter_rows(x, scatter, *[None] * 4, batch, seq, 0, 1, False)  # type: ignore[no-any-return]

    qkv = tuple(random(1, nodes, num_heads * 128) for num_heads in (query_heads, key_heads, key_heads))
    tables = (random(128), random(1, 1, nodes, 128), random(1, 1, nodes, 128))
    hidden, weight = random(1, nodes, width), random(width)
    return [
        ("norm, rotary, scatter of q, k, v", attention_inputs, (*qkv, *tables)),
        ("add, norm, scatter", lambda x, y, w: scattered(rms_norm(x + y, w)), (hidden, hidden, weight)),
        ("scatter", scattered, (hidden,)),
        (
            "fold of attention",
            lambda x: radix.fold_rows(x.transpose(1, 2).flatten(2), fold, scatter, 0, 1),
            (random(batch, seq, query_heads, 128).transpose(1, 2),),
        ),
        (
            "gradient of a fold",
            lambda x: radix.place_rows(x, fold, scatter, batch, seq, 0, 1),
            (random(1, nodes, query_heads * 128),),
        ),
    ]


def compiled(program: Callable[..., Any], as_indexing: bool) -> Callable[..., Any]:
    table = {**select_decomp_table(), **(AS_INDEXING if as_indexing else {})}

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        result: Callable[..., Any] = compile_fx(gm, inputs, decompositions=table)  # type: ignore[assignment]
        return result

    torch._dynamo.reset()
    call: Callable[..., Any] = torch.compile(program, backend=backend, dynamic=True)
    return call


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its rows and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench_cuts", description="Measure index ops fused and as kernels.")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--runs", type=positive, default=20, help="timed runs (on a GPU, milliseconds of runs)")
    options = parser.parse_args(argv)
    try:
        device = pick_device(options.device)
        check_toolchain(device)
    except UsageError as error:
        print(f"bench_cuts: {error}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
    on_gpu = device.type == "cuda"
    dtype, width, heads = (torch.bfloat16, 1024, (16, 8)) if on_gpu else (torch.float32, 512, (4, 2))
    print(f"machine  {machine(device)}")
    print(f"rows     {width} wide, {heads[0]} and {heads[1]} heads of 128, {dtype}")
    print(f"{'cut':<34}{'batch':<26}{'as indexing':>13}{'kernel':>13}{'indexing is':>14}", flush=True)
    for case in (Case(16, 2048, 1024), Case(16, 1280, 1024)) if on_gpu else (Case(16, 288, 256), Case(16, 128, 0)):
        for name, program, inputs in cuts(case, device, dtype, width, heads):
            seconds = []
            for as_indexing in (True, False):
                # torch's compile caches ignore decompositions, and would return the other program.
                with torch.no_grad(), torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
                    call = functools.partial(compiled(program, as_indexing), *inputs)
                    call()
                    seconds.append(seconds_of(call, device, options.runs))
            fused, kernel = seconds
            print(
                f"{name:<34}{case!s:<26}{fused * 1e3:>10.3f} ms{kernel * 1e3:>10.3f} ms{kernel / fused:>10.2f}x"
                + (" as fast"),
                flush=True,
            )
    chosen = sorted(op.name() for op in index_ops.decompositions(device))
    print("chosen   as indexing:", ", ".join(name.removeprefix("radix::") for name in chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())

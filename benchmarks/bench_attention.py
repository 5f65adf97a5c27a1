"""Time the attention of one layer: in full form, packed, and on the prefix tree in several implementations.

Run as `python -m benchmarks.bench_attention`, with `--backward` for forward and backward. The rows:

    full      torch's attention on all rows, padding included
    packed    `varlen_attn` on all rows without padding
    varlen    `varlen_attn` with the new nodes of each sequence as queries, and the gathered keys and values of its path
    flex      compiled FlexAttention on the nodes, with a block mask computed from the plan
    tree      the op `radix::tree_attention`

`varlen_attn` needs a GPU; FlexAttention has no backward on a CPU. TFLOP/s count the FLOPs that the tree needs: the
pairs of a node and an ancestor (or itself), times 4 * heads * head size, and 2.5 times that for the backward.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks import workloads
from benchmarks.demo import UsageError, check_toolchain, machine, pick_device, positive
from benchmarks.prefix_batches import PrefixBatch, one_prefix, rerank
from radix_compile.kernels.tree_arguments import TreeArrays
from radix_compile.kernels.tree_attention import code_for
from radix_compile.plan.torch_tiles import torch_tiles
from radix_compile.plan.triton_tiles import triton_tiles

SHAPES = {"0.6B": (16, 8, 128), "4B": (32, 8, 128), "8B": (32, 8, 128)}
"""Heads, key heads and head size of Qwen3."""
SMALL = (8, 4, 64)
BLOCK = 128


def cases(on_gpu: bool) -> Iterator[PrefixBatch]:
    if not on_gpu:
        yield from (one_prefix(16, 256, 32), one_prefix(16, 512, 32), one_prefix(32, 128, 32), rerank())
        yield from (one_prefix(8, 0, 256), one_prefix(1, 0, 512), one_prefix(512, 63, 1))
        return
    yield from (one_prefix(15, prefix, suffix) for prefix in (512, 1024, 2047) for suffix in (256, 1024))
    yield from (rerank(), one_prefix(16, 1024, 256), one_prefix(8, 0, 2048), one_prefix(4096, 127, 1))


class Tensors:
    """Random queries, keys and values of a case, in full, packed and compact form."""

    def __init__(self, case: PrefixBatch, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype):
        self.case, self.plan, self.device = case, case.plan(), device
        heads, groups, size = shape
        nodes = len(self.plan.fold)

        def random(count: int) -> Tensor:
            return torch.randn(1, nodes, count, size, device=device, dtype=dtype)

        compact = random(heads), random(groups), random(groups)
        begin, end = self.plan.tree()
        arrays = {"fold": self.plan.fold, "scatter": self.plan.scatter, "begin": begin, "end": end}
        if code_for(compact[0], compact[2]) == "triton":
            arrays |= triton_tiles(self.plan, begin, end).by_name()
        else:
            arrays |= torch_tiles(self.plan, begin, end, [None]).by_name()
        self.tree = TreeArrays(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
        rows = self.tree.scatter.clamp(min=0)
        batch, columns = case.ids.shape
        full = [tensor[0, rows].view(batch, columns, -1, size) for tensor in compact]
        self.compact = [self._leaf(tensor.transpose(1, 2)) for tensor in compact]
        self.full = [self._leaf(tensor.transpose(1, 2)) for tensor in full]
        kept = self.tree.scatter >= 0
        self.packed = [self._leaf(tensor.flatten(0, 1)[kept]) for tensor in full]
        self.nodes = [self._leaf(tensor[0].clone()) for tensor in compact]
        self.pairs = self.plan.pairs

    @staticmethod
    def _leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_()


def ways(tensors: Tensors) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
    """Yield each implementation: its name, the tensors that it has gradients for, and the call."""
    mask = None
    if tensors.case.is_padded:
        columns = torch.arange(tensors.case.ids.shape[1], device=tensors.device)
        is_token = tensors.case.mask.to(tensors.device).bool()
        mask = (columns <= columns[:, None]) & is_token[:, None, None, :]
    q, k, v = tensors.full

    def full() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    yield "full", tensors.full, full
    if tensors.device.type == "cuda":
        yield "packed", tensors.packed, _varlen_of_rows(tensors)
        yield "varlen", tensors.nodes, _varlen_of_nodes(tensors)
    yield "flex", tensors.compact, _flex(tensors)
    compact, scale = tensors.compact, q.shape[3] ** -0.5
    yield (
        "tree",
        compact,
        lambda: torch.ops.radix.tree_attention(*compact, *tensors.tree, None, None, scale, None, None)[0],
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest: tuple[int, int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    result: Any = varlen_attn(q, k, v, starts_q, starts_k, *longest, **options)
    return result  # type: ignore[no-any-return]


def _starts(lengths: Tensor, device: torch.device) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)


def _varlen_of_rows(tensors: Tensors) -> Callable[[], Tensor]:
    starts, longest = _starts(tensors.case.lengths, tensors.device), int(tensors.case.lengths.max())
    q, k, v = tensors.packed
    return lambda: _varlen(q, k, v, starts, starts, (longest, longest))


def _varlen_of_nodes(tensors: Tensors) -> Callable[[], Tensor]:
    plan, device = tensors.plan, tensors.device
    order = torch.from_numpy(plan.order)
    num_keys = tensors.case.lengths[order]
    num_queries = num_keys - torch.from_numpy(plan.shared)
    starts_q, starts_k = _starts(num_queries, device), _starts(num_keys, device)
    columns = tensors.case.ids.shape[1]
    rows = torch.cat([order[i] * columns + torch.arange(int(num_keys[i])) for i in range(len(order))]).to(device)
    path = tensors.tree.scatter[rows]
    longest = int(num_queries.max()), int(num_keys.max())
    q, k, v = tensors.nodes
    return lambda: _varlen(q, k.index_select(0, path), v.index_select(0, path), starts_q, starts_k, longest)


def _flex(tensors: Tensors) -> Callable[[], Tensor]:
    begin, end = tensors.tree.begin, tensors.tree.end
    nodes, block = len(begin), BLOCK
    num_blocks = -(-nodes // block)
    first = torch.arange(num_blocks, device=tensors.device) * block
    padded = F.pad(end, (0, num_blocks * block - nodes)).view(num_blocks, block)
    some = (padded.max(1).values > first[:, None]) & (first <= first[:, None])
    every = (padded.min(1).values >= first[:, None] + block) & (first + block - 1 <= first[:, None])

    def counts_and_indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
        return blocks.sum(1, dtype=torch.int32)[None, None], order[None, None]

    def ancestor(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[j])

    block_mask = BlockMask.from_kv_blocks(
        *counts_and_indices(some & ~every),
        *counts_and_indices(every),
        BLOCK_SIZE=block,
        mask_mod=ancestor,
        seq_lengths=(nodes, nodes),
    )
    call: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    on_cpu = tensors.device.type == "cpu"  # there it has no backward
    leaves = [tensor.detach() for tensor in tensors.compact] if on_cpu else tensors.compact
    return lambda: call(*leaves, block_mask=block_mask, enable_gqa=True)


def seconds_of(call: Callable[[], object], device: torch.device, runs: int) -> float:
    """Return the median seconds of a call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e-3 * float(do_bench(call, warmup=50, rep=runs * 10, return_mode="median"))
    call()
    return sorted(workloads.interleaved({"": call}, runs, device)[""])[runs // 2]


def measure(tensors: Tensors, runs: int, backward: bool) -> Iterator[tuple[str, float]]:
    """Yield the name and the median seconds of each implementation."""
    for name, leaves, attend in ways(tensors):
        if backward and name == "flex" and tensors.device.type == "cpu":
            continue

        def forward_and_backward(leaves: list[Tensor] = leaves, attend: Callable[[], Tensor] = attend) -> object:
            result = attend()
            return torch.autograd.grad(result, leaves, result.detach())

        with torch.set_grad_enabled(backward):
            yield name, seconds_of(forward_and_backward if backward else attend, tensors.device, runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its rows and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench_attention", description="Measure attention on the prefix tree.")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--model", choices=list(SHAPES), default="8B", help="use the heads of this model on a GPU")
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--runs", type=positive, default=20, help="timed runs (on a GPU, times 10 ms of runs)")
    options = parser.parse_args(argv)
    try:
        device = pick_device(options.device)
        check_toolchain(device)
    except UsageError as error:
        print(f"bench_attention: {error}", file=sys.stderr)
        return 2
    on_gpu = device.type == "cuda"
    shape, dtype = (SHAPES[options.model], torch.bfloat16) if on_gpu else (SMALL, torch.float32)
    print(f"machine  {machine(device)}")
    print(f"heads    {shape[0]}, {shape[1]} of keys, of size {shape[2]}, {dtype}")
    print(f"measured {'forward and backward' if options.backward else 'forward'}, medians")
    torch._dynamo.config.recompile_limit = 64
    for case in cases(on_gpu):
        tensors = Tensors(case, shape, device, dtype)
        flops = 4 * tensors.pairs * shape[0] * shape[2] * (3.5 if options.backward else 1)
        print(f"{case.name}: {case.tokens} tokens, {len(tensors.plan.fold)} nodes, {tensors.pairs:.3g} pairs")
        first = None
        for name, seconds in measure(tensors, options.runs, options.backward):
            first = first or seconds
            rate = flops / seconds / 1e12
            print(f"  {name:<8}{seconds * 1e3:>10.3f} ms{first / seconds:>9.2f}x{rate:>9.3g} TFLOP/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Attention of one layer: in full form, packed, and on the prefix tree by several ways.

Run as `python -m benchmarks.bench_attention`, with `--backward` for forward and backward. The ways:

    full      torch's attention on all rows, padding included
    packed    `varlen_attn` on all rows without padding
    varlen    `varlen_attn` with the new nodes of each sequence for queries, and keys and values spread along its path
    flex      compiled FlexAttention on the nodes, its block mask computed from the plan
    tree      the op `radix::tree_attention`

`varlen_attn` is for GPUs; FlexAttention has no backward on a CPU. TFLOP/s count what the tree needs: four times the
number of pairs of a node and an ancestor (or itself), times heads and head size; for the backward 2.5 times that more.
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
    """Query, key and value of a case, by row and by node."""

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
        full = [one[0, rows].view(batch, columns, -1, size) for one in compact]
        self.compact = [self._leaf(one.transpose(1, 2)) for one in compact]
        self.full = [self._leaf(one.transpose(1, 2)) for one in full]
        kept = self.tree.scatter >= 0
        self.packed = [self._leaf(one.flatten(0, 1)[kept]) for one in full]
        self.nodes = [self._leaf(one[0].clone()) for one in compact]
        self.pairs = self.plan.pairs

    @staticmethod
    def _leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_()


def ways(given: Tensors) -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
    """Name, leaves and call."""
    mask = None
    if given.case.is_padded:
        columns = torch.arange(given.case.ids.shape[1], device=given.device)
        shown = given.case.mask.to(given.device).bool()
        mask = (columns <= columns[:, None]) & shown[:, None, None, :]
    q, k, v = given.full

    def full() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    yield "full", given.full, full
    if given.device.type == "cuda":
        yield "packed", given.packed, _varlen_of_rows(given)
        yield "varlen", given.nodes, _varlen_of_nodes(given)
    yield "flex", given.compact, _flex(given)
    a, b, c = given.compact
    plan, scale = given.tree, q.shape[3] ** -0.5
    yield (
        "tree",
        given.compact,
        lambda: torch.ops.radix.tree_attention(a, b, c, *plan, None, None, scale, None, None)[0],
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


def _varlen_of_rows(given: Tensors) -> Callable[[], Tensor]:
    starts, longest = _starts(given.case.lengths, given.device), int(given.case.lengths.max())
    q, k, v = given.packed
    return lambda: _varlen(q, k, v, starts, starts, (longest, longest))


def _varlen_of_nodes(given: Tensors) -> Callable[[], Tensor]:
    plan, lengths = given.plan, given.case.lengths
    order = torch.from_numpy(plan.order)
    whole = lengths[order]
    new = whole - torch.from_numpy(plan.shared)
    starts_q, starts_k = _starts(new, given.device), _starts(whole, given.device)
    columns = given.case.ids.shape[1]
    rows = torch.cat([order[i] * columns + torch.arange(int(whole[i])) for i in range(len(order))]).to(given.device)
    path = given.tree.scatter[rows]
    longest = int(new.max()), int(whole.max())
    q, k, v = given.nodes
    return lambda: _varlen(q, k.index_select(0, path), v.index_select(0, path), starts_q, starts_k, longest)


def _flex(given: Tensors) -> Callable[[], Tensor]:
    begin, end = given.tree.begin, given.tree.end
    nodes, block = len(begin), BLOCK
    count = -(-nodes // block)
    first = torch.arange(count, device=given.device) * block
    padded = F.pad(end, (0, count * block - nodes)).view(count, block)
    some = (padded.max(1).values > first[:, None]) & (first <= first[:, None])
    every = (padded.min(1).values >= first[:, None] + block) & (first + block - 1 <= first[:, None])

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
        return blocks.sum(1, dtype=torch.int32)[None, None], order[None, None]

    def ancestor(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[j])

    blocks = BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=block, mask_mod=ancestor, seq_lengths=(nodes, nodes)
    )
    call: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    on_cpu = given.device.type == "cpu"  # which is for inference only
    leaves = [one.detach() for one in given.compact] if on_cpu else given.compact
    return lambda: call(*leaves, block_mask=blocks, enable_gqa=True)


def seconds_of(call: Callable[[], object], device: torch.device, runs: int) -> float:
    """Median seconds."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e-3 * float(do_bench(call, warmup=50, rep=runs * 10, return_mode="median"))
    call()
    return sorted(workloads.interleaved({"": call}, runs, device)[""])[runs // 2]


def measure(given: Tensors, runs: int, backward: bool) -> Iterator[tuple[str, float]]:
    for name, leaves, attend in ways(given):
        if backward and name == "flex" and given.device.type == "cpu":
            continue

        def both(leaves: list[Tensor] = leaves, attend: Callable[[], Tensor] = attend) -> object:
            result = attend()
            return torch.autograd.grad(result, leaves, result.detach())

        with torch.set_grad_enabled(backward):
            yield name, seconds_of(both if backward else attend, given.device, runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints as it goes and returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench_attention", description="Measure attention on the prefix tree.")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--model", choices=list(SHAPES), default="8B", help="whose heads, on a GPU")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--runs", type=positive, default=20, help="timed runs, on a GPU tens of milliseconds of them")
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
        given = Tensors(case, shape, device, dtype)
        needed = 4 * given.pairs * shape[0] * shape[2] * (3.5 if options.backward else 1)
        print(f"{case.name}: {case.tokens} tokens, {len(given.plan.fold)} nodes, {given.pairs:.3g} pairs")
        first = None
        for name, seconds in measure(given, options.runs, options.backward):
            first = first or seconds
            rate = needed / seconds / 1e12
            print(f"  {name:<8}{seconds * 1e3:>10.3f} ms{first / seconds:>9.2f}x{rate:>9.3g} TFLOP/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

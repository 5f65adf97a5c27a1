"""Time the index ops against torch's index ops, and against a copy of as many bytes.

Run as `python -m benchmarks.bench_index_kernels`. Bytes count every input row and every output row once. "of a copy" is
the bandwidth relative to a contiguous copy of as many bytes. The first rows are of one tensor, at row widths from one
number to a vocabulary; the last ones are of the Q, K and V of a layer, one by one and in one launch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import workloads
from benchmarks.demo import UsageError, check_toolchain, machine, pick_device, positive
from radix_compile.kernels import index_ops  # noqa: F401 - importing it registers the ops
from radix_compile.plan.prefix_plan import PrefixPlan

radix = torch.ops.radix

WIDTHS = {"4 B": 2, "32 B": 16, "256 B": 128, "1 KiB": 512, "2 KiB": 1024, "8 KiB": 4096, "logits": 151_936}
"""Entries of a row, in bfloat16."""


@dataclass(frozen=True)
class Case:
    """A batch of ``batch`` sequences of ``seq`` tokens, which share their first ``prefix`` tokens."""

    batch: int
    seq: int
    prefix: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.seq}, {self.prefix} shared"

    def indices(self, device: torch.device) -> list[Tensor]:
        """Return ``fold``, ``scatter``, ``rows``, ``starts`` and ``pieces``."""
        ids = torch.arange(self.batch * self.seq).view(self.batch, self.seq)
        ids[:, : self.prefix] = ids[0, : self.prefix]
        plan = PrefixPlan.from_rows(ids)
        return [torch.from_numpy(array).to(device) for array in (plan.fold, plan.scatter, *plan.row_lists())]


@dataclass(frozen=True)
class Measured:
    op: str
    peer: str
    width: str
    case: Case
    seconds: float
    peer_seconds: float
    copy_seconds: float
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.op:<13}{self.width:>8}  {self.case!s:<24}{self.bytes / self.seconds / 1e9:>9,.0f} GB/s"
            f"{self.copy_seconds / self.seconds:>10.0%}{self.peer_seconds / self.seconds:>12.2f}x  {self.peer}"
        )


def seconds_of(call: Callable[[], object], device: torch.device, runs: int) -> float:
    """Return the median seconds of a call; on a GPU, without launch overhead (a CUDA graph is replayed)."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        with torch.cuda.stream(torch.cuda.Stream()):
            return 1e-3 * float(do_bench_cudagraph(call, rep=runs, return_mode="median"))
    call()
    return sorted(workloads.interleaved({"": call}, runs, device)[""])[runs // 2]


def copy_seconds(moved: int, device: torch.device, runs: int) -> float:
    """Return the seconds of reading half of the bytes and writing the other half, by the faster of two kernels."""
    source = torch.randn(max(moved // 4, 1), device=device).bfloat16()
    target = torch.empty_like(source)
    calls = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return min(seconds_of(call, device, runs) for call in calls)


def one_tensor(case: Case, width: str, device: torch.device, runs: int) -> Iterator[Measured]:
    fold, scatter, *lists = case.indices(device)
    full = torch.randn(case.batch, case.seq, WIDTHS[width], device=device).bfloat16()
    compact = torch.randn(1, len(fold), WIDTHS[width], device=device).bfloat16()
    shape = case.batch, case.seq
    flat, nodes = full.flatten(0, 1), compact[0]

    def sum_by_torch() -> Tensor:
        return torch.zeros_like(nodes).index_add_(0, scatter, flat)

    def place_by_torch() -> Tensor:
        return torch.zeros_like(flat).index_add_(0, fold, nodes)

    both = flat.nbytes + nodes.nbytes
    for op, peer, moved, ours, theirs in (
        ("scatter_rows", "index_select", both,
         lambda: radix.scatter_rows(compact, scatter, *[None] * 4, *shape, 0, 1, False),
         lambda: nodes.index_select(0, scatter)),
        ("fold_rows", "index_select", 2 * nodes.nbytes, lambda: radix.fold_rows(full, fold, scatter, 0, 1),
         lambda: flat.index_select(0, fold)),
        ("sum_rows", "zeros, index_add_", both, lambda: radix.sum_rows(full, scatter, fold, *lists, 0, 1),
         sum_by_torch),
        ("place_rows", "zeros, index_add_", both, lambda: radix.place_rows(compact, fold, scatter, *shape, 0, 1),
         place_by_torch),
    ):  # fmt: skip
        copied = copy_seconds(moved, device, runs)
        times = seconds_of(ours, device, runs), seconds_of(theirs, device, runs)
        yield Measured(op, peer, width, case, *times, copied, moved)


def one_layer(case: Case, device: torch.device, runs: int) -> Iterator[Measured]:
    """Time queries of 16 heads, and keys and values of 8 heads, of size 128."""
    fold, scatter, *lists = case.indices(device)

    def heads(batch: int, seq: int) -> list[Tensor]:
        shapes = [(batch, seq, num_heads, 128) for num_heads in (16, 8, 8)]
        return [torch.randn(shape, device=device).bfloat16().transpose(1, 2) for shape in shapes]

    full, compact = heads(case.batch, case.seq), heads(1, len(fold))
    moved = sum(tensor.nbytes for tensor in (*full, *compact))
    shape, dims_of_each, dims = (case.batch, case.seq), ([0, 0, 0], [2, 2, 2]), (0, 2)
    copied = copy_seconds(moved, device, runs)
    for op, in_one_launch, one_by_one in (
        ("scatter_rows",
         lambda: radix.foreach_scatter_rows(compact, scatter, *[None] * 4, *shape, *dims_of_each, False),
         lambda: [radix.scatter_rows(tensor, scatter, *[None] * 4, *shape, *dims, False) for tensor in compact]),
        ("sum_rows", lambda: radix.foreach_sum_rows(full, scatter, fold, *lists, *dims_of_each),
         lambda: [radix.sum_rows(tensor, scatter, fold, *lists, *dims) for tensor in full]),
    ):  # fmt: skip
        times = seconds_of(in_one_launch, device, runs), seconds_of(one_by_one, device, runs)
        yield Measured(op, "one by one", "Q, K, V", case, *times, copied, moved)


def launch_microseconds(device: torch.device, calls: int = 200) -> str:
    """Return the CPU time of a call of each op, as text. A busy GPU hides this launch overhead."""
    case = Case(4, 64, 32)
    fold, scatter, *lists = case.indices(device)
    compact, full = torch.randn(1, len(fold), 64, device=device), torch.randn(4, 64, 64, device=device)
    times = []
    ops: dict[str, Callable[[], object]] = {
        "index_select": lambda: compact.index_select(1, scatter),
        "fold_rows": lambda: radix.fold_rows(full, fold, scatter, 0, 1),
        "scatter_rows": lambda: radix.scatter_rows(compact, scatter, *[None] * 4, 4, 64, 0, 1, False),
        "sum_rows of 3": lambda: radix.foreach_sum_rows([full] * 3, scatter, fold, *lists, [0] * 3, [1] * 3),
    }
    for name, call in ops.items():
        for _ in range(20):
            call()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(f"{name} {(time.perf_counter() - start) / calls * 1e6:.0f} us")
        torch.cuda.synchronize(device)
    return ", ".join(times)


def cases(device: torch.device, rows: int) -> list[Case]:
    """Return 16 sequences that share half, 128 that share nothing, and thousands that share one token."""
    thousands = min(4096, rows // 2)
    return [Case(16, rows // 16, rows // 32), Case(128, rows // 128, 0), Case(thousands, rows // thousands, 1)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its rows and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench_index_kernels", description="Measure the index ops.")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--runs", type=positive, default=20, help="timed runs (on a GPU, milliseconds of runs)")
    parser.add_argument("--rows", type=positive, help="rows of the full tensors (default: a size for the device)")
    options = parser.parse_args(argv)
    try:
        device = pick_device(options.device)
        check_toolchain(device)
    except UsageError as error:
        print(f"bench_index_kernels: {error}", file=sys.stderr)
        return 2
    print(f"machine  {machine(device)}")
    print(f"{'op':<13}{'row':>8}  {'batch':<24}{'moved':>14}{'of a copy':>10}{'speedup':>13}  over", flush=True)
    base_rows = {"cpu": 2**13, "cuda": 2**18}[device.type]
    for width, entries in WIDTHS.items():
        rows = options.rows or max(256, min(base_rows * 32, base_rows * 1024 // entries))
        for case in cases(device, rows):
            for result in one_tensor(case, width, device, options.runs):
                print(result, flush=True)
    for case in cases(device, options.rows or base_rows // 4):
        for result in one_layer(case, device, options.runs):
            print(result, flush=True)
    if device.type == "cuda":
        print(f"calls    {launch_microseconds(device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

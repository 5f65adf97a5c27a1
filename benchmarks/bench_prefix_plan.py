"""Time prefix plans against the radix-mlp package (the published RadixMLP, arXiv 2601.15013).

    python -m benchmarks.bench_prefix_plan [--quick] [--without-extension] [--output FILE]

Batches are random tokens after one prefix that all sequences share; with a share of 100%, all sequences are equal.
`ours` is `compute_fold_and_scatter`, with all four outputs, on the same arrays as the package, in alternating runs.
`rows` is `PrefixPlan.from_rows` on int64 ids and positions. Times are medians of warm calls.

The second table has the parts of a plan that a call of a compiled model computes on the CPU: `rows`, `tree` for
attention on the prefix tree, `tiles` on GPUs, `lists` in training.

The exit status is 1 if a batch of 8 sequences or more takes longer than with the package, or if the batch of 2048 x 512
tokens with a share of 25% is less than ten times as fast. There is no margin for noise, but a batch that fails is
measured again, and the second measurement counts.

One kind of batch, not in the table, is up to two and a half times slower than with the package: hundreds of unsorted
sequences of at most a few tokens, nearly all of them equal. Such a batch takes microseconds either way.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from radix_mlp import compute_fold_and_scatter as package

from benchmarks.prefix_batches import one_prefix, rerank
from radix_compile.plan import fold_and_scatter
from radix_compile.plan.fold_and_scatter import compute_fold_and_scatter
from radix_compile.plan.prefix_plan import PrefixPlan
from radix_compile.plan.triton_tiles import triton_tiles

VOCABULARY = 50_000
EQUAL = [(8, 1), (8, 4), (8, 16), (8, 64), (8, 512), (32, 16), (32, 128), (32, 2304), (128, 4), (128, 32), (128, 512)]
EQUAL += [(1024, 1), (1024, 4), (1024, 64), (2048, 512), (4096, 512)]
QUICK = [(8, 4), (8, 64), (32, 128), (128, 512), (2048, 512)]
SHARES = (0.0, 0.25, 0.5, 0.9, 1.0)
HEADLINE, HEADLINE_RATIO = (2048, 512, 0.25, "equal"), 10.0


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    load = f", load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    path = "C extension" if fold_and_scatter.extension else "NumPy only"
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, radix-mlp {version('radix-mlp')}"
    return f"{model}, {os.cpu_count()} cores{load}, {platform.system()}, {versions}, {path}"


def packed_batch(batch: int, length: int, share: float, ragged: bool) -> tuple[np.ndarray[Any, Any], ...]:
    """Return uint32 ids, positions and bounds. Ragged sequences have between 0.5 and 1.5 times `length` tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(length // 2, length + length // 2 + 1, batch) if ragged else np.full(batch, length)
    ids = rng.integers(0, VOCABULARY, (batch, int(lengths.max())))
    shared = round(share * (ids.shape[1] if share == 1 else length))
    ids[:, :shared] = ids[0, :shared]
    kept = np.arange(ids.shape[1]) < lengths[:, None]
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)[kept]
    bounds = np.concatenate([[0], lengths.cumsum()])
    return tuple(array.astype(np.uint32) for array in (ids[kept], positions, bounds))


def medians(functions: list[Callable[[], object]], budget_s: float) -> list[float]:
    """Return the median milliseconds of each function. They alternate for `budget_s` seconds, at least three rounds."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    stop = time.perf_counter() + budget_s
    while len(times[0]) < 3 or (time.perf_counter() < stop and len(times[0]) < 2000):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) * 1e3 for seconds in times]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer batches, and less time for each")
    parser.add_argument("--without-extension", action="store_true", help="measure NumPy in place of the C extension")
    parser.add_argument("--output", type=Path, help="also write the output to this file")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    if arguments.without_extension:
        fold_and_scatter.extension = None
    cases = [(b, s, share, "equal") for b, s in (QUICK if quick else EQUAL) for share in SHARES]
    cases += [(b, s, 0.25, "ragged") for b, s in (QUICK if quick else EQUAL)]
    if quick:
        cases = [case for case in cases if case[2] in (0.25, 1.0)]

    lines: list[str] = []

    def show(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    show(machine())
    show("sequences tokens shared lengths  package ms   ours ms  ratio   rows ms")
    failures: list[str] = []
    budget_s = 0.2 if quick else 0.5
    for case in cases:
        batch, length, share, lengths = case
        ids, positions, bounds = packed_batch(batch, length, share, lengths == "ragged")
        pair: list[Callable[[], object]] = [
            partial(package, ids, positions, bounds),
            partial(compute_fold_and_scatter, ids, positions, bounds),
        ]
        required = HEADLINE_RATIO if case == HEADLINE else 1.0
        theirs, ours = medians(pair, budget_s)
        if theirs / ours < required:
            theirs, ours = medians(pair, budget_s)
        rows = float("nan")
        if lengths == "equal":
            keys = [array.astype(np.int64).reshape(batch, length) for array in (ids, positions)]
            (rows,) = medians([partial(PrefixPlan.from_rows, *keys)], budget_s / 2)
        ratio = theirs / ours
        name = f"{batch:9} {length:6} {share:6.0%} {lengths:>7}"
        mark = "  <" if ratio < required else ""
        show(f"{name} {theirs:11.4f} {ours:9.4f} {ratio:5.1f}x {rows:9.4f}{mark}")
        if batch >= 8 and ratio < required:
            failures.append(f"{name}: {ratio:.2f}x, required {required:.0f}x")
    show("\nbatch                    rows ms   tree ms  tiles ms  lists ms")
    for call in (one_prefix(15, 2047, 256), one_prefix(15, 512, 1024), one_prefix(16, 1024, 256), rerank()):
        plan = call.plan()
        parts: list[Callable[[], object]] = [
            partial(PrefixPlan.from_rows, call.ids),
            plan.tree,
            partial(triton_tiles, plan, *plan.tree()),
            plan.row_lists,
        ]
        show(f"{call.name:<22}{''.join(f'{ms:10.4f}' for ms in medians(parts, budget_s))}")
    if failures:
        show(f"\n{len(failures)} of {len(cases)} batches are too slow (marked <):")
        show("\n".join(failures))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

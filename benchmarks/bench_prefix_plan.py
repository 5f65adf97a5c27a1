"""How long the prefix plans take, against the radix-mlp package (the published RadixMLP, arXiv 2601.15013).

    python -m benchmarks.bench_prefix_plan [--quick]

Batches are random tokens behind one prefix that all sequences share; a share of 1 is one sequence over and over.
`ours` is `compute_fold_and_scatter`, all four outputs included, on the same arrays and in turn with the package;
`rows` is `PrefixPlan.from_rows` on int64 ids and positions.  Times are medians of warm calls.

The exit status is 1 if a batch of 8 sequences or more takes longer than the package takes, or if the batch of
2048 x 512 tokens, a quarter of them shared, is less than ten times as fast.
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
from pathlib import Path
from typing import Any

import numpy as np
from radix_mlp import compute_fold_and_scatter as package

from radix_compile.prefix_plan import PrefixPlan, compute_fold_and_scatter

VOCABULARY = 50_000
EQUAL = [(8, 4), (8, 16), (8, 64), (8, 512), (32, 16), (32, 128), (32, 2304), (128, 4), (128, 32), (128, 512)]
EQUAL += [(1024, 4), (1024, 64), (2048, 512), (4096, 512)]
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
    return f"{model}, {os.cpu_count()} cores{load}, Python {platform.python_version()}, NumPy {np.__version__}"


def packed_batch(batch: int, length: int, share: float, ragged: bool) -> tuple[np.ndarray[Any, Any], ...]:
    """uint32 ids, positions and bounds; ragged sequences have half to one and a half times `length` tokens."""
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
    """Median milliseconds of each function, called in turn until the budget is spent (three rounds at least)."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    stop = time.perf_counter() + budget_s
    while len(times[0]) < 3 or (time.perf_counter() < stop and len(times[0]) < 2000):
        for function, measured in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured) * 1e3 for measured in times]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer batches, less time for each")
    quick: bool = parser.parse_args().quick
    cases = [(b, s, share, "equal") for b, s in (QUICK if quick else EQUAL) for share in SHARES]
    cases += [(b, s, 0.25, "ragged") for b, s in (QUICK if quick else EQUAL)]
    if quick:
        cases = [case for case in cases if case[2] in (0.25, 1.0)]

    print(machine())
    print(f"{'sequences':>9} {'tokens':>6} {'shared':>6} {'lengths':>7} {'package ms':>11} {'ours ms':>9} "
          f"{'ratio':>6} {'rows ms':>9}")  # fmt: skip
    missed: list[str] = []
    for case in cases:
        batch, length, share, lengths = case
        ids, positions, bounds = packed_batch(batch, length, share, lengths == "ragged")
        functions: list[Callable[[], object]] = [
            partial(package, ids, positions, bounds),
            partial(compute_fold_and_scatter, ids, positions, bounds),
        ]
        if lengths == "equal":
            keys = [array.astype(np.int64).reshape(batch, length) for array in (ids, positions)]
            functions.append(partial(PrefixPlan.from_rows, *keys))
        theirs, ours, *rows = medians(functions, 0.2 if quick else 0.5)
        ratio = theirs / ours
        wanted = HEADLINE_RATIO if case == HEADLINE else 1.0
        name = f"{batch:9} {length:6} {share:6.0%} {lengths:>7}"
        print(f"{name} {theirs:11.4f} {ours:9.4f} {ratio:5.1f}x {rows[0] if rows else float('nan'):9.4f}"
              + ("  <" if ratio < wanted else ""))  # fmt: skip
        if batch >= 8 and ratio < wanted:
            missed.append(f"{name}: {ratio:.2f}x, wanted {wanted:.0f}x")
    if missed:
        print(f"\n{len(missed)} of {len(cases)} batches are slower than they have to be (marked <):")
        print("\n".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

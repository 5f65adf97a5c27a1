"""Time a data set in batches of several orders: as it comes, sorted by length, and ordered for sharing.

Run as `python -m benchmarks.bench_batching`. The prompts are a reranker's: an instruction, a query, a passage.
Each row of the table runs all prompts through one model, with plain inductor and with radix.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import radix_compile
from benchmarks import workloads
from benchmarks.demo import PLAIN, RADIX, UsageError, check_toolchain, machine, pick_device, positive
from radix_compile.plan.batching import SharedPrefixBatchSampler

Batches = list[dict[str, Tensor]]


def orders(prompts: list[str], size: int) -> dict[str, list[list[int]]]:
    """Return batches of indices for each order: as the prompts come, by length (as embedding tools do), for sharing."""
    as_they_come = list(range(len(prompts)))
    lengths = [len(ids) for ids in workloads.tokenizer()(prompts)["input_ids"]]
    by_length = sorted(as_they_come, key=lengths.__getitem__)
    starts = range(0, len(prompts), size)
    return {
        "as they come": [as_they_come[start : start + size] for start in starts],
        "by length": [by_length[start : start + size] for start in starts],
        "for sharing": list(SharedPrefixBatchSampler(prompts, size)),
    }


def epoch(run: Callable[..., object], batches: Batches) -> Callable[[], None]:
    """Return a function that runs all batches."""

    def run_batches() -> None:
        with torch.no_grad():
            for batch in batches:
                run(**batch, use_cache=False)

    return run_batches


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its rows and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench_batching", description="Measure orders of a data set.")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--queries", type=positive, default=16, help="(default: %(default)s)")
    parser.add_argument("--passages", type=positive, default=8, help="for each query (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=16, help="(default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=4, help="layers of the model (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=5, help="timed passes over the prompts (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        device = pick_device(options.device)
        check_toolchain(device)
    except UsageError as error:
        print(f"bench_batching: {error}", file=sys.stderr)
        return 2
    prompts = workloads.rerank_prompts(options.queries, options.passages)
    random.Random(0).shuffle(prompts)
    model = workloads.qwen3(layers=options.layers).to(device)
    compiled = {name: torch.compile(model, backend=name, dynamic=True) for name in (PLAIN, RADIX)}
    print(f"machine  {machine(device)}")
    print(f"prompts  {len(prompts)}: {options.queries} queries with {options.passages} passages, in random order")
    print(f"{'order':<14}{'padded':>9}{'tokens':>9}{'compact':>9}{PLAIN:>12}{RADIX:>12}{'speedup':>9}", flush=True)
    for name, batches in orders(prompts, options.batch_size).items():
        inputs = [
            {key: value.to(device) for key, value in workloads.tokenize([prompts[i] for i in batch]).items()}
            for batch in batches
        ]
        calls: dict[str, Callable[[], object]] = {backend: epoch(run, inputs) for backend, run in compiled.items()}
        for call in calls.values():
            call()
        radix_compile.reset_stats()
        seconds = workloads.interleaved(calls, options.runs, device)
        stats = radix_compile.stats()
        padded = sum(batch["input_ids"].numel() for batch in inputs)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in inputs)
        compact = stats.compact_tokens // options.runs if stats.folded_calls else padded
        plain, radix = (statistics.median(seconds[backend]) for backend in (PLAIN, RADIX))
        print(
            f"{name:<14}{padded:>9,}{tokens:>9,}{compact:>9,}{plain:>10.2f} s{radix:>10.2f} s{plain / radix:>8.2f}x",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

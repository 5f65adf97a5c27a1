"""Time the overhead of the radix backend on a batch that shares nothing: all sequences start with different tokens.

Run as `python -m benchmarks.bench_overhead` with the package installed. Exits with 1 if the radix backend is more than
2 % slower than plain inductor.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import radix_compile
from benchmarks import workloads
from benchmarks.demo import PLAIN, RADIX, UsageError, check_toolchain, describe, machine, pick_device, positive

ALLOWED = 1.02
"""The largest allowed ratio of the radix backend's time to plain inductor's."""


def unshared_batch(rows: int, length: int, vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random token ids [rows, length] whose first tokens are all different, and a mask of ones."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    ids[:, 0] = 1 + torch.randperm(vocabulary - 1, generator=generator)[:rows]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print the overhead and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench_overhead", description="Measure the cost of sharing nothing.")
    parser.add_argument("--rows", type=positive, default=16, help="sequences in the batch (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=128, help="tokens in each of them (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=25, help="timed runs of each backend (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    options = parser.parse_args(argv)
    max_rows = len(workloads.tokenizer()) - 1
    if options.rows > max_rows:
        parser.error(f"--rows must be at most {max_rows:,}, the number of different first tokens")
    try:
        device = pick_device(options.device)
        check_toolchain(device)
    except UsageError as error:
        print(f"bench_overhead: {error}", file=sys.stderr)
        return 2

    model = workloads.qwen3().to(device)
    batch = unshared_batch(options.rows, options.length, model.config.vocab_size)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    print(f"machine  {machine(device)}")
    print(f"model    {describe(model)}")
    print(f"batch    {options.rows} sequences of {options.length} tokens, none of them shared", flush=True)

    def call_with(backend: str) -> Callable[[], object]:
        forward: Callable[..., Any] = torch.compile(model.forward, backend=backend)
        return lambda: forward(**batch, use_cache=False).logits

    calls = {name: call_with(name) for name in (PLAIN, RADIX)}
    with torch.inference_mode():
        workloads.interleaved(calls, 2, device)  # compiles, then warms up
        radix_compile.reset_stats()
        seconds = workloads.interleaved(calls, options.runs, device)
    stats = radix_compile.stats()

    # The two runs of a round are close in time, so their ratio varies less than the ratio of the medians.
    ratio = statistics.median(radix / plain for plain, radix in zip(seconds[PLAIN], seconds[RADIX], strict=True))
    print(f"folded   {stats.folded_calls:,} of {stats.calls:,} calls")
    print(f"plan     {stats.plan_seconds / max(stats.calls, 1) * 1e3:,.2f} ms a call")
    print(f"plain    {statistics.median(seconds[PLAIN]) * 1e3:,.1f} ms")
    print(f"radix    {statistics.median(seconds[RADIX]) * 1e3:,.1f} ms")
    print(f"ratio    {ratio:.3f}, at most {ALLOWED:g} allowed")
    return 0 if ratio <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())

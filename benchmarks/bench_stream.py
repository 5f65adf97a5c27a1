"""Time reranking on a stream of batches of ever new sizes, of which the last token of each sequence is read.

Run as `python -m benchmarks.bench_stream`. The model has the sizes of Qwen3 and random weights, and returns the hidden
state of each sequence's last token. The rows:

    plain     inductor, padding included, with dynamic shapes
    packed    inductor on one row without padding, with `varlen_attn` and dynamic shapes (GPUs only)
    radix     radix (`fold="always"`), with dynamic shapes
    auto      radix with its default options

All programs run on the same batches. The first calls compile and are not timed; each other call is timed once, on a
batch that the program has not seen. The last columns count rows: computed by the program, and distinct prefixes of the
tokens that are read.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import radix_compile
from benchmarks import workloads
from benchmarks.bench_models import MODELS, PACKED, VOCABULARY
from benchmarks.demo import UsageError, check_toolchain, machine, pick_device, positive
from benchmarks.prefix_batches import rerank_stream

NAMES = ("plain", "packed", "radix", "auto")
LONGEST = 60 + 24 + 130 + 9
"""The longest sequence that the stream may have: `varlen_attn` is given a bound that is the same for all batches."""


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    mask: Tensor
    left: bool

    @property
    def last(self) -> Tensor:
        """The column of the last token of each sequence, ``[B]``."""
        seq = self.ids.shape[1]
        return self.mask.new_full((len(self.ids),), seq - 1) if self.left else self.mask.sum(1) - 1

    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids and positions ``[1, T]`` without padding, where sequences start, and where they end."""
        lengths = self.mask.sum(1)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        positions = (self.mask.cumsum(1) - 1)[self.mask > 0]
        return self.ids[self.mask > 0][None], positions[None], starts, starts[1:].long() - 1

    def distinct(self) -> int:
        """The number of distinct prefixes of the sequences. (Padding is no part of them.)"""
        sequences = [ids[mask > 0].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]
        return len({tuple(sequence[: i + 1]) for sequence in sequences for i in range(len(sequence))})


def programs(model: Any, names: Sequence[str]) -> dict[str, Callable[[Batch], Tensor]]:
    """The programs by the name of their row."""

    def pooled(ids: Tensor, mask: Tensor, last: Tensor) -> Tensor:
        hidden: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(ids), device=ids.device), last]

    def pooled_packed(ids: Tensor, positions: Tensor, starts: Tensor, last: Tensor) -> Tensor:
        PACKED.starts, PACKED.longest = starts, LONGEST
        hidden: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return hidden[0, last]

    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "packed": {},
        "radix": {"backend": "radix", "options": {"fold": "always"}},
        "auto": {"backend": "radix"},
    }
    made: dict[str, Callable[[Batch], Tensor]] = {}
    for name in names:
        compiled = torch.compile(pooled_packed if name == "packed" else pooled, dynamic=True, **options[name])

        def call(batch: Batch, name: str = name, compiled: Any = compiled) -> Tensor:
            model.config._attn_implementation = "packed" if name == "packed" else "sdpa"
            inputs = batch.packed() if name == "packed" else (batch.ids, batch.mask, batch.last)
            result: Tensor = compiled(*inputs)
            return result

        made[name] = call
    return made


def seconds_of(call: Callable[[Batch], Tensor], batch: Batch) -> float:
    on_gpu = batch.ids.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call(batch)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its rows and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench_stream", description="Measure reranking on batches of new sizes.")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--model", choices=list(MODELS), help="sizes of the model (default: 8B, small on a CPU)")
    parser.add_argument("--layers", type=positive, help="number of layers (default: the model's)")
    parser.add_argument("--batches", type=positive, default=64, help="batches (default: %(default)s)")
    parser.add_argument("--warm", type=positive, default=4, help="calls that are not timed (default: %(default)s)")
    parser.add_argument("--padding", choices=["right", "left"], default="right", help="(default: %(default)s)")
    parser.add_argument("--queries", type=positive, default=4, help="queries of a batch (default: %(default)s)")
    parser.add_argument("--passages", type=positive, default=10, help="passages of a query (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=NAMES, default=NAMES, help="only these rows")
    options = parser.parse_args(argv)
    if options.batches <= options.warm:
        parser.error("--batches must be more than --warm")
    try:
        device = pick_device(options.device)
        check_toolchain(device)
    except UsageError as error:
        print(f"bench_stream: {error}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    on_gpu = device.type == "cuda"
    name = options.model or ("8B" if on_gpu else "small")
    sizes = {**MODELS[name], **({"layers": options.layers} if options.layers else {})}
    transformers.AttentionInterface.register("packed", PACKED)
    with torch.device(device):
        causal = workloads.qwen3(**sizes, vocabulary=VOCABULARY)
    model = causal.model.to(device, torch.bfloat16 if on_gpu else torch.float32).eval()
    left = options.padding == "left"
    drawn = rerank_stream(options.batches, options.queries, options.passages, left=left)
    batches = [Batch(ids.to(device), mask.to(device), left) for ids, mask in drawn]
    timed = batches[options.warm :]
    rows, tokens = (sum(int(count) for count in counts) for counts in zip(*map(_counts, timed), strict=True))
    distinct = sum(batch.distinct() for batch in timed)
    print(f"machine  {machine(device)}")
    print(f"model    Qwen3-{name}, {sizes['layers']} layers, {next(model.parameters()).dtype}")
    print(f"batches  {len(timed)} of {options.queries} x {options.passages}, {options.padding} padding: ", end="")
    print(f"{rows} rows, {tokens} tokens, {distinct} distinct prefixes")
    ways = [way for way in NAMES if way in options.ways and (on_gpu or way != "packed")]
    plain_seconds, expected = None, None
    with torch.no_grad():
        for way in ways:
            torch._dynamo.reset()
            call = programs(model, [way])[way]
            compile_seconds = sum(seconds_of(call, batch) for batch in batches[: options.warm])
            radix_compile.reset_stats()
            seconds = [seconds_of(call, batch) for batch in timed]
            stats = radix_compile.stats()
            result = call(timed[-1])
            expected = result if expected is None else expected
            difference = float((result - expected).float().norm() / expected.float().norm())
            plain_seconds = plain_seconds or seconds
            ratio = statistics.median(a / b for a, b in zip(plain_seconds, seconds, strict=True))
            # In calls that ran plain every row is computed.
            of_plain = rows - stats.tokens if way in ("radix", "auto") else 0
            computed = {"plain": rows, "packed": tokens}.get(way, stats.compact_tokens + of_plain)
            median, total = statistics.median(seconds) * 1e3, sum(seconds)
            print(
                f"  {way:<8}{median:>9.2f} ms{ratio:>7.2f}x  total {total:>6.2f} s  computed {computed:>7}"
                f" ({computed / distinct:.3f} of distinct)  first calls {compile_seconds:>6.1f} s"
                f"  error {difference:.1e}",
                flush=True,
            )
    return 0


def _counts(batch: Batch) -> tuple[int, int]:
    return batch.ids.numel(), int(batch.mask.sum())


if __name__ == "__main__":
    sys.exit(main())

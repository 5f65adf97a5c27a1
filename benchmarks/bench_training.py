"""Time training steps on groups of completions, and their memory: plain inductor against radix.

Run as `python -m benchmarks.bench_training`. A step is a forward pass, the cross-entropy of the completions, a backward
pass, and an AdamW update. The batch has `--sequences` sequences of `--length` tokens without padding, `G` for each
prompt; "prompt" is the share of the prompt in a sequence. The model is an unmodified Qwen3 of transformers with random
weights: on a GPU with the sizes of Qwen3-0.6B in bfloat16, on a CPU a small one.

"bound" is tokens / distinct prefixes, the speedup if all cost were per token. "saved" is the memory that autograd saves
for the backward pass, "peak" the most memory allocated in a step, each with plain inductor and with radix.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import radix_compile
from benchmarks import workloads
from benchmarks.demo import PLAIN, RADIX, UsageError, check_toolchain, describe, machine, pick_device, positive

SHARES = (0.0, 0.25, 0.5, 0.75, 0.95)
GROUPS = (1, 4, 16)


def group_batch(sequences: int, length: int, group: int, share: float, vocabulary: int) -> dict[str, Tensor]:
    """Return random ids [sequences, length], `group` for each prompt, and labels that ignore the prompts (-100)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (sequences, length), generator=generator)
    prompt = round(share * length)
    for first in range(0, sequences, group):
        ids[first : first + group, :prompt] = ids[first, :prompt].clone()
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


class Trained:
    """A model that is trained with one backend."""

    def __init__(self, model: Any, backend: str, fused: bool) -> None:
        def loss(**batch: Tensor) -> Tensor:
            result: Tensor = model(**batch).loss
            return result

        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
        self.loss: Callable[..., Any] = torch.compile(loss, backend=backend)

    def step(self, batch: dict[str, Tensor]) -> None:
        self.loss(**batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved_bytes(self, batch: dict[str, Tensor]) -> int:
        """Return the bytes that autograd saves for the backward pass, without parameters, each storage once."""
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.loss(**batch).backward()
        self.optimizer.zero_grad()
        return sum(storages.values())

    def peak_bytes(self, batch: dict[str, Tensor], device: torch.device) -> int | None:
        """Return the peak memory of a step, weights and optimiser state included; None on a CPU."""
        if device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(device)
        self.step(batch)
        return torch.cuda.max_memory_allocated(device)


def format_bytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its rows and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench_training", description="Measure training steps.")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--sequences", type=positive, default=16, help="a multiple of 16 (default: %(default)s)")
    parser.add_argument("--length", type=positive, help="tokens in each (default: 1024, 128 on a CPU)")
    parser.add_argument("--layers", type=positive, help="layers of the model (default: 28, 4 on a CPU)")
    parser.add_argument("--runs", type=positive, default=7, help="timed steps of each backend (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.sequences % max(GROUPS):
        parser.error(f"--sequences must be a multiple of {max(GROUPS)}, not {options.sequences}")
    try:
        device = pick_device(options.device)
        check_toolchain(device)
    except UsageError as error:
        print(f"bench_training: {error}", file=sys.stderr)
        return 2
    if device.type == "cuda":
        large = {"heads": 16, "kv_heads": 8, "head_dim": 128, "intermediate": 3072, "vocabulary": 151_936}
        model = workloads.qwen3(1024, options.layers or 28, **large).to(device, torch.bfloat16)
        length = options.length or 1024
    else:
        model, length = workloads.qwen3(layers=options.layers or 4), options.length or 128
    model.train()
    print(f"machine  {machine(device)}")
    print(f"model    {describe(model)}, {model.config.num_hidden_layers} layers")
    print(f"batch    {options.sequences} sequences of {length} tokens")
    heads = (
        "G",
        "prompt",
        "tokens",
        "compact",
        "plain",
        "radix",
        "speedup",
        "bound",
        "saved",
        "radix",
        "peak",
        "radix",
    )
    print(("{:>4}{:>8}{:>8}{:>9}" + "{:>11}" * 2 + "{:>9}{:>8}" + "{:>12}" * 4).format(*heads), flush=True)

    trained = {name: Trained(copy.deepcopy(model), name, device.type == "cuda") for name in (PLAIN, RADIX)}
    for group in GROUPS:
        for share in SHARES:
            batch = group_batch(options.sequences, length, group, share, model.config.vocab_size)
            distinct = len(radix_compile.plan.prefix_plan.PrefixPlan.from_rows(batch["input_ids"]).fold)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            steps: dict[str, Callable[[], object]] = {
                name: functools.partial(training.step, batch) for name, training in trained.items()
            }
            workloads.interleaved(steps, 2, device)  # compiles, then warms up
            seconds = workloads.interleaved(steps, options.runs, device)
            plain, radix = (statistics.median(seconds[name]) for name in (PLAIN, RADIX))
            tokens = batch["input_ids"].numel()
            saved = [format_bytes(training.saved_bytes(batch)) for training in trained.values()]
            peak = [format_bytes(training.peak_bytes(batch, device)) for training in trained.values()]
            print(
                f"{group:>4}{share:>8.0%}{tokens:>8,}{distinct:>9,}{plain * 1e3:>8,.1f} ms{radix * 1e3:>8,.1f} ms"
                f"{plain / radix:>8.2f}x{tokens / distinct:>7.2f}x" + "".join(f"{size:>12}" for size in saved + peak),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whole models on batches that share prefixes: plain, without padding, position-wise folded, and folded with attention.

Run as `python -m benchmarks.bench_models`. The models have the sizes of Qwen3 and random weights; what is timed is the
hidden states of a batch, or with `--backward` a forward and a backward pass. The columns:

    plain     inductor, padding included
    packed    inductor on one row without padding, attention by `varlen_attn` (GPUs only)
    reuse     inductor on each group's prefix once and then, with its cache repeated, on what follows: as one would
              write it by hand for these batches; what comes out are the hidden states of what follows (forward only)
    rows      radix with `fold_attention=False`, attention in full form: what RadixMLP does (arXiv 2601.15013)
    radix     radix
    skip      radix with `padding="skip"`, for batches that are padded
    auto      radix with its options as they are: it times its programs first, and then takes what is predicted fastest

In the columns before the last, whatever is shared folds (`fold="always"`).

With `--check` the error of each is printed too: its distance from the same model in the next wider type (float64 for
float32, float32 for bfloat16), run one sequence at a time, over the norm of that. Of hidden states behind tokens, or of
all gradients. Any that is more than twice that of plain fails the run.

The token bound is tokens over distinct prefixes. The arithmetic bound counts multiplications, of weights for each token
and of attention for each pair of query and key: those of plain, which sees no future, over those of the tree.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks import workloads
from benchmarks.demo import UsageError, check_toolchain, machine, pick_device, positive
from benchmarks.prefix_batches import PrefixBatch, one_prefix, rerank

MODELS: dict[str, dict[str, int]] = {
    "0.6B": {"hidden": 1024, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "intermediate": 3072},
    "4B": {"hidden": 2560, "layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 9728},
    "8B": {"hidden": 4096, "layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 12288},
    "small": {"hidden": 512, "layers": 6, "heads": 8, "kv_heads": 4, "head_dim": 64, "intermediate": 1536},
}
VOCABULARY = 32_000
NAMES = ("plain", "packed", "reuse", "rows", "radix", "skip", "auto")
_SHORTER = ((512, 256), (512, 1024), (1024, 256), (1024, 1024), (2047, 1024))


def cases(on_gpu: bool, backward: bool) -> Iterator[PrefixBatch]:
    if backward:
        yield one_prefix(16, 1024, 256) if on_gpu else one_prefix(8, 128, 32)
    elif on_gpu:
        yield from (one_prefix(15, 2047, 256), rerank())
        yield from (one_prefix(15, prefix, suffix) for prefix, suffix in _SHORTER)
    else:
        yield from (one_prefix(16, 256, 32), one_prefix(16, 512, 32), one_prefix(32, 128, 32), rerank(4, 4))


def bounds(case: PrefixBatch, sizes: dict[str, int]) -> tuple[float, float]:
    """The token bound and the arithmetic bound over plain without padding."""
    plan = case.plan()
    inner = sizes["heads"] * sizes["head_dim"]
    by_token = sizes["hidden"] * (2 * inner + 2 * sizes["kv_heads"] * sizes["head_dim"] + 3 * sizes["intermediate"])
    pairs = int((case.lengths * (case.lengths + 1) // 2).sum())
    nodes = len(plan.fold)
    return case.tokens / nodes, (case.tokens * by_token + 2 * pairs * inner) / (
        nodes * by_token + 2 * plan.pairs * inner
    )


class _Packed:
    """Attention on one row of several sequences, by `varlen_attn`."""

    starts: Tensor
    longest: int

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, Any] = {"window_size": (-1, 0)}
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        q, k, v = (one[0].transpose(0, 1) for one in (q, k, v))
        result: Any = varlen_attn(q, k, v, self.starts, self.starts, self.longest, self.longest, **options)
        return result[None], None


PACKED = _Packed()


def reuse(model: Any, ids: Tensor, mask: Tensor | None, groups: int, prefix: int) -> Tensor:
    """The hidden states behind the prefixes of groups, whose keys and values are computed once."""
    members = len(ids) // groups
    cache = model(input_ids=ids[::members, :prefix], use_cache=True).past_key_values
    cache.batch_repeat_interleave(members)
    hidden: Tensor = model(input_ids=ids[:, prefix:], attention_mask=mask, past_key_values=cache).last_hidden_state
    return hidden


Call = Callable[[], Tensor]


class Ways:
    """The calls that are compared, each compiled when it is asked for. Its names are the columns of the table."""

    def __init__(self, model: Any, case: PrefixBatch, device: torch.device, mode: str | None = None) -> None:
        self.model, self.case, self.device, self.mode = model, case, device, mode
        self.ids, self.mask = case.ids.to(device), case.mask.to(device)
        self.inputs: dict[str, Any] = {"input_ids": self.ids, "use_cache": False}
        if case.is_padded:
            self.inputs["attention_mask"] = self.mask

    def names(self, backward: bool) -> list[str]:
        on_gpu = self.device.type == "cuda"
        there = {"packed": on_gpu, "reuse": not backward, "skip": self.case.is_padded}
        return [name for name in NAMES if there.get(name, True)]

    def make(self, name: str) -> Call:
        torch._dynamo.reset()
        call: Call = getattr(self, name)()
        return call

    def _compiled(self, inputs: dict[str, Any], attention: str = "sdpa", **options: Any) -> Call:
        self.model.config._attn_implementation = attention
        call = torch.compile(lambda **given: self.model(**given).last_hidden_state, **options)
        return lambda: call(**inputs)

    def _radix(self, **options: Any) -> Call:
        return self._compiled(self.inputs, backend="radix", options={"mode": self.mode, **options})

    def plain(self) -> Call:
        return self._compiled(self.inputs, mode=self.mode)

    def packed(self) -> Call:
        kept = self.mask.flatten() > 0
        positions = torch.arange(self.ids.shape[1], device=self.device).repeat(len(self.ids))[kept][None]
        starts = torch.nn.functional.pad(self.case.lengths.cumsum(0), (1, 0)).to(self.device, torch.int32)
        PACKED.starts, PACKED.longest = starts, int(self.case.lengths.max())
        packed = {"input_ids": self.ids.flatten()[kept][None], "position_ids": positions, "use_cache": False}
        return self._compiled(packed, "packed", mode=self.mode)

    def reuse(self) -> Call:
        self.model.config._attn_implementation = "sdpa"
        by_hand, case = torch.compile(reuse, mode=self.mode), self.case
        return lambda: by_hand(self.model, self.ids, self.inputs.get("attention_mask"), case.groups, case.prefix)

    def rows(self) -> Call:
        return self._radix(fold_attention=False, fold="always")

    def radix(self) -> Call:
        return self._radix(fold="always")

    def skip(self) -> Call:
        return self._radix(fold="always", padding="skip")

    def auto(self) -> Call:
        return self._radix()


def step(call: Call, backward: bool) -> Tensor:
    """The hidden states; with ``backward``, after a backward pass of their sum."""
    with torch.set_grad_enabled(backward):
        states = call()
        if backward:
            states.backward(torch.ones_like(states))
    return states.detach()


def wider(model: Any, case: PrefixBatch, device: torch.device, backward: bool) -> list[Tensor]:
    """Hidden states ``[B, S, hidden]``, zero behind the tokens, or the gradients of their sum, in a wider type.

    On the CPU, so that the memory of what is measured after it is its own.
    """
    model = copy.deepcopy(model).to(torch.float32 if model.dtype == torch.bfloat16 else torch.float64)
    model.config._attn_implementation = "sdpa"

    def states_of(ids: Tensor) -> Tensor:
        states: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        return states

    states = torch.zeros(*case.ids.shape, model.config.hidden_size, dtype=model.dtype, device=device)
    for ids, length, row in zip(case.ids.to(device), case.lengths.tolist(), states, strict=True):
        row[:length] = step(functools.partial(states_of, ids[None, :length]), backward)[0]
    return [one.cpu() for one in ([one.grad for one in model.parameters()] if backward else [states])]


def distance(ways: Ways, name: str, ours: list[Tensor], wanted: list[Tensor], backward: bool) -> float:
    """The distance of what the way ``name`` computes, over the norm of what is wanted."""
    wanted = [one.to(ways.device) for one in wanted]
    if not backward:
        shown = ways.mask > 0
        if name == "packed":
            ours, wanted = [ours[0][0]], [wanted[0][shown]]
        else:  # `reuse` has no rows of the prefix
            behind = slice(shown.shape[1] - ours[0].shape[1], None)
            shown = shown[:, behind]
            ours, wanted = [ours[0][shown]], [wanted[0][:, behind][shown]]
    norms = [
        torch.stack([torch.linalg.vector_norm(one) for one in each])
        for each in ([one - other for one, other in zip(ours, wanted, strict=True)], wanted)
    ]
    return float(norms[0].norm() / norms[1].norm())


def measure(once: Call, device: torch.device, runs: int) -> tuple[float, float, int | None]:
    """Median seconds, those of the first call, which compiles, and the most memory allocated."""
    started = time.perf_counter()
    once()
    first = time.perf_counter() - started
    workloads.warm_up(once, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = statistics.median(workloads.interleaved({"": once}, runs, device)[""])
    return seconds, first, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def from_no_gradients(parameters: list[torch.nn.Parameter], call: Call, backward: bool) -> Tensor:
    """A ``step`` as training takes it: nothing is left of the one before, to which gradients would be added."""
    for one in parameters:
        one.grad = None
    return step(call, backward)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints as it goes and returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench_models", description="Measure models on batches that share prefixes.")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--model", choices=list(MODELS), help="whose sizes (default: 8B, small on a CPU)")
    parser.add_argument("--layers", type=positive, help="fewer layers")
    parser.add_argument("--cases", type=positive, default=99, help="only the first so many batches")
    parser.add_argument("--only", default="", help="only batches with this in their name")
    parser.add_argument("--ways", nargs="+", choices=NAMES, default=NAMES, help="only these columns")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--check", action="store_true", help="errors too, compared with those of plain")
    parser.add_argument("--mode", choices=list(torch._inductor.list_mode_options()), help="inductor's, for all columns")
    parser.add_argument("--runs", type=positive, default=7, help="timed runs (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.check and "plain" not in options.ways:
        parser.error("--check compares with plain, which --ways leaves out")
    try:
        device = pick_device(options.device)
        check_toolchain(device)
    except UsageError as error:
        print(f"bench_models: {error}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    on_gpu = device.type == "cuda"
    name = options.model or ("8B" if on_gpu else "small")
    sizes = {**MODELS[name], **({"layers": options.layers} if options.layers else {})}
    transformers.AttentionInterface.register("packed", PACKED)
    with torch.device(device):
        causal = workloads.qwen3(**sizes, vocabulary=VOCABULARY)
    model = causal.model.to(device, torch.bfloat16 if on_gpu else torch.float32)
    model.train(options.backward)
    parameters = list(model.parameters())
    print(f"machine  {machine(device)}")
    print(f"model    Qwen3-{name}, {sizes['layers']} layers, {next(model.parameters()).dtype}")
    passes, mode = "forward and backward" if options.backward else "forward", f" in mode {options.mode}"
    print(f"measured {passes}{mode if options.mode else ''}, medians of {options.runs}")
    wrong = False
    chosen = [case for case in cases(on_gpu, options.backward) if options.only in case.name]
    for case in chosen[: options.cases]:
        by_token, by_arithmetic = bounds(case, sizes)
        print(
            f"{case.name}: {case.tokens} tokens, bounds {by_token:.2f}x by tokens, {by_arithmetic:.2f}x by arithmetic"
        )
        first, least = None, None
        ways = Ways(model, case, device, options.mode)
        wanted = wider(model, case, device, options.backward) if options.check else []
        for way in (name for name in ways.names(options.backward) if name in options.ways):
            once = functools.partial(from_no_gradients, parameters, ways.make(way), options.backward)
            seconds, compiling, peak = measure(once, device, options.runs)
            first = first or seconds
            memory = "" if peak is None else f"{peak / 2**30:>9.2f} GiB"
            row = f"  {way:<8}{seconds * 1e3:>10.1f} ms{first / seconds:>8.2f}x{memory}"
            if options.check:
                states = once()
                ours = [one.grad for one in parameters] if options.backward else [states]
                found = distance(ways, way, ours, wanted, options.backward)
                least = least or found
                wrong |= not found <= 2 * least
                row += f"   error {found:.2e}"
            print(f"{row}   first call {compiling:.1f} s", flush=True)
            model.zero_grad()
    if wrong:
        print("bench_models: an error is more than twice that of plain", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())

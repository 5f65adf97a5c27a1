"""Time whole models on batches that share prefixes: plain, packed, position-wise folded, and folded with attention.

Run as `python -m benchmarks.bench_models`. The models have the sizes of Qwen3 and random weights. A run computes the
hidden states of a batch, with `--backward` also the gradients. The rows:

    plain     inductor, padding included
    packed    inductor on one row without padding, with `varlen_attn` (GPUs only)
    reuse     inductor, with each group's prefix computed once and its cache repeated for the suffixes: the program that
              one would write by hand for these batches. It returns the hidden states of the suffixes (forward only)
    rows      radix with `fold_attention=False`, as RadixMLP does (arXiv 2601.15013)
    radix     radix
    skip      radix with `padding="skip"`, for padded batches
    auto      radix with its default options: it times its programs, then runs the one that is predicted to be fastest

`rows`, `radix` and `skip` fold every call (`fold="always"`).

With `--check` the error of each row is printed too: the distance from the same model in a wider dtype (float64 for
float32, float32 for bfloat16), run on one sequence at a time, relative to the norm of that result. It is the error of
the tokens' hidden states, or of all gradients. The run fails if an error is more than twice that of plain.

The token bound is tokens / distinct prefixes. The arithmetic bound is the ratio of multiplications without and with
folding: those of weights per token, and those of causal attention per pair of query and key.
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
    """Return the token bound and the arithmetic bound, both over plain without padding."""
    plan = case.plan()
    inner = sizes["heads"] * sizes["head_dim"]
    by_token = sizes["hidden"] * (2 * inner + 2 * sizes["kv_heads"] * sizes["head_dim"] + 3 * sizes["intermediate"])
    pairs = int((case.lengths * (case.lengths + 1) // 2).sum())
    nodes = len(plan.fold)
    return case.tokens / nodes, (case.tokens * by_token + 2 * pairs * inner) / (
        nodes * by_token + 2 * plan.pairs * inner
    )


class _Packed:
    """Attention on several sequences packed in one row, by `varlen_attn`."""

    starts: Tensor
    longest: int

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, Any] = {"window_size": (-1, 0)}
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
        result: Any = varlen_attn(q, k, v, self.starts, self.starts, self.longest, self.longest, **options)
        return result[None], None


PACKED = _Packed()


def reuse(model: Any, ids: Tensor, mask: Tensor | None, groups: int, prefix: int) -> Tensor:
    """Return the hidden states of the suffixes. The prefix of each group is computed once."""
    group_size = len(ids) // groups
    cache = model(input_ids=ids[::group_size, :prefix], use_cache=True).past_key_values
    cache.batch_repeat_interleave(group_size)
    hidden: Tensor = model(input_ids=ids[:, prefix:], attention_mask=mask, past_key_values=cache).last_hidden_state
    return hidden


Call = Callable[[], Tensor]


class Ways:
    """The programs that are compared, by the name of their row. Each is compiled when it is first called."""

    def __init__(self, model: Any, case: PrefixBatch, device: torch.device, mode: str | None = None) -> None:
        self.model, self.case, self.device, self.mode = model, case, device, mode
        self.ids, self.mask = case.ids.to(device), case.mask.to(device)
        self.inputs: dict[str, Any] = {"input_ids": self.ids, "use_cache": False}
        if case.is_padded:
            self.inputs["attention_mask"] = self.mask

    def names(self, backward: bool) -> list[str]:
        on_gpu = self.device.type == "cuda"
        applies = {"packed": on_gpu, "reuse": not backward, "skip": self.case.is_padded}
        return [name for name in NAMES if applies.get(name, True)]

    def make(self, name: str) -> Call:
        torch._dynamo.reset()
        call: Call = getattr(self, name)()
        return call

    def _compiled(self, inputs: dict[str, Any], attention: str = "sdpa", **options: Any) -> Call:
        self.model.config._attn_implementation = attention
        call = torch.compile(lambda **kwargs: self.model(**kwargs).last_hidden_state, **options)
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
        compiled, case = torch.compile(reuse, mode=self.mode), self.case
        return lambda: compiled(self.model, self.ids, self.inputs.get("attention_mask"), case.groups, case.prefix)

    def rows(self) -> Call:
        return self._radix(fold_attention=False, fold="always")

    def radix(self) -> Call:
        return self._radix(fold="always")

    def skip(self) -> Call:
        return self._radix(fold="always", padding="skip")

    def auto(self) -> Call:
        return self._radix()


def step(call: Call, backward: bool) -> Tensor:
    """Return the hidden states, with ``backward`` after a backward pass of their sum."""
    with torch.set_grad_enabled(backward):
        states = call()
        if backward:
            states.backward(torch.ones_like(states))
    return states.detach()


def reference(model: Any, case: PrefixBatch, device: torch.device, backward: bool) -> list[Tensor]:
    """Return the hidden states ``[B, S, hidden]``, zero at padding, or the gradients of their sum, in a wider dtype.

    The result is moved to the CPU, so that it does not count as memory of the programs that are measured.
    """
    model = copy.deepcopy(model).to(torch.float32 if model.dtype == torch.bfloat16 else torch.float64)
    model.config._attn_implementation = "sdpa"

    def states_of(ids: Tensor) -> Tensor:
        states: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        return states

    states = torch.zeros(*case.ids.shape, model.config.hidden_size, dtype=model.dtype, device=device)
    for ids, length, row in zip(case.ids.to(device), case.lengths.tolist(), states, strict=True):
        row[:length] = step(functools.partial(states_of, ids[None, :length]), backward)[0]
    results = [parameter.grad for parameter in model.parameters()] if backward else [states]
    return [result.cpu() for result in results]


def distance(ways: Ways, name: str, results: list[Tensor], expected: list[Tensor], backward: bool) -> float:
    """Return the distance between the results of the row ``name`` and the expected ones, over the norm of these."""
    expected = [tensor.to(ways.device) for tensor in expected]
    if not backward:
        is_token = ways.mask > 0
        if name == "packed":
            results, expected = [results[0][0]], [expected[0][is_token]]
        else:  # `reuse` has the columns of the suffixes only
            columns = slice(is_token.shape[1] - results[0].shape[1], None)
            is_token = is_token[:, columns]
            results, expected = [results[0][is_token]], [expected[0][:, columns][is_token]]
    differences = [result - tensor for result, tensor in zip(results, expected, strict=True)]
    norms = [
        torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]) for tensors in (differences, expected)
    ]
    return float(norms[0].norm() / norms[1].norm())


def measure(call: Call, device: torch.device, runs: int) -> tuple[float, float, int | None]:
    """Return the median seconds, the seconds of the first call, which compiles, and the peak memory (GPUs only)."""
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    workloads.warm_up(call, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = statistics.median(workloads.interleaved({"": call}, runs, device)[""])
    return seconds, first, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def step_without_gradients(parameters: list[torch.nn.Parameter], call: Call, backward: bool) -> Tensor:
    """Return the result of ``step`` after deleting all gradients, as an optimizer does."""
    for parameter in parameters:
        parameter.grad = None
    return step(call, backward)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its rows and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench_models", description="Measure models on batches that share prefixes.")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--model", choices=list(MODELS), help="sizes of the model (default: 8B, small on a CPU)")
    parser.add_argument("--layers", type=positive, help="number of layers (default: the model's)")
    parser.add_argument("--cases", type=positive, default=99, metavar="N", help="only the first N batches")
    parser.add_argument("--only", default="", metavar="TEXT", help="only batches with TEXT in their name")
    parser.add_argument("--ways", nargs="+", choices=NAMES, default=NAMES, help="only these rows")
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--check", action="store_true", help="print errors, and compare them with those of plain")
    parser.add_argument("--mode", choices=list(torch._inductor.list_mode_options()), help="inductor's mode in all rows")
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
    is_wrong = False
    selected = [case for case in cases(on_gpu, options.backward) if options.only in case.name]
    for case in selected[: options.cases]:
        by_token, by_arithmetic = bounds(case, sizes)
        print(
            f"{case.name}: {case.tokens} tokens, bounds {by_token:.2f}x by tokens, {by_arithmetic:.2f}x by arithmetic"
        )
        plain_seconds, plain_error = None, None
        ways = Ways(model, case, device, options.mode)
        expected = reference(model, case, device, options.backward) if options.check else []
        for way in (name for name in ways.names(options.backward) if name in options.ways):
            call = functools.partial(step_without_gradients, parameters, ways.make(way), options.backward)
            seconds, first_seconds, peak = measure(call, device, options.runs)
            plain_seconds = plain_seconds or seconds
            memory = "" if peak is None else f"{peak / 2**30:>9.2f} GiB"
            row = f"  {way:<8}{seconds * 1e3:>10.1f} ms{plain_seconds / seconds:>8.2f}x{memory}"
            if options.check:
                states = call()
                results = [parameter.grad for parameter in parameters] if options.backward else [states]
                way_error = distance(ways, way, results, expected, options.backward)
                plain_error = plain_error or way_error
                is_wrong |= not way_error <= 2 * plain_error
                row += f"   error {way_error:.2e}"
            print(f"{row}   first call {first_seconds:.1f} s", flush=True)
            model.zero_grad()
    if is_wrong:
        print("bench_models: an error is more than twice that of plain", file=sys.stderr)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())

"""Compare `torch.compile(model, backend="radix")` with plain inductor on one batch of prompts.

Run as `python -m benchmarks.demo` with the package installed (`make demo` does both). By default the batch has few-shot
prompts that share their instruction and examples, and the model is a Qwen3 with random weights; `--data` and `--model`
replace them.

Exit codes: 0 if the outputs agree, 1 if they differ, 2 for wrong arguments or input.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import radix_compile
from benchmarks import workloads

PLAIN = "inductor"
RADIX = "radix"

TOLERANCE = 10.0
"""The largest allowed ratio of the radix backend's error against fp64 to plain inductor's."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class UsageError(Exception):
    """Wrong arguments or input. The message is one line for the user."""


@dataclass(frozen=True)
class Errors:
    """Largest absolute differences of the logits, over the real tokens of the batch."""

    radix_to_plain: float
    plain_to_eager: float
    eager: float
    plain: float
    radix: float
    allowed: float

    @property
    def acceptable(self) -> bool:
        """Whether radix is about as close to the fp64 reference as plain inductor. False if an output has a NaN."""
        return self.radix <= self.allowed


class Progress:
    """Shows the stages on stderr: as progress bars on a terminal, else as a line per finished stage."""

    def __init__(self) -> None:
        self._bars: Any = None
        if sys.stderr.isatty() and importlib.util.find_spec("rich"):
            from rich import progress
            from rich.console import Console

            self._bars = progress.Progress(
                progress.SpinnerColumn(finished_text="[green]✓"),
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.TimeElapsedColumn(),
                console=Console(stderr=True),
                refresh_per_second=2,  # drawing takes time from the measured runs
            )

    def shown(self) -> AbstractContextManager[object]:
        """Return the context manager in which stages are shown."""
        return self._bars if self._bars is not None else nullcontext()

    @contextmanager
    def stage(self, name: str, steps: int = 1) -> Iterator[Callable[[], None]]:
        """A context manager for one stage. It yields a function to call after each step (optional for one step)."""
        start = time.perf_counter()
        if self._bars is None:
            yield lambda: None
            print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        else:
            task = self._bars.add_task(name, total=steps)
            yield lambda: self._bars.advance(task)
            self._bars.update(task, completed=steps)


class _InDouble(TorchFunctionMode):
    """Replaces float32 by float64. Models cast to float32 explicitly where half precision is not enough."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()

        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    options = _parser().parse_args(argv)
    try:
        return compare(options)
    except UsageError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("demo: out of device memory; try a smaller --batch-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="demo", description="Compare the radix backend with plain inductor.")
    parser.add_argument(
        "--model", metavar="NAME_OR_PATH", help="a causal language model with its weights and tokenizer"
    )
    parser.add_argument(
        "--data", metavar="FILE.jsonl", help='your prompts: an object with a "prompt" or a "question" per line'
    )
    parser.add_argument(
        "--examples",
        type=positive,
        default=2,
        help="worked examples in the shared prefix, at most 8 (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="prompts in the batch (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=7, help="timed runs of each backend (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="dtype of the weights (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    return parser


def positive(text: str) -> int:
    """Return the positive integer in ``text``, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def compare(options: argparse.Namespace) -> int:
    """Run the comparison, print the results, and return 0 if the outputs agree, else 1."""
    device = pick_device(options.device)
    check_toolchain(device)
    prompts, source = _prompts(options.data, options.batch_size, options.examples)

    progress = Progress()
    with progress.shown(), torch.inference_mode():
        with progress.stage("loading the model" if options.model else "building the model"):
            model, tokenizer = _model(options.model)
            model = model.to(device=device, dtype=_DTYPES[options.dtype])
        with progress.stage("tokenising"):
            batch = _batch(prompts, tokenizer, model, device)
        real = batch["attention_mask"].bool()
        setup = {
            "machine": machine(device),
            "model": f"{options.model or 'random weights'}, {describe(model)}",
            "prompts": f"{len(prompts)} {source}, {int(real.sum()):,} tokens, {real.numel():,} with padding",
        }

        def call(forward: Callable[..., Any]) -> Tensor:
            logits: Tensor = forward(**batch, use_cache=False).logits
            return logits

        plain_forward = torch.compile(model.forward, backend=PLAIN)
        radix_forward = torch.compile(model.forward, backend=RADIX)
        with progress.stage("compiling with inductor"):
            plain = call(plain_forward)[real]
        with progress.stage("compiling with radix"):
            call(radix_forward)
        radix_compile.reset_stats()
        with progress.stage("counting tokens"):
            radix = call(radix_forward)[real]
        stats = radix_compile.stats()

        with progress.stage("measuring", options.runs) as done:
            seconds = workloads.interleaved(
                {PLAIN: lambda: call(plain_forward), RADIX: lambda: call(radix_forward)}, options.runs, device, done
            )
        with progress.stage("checking against fp64", len(prompts)) as done:
            eager = call(model.forward)[real]
            errors = _errors(model, batch, {"eager": eager, "plain": plain, "radix": radix}, done)

    _print_table(setup)
    _print_table(_results(stats.tokens, stats.compact_tokens, seconds, errors))
    if not errors.acceptable:
        print(
            f"demo: the outputs differ: radix is {errors.radix:.1e} from fp64, more than {errors.allowed:.1e}, "
            f"which is {TOLERANCE:g} times the error of plain inductor",
            file=sys.stderr,
        )
        return 1
    return 0


def pick_device(name: str | None) -> torch.device:
    """Return the device of this name, by default the GPU if there is one.

    Raises:
        UsageError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: there is no such device") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch finds no such device")
    return device


def check_toolchain(device: torch.device) -> None:
    """Check that the radix backend is registered and that inductor has a C++ compiler.

    Raises:
        UsageError: the backend is not registered, or no C++ compiler is found.
    """
    if RADIX not in torch.compiler.list_backends():
        raise UsageError('the backend "radix" is not registered; install the package first: pip install -e .')
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UsageError("inductor needs a C++ compiler, and none was found; set CXX to its name")


def machine(device: torch.device) -> str:
    """Return the machine and the versions in one line."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        capability = torch.backends.cpu.get_cpu_capability()
        hardware = f"{platform.machine()} {capability}, {threads} thread{'s' * (threads != 1)}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{platform.system()}, {hardware}, {versions}, Python {platform.python_version()}"


def describe(model: torch.nn.Module) -> str:
    """Return the model's class, number of parameters and dtype."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {parameters / 1e6:,.1f} M parameters, {dtype}"


def _prompts(path: str | None, batch_size: int, examples: int) -> tuple[list[str], str]:
    """Return the prompts, and a description of their source."""
    if path is None:
        return workloads.few_shot_prompts(batch_size, examples), "few-shot prompts"
    try:
        prompts = workloads.load_prompts(path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if len(prompts) <= batch_size:
        return prompts, f"of {path}"
    return prompts[:batch_size], f"of the {len(prompts):,} in {path}"


def _model(name: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the model of this name or path with its tokenizer, or without a name those of the workloads."""
    if name is None:
        return workloads.qwen3(), workloads.tokenizer()
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:  # a path, not a name on the hub
        name = os.path.expanduser(name)
        if not os.path.isdir(name):
            raise UsageError(f"the model {name} cannot be loaded: there is no such directory")
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # first, so that a wrong name fails early
        tokenizer = AutoTokenizer.from_pretrained(name, config=config, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype="auto", trust_remote_code=False).eval()
    except Exception as error:  # the loaders raise many types: no network, no such repository, a damaged file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"the model {name} cannot be loaded: {reason}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"the tokenizer of {name} has no padding token and no end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _batch(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, model: Any, device: torch.device
) -> dict[str, Tensor]:
    """Return the tokenised prompts on the device."""
    batch = workloads.tokenize(prompts, tokenizer)
    length = batch["input_ids"].shape[1]
    max_length = getattr(model.config, "max_position_embeddings", None)
    if max_length is not None and length > max_length:
        raise UsageError(f"a prompt has {length:,} tokens, and the model takes at most {max_length:,}")
    if not batch["attention_mask"].any(dim=1).all():
        raise UsageError("the tokenizer returns no tokens for a prompt; is the model's own tokenizer missing?")
    if batch["input_ids"].max() >= model.get_input_embeddings().num_embeddings:
        raise UsageError("the tokenizer returns ids outside the model's vocabulary; they do not belong together")
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _errors(model: Any, batch: dict[str, Tensor], outputs: dict[str, Tensor], done: Callable[[], None]) -> Errors:
    """Compare the outputs [real tokens, V] with each other and with the model in fp64. Converts ``model`` to fp64.

    The reference runs eagerly, on one unpadded prompt at a time, so that no error of batching or padding affects it.
    """
    dtype = next(model.parameters()).dtype
    model.double()
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    largest = {name: torch.zeros((), dtype=torch.float64, device=output.device) for name, output in outputs.items()}
    scale = 0.0
    start = 0
    for ids, length in zip(batch["input_ids"], lengths, strict=True):
        with _InDouble():
            reference = model(input_ids=ids[:length].unsqueeze(0), use_cache=False).logits[0]
        scale = max(scale, reference.abs().max().item())
        for name, output in outputs.items():
            difference = (output[start : start + length] - reference).abs().max()
            largest[name] = torch.maximum(largest[name], difference)  # unlike max(), keeps a NaN
        start += length
        done()
    eager, plain, radix = outputs["eager"], outputs["plain"], outputs["radix"]
    return Errors(
        radix_to_plain=(radix - plain).abs().max().item(),
        plain_to_eager=(plain - eager).abs().max().item(),
        eager=largest["eager"].item(),
        plain=largest["plain"].item(),
        radix=largest["radix"].item(),
        allowed=TOLERANCE * max(largest["plain"].item(), scale * torch.finfo(dtype).eps),
    )


def _results(tokens: int, compact_tokens: int, seconds: dict[str, list[float]], errors: Errors) -> dict[str, str]:
    """Return the rows of the table of results."""
    plain, radix = (statistics.median(seconds[name]) for name in (PLAIN, RADIX))
    speedup = plain / radix
    if compact_tokens:
        bound = tokens / compact_tokens
        folding = {
            "tokens before folding": f"{tokens:,}",
            "tokens after folding": f"{compact_tokens:,}",
            "token bound": f"{bound:.2f} x",
        }
        share = {"share of the token bound": f"{speedup / bound:.0%}"}
    else:
        folding = {"tokens before folding": "nothing was folded"}
        share = {}
    return {
        **folding,
        "plain inductor": f"{plain * 1e3:,.1f} ms",
        "radix": f"{radix * 1e3:,.1f} ms",
        "speedup": f"{speedup:.2f} x",
        **share,
        "largest difference, radix to plain": f"{errors.radix_to_plain:.1e}",
        "for scale, plain to eager": f"{errors.plain_to_eager:.1e}",
        "error against fp64, eager": f"{errors.eager:.1e}",
        "error against fp64, plain": f"{errors.plain:.1e}",
        "error against fp64, radix": f"{errors.radix:.1e} (allowed: {errors.allowed:.1e})",
    }


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print()
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())

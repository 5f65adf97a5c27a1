"""Time a model on this machine with plain inductor and with radix, for one or several lengths of the shared prefix.

Times are medians over alternating runs, after a warm-up. "bound" is rows / nodes, the speedup if all work ran once per
node and nothing else took time. "difference" is the largest difference between the outputs, relative to the largest
output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import radix_compile
from radix_compile.cli.inputs import (
    UsageError,
    add_batch,
    add_model,
    arguments_of,
    load_batch,
    load_model,
    natural,
    positive,
)
from radix_compile.torch_internals import synchronize

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Timing:
    """One batch: its rows and nodes, the median seconds of a call, and the largest difference between the outputs,
    relative to the largest output.
    """

    batch: str
    rows: int
    nodes: int
    plain: float
    radix: float
    difference: float

    @property
    def speedup(self) -> float:
        return self.plain / self.radix

    @property
    def bound(self) -> float:
        return self.rows / self.nodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_batch(parser)
    parser.add_argument("--prefixes", type=natural, nargs="+", metavar="P", help="time each of these as --prefix")
    parser.add_argument("--runs", type=positive, default=5, help="timed runs of each program (default: %(default)s)")
    parser.add_argument("--pin", action="store_true", help='fold every call (fold="always"), even if plain is faster')
    parser.add_argument("-o", "--output", metavar="FILE.png", help="plot speedups and bounds (needs matplotlib)")


def run(options: argparse.Namespace, console: Console) -> int:
    if options.output and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("-o needs matplotlib: pip install 'radix-compile[cli]'")
    if options.output and (
        Path(options.output).suffix not in PLOT_SUFFIXES or not Path(options.output).parent.is_dir()
    ):
        endings = ", ".join(PLOT_SUFFIXES)
        raise UsageError(f"-o {options.output}: expected a file in an existing folder, ending in {endings}")
    model = load_model(options)
    prefixes = [None] if options.data else options.prefixes or [options.prefix]
    stderr = Console(stderr=True)
    progress = track(prefixes, "timing", console=stderr, disable=not stderr.is_terminal, transient=True)
    timings = [_time_batch(options, model, prefix) for prefix in progress]
    if options.output:
        _plot(timings, options)
    if options.json:
        data = [{**asdict(timing), "speedup": timing.speedup, "bound": timing.bound} for timing in timings]
        print(json.dumps(data, indent=2))
        return 0
    table = Table("batch", "rows", "nodes", "bound", "plain", "radix", "speedup", "difference", box=None)
    for timing in timings:
        times = (f"{1e3 * seconds:.1f} ms" for seconds in (timing.plain, timing.radix))
        ratios = f"{timing.bound:.2f}x", *times, f"{timing.speedup:.2f}x", f"{timing.difference:.1e}"
        table.add_row(timing.batch, f"{timing.rows:,}", f"{timing.nodes:,}", *ratios)
    console.print(table)
    if options.output:
        console.print(f"{options.output}: speedups and bounds", markup=False)
    return 0


def _time_batch(options: argparse.Namespace, model: nn.Module, prefix: int | None) -> Timing:
    if prefix is not None:
        options = argparse.Namespace(**{**vars(options), "prefix": prefix})
    batch = load_batch(options, model)
    args, kwargs = arguments_of(model, batch)
    radix_options: dict[str, Any] = {"fold": "always"} if options.pin else {}
    torch.compiler.reset()
    plain, radix = torch.compile(model), torch.compile(model, backend="radix", options=radix_options)
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(*args, **kwargs),
        "radix": lambda: radix(*args, **kwargs),
    }
    with torch.no_grad():
        outputs = {name: _first_tensor(call()) for name, call in calls.items()}
        rows, nodes = _count_rows_and_nodes(batch)
        seconds = _median_seconds(calls, options.runs, torch.device(options.device))
    scale = outputs["plain"].abs().max().clamp(min=1e-30)
    difference = float((outputs["plain"] - outputs["radix"]).abs().max() / scale)
    name = options.data or f"{options.batch} x ({options.prefix} + {options.suffix})"
    return Timing(name, rows, nodes, seconds["plain"], seconds["radix"], difference)


def _count_rows_and_nodes(batch: dict[str, Tensor]) -> tuple[int, int]:
    plan = radix_compile.PrefixPlan.from_rows(*batch.values())
    return plan.tokens, plan.compact_tokens


def _median_seconds(calls: dict[str, Callable[[], Any]], runs: int, device: torch.device) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if turn:  # the first turn is the warm-up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _first_tensor(output: Any) -> Tensor:
    values = output.values() if hasattr(output, "values") and not isinstance(output, Tensor) else output
    first = output if isinstance(output, Tensor) else next(iter(values))
    if not isinstance(first, Tensor):
        raise UsageError(f"the model returns {type(output).__name__}; expected a tensor, or a tensor as first element")
    return first.float()


def _plot(timings: list[Timing], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    names = [timing.batch for timing in timings]
    speedups, bounds = [timing.speedup for timing in timings], [timing.bound for timing in timings]
    axes.bar(names, speedups, color="#13693c", label="plain time / radix time", width=0.5)
    axes.plot(names, bounds, "_", color="#8f4a00", markersize=36, label="rows / nodes")
    axes.axhline(1, color="#4a5966", linewidth=0.8)
    axes.set_ylabel("speedup")
    axes.set_title(f"{options.model} on {options.device}, {options.dtype}")
    axes.legend()
    try:
        figure.savefig(options.output, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"-o {options.output}: {error}") from error
    pyplot.close(figure)

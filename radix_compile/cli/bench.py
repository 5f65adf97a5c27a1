"""Time a model here, plain and with radix, for prefixes of several lengths.

The times are medians of runs in turn, after warming up; errors are the largest differences of the outputs.
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

DRAWN = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Row:
    """One batch: rows and nodes, seconds of a call, and by how much outputs differ at most, over their largest."""

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
    parser.add_argument("--prefixes", type=natural, nargs="+", metavar="P", help="several lengths instead of --prefix")
    parser.add_argument("--runs", type=positive, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument(
        "--pin", action="store_true", help="fold whatever is shared, instead of what is predicted to pay"
    )
    parser.add_argument("-o", "--output", metavar="FILE.png", help="draw speedups and bounds (needs matplotlib)")


def run(options: argparse.Namespace, console: Console) -> int:
    if options.output and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("-o needs matplotlib: pip install 'radix-compile[cli]'")
    if options.output and (Path(options.output).suffix not in DRAWN or not Path(options.output).parent.is_dir()):
        raise UsageError(f"-o {options.output}: expected a file in an existing folder, ending in {', '.join(DRAWN)}")
    model = load_model(options)
    prefixes = [None] if options.data else options.prefixes or [options.prefix]
    bar = Console(stderr=True)
    shown = track(prefixes, "timing", console=bar, disable=not bar.is_terminal, transient=True)
    rows = [_row(options, model, prefix) for prefix in shown]
    if options.output:
        _draw(rows, options)
    if options.json:
        print(json.dumps([{**asdict(row), "speedup": row.speedup, "bound": row.bound} for row in rows], indent=2))
        return 0
    table = Table("batch", "rows", "nodes", "bound", "plain", "radix", "speedup", "difference", box=None)
    for row in rows:
        times = (f"{1e3 * seconds:.1f} ms" for seconds in (row.plain, row.radix))
        ratios = f"{row.bound:.2f}x", *times, f"{row.speedup:.2f}x", f"{row.difference:.1e}"
        table.add_row(row.batch, f"{row.rows:,}", f"{row.nodes:,}", *ratios)
    console.print(table)
    if options.output:
        console.print(f"{options.output}: speedups and bounds", markup=False)
    return 0


def _row(options: argparse.Namespace, model: nn.Module, prefix: int | None) -> Row:
    if prefix is not None:
        options = argparse.Namespace(**{**vars(options), "prefix": prefix})
    batch = load_batch(options, model)
    args, kwargs = arguments_of(model, batch)
    pinned: dict[str, Any] = {"fold": "always"} if options.pin else {}
    torch.compiler.reset()
    plain, radix = torch.compile(model), torch.compile(model, backend="radix", options=pinned)
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(*args, **kwargs),
        "radix": lambda: radix(*args, **kwargs),
    }
    with torch.no_grad():
        outputs = {name: _first(call()) for name, call in calls.items()}
        rows, nodes = _counts(batch)
        took = _medians(calls, options.runs, torch.device(options.device))
    scale = outputs["plain"].abs().max().clamp(min=1e-30)
    difference = float((outputs["plain"] - outputs["radix"]).abs().max() / scale)
    name = options.data or f"{options.batch} x ({options.prefix} + {options.suffix})"
    return Row(name, rows, nodes, took["plain"], took["radix"], difference)


def _counts(batch: dict[str, Tensor]) -> tuple[int, int]:
    plan = radix_compile.PrefixPlan.from_rows(*batch.values())
    return plan.tokens, plan.compact_tokens


def _medians(calls: dict[str, Callable[[], Any]], runs: int, device: torch.device) -> dict[str, float]:
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            if turn:  # the first warms up
                took[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def _first(output: Any) -> Tensor:
    several = output.values() if hasattr(output, "values") and not isinstance(output, Tensor) else output
    found = output if isinstance(output, Tensor) else next(iter(several))
    if not isinstance(found, Tensor):
        raise UsageError(f"the model returns {type(output).__name__}; expected a tensor, or one first among others")
    return found.float()


def _draw(rows: list[Row], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    names = [row.batch for row in rows]
    axes.bar(names, [row.speedup for row in rows], color="#13693c", label="radix over plain", width=0.5)
    axes.plot(names, [row.bound for row in rows], "_", color="#8f4a00", markersize=36, label="rows over nodes")
    axes.axhline(1, color="#4a5966", linewidth=0.8)
    axes.set_ylabel("speedup")
    axes.set_title(f"{options.model} on {options.device}, {options.dtype}")
    axes.legend()
    try:
        figure.savefig(options.output, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"-o {options.output}: {error}") from error
    pyplot.close(figure)

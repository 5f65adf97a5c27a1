"""Timing a graph's programs on the inputs of a call, and keeping what was measured on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.cost_model import Timed

log = logging.getLogger(__name__)

RUNS = 3
"""Each program runs once to warm up, then so often, in turn with the others; its fastest run counts."""
ENOUGH = 2.0
"""Seconds for all runs of a turn, after which there is no other."""


def calibration_file() -> Path:
    """Where measurements are kept: ``$RADIX_COMPILE_CACHE``, or the user's cache directory, ``calibration.json``.

    The file may be read, edited and deleted at any time.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RADIX_COMPILE_CACHE") or Path(base) / "radix_compile") / "calibration.json"


def fingerprint(captured: fx.GraphModule, device: torch.device, compiled_by: tuple[Any, ...]) -> str:
    """A graph's name in the file: its ops, the sizes of its weights, what compiles and what runs it."""
    ops = [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]
    static = [node.meta["val"] for node in captured.graph.find_nodes(op="placeholder") if node.meta.get("is_static")]
    tensors = [one for one in static if isinstance(one, torch.Tensor)]
    weights = [(str(one.dtype), [size if isinstance(size, int) else None for size in one.shape]) for one in tensors]
    about = [ops, weights, captured.meta["differentiable"], _device(device), torch.__version__, str(compiled_by)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


class Measurements:
    """Those of one graph, in a file that it shares with others. One that cannot be read or written is left alone."""

    def __init__(self, file: Path, key: str, about: Mapping[str, Any]) -> None:
        self.file, self.key, self.about = file, key, dict(about)

    def load(self) -> list[Timed]:
        found = _read(self.file).get(self.key, {}).get("timed", [])
        return [Timed(one["rows"], {name: _points(points) for name, points in one["seconds"].items()}) for one in found]

    def save(self, timed: list[Timed]) -> None:
        """Replaces the file as a whole: another process that reads it meanwhile sees the one or the other."""
        sizes = [{"rows": one.rows, "seconds": dict(one.points)} for one in timed]
        everything = _read(self.file) | {self.key: {**self.about, "timed": sizes}}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False) as made:
                json.dump(everything, made, indent=1)
            Path(made.name).replace(self.file)
        except OSError as error:
            log.warning("measurements are not kept: %s", error)


def _points(points: list[list[float]]) -> tuple[tuple[float, float], ...]:
    return tuple((float(flops), float(seconds)) for flops, seconds in points)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def time_programs(runs: Mapping[Any, Callable[[], object]], device: torch.device) -> dict[Any, float]:
    """The seconds that each of them takes at best, infinite for one that runs out of memory.

    Gradients are not asked for, and random numbers are as they were before.
    """
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        took = {name: _seconds(run, device) for name, run in runs.items()}  # a first run may compile and load
        fits = [name for name in took if math.isfinite(took[name])]
        took |= dict.fromkeys(fits, math.inf)
        for _ in range(RUNS):
            turn = {name: _seconds(runs[name], device) for name in fits}
            took |= {name: min(took[name], seconds) for name, seconds in turn.items()}
            if sum(turn.values()) > ENOUGH:
                break
    return took


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    internals.synchronize(device)
    started = time.perf_counter()
    try:
        run()
    except torch.OutOfMemoryError:
        return math.inf
    internals.synchronize(device)
    return time.perf_counter() - started

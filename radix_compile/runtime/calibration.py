"""Timing a graph's programs on the inputs of a call, and keeping what was measured on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.ir.graph import facts, graph_facts
from radix_compile.runtime.cost_model import Timed
from radix_compile.runtime.measurements_file import Graph, locked, read, warn_once, write
from radix_compile.torch_internals import val

RUNS = 3
"""Each program runs once to warm up, then so often, in turn with the others; its fastest run counts."""
ENOUGH = 2.0
"""Seconds for all runs of a turn, after which there is no other."""


def calibration_file() -> Path | None:
    """Where measurements are kept: ``$RADIX_COMPILE_CACHE``, or the user's cache directory, ``calibration.json``.

    None if the user has no home directory. The file may be read, edited and deleted at any time; ``measurements_file``
    says what is in it.
    """
    if folder := os.environ.get("RADIX_COMPILE_CACHE"):
        return Path(folder) / "calibration.json"
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither $HOME nor an entry in the list of users
        return None
    return base / "radix_compile" / "calibration.json"


def fingerprint(captured: fx.GraphModule, device: torch.device, compiled_by: tuple[Any, ...]) -> str:
    """A graph's name in the file: its ops, the sizes of its weights, what compiles and what runs it."""
    ops = [str(node.target) for node in captured.graph.nodes if node.op == "call_function"]
    static = [val(node) for node in captured.graph.find_nodes(op="placeholder") if facts(node).is_static]
    tensors = [one for one in static if isinstance(one, torch.Tensor)]
    weights = [(str(one.dtype), [size if isinstance(size, int) else None for size in one.shape]) for one in tensors]
    trains = graph_facts(captured).is_differentiable
    about = [ops, weights, trains, _device(device), torch.__version__, str(compiled_by)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


class Measurements:
    """The measurements of one graph, in a file that it shares with others, or nowhere if that is None.

    No call fails because of the file. One that cannot be read or written is left alone. What is of another form than
    it should be counts as not there, and is gone after the next save. Either is a warning, once.
    """

    def __init__(self, file: Path | None, key: str, about: Mapping[str, object]) -> None:
        self.file, self.key = file, key
        self.about = {name: str(value) for name, value in about.items()}

    def load(self) -> list[Timed]:
        """The calls that were timed, as far as they are kept."""
        try:
            return self._timed({} if self.file is None else read(self.file))
        except (OSError, ValueError) as error:
            self._not_kept(error)
            return []

    def save(self, timed: list[Timed]) -> None:
        """Adds calls that were timed, in place of those of the same size and programs.

        The file is replaced as a whole: another process that reads it meanwhile sees the one or the other.
        """
        try:
            if self.file is None:
                raise FileNotFoundError("there is no home directory; set RADIX_COMPILE_CACHE to a directory")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.file):
                graphs = read(self.file)
                both = {(one.rows, frozenset(one.points)): one for one in self._timed(graphs) + timed}
                write(self.file, graphs | {self.key: Graph(self.about, list(both.values()))})
        except (OSError, ValueError) as error:
            self._not_kept(error)

    def _timed(self, graphs: Mapping[str, Graph]) -> list[Timed]:
        return graphs[self.key].timed if self.key in graphs else []

    def _not_kept(self, error: OSError | ValueError) -> None:
        reason = getattr(error, "strerror", None) or error  # without names of temporary files, which are never the same
        place = "" if self.file is None else f" in {str(self.file)!r}"
        warn_once(f"measurements are not kept{place}: {reason}")


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

"""The file that keeps what was measured: its form, which is checked, and what it takes to share it.

It may be edited by hand, and other versions of this package may have written it. It is strict JSON::

    {"version": 2, "graphs": {name: {"timed": [{"rows": number, "seconds": {program: [[FLOPs, seconds], ...]}}]}}}

A graph has texts beside ``timed``, which say what it is. The seconds of a program that ran out of memory are null.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import reprlib
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from radix_compile.runtime.cost_model import Point, Timed

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

VERSION = 2
"""The version of the file's form. The first one had no version in it."""
MOST_BYTES = 1 << 24
"""A larger file is left alone: it will be another by mistake, as a graph has some hundred bytes."""
SMALLEST, LARGEST = 1e-30, 1e30
"""Rows, FLOPs and seconds in the file are between these, so that no quotient divides by zero or overflows."""
PATIENCE = 2.0
"""Seconds that a call waits for other processes that write to the file."""

_said: set[str] = set()


class Graph(NamedTuple):
    """An entry of the file: texts that say what it is of, and the calls that were timed."""

    about: dict[str, str]
    timed: list[Timed]


def warn_once(message: str) -> None:
    """A warning, once in a process: what is wrong with the file is found at each of its uses."""
    log.info("%s", message)
    if message not in _said:
        _said.add(message)
        warnings.warn(f"radix: {message}", stacklevel=2)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keeps other processes from writing in between. Raises ``OSError``, a ``TimeoutError`` if they take too long."""
    _is_there(file)  # or what is left alone, as /dev/null, would get a lock beside it
    if sys.platform == "win32":
        yield
        return
    until = time.monotonic() + PATIENCE
    with file.with_name(f"{file.name}.lock").open("a") as lock:  # never deleted: others may be waiting for it
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process has locked it for {PATIENCE:g} s") from None
                time.sleep(0.01)
            except OSError:  # a file system without locks: at worst what another process adds right now is lost
                break
        yield


def read(file: Path) -> dict[str, Graph]:
    """Its graphs by name, those of the right form. Raises ``OSError``, or ``ValueError`` if that cannot be a path."""
    content = file.read_bytes() if _is_there(file) else b""
    graphs: dict[str, Graph] = {}
    try:
        entries = _entries(content) if content.strip() else {}
    except ValueError as error:
        warn_once(f"the measurements in {str(file)!r} are not used: {error}")
        return graphs
    for key, entry in entries.items():
        try:
            graphs[key] = _graph(entry)
        except ValueError as error:
            warn_once(f"graph {reprlib.repr(key)} in {str(file)!r} is not used: {error}")
    return graphs


def _is_there(file: Path) -> bool:
    """Raises ``OSError`` for a directory, a pipe or a device, or for what is too large."""
    try:
        about = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(about.st_mode):
        raise OSError("expected a regular file, found another kind")
    if about.st_size > MOST_BYTES:
        raise OSError(f"expected at most {MOST_BYTES >> 20} MiB, found {about.st_size >> 20}")
    return True


def _entries(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, found {reprlib.repr(content)}: {error}") from None
    match found:
        case {"version": version, "graphs": dict(graphs)} if version == VERSION:
            return graphs
    raise _unexpected(f'{{"version": {VERSION}, "graphs": {{...}}}}', found)


def _graph(found: Any) -> Graph:
    match found:
        case {"timed": list(timed), **about} if all(isinstance(one, str) for one in about.values()):
            return Graph({str(name): str(text) for name, text in about.items()}, [_call(one) for one in timed])
    raise _unexpected('{"timed": [...]} and texts', found)


def _call(found: Any) -> Timed:
    match found:
        case {"rows": int(rows), "seconds": dict(programs)} if _is_measure(rows):
            return Timed(rows, {name: _points(points) for name, points in programs.items()})
    raise _unexpected('{"rows": a positive integer, "seconds": {...}}', found)


def _points(found: Any) -> tuple[Point, ...]:
    match found:
        case [_, *_]:
            return tuple(_point(one) for one in found)
    raise _unexpected("a list of pairs", found)


def _point(found: Any) -> Point:
    match found:
        case [flops, seconds] if _is_measure(flops) and (seconds is None or _is_measure(seconds)):
            return float(flops), math.inf if seconds is None else float(seconds)
    raise _unexpected(f"[FLOPs, seconds], both from {SMALLEST:g} to {LARGEST:g}, seconds or null", found)


def _is_measure(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and SMALLEST <= found <= LARGEST


def _unexpected(expected: str, found: Any) -> ValueError:
    short = reprlib.Repr()
    short.maxlevel = 2
    return ValueError(f"expected {expected}, found {short.repr(found)}")


def write(file: Path, graphs: Mapping[str, Graph]) -> None:
    """Replaces the file as a whole. Raises ``OSError``, after which all is as before."""
    entries = {
        key: {**one.about, "timed": [{"rows": call.rows, "seconds": _plain(call)} for call in one.timed]}
        for key, one in graphs.items()
    }
    content = json.dumps({"version": VERSION, "graphs": entries}, indent=1, allow_nan=False)
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with open(handle, "w") as made:
            made.write(content)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)  # the disk may be full


def _plain(call: Timed) -> dict[str, list[tuple[float, float | None]]]:
    return {
        name: [(flops, seconds if math.isfinite(seconds) else None) for flops, seconds in points]
        for name, points in call.points.items()
    }

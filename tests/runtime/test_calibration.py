"""How programs are timed, and how that is kept."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import radix_compile
from radix_compile import backend
from radix_compile.runtime import calibration, measurements_file
from radix_compile.runtime.calibration import Measurements, calibration_file, fingerprint, time_programs
from radix_compile.runtime.cost_model import Timed
from radix_compile.runtime.measurements_file import VERSION
from tests.graphs import captured
from tests.models import VOCABULARY, shared_batch

fcntl = pytest.importorskip("fcntl")

CPU = torch.device("cpu")
ONE = Timed(100, {"plain": ((1.0, 0.5),), "full fold": ((0.5, 0.2), (1.0, math.inf))})
TWO = Timed(900, {"plain": ((9.0, 4.5),)})
KEY = "0123456789abcdef"
"""The name that the graph of ``said_in_a_call`` has in the file."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "calibration.json"


def said_in_a_call(file: Path | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of a compile and a call, after which the result is compared to the model's own."""
    torch._dynamo.reset()
    monkeypatch.setattr(backend, "fingerprint", lambda *_: KEY)
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(97, 8), nn.Linear(8, 8)), shared_batch(4, 24, 16)
    options = {"inner_backend": "eager", "calibration": None if file is None else str(file)}
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        ours = torch.compile(model, backend="radix", options=options)(ids)
        torch.testing.assert_close(ours, model(ids))
    return [str(one.message) for one in caught if str(one.message).startswith("radix:")]


def graphs(file: Path) -> dict[str, Any]:
    """What is in the file, which has to be strict JSON and without fault."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = measurements_file.read(file)
    found: dict[str, Any] = json.loads(file.read_text(), parse_constant=refuse)
    assert found["version"] == VERSION
    assert found["graphs"].keys() == read.keys()
    return found["graphs"]


def test_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RADIX_COMPILE_CACHE", str(tmp_path))
    assert calibration_file() == tmp_path / "calibration.json"
    monkeypatch.delenv("RADIX_COMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file() == tmp_path / "radix_compile" / "calibration.json"


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements_file, "_said", set())
    for name in ("RADIX_COMPILE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a KeyError, as for a user without an entry
    (said,) = said_in_a_call(None, monkeypatch)
    assert "measurements are not kept: there is no home directory" in said
    assert said_in_a_call(None, monkeypatch) == []


def test_measurements_of_two_graphs_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "calibration.json"
    one, other = (Measurements(file, key, {"device": "cpu"}) for key in ("one", "other"))
    assert one.load() == []
    one.save([ONE, TWO])
    other.save([TWO])
    assert one.load() == [ONE, TWO]
    assert other.load() == [TWO]
    assert graphs(file)["one"]["device"] == "cpu"
    assert {path.name for path in file.parent.iterdir()} == {file.name, f"{file.name}.lock"}


@pytest.mark.parametrize("seconds", [1e-9, 0.1 + 0.2, 1 / 3, 1e6, math.inf])
def test_numbers_come_back_as_they_were(file: Path, seconds: float) -> None:
    timed = Timed(7, {"plain": ((1e18 / 7, seconds),)})
    kept = Measurements(file, "one", {})
    kept.save([timed])
    assert kept.load() == [timed]
    assert graphs(file).keys() == {"one"}


def test_what_another_process_timed_of_the_same_graph_stays(file: Path) -> None:
    one, other = (Measurements(file, "one", {}) for _ in range(2))
    one.save([ONE])
    other.save([TWO])
    assert one.load() == [ONE, TWO]
    again = Timed(ONE.rows, dict.fromkeys(ONE.points, ((3.0, 3.0),)))
    other.save([again])
    assert one.load() == [again, TWO]


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_call_is_timed_once_and_says_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    if content is not None:
        file.write_text(content)
    for _ in range(2):
        assert said_in_a_call(file, monkeypatch) == []
        assert radix_compile.stats().timed_calls == 1
    assert graphs(file).keys() == {KEY}


def as_file(timed: object, version: object = VERSION, **about: object) -> str:
    return json.dumps({"version": version, "graphs": {KEY: {**about, "timed": timed}}})


def of_seconds(seconds: object, rows: object = 96) -> str:
    return as_file([{"rows": rows, "seconds": seconds}])


def of_point(point: object) -> str:
    return of_seconds({"plain": [point], "position-wise fold": [point]})


SECONDS = {"plain": [[1.0, 2.0]], "position-wise fold": [[1.0, 2.0]]}
GOOD = [{"rows": 96, "seconds": SECONDS}]
MALFORMED: dict[str, str | bytes] = {
    "not JSON": "{not json",
    "cut off": as_file(GOOD)[:-9],
    "not text": b"\x80\x81\xff\x00",
    "a list": "[1, 2]",
    "a number": "3",
    "null": "null",
    "long": json.dumps([as_file(GOOD)] * 1000),
    "too deep": "[" * 100_000,
    "deep": "[" * 200 + "]" * 200,
    "too many digits": as_file(GOOD).replace("96", "9" * 5000),
    "without a version": json.dumps({KEY: {"device": "cpu", "timed": GOOD}}),
    "an older version": as_file(GOOD, VERSION - 1),
    "a newer version": as_file(GOOD, VERSION + 1),
    "a version that is text": as_file(GOOD, str(VERSION)),
    "without graphs": json.dumps({"version": VERSION}),
    "a list of graphs": json.dumps({"version": VERSION, "graphs": [GOOD]}),
    "a graph is a list": json.dumps({"version": VERSION, "graphs": {KEY: GOOD}}),
    "a graph is null": json.dumps({"version": VERSION, "graphs": {KEY: None}}),
    "without timed": json.dumps({"version": VERSION, "graphs": {KEY: {"device": "cpu"}}}),
    "timed is null": as_file(None),
    "timed is a dict": as_file({}),
    "a text is a number": as_file(GOOD, device=3),
    "a call is a number": as_file([3]),
    "without rows": as_file([{"seconds": SECONDS}]),
    "without seconds": as_file([{"rows": 96}]),
    "rows are text": of_seconds(SECONDS, "96"),
    "no rows": of_seconds(SECONDS, 0),
    "rows are true": of_seconds(SECONDS, True),
    "rows are a fraction": of_seconds(SECONDS, 1.5),
    "rows are huge": of_seconds(SECONDS, 10**400),
    "seconds are a list": of_seconds([]),
    "no points": of_seconds({"plain": [], "position-wise fold": []}),
    "points are text": of_seconds({"plain": "ab", "position-wise fold": "ab"}),
    "a point is text": of_point("ab"),
    "a point of one": of_point([1.0]),
    "a point of three": of_point([1.0, 1.0, 1.0]),
    "numbers as text": of_point(["1.0", "1.0"]),
    "NaN": of_point([1.0, math.nan]),
    "infinite FLOPs": of_point([math.inf, 1.0]),
    "infinite seconds": of_point([1.0, math.inf]),
    "no FLOPs": of_point([0.0, 1.0]),
    "no seconds": of_point([1.0, 0]),
    "negative": of_point([1.0, -1.0]),
    "true": of_point([1.0, True]),
    "FLOPs are null": of_point([None, 1.0]),
    "a number too large": of_point([1e300, 1e-300]),
}


@pytest.mark.parametrize("form", MALFORMED)
def test_what_is_of_another_form_is_said_and_replaced(file: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    content = MALFORMED[form]
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    (said,) = said_in_a_call(file, monkeypatch)
    assert str(file) in said
    assert "not used: expected " in said
    assert ", found " in said
    assert len(said) < 800
    assert radix_compile.stats().timed_calls == 1
    assert graphs(file).keys() == {KEY}


def test_only_the_graph_of_another_form_is_dropped(file: Path) -> None:
    one, two, three = (Measurements(file, key, {"device": key}) for key in ("one", "two", "three"))
    one.save([ONE])
    two.save([TWO])
    file.write_text(file.read_text().replace("900", "-900"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert two.load() == []
        assert one.load() == [ONE]
        three.save([TWO])
    (message,) = (str(one.message) for one in said)
    assert re.fullmatch(r"radix: graph 'two' in .* is not used: expected .*, found .*-900.*", message)
    assert (one.load(), two.load(), three.load()) == ([ONE], [], [TWO])
    assert graphs(file)["one"]["device"] == "one"


def another_kind(file: Path, kind: str) -> Path:
    """A path that cannot be that of a file, or of no file of measurements."""
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "loop of links":
        file.symlink_to(file)
    elif kind == "enormous":
        with file.open("w") as made:
            made.truncate(1 << 30)
    elif kind == "below a file":
        file.write_text("")
        file = file / "calibration.json"
    elif kind == "name too long":
        file = file.with_name("a" * 300)
    elif kind == "no name at all":
        file = file.with_name("\ud800")
    return file


def entries(directory: Path) -> dict[str, tuple[int, int, int]]:
    found = {path.name: path.lstat() for path in directory.iterdir()}
    return {name: (about.st_ino, about.st_size, about.st_mtime_ns) for name, about in found.items()}


KINDS = ["directory", "pipe", "loop of links", "enormous", "below a file", "name too long", "no name at all"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_the_file_is_left_alone(file: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = another_kind(file, kind)
    before = entries(file.parent)
    (said,) = said_in_a_call(path, monkeypatch)
    assert f"measurements are not kept in {str(path)!r}: " in said
    assert entries(file.parent) == before


def test_a_file_that_may_not_be_read_is_left_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(as_file(GOOD))

    def refuse(self: Path) -> bytes:  # not by its mode, which does not stop root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        (said,) = said_in_a_call(file, monkeypatch)
    assert said.endswith("Permission denied")
    assert file.read_text() == as_file(GOOD)


def test_a_path_with_a_nul_character() -> None:
    with pytest.raises(ValueError, match="'calibration' must be a path without NUL"):
        radix_compile.RadixBackend(calibration="a\0b")
    kept = Measurements(Path("a\0b"), "one", {})
    with pytest.warns(UserWarning, match="measurements are not kept in 'a.x00b': "):
        kept.save([ONE])
    assert kept.load() == []


@pytest.mark.parametrize("content", [None, as_file(GOOD)])
def test_a_full_disk_leaves_nothing_behind(file: Path, content: str | None) -> None:
    resource = pytest.importorskip("resource")
    if content is not None:
        file.write_text(content)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # files may be made, but nothing written to them
    try:
        with pytest.warns(UserWarning, match="measurements are not kept"):
            Measurements(file, "one", {}).save([ONE])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = {path.name for path in file.parent.iterdir()}
    assert left - {f"{file.name}.lock"} == (set() if content is None else {file.name})
    if content is not None:
        assert file.read_text() == content


def test_processes_that_write_at_the_same_time_lose_nothing(file: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(4)

    def save(process: int) -> None:
        start.wait()
        for i in range(25):
            Measurements(file, f"{process}, {i}", {}).save([ONE])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads
        processes = [fork.Process(target=save, args=(number,)) for number in range(4)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert graphs(file).keys() == {f"{process}, {i}" for process in range(4) for i in range(25)}


def test_a_call_does_not_wait_long_for_another_process(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements_file, "PATIENCE", 0.1)
    with open(f"{file}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        (said,) = said_in_a_call(file, monkeypatch)
        assert time.monotonic() - started < 5
    assert "measurements are not kept" in said
    assert "another process" in said
    assert not file.exists()
    assert said_in_a_call(file, monkeypatch) == []
    assert graphs(file).keys() == {KEY}


@pytest.mark.parametrize("locks", ["not on Windows", "not on this file system"])
def test_without_locks_it_is_kept_all_the_same(file: Path, monkeypatch: pytest.MonkeyPatch, locks: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        if locks == "not on Windows":
            patch.setattr(sys, "platform", "win32")
            patch.delattr(measurements_file, "fcntl")
        else:
            patch.setattr(fcntl, "flock", refuse)
        for key in ("one", "two"):
            Measurements(file, key, {}).save([ONE])
    assert graphs(file).keys() == {"one", "two"}


def test_programs_are_timed_in_turn_at_their_best() -> None:
    runs: list[str] = []
    took = time_programs({name: lambda name=name: runs.append(name) for name in "ab"}, CPU)
    assert runs == ["a", "b"] * (1 + calibration.RUNS)
    assert all(0 < seconds < 1 for seconds in took.values())


def test_long_runs_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "ENOUGH", 0.0)
    runs: list[int] = []
    time_programs({"a": lambda: runs.append(1)}, CPU)
    assert len(runs) == 2


def test_one_that_runs_out_of_memory() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("no room")

    took = time_programs({"a": too_large, "b": lambda: None}, CPU)
    assert took["a"] == math.inf
    assert took["b"] < 1


def test_random_numbers_go_on_as_before() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    time_programs({"a": lambda: torch.rand(5)}, CPU)
    assert torch.equal(torch.rand(2), expected)


def test_no_gradient_is_kept() -> None:
    weight = torch.ones(2, requires_grad=True)
    results: list[torch.Tensor] = []
    time_programs({"a": lambda: results.append(weight * 2)}, CPU)
    assert not any(result.requires_grad for result in results)


def test_graphs_with_other_weights_are_measured_apart() -> None:
    """The ops are the same; half the width, or half the bits, is another time."""

    def name_of(width: int, dtype: torch.dtype) -> str:
        torch._dynamo.reset()
        model = nn.Sequential(nn.Embedding(VOCABULARY, width), nn.Linear(width, width)).to(dtype)
        return fingerprint(captured(model, shared_batch(4, 12, 8)), torch.device("cpu"), ("inductor",))

    names = [name_of(16, torch.float32), name_of(32, torch.float32), name_of(16, torch.bfloat16)]
    assert len(set(names)) == 3
    assert name_of(16, torch.float32) == names[0]

"""How programs are timed, and how that is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from radix_compile import calibration
from radix_compile.calibration import Measurements, calibration_file, time_programs
from radix_compile.cost_model import Timed

CPU = torch.device("cpu")
ONE = Timed(100, {"plain": ((1.0, 0.5),), "full fold": ((0.5, 0.2), (1.0, math.inf))})
TWO = Timed(900, {"plain": ((9.0, 4.5),)})


def test_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RADIX_COMPILE_CACHE", str(tmp_path))
    assert calibration_file() == tmp_path / "calibration.json"
    monkeypatch.delenv("RADIX_COMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file() == tmp_path / "radix_compile" / "calibration.json"


def test_measurements_of_two_graphs_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "calibration.json"
    one, other = (Measurements(file, key, {"device": "cpu"}) for key in ("one", "other"))
    assert one.load() == []
    one.save([ONE, TWO])
    other.save([TWO])
    assert one.load() == [ONE, TWO]
    assert other.load() == [TWO]
    assert json.loads(file.read_text())["one"]["device"] == "cpu"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("content", ["", "[1, 2]", "{not json"])
def test_a_file_that_cannot_be_read_is_made_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(content)
    kept = Measurements(file, "one", {})
    assert kept.load() == []
    kept.save([ONE])
    assert kept.load() == [ONE]


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    Measurements(tmp_path / "file" / "calibration.json", "one", {}).save([ONE])
    assert "measurements are not kept" in capsys.readouterr().err


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

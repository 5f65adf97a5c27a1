"""Which program each call runs, and what is timed for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import radix_compile
from radix_compile import backend
from radix_compile.passes import fold_graph
from radix_compile.runtime import dispatch
from radix_compile.runtime.cost_model import PLAIN
from tests.models import DEVICE, build, shared_batch

FULL, ROWS, OFF = "full fold", "position-wise fold", "fold off the tree"


class Clock:
    """In place of one: programs take as long as it says, with the call's plan and with one that shares nothing."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {PLAIN: (1.0, 1.0), FULL: (0.57, 1.2), OFF: (0.57, 1.2)}
        self.results: list[dict[tuple[str, str], Any]] = []

    def time(self, runs: dict[tuple[str, str], Any], device: torch.device) -> dict[tuple[str, str], float]:
        self.results.append({name: run() for name, run in runs.items()})
        return {(name, which): self.seconds[name][which == "unshared"] for name, which in runs}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(dispatch, "time_programs", made.time)
    return made


@pytest.fixture
def model() -> Iterator[nn.Module]:
    with torch.no_grad():
        yield build("Qwen3", num_hidden_layers=1)


def compiled(model: nn.Module, tmp_path: Path, **options: Any) -> Any:
    torch._dynamo.reset()
    made = torch.compile(
        model,
        backend="radix",
        options={"inner_backend": "eager", "calibration": str(tmp_path / "calibration.json"), **options},
    )

    def call(ids: Tensor, **more: Any) -> Tensor:
        logits: Tensor = made(ids, use_cache=False, **more).logits
        torch.testing.assert_close(logits, model(ids, use_cache=False, **more).logits, rtol=1e-4, atol=1e-5)
        return logits

    return call


IDS = shared_batch(4, 24, 16)
LITTLE = shared_batch(4, 24, 3)
"""Of which 96 rows are 87 nodes."""
NOTHING = torch.arange(96).view(4, 24)


def test_a_call_is_timed_once_and_folds(model: nn.Module, clock: Clock, tmp_path: Path) -> None:
    call = compiled(model, tmp_path)
    for _ in range(3):
        call(IDS)
    assert len(clock.results) == 1
    assert set(clock.results[0]) == {(PLAIN, ""), (FULL, "shared"), (FULL, "unshared")}
    counted = radix_compile.stats()
    assert (counted.timed_calls, counted.folded_calls, counted.calls) == (1, 3, 3)


def test_what_is_timed_computes_the_same(model: nn.Module, clock: Clock, tmp_path: Path) -> None:
    compiled(model, tmp_path)(IDS)
    plain, *folded = clock.results[0].values()
    for one in folded:
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-5)


def test_with_little_shared_the_plain_program_is_faster(model: nn.Module, clock: Clock, tmp_path: Path) -> None:
    call = compiled(model, tmp_path)
    call(IDS)
    call(LITTLE)
    counted = radix_compile.stats()
    assert (counted.folded_calls, counted.timed_calls) == (1, 1)
    assert counted.plain_calls == {"the plain program is predicted to be as fast": 1}


def test_with_nothing_shared_nothing_is_timed(model: nn.Module, clock: Clock, tmp_path: Path) -> None:
    compiled(model, tmp_path)(NOTHING)
    assert not clock.results
    assert radix_compile.stats().plain_calls == {"too little is shared": 1}


def test_a_model_that_is_slower_folded_runs_plain(model: nn.Module, clock: Clock, tmp_path: Path) -> None:
    clock.seconds[FULL] = (1.2, 1.4)
    compiled(model, tmp_path)(IDS)
    assert radix_compile.stats().plain_calls == {"the plain program is predicted to be as fast": 1}


def test_another_process_reads_what_was_measured(model: nn.Module, clock: Clock, tmp_path: Path) -> None:
    for _ in range(2):
        compiled(model, tmp_path)(IDS)
    assert len(clock.results) == 1
    assert radix_compile.stats().folded_calls == 2
    other = build("Qwen3", num_hidden_layers=2)
    compiled(other, tmp_path)(IDS)
    assert len(clock.results) == 2  # another model


@pytest.mark.parametrize(
    ("options", "folds"),
    [({"fold": "always"}, 2), ({"fold": 1}, 2), ({"fold": 0.5}, 1), ({"fold": "never"}, 0), ({"calibrate": False}, 2)],
)
def test_pinned_by_options(model: nn.Module, clock: Clock, tmp_path: Path, options: dict[str, Any], folds: int) -> None:
    clock.seconds[FULL] = (1.2, 1.4)
    call = compiled(model, tmp_path, **options)
    call(IDS)
    call(LITTLE)
    assert not clock.results
    assert radix_compile.stats().folded_calls == folds


def test_without_calibration_what_is_known_counts(model: nn.Module, clock: Clock, tmp_path: Path) -> None:
    clock.seconds[FULL] = (1.2, 1.4)
    compiled(model, tmp_path)(IDS)
    compiled(model, tmp_path, calibrate=False)(IDS)
    assert len(clock.results) == 1
    assert radix_compile.stats().folded_calls == 0


@pytest.mark.parametrize("faster", [FULL, ROWS])
def test_on_a_gpu_attention_in_full_form_is_another_choice(
    model: nn.Module, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    ids = IDS.to(DEVICE)
    model.to(DEVICE)
    if DEVICE == "cpu":  # then the interpreter runs the kernels of a GPU
        monkeypatch.setattr(fold_graph, "code_for", lambda query, value: "triton")
    clock.seconds |= {FULL: (0.5, 1.1), ROWS: (0.5, 1.1)} | {faster: (0.3, 1.1)}
    compiled(model, tmp_path)(ids)
    assert {name for name, _ in clock.results[0]} == {PLAIN, FULL, ROWS}
    counted = radix_compile.stats()
    assert counted.folded_calls == 1
    assert bool(counted.tree_pairs) == (faster == FULL)


def test_calls_off_the_tree_are_timed_themselves(clock: Clock, tmp_path: Path) -> None:
    call = compiled(build("Qwen3", attention="eager", num_hidden_layers=1), tmp_path)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        call(IDS, attention_mask=mask)
        mask[:, :3] = 0  # on the left, so that those rows see no key
        call(IDS, attention_mask=mask)
    assert [{name for name, _ in one} for one in clock.results] == [{PLAIN, FULL}, {PLAIN, OFF}]
    assert radix_compile.stats().folded_calls == 2


def test_programs_that_other_processes_take_part_in_are_not_timed(
    model: nn.Module, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_measurements", lambda captured, options: None)
    compiled(model, tmp_path)(IDS)
    assert not clock.results
    assert radix_compile.stats().folded_calls == 1


def test_the_gradient_of_a_timed_call(clock: Clock, tmp_path: Path) -> None:
    model = build("Qwen3", num_hidden_layers=1).double().train()
    call = torch.compile(
        lambda ids: model(ids, labels=ids, use_cache=False).loss,
        backend="radix",
        options={"inner_backend": "aot_eager", "calibration": str(tmp_path / "calibration.json")},
    )
    weights = list(model.parameters())
    ours = torch.autograd.grad(call(IDS), weights)
    plain = torch.autograd.grad(model(IDS, labels=IDS, use_cache=False).loss, weights)
    torch.testing.assert_close(ours, plain)
    assert (len(clock.results), radix_compile.stats().folded_calls) == (1, 1)


def test_explain_times_nothing_unasked(model: nn.Module, clock: Clock, tmp_path: Path) -> None:
    """The programs that it runs are not those that the user's options compile."""
    options = {"calibration": str(tmp_path / "calibration.json"), "fold": "auto"}
    assert radix_compile.explain(model, IDS, options=options, use_cache=False).folded
    assert not clock.results
    assert not list(tmp_path.iterdir())


def test_explain_predicts_and_measures(model: nn.Module, tmp_path: Path) -> None:
    options = {"inner_backend": "aot_eager", "calibration": str(tmp_path / "calibration.json")}
    before = radix_compile.explain(model, IDS, options={**options, "inner_backend": "eager"}, use_cache=False)
    assert before.predicted == before.measured == {}
    found = radix_compile.explain(model, IDS, options=options, measure=True, use_cache=False)
    assert set(found.predicted) == {PLAIN, FULL}
    assert set(found.measured) == {PLAIN, "radix"}
    assert all(seconds > 0 for seconds in (*found.predicted.values(), *found.measured.values()))
    assert "predicted: plain" in str(found)
    assert "measured:  plain" in str(found)
    again = radix_compile.explain(model, IDS, options=options, use_cache=False)
    assert again.predicted == pytest.approx(found.predicted)
    assert again.measured == {}

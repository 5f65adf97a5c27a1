"""Each family folds with right padding as the compatibility page says, and Qwen3 with every form of call."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.compatibility.cells import Cell, run_cell
from tests.compatibility.families import FAMILIES, attentions
from tests.compatibility.forms import forms_of

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
FOLDING_FAMILIES = sorted(name for name, family in FAMILIES.items() if family.causal)
DECLINED_FORMS = {"static cache"}
WITHOUT_ATTENTION = {"Mamba2"}

KINDS = {"GPT2", "Qwen3", "Gemma2", "Bloom", "Mixtral", "DeepseekV3", "GptOss", "Qwen3Next", "Mamba2", "Bert"}
"""One family of each kind. The others are marked slow."""


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_family(name: str) -> None:
    cell = run_cell(name, attentions(name)[0], forms_of(name)[0])
    assert not cell.fails, cell
    if name in FOLDING_FAMILIES:
        assert cell.result == "folded", cell
        assert cell.compact_tokens == 74 < cell.tokens == 144
        assert cell.on_tree != bool(cell.full_form) or name in WITHOUT_ATTENTION
    else:
        assert cell.reason, cell


@pytest.mark.parametrize("form", forms_of("Qwen3"))
def test_form(form: str) -> None:
    cell = run_cell("Qwen3", "sdpa", form)
    assert cell.result == ("declined" if form in DECLINED_FORMS else "folded"), cell
    assert bool(cell.reason) == (form in DECLINED_FORMS)


@pytest.mark.slow  # tests/analysis/rules/test_flex.py folds and refuses flex_attention by default
def test_flex_attention() -> None:
    """The graphs after the graph break of the block mask take embeddings as inputs."""
    cell = run_cell("Qwen3", "flex_attention", "right padding")
    assert cell.result == "folded", cell
    assert cell.compact_tokens < cell.tokens


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong number gets the result "wrong"."""
    monkeypatch.setattr("tests.compatibility.cells.logits", _logits_with_error())
    assert run_cell("Qwen3", "sdpa", "right padding").result == "wrong"


def _logits_with_error() -> object:
    """``logits``, with an error in the third call: the one with radix."""
    from tests.compatibility.cells import logits

    num_runs = 0

    def changed_logits(output: object) -> object:
        nonlocal num_runs
        num_runs += 1
        return [tensor + (1e-3 if num_runs == 3 else 0) for tensor in logits(output)]

    return changed_logits


def test_the_page_is_of_these_families_and_has_no_failure() -> None:
    text = PAGE.read_text()
    table = text.split("## Families and attention")[1].split("##")[0]
    cell = r" (\w+|-)(?: \+ tree)? \|"
    rows = re.findall(rf"^\| (\w+) \|{cell}{cell}{cell}", table, re.MULTILINE)
    assert [row[0] for row in rows if row[0] != "family"] == list(FAMILIES)
    assert sum("folded" in row for row in rows) >= 24
    assert not re.search(r"\| (wrong|crash) ", text)


def test_a_crash_is_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radix_compile.backend.capture_and_annotate", lambda *_: 1 // 0)
    cell: Cell = run_cell("Qwen3", "sdpa", "right padding")
    assert cell.result == "crash"
    assert "ZeroDivisionError" in cell.reason

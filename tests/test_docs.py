"""The Python in the README and in docs/ runs as it stands, block after block."""

from __future__ import annotations

import re
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from radix_compile.analysis.op_info import OP_INFO
from radix_compile.cli import main
from radix_compile.options import Options
from radix_compile.passes import pipeline
from tests.tiers import slow_unless

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def own_table() -> Iterator[None]:
    """Rules that a page registers are gone behind it."""
    before = dict(OP_INFO)
    yield
    OP_INFO.clear()
    OP_INFO.update(before)


@pytest.mark.usefixtures("own_table")
@pytest.mark.parametrize(
    "page",
    slow_unless(lambda page: page.name != "training.md", [page for page in PAGES if blocks(page)]),  # 12 s
    ids=lambda page: page.name,
)
def test_snippets_run(page: Path) -> None:
    names: dict[str, object] = {"__name__": "snippet"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), names)


def test_there_is_something_to_run() -> None:
    assert {page.name for page in PAGES if blocks(page)} >= {"README.md", "add-an-op.md"}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def options(page: Path) -> list[tuple[str, str]]:
    """The names and defaults in the table of options."""
    table = page.read_text().partition("| option | default | |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.MULTILINE)


def test_the_tables_of_options() -> None:
    defaults = [(name, repr(default).replace("'", '"')) for name, default in asdict(Options()).items()]
    assert options(ROOT / "docs" / "options.md") == defaults
    shown = options(ROOT / "README.md")
    assert shown == [row for row in defaults if row in shown] != []


def commands(page: Path) -> list[tuple[list[str], list[str]]]:
    """Each ``$ radix-compile ...`` with the lines that are shown of its output."""
    shown: list[tuple[list[str], list[str]]] = []
    for line in page.read_text().splitlines():
        if line.startswith("    $ radix-compile "):
            shown.append((line.split()[2:], []))
        elif shown and (line.startswith("    ") or not line):
            shown[-1][1].append(line.removeprefix("    "))
        elif shown and shown[-1][1][-1:] != [None]:
            shown[-1][1].append(None)  # type: ignore[arg-type] - prose: what follows is of another
    return [(given, lines[: lines.index(None)] if None in lines else lines) for given, lines in shown]  # type: ignore[arg-type]


SHOWN = [" ".join(given) for given, _ in commands(ROOT / "docs" / "inspection.md")]


@pytest.mark.parametrize(
    "given", [pytest.param(one, marks=pytest.mark.slow) if one.startswith("bench") else one for one in SHOWN]
)
def test_commands_print_what_is_shown(
    given: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for times: of a benchmark, the rows and nodes."""
    monkeypatch.chdir(ROOT)
    expected = next(lines for words, lines in commands(ROOT / "docs" / "inspection.md") if " ".join(words) == given)
    assert main([*given.split(), *(["--runs", "1"] if given.startswith("bench") else [])]) in (0, 1)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    for line in filter(None, expected):
        if given.startswith("bench"):
            counts = line.partition(" ms")[0].rpartition("  ")[0].rstrip()
            assert " ms" not in line or any(one.startswith(counts) for one in printed), line
        else:
            assert line in printed


def first_column(heading: str) -> list[str]:
    """The first cells of the first table behind a heading of the code map."""
    section = (ROOT / "docs" / "code-map.md").read_text().split(f"## {heading}")[1]
    return re.findall(r"^\| ([^|]+) \|", section.split("\n## ")[0], re.MULTILINE)[1:]


def test_the_code_map_has_the_passes_in_order() -> None:
    passes = [one.__name__ for one in (*pipeline.ANALYSES, *pipeline.FOLDING)]
    assert [step for step in first_column("Compiling a graph") if step in passes] == passes


def test_the_code_map_has_the_layers_in_order() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    named = [re.findall(r"`(\w+)`", cell) for cell in first_column("Packages")]
    assert [sorted(cells) for cells in named if cells] == [sorted(re.split(r" \| ", one)) for one in contract["layers"]]

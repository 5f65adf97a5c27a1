"""Run every cell and write the page: ``make compatibility``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers

from radix_compile.passes import pipeline
from tests.compatibility import cuda, versions
from tests.compatibility.cells import Cell, run_cell
from tests.compatibility.families import FAMILIES, attentions
from tests.compatibility.forms import FORMS, forms_of

HEAD = """# Compatibility

`make compatibility` generates this page; do not edit it. Each cell is a small unmodified model of transformers with
random weights. The model runs plain, in float64 and with `backend="radix"`, and the logits of every row are compared.

- folded: the token-wise work of every layer runs once per distinct prefix. In the first table, "+ tree" means that
  attention runs on the prefix tree as well.
- partly: the same, up to an op that is named below.
- declined: the plain program runs, for a reason that is given below.
- unsupported: the plain model fails without radix.

torch {torch}, transformers {transformers}, inner backend `aot_eager`, on a CPU. {count} cells: {results}.

"""


def planned_cells() -> Iterator[tuple[str, str, str]]:
    """The family, attention and form of each cell: every attention with the first form, every form with the default."""
    for family in FAMILIES:
        for number, attention in enumerate(attentions(family)):
            forms = forms_of(family) if number == 0 else forms_of(family)[:1]
            yield from ((family, attention, form) for form in forms)


def page(cells: Iterable[Cell]) -> str:
    cells = list(cells)
    kinds = ("folded", "partly", "declined", "unsupported", "wrong", "crash")
    counts = {kind: sum(cell.result == kind for cell in cells) for kind in kinds}
    results = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    head = HEAD.format(
        torch=torch.__version__, transformers=transformers.__version__, count=len(cells), results=results
    )
    sections = [*_attention_table(cells), "", *_form_table(cells), "", *_reasons(cells)]
    for part in (cuda, versions):
        sections += ["", *part.table()] if part.RESULTS.exists() else []
    return head + "\n".join(sections) + "\n"


def _attention_table(cells: list[Cell]) -> Iterator[str]:
    yield "## Families and attention, right padding\n"
    kinds = ("sdpa", "eager", "flex_attention")
    yield f"| family | {' | '.join(kinds)} | tokens | |"
    yield "| --- |" + " --- |" * (len(kinds) + 2)
    for family in FAMILIES:
        own = {cell.attention: cell for cell in cells if cell.family == family and cell.form == forms_of(family)[0]}
        shown = " | ".join(_with_tree(own[kind]) if kind in own else "-" for kind in kinds)
        tokens = next((f"{cell.tokens} -> {cell.compact_tokens}" for cell in own.values() if cell.tokens), "")
        yield f"| {family} | {shown} | {tokens} | {FAMILIES[family].note} |"


def _with_tree(cell: Cell) -> str:
    return f"{cell.result} + tree" if cell.on_tree and cell.result in ("folded", "partly") else cell.result


def _form_table(cells: list[Cell]) -> Iterator[str]:
    forms = [form for form in FORMS if any(cell.form == form for cell in cells)]
    yield "## Families and forms of call\n"
    yield f"| family | {' | '.join(forms)} |"
    yield "| --- |" + " --- |" * len(forms)
    for family in FAMILIES:
        first = attentions(family)[0]
        own = {cell.form: cell.result for cell in cells if cell.family == family and cell.attention == first}
        yield f"| {family} | {' | '.join(own.get(form, '-') for form in forms)} |"


def _reasons(cells: list[Cell]) -> Iterator[str]:
    yield "## Reasons\n"
    for result in ("wrong", "crash", "partly", "declined", "unsupported"):
        reasons: dict[str, list[str]] = {}
        for cell in cells:
            if cell.result == result:
                reasons.setdefault(_short(cell.reason), []).append(f"{cell.family} ({cell.form})")
        if reasons:
            yield f"### {result}\n"
        yield from _by_reason(reasons)
    reasons = {}
    for cell in cells:
        if cell.full_form:
            reasons.setdefault(cell.full_form, []).append(f"{cell.family} ({cell.attention}, {cell.form})")
    if reasons:
        yield "### folded, with attention in full form\n"
    yield from _by_reason(reasons)


def _by_reason(reasons: dict[str, list[str]]) -> Iterator[str]:
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        others = f" and {len(names) - 6} more" if len(names) > 6 else ""
        yield f"- {reason}: {', '.join(names[:6])}{others}"
    if reasons:
        yield ""


def _short(reason: str) -> str:
    """The reason without paths of this machine."""
    return re.sub(r"/[\w./-]+/", "", reason.split(" at /")[0]).replace("|", "/")


def _check_everything() -> None:
    """Verify graphs after every pass, so that a mistake in a pass is a crash."""
    pipeline.ALWAYS_VERIFY = True


def main() -> int:
    parser = argparse.ArgumentParser(prog="compatibility", description="Run the compatibility matrix.")
    parser.add_argument("page", type=Path, help="the file to write, for example docs/compatibility.md")
    parser.add_argument("--family", nargs="*", choices=list(FAMILIES), help="run these only")
    parser.add_argument("--form", nargs="*", choices=list(FORMS), help="run these only")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    planned = [
        cell
        for cell in planned_cells()
        if (not options.family or cell[0] in options.family) and (not options.form or cell[2] in options.form)
    ]
    cells = []
    with ProcessPoolExecutor(options.workers, initializer=_check_everything) as pool:
        for cell in pool.map(run_cell, *zip(*planned, strict=True)):
            print(cell, flush=True)
            cells.append(cell)
    options.page.write_text(page(cells))
    return int(any(cell.fails for cell in cells))


if __name__ == "__main__":
    sys.exit(main())

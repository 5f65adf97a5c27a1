"""Run some cells on a GPU: ``python -m tests.compatibility.cuda``. The page shows the results of the last run."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers

from tests.compatibility.cells import Cell, run_cell
from tests.compatibility.families import FAMILIES, attentions
from tests.compatibility.forms import forms_of

RESULTS = Path(__file__).with_name("cuda.json")
EAGER_FORMS = ("right padding", "left padding, positions", "embeddings", "labels", "autocast")
"""The forms that run for every family, with the inner backend ``aot_eager``."""
INDUCTOR_FAMILIES = ("Qwen3", "Gemma3", "Bloom", "GptOss", "Mixtral", "DeepseekV3", "Mamba2", "Qwen3Next")
"""The families that also run with inductor, with right padding."""


def planned_cells(families: Iterable[str]) -> Iterator[tuple[str, str, str, str]]:
    """The family, attention, form and inner backend of each cell."""
    for family in families:
        first, *others = attentions(family)
        yield from ((family, first, form, "aot_eager") for form in forms_of(family) if form in EAGER_FORMS)
        yield from ((family, other, forms_of(family)[0], "aot_eager") for other in others if other != "eager")
    yield from ((family, attentions(family)[0], "right padding", "inductor") for family in INDUCTOR_FAMILIES)


def table() -> Iterator[str]:
    """The lines of the page's section on GPUs, from the results of the last run."""
    run = json.loads(RESULTS.read_text())
    kinds = [*EAGER_FORMS, "flex_attention", "inductor"]
    yield "## On a GPU\n"
    yield f"Results of `python -m tests.compatibility.cuda` on an {run['device']}, torch {run['torch']}, transformers"
    yield f"{run['transformers']}. {run['results']}. A dash marks a cell that was not run.\n"
    yield f"| family | {' | '.join(kinds)} |"
    yield "| --- |" + " --- |" * len(kinds)
    rows: dict[str, dict[str, str]] = {}
    for cell in run["cells"]:
        kind = cell["attention"] if cell["attention"] == "flex_attention" else cell["form"]
        rows.setdefault(cell["family"], {})["inductor" if cell["inner"] == "inductor" else kind] = cell["result"]
    for family, results in rows.items():
        yield f"| {family} | {' | '.join(results.get(kind, '-') for kind in kinds)} |"


def _run(family: str, attention: str, form: str, inner: str) -> Cell:
    return run_cell(family, attention, form, inner, "cuda")


def main() -> int:
    parser = argparse.ArgumentParser(prog="cuda", description="Run some cells of the compatibility page on a GPU.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--family", nargs="*", choices=list(FAMILIES), default=list(FAMILIES), help="run aot_eager cells of these only"
    )
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    planned, results = list(planned_cells(options.family)), []
    counts: dict[str, int] = {}
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for (*_, inner), cell in zip(planned, pool.map(_run, *zip(*planned, strict=True)), strict=True):
            print(cell, f"({inner})", flush=True)
            counts[cell.result] = counts.get(cell.result, 0) + 1
            results.append({**vars(cell), "inner": inner})
            run = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "results": f"{len(results)} cells: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()),
                "cells": results,
            }
            options.results.write_text(json.dumps(run, indent=1) + "\n")
    return int(any(kind in counts for kind in ("wrong", "crash")))


if __name__ == "__main__":
    sys.exit(main())

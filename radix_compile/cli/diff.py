"""Show a model's graph before and after, or what one pass did to it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from radix_compile.cli.explain import explained
from radix_compile.cli.inputs import UsageError, add_batch, add_model, natural
from radix_compile.inspection.diff import GraphDiff

ENDINGS = {"": "text", ".txt": "text", ".diff": "text", ".html": "html", ".json": "json"}
"""The format of a file by the ending of its name, unless ``--format`` names another."""

STYLES = {"~": "green", "+": "yellow", "-": "red", "@": "bold"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_batch(parser)
    parser.add_argument("--format", choices=("text", "html", "json"), help="default: by the name of -o, or text")
    parser.add_argument("-o", "--output", metavar="FILE", help="write to this file")
    parser.add_argument("--pass", dest="across", metavar="NAME", help="only what this pass did, such as fold_graph")
    parser.add_argument("--layer", type=natural, metavar="N", help="only this layer")


def run(options: argparse.Namespace, console: Console) -> int:
    """0 if something folds, 1 if nothing does."""
    kind = "json" if options.json else options.format or _kind_of(options.output or "")
    if kind == "html" and options.output is None and sys.stdout.isatty():
        raise UsageError("--format html needs a file to write to: -o diff.html")
    diff = explained(options).diff
    try:
        if options.across:
            diff = diff.across(options.across)
        if options.layer is not None:
            diff = diff.of_layer(options.layer)
    except ValueError as error:
        raise UsageError(str(error)) from error
    content = _content(diff, kind)
    if options.output:
        try:
            Path(options.output).write_text(content + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"-o {options.output}: {error.strerror}") from error
        console.print(f"{options.output}: {diff!r}", markup=False)
    elif kind == "text":
        for line in content.splitlines():
            console.print(Text(line, STYLES.get(line[:1], "")))
    else:
        print(content)
    return 0 if any(pair.report.folded for pair in diff.pairs) else 1


def _kind_of(output: str) -> str:
    suffix = Path(output).suffix
    if suffix not in ENDINGS:
        raise UsageError(f"-o {output}: expected a file ending in {', '.join(filter(None, ENDINGS))}, or --format")
    return ENDINGS[suffix]


def _content(diff: GraphDiff, kind: str) -> str:
    if kind == "json":
        return json.dumps(diff.to_dict(), indent=2)
    return diff.html() if kind == "html" else diff.text()

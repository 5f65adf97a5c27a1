"""Show a model's graph before and after folding, or the changes of one pass."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from radix_compile.cli.explain import explain_model
from radix_compile.cli.inputs import UsageError, add_batch, add_model, natural
from radix_compile.inspection.diff import GraphDiff

FORMATS = {"": "text", ".txt": "text", ".diff": "text", ".html": "html", ".json": "json"}
"""The format of a file by the suffix of its name, if ``--format`` is not given."""

STYLES = {"~": "green", "+": "yellow", "-": "red", "@": "bold"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_batch(parser)
    parser.add_argument("--format", choices=("text", "html", "json"), help="default: from the suffix of -o, else text")
    parser.add_argument("-o", "--output", metavar="FILE", help="write to this file")
    parser.add_argument("--pass", dest="pass_name", metavar="NAME", help="only the changes of this pass (fold_graph)")
    parser.add_argument("--layer", type=natural, metavar="N", help="only the layer of this number")


def run(options: argparse.Namespace, console: Console) -> int:
    """Return 0 if a graph folds, else 1."""
    output_format = "json" if options.json else options.format or _format_of(options.output or "")
    if output_format == "html" and options.output is None and sys.stdout.isatty():
        raise UsageError("--format html needs a file to write to: -o diff.html")
    diff = explain_model(options).diff
    try:
        if options.pass_name:
            diff = diff.across(options.pass_name)
        if options.layer is not None:
            diff = diff.of_layer(options.layer)
    except ValueError as error:
        raise UsageError(str(error)) from error
    content = _content(diff, output_format)
    if options.output:
        try:
            Path(options.output).write_text(content + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"-o {options.output}: {error.strerror}") from error
        console.print(f"{options.output}: {diff!r}", markup=False)
    elif output_format == "text":
        for line in content.splitlines():
            console.print(Text(line, STYLES.get(line[:1], "")))
    else:
        print(content)
    return 0 if any(pair.report.folded for pair in diff.pairs) else 1


def _format_of(output: str) -> str:
    suffix = Path(output).suffix
    if suffix not in FORMATS:
        raise UsageError(f"-o {output}: expected a file ending in {', '.join(filter(None, FORMATS))}, or --format")
    return FORMATS[suffix]


def _content(diff: GraphDiff, output_format: str) -> str:
    if output_format == "json":
        return json.dumps(diff.to_dict(), indent=2)
    return diff.html() if output_format == "html" else diff.text()

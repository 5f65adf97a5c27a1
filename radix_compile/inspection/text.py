"""A graph diff as text, for a terminal or a file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from radix_compile.inspection.lines import Kind, Line, within_layer

if TYPE_CHECKING:
    from radix_compile.inspection.diff import GraphDiff, GraphPair

LEGEND = "~ runs once per node   + added   - removed   unmarked lines are unchanged"
OUTSIDE_LAYERS = "outside layers"


def text(diff: GraphDiff) -> str:
    """Return a heading for each graph and each layer, and a line for each node; equal layers once."""
    return "\n".join(line for number, pair in enumerate(diff.pairs) for line in _text(number, pair, diff.layer))


def heading(number: int, pair: GraphPair) -> str:
    """Return ``graph 0: 480 rows -> 151 nodes (3.18x), ...``."""
    graph = f"graph {number}: "
    if not pair.report.folded:
        return f"{graph}not folded: {short(pair.report.reason)}"
    tree = f"{pair.rows:,} rows -> {pair.nodes:,} nodes ({pair.rows / pair.nodes:.2f}x), " if pair.nodes else ""
    before, after = (sum(node.is_computed for node in view.nodes) for view in (pair.before, pair.after))
    moved = f", {in_bytes(pair.moved)} moved between rows and nodes" if pair.nodes else ""
    return f"{graph}{tree}{before} ops before, {after} after{moved}"


def _text(number: int, pair: GraphPair, layer: int | None) -> Iterator[str]:
    yield heading(number, pair)
    yield f"  {LEGEND}"
    for block in pair.blocks(layer):
        shown = [line for line in block.lines if line.node.is_computed or line.kind is not Kind.SAME]
        if not shown:
            continue
        yield ""
        yield f"@@ {block.title or OUTSIDE_LAYERS} @@"
        rows = [
            (line.kind.value, op_of(line), shape_of(line), within_layer(line.module), source_of(line)) for line in shown
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def short(message: str) -> str:
    """Return the message with paths relative to the working directory or to ``site-packages``."""
    return re.sub(r"/\S*/site-packages/", "", message).replace(f"{Path.cwd()}{os.sep}", "")


def op_of(line: Line) -> str:
    """Return ``linear``, or ``sdpa -> tree_attention`` where another op replaces it."""
    if line.before is None or line.after is None or line.before.op == line.after.op or line.after.op == "reshape":
        return line.node.op
    return f"{line.before.op} -> {line.after.op}"


def shape_of(line: Line) -> str:
    """Return the shape before and after (once if they are equal), and the dtype."""
    shapes = [node.shape for node in (line.before, line.after) if node is not None and node.shape]
    dtype = line.node.dtype
    return f"{' -> '.join(dict.fromkeys(shapes))} {dtype}".strip()


def source_of(line: Line) -> str:
    """Return the file name and line number of the user's program."""
    source = line.node.source or (line.before.source if line.before else "")
    path, _, rest = source.partition(":")
    return f"{Path(path).name}:{rest.partition(':')[0]}" if source else ""


def in_bytes(count: float) -> str:
    """Return the number of bytes as text, as in ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError

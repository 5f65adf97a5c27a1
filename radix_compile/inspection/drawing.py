"""Both graphs side by side as a drawing: a box for each node, equal layers once."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from radix_compile.inspection.graph_view import BOUNDARY, NodeView
from radix_compile.inspection.lines import Block, Kind, Line
from radix_compile.inspection.text import heading

if TYPE_CHECKING:
    from radix_compile.inspection.diff import GraphDiff

WIDTH, MIDDLE, STEP, MARGIN = 900, 450, 18, 16
STYLE = """
text { font: 11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1d2126 }
.said { fill: #5d6670 } .head { font-weight: 600; font-size: 12px } .paper { fill: #ffffff }
.full { fill: #e6eaee } .compact { fill: #d3eedd } .boundary { fill: #fce2bf } .attention { fill: #e2d6f8 }
.removed { fill: #f6d9d9 } .link { stroke: #9aa4ad; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e7ea } .said { fill: #98a3ad } .paper { fill: #14171a } .full { fill: #2b333a }
  .compact { fill: #1d4a2e } .boundary { fill: #573d15 } .attention { fill: #40306a } .removed { fill: #552a2c }
}
"""


def drawing(diff: GraphDiff) -> str:
    """An SVG, in the colours of the page: light or dark as the reader has it."""
    y, parts = MARGIN, []
    for number, pair in enumerate(diff.pairs):
        y += STEP
        parts += [_text(MARGIN, y, diff.title, "head"), _text(MARGIN, y + STEP, heading(number, pair), "said")]
        y += STEP
        for block in pair.blocks(diff.layer):
            y = _draw_block(parts, block, y)
    height = y + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{STYLE}</style>"
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>{"".join(parts)}</svg>'
    )


def _draw_block(parts: list[str], block: Block, y: int) -> int:
    """Returns where the next may begin."""
    lines = [line for line in block.lines if line.node.is_computed or line.kind is Kind.ADDED]
    if not lines:
        return y
    y += STEP + STEP // 2
    parts.append(_text(MARGIN, y, block.title or "outside of layers", "head"))
    for line in lines:
        y += STEP
        parts.extend(_draw_line(line, y))
    return y


def _draw_line(line: Line, y: int) -> Iterator[str]:
    gap = 12
    if line.before is not None:
        form = "removed" if line.kind is Kind.REMOVED else "full"
        yield _box(MARGIN, y, MIDDLE - gap - MARGIN, line.before, form)
    if line.after is not None:
        yield _box(MIDDLE + gap, y, WIDTH - MARGIN - MIDDLE - gap, line.after, form_of(line.after))
    if line.before is not None and line.after is not None:
        yield f'<path class="link" d="M{MIDDLE - gap} {y - 4}H{MIDDLE + gap}"/>'


def form_of(node: NodeView) -> str:
    """The class that a node is coloured by."""
    if node.op == "tree_attention":
        return "attention"
    return node.form if node.form in ("compact", BOUNDARY) else "full"


def _box(x: int, y: int, width: int, node: NodeView, form: str) -> str:
    about = " ".join(filter(None, (node.name, node.module, node.source.rpartition("/")[2])))
    box = f'<rect class="{form}" x="{x}" y="{y - 13}" width="{width}" height="17" rx="3"/>'
    return (
        f"<g><title>{escape(about)}</title>{box}"
        f"{_text(x + 6, y, node.op)}"
        f"{_text(x + width - 6, y, f'{node.shape} {node.dtype}'.strip(), 'said', 'end')}</g>"
    )


def _text(x: int, y: int, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'

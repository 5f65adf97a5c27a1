"""Two graphs line by line: what is as it was, what runs on nodes now, what was added and what is gone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from radix_compile.inspection.graph_view import GraphView, NodeView

REPLACEMENTS = ("tree_attention", "token_nll")
"""Ops that stand for an op of another name."""
SAME_OP = {"view": "reshape", "_unsafe_view": "reshape"}


class Kind(Enum):
    """The values are what the line starts with in text."""

    SAME = " "
    COMPACT = "~"
    ADDED = "+"
    REMOVED = "-"


@dataclass(frozen=True)
class Line:
    """A node before, after, or both."""

    kind: Kind
    before: NodeView | None
    after: NodeView | None

    @property
    def node(self) -> NodeView:
        """The node as it is now, or as it was if it is gone."""
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def module(self) -> str:
        return self.node.module or (self.before.module if self.before else "")


def lines_of(before: GraphView, after: GraphView) -> Iterator[Line]:
    """In the order of ``before``; what was added comes where it was made."""
    known = {node.name for node in before.nodes}
    made: dict[str, list[NodeView]] = {}
    last = before.nodes[0].name if before.nodes else ""
    for node in after.nodes:
        origin = node.origin or node.name
        last = origin if origin in known else last
        made.setdefault(last, []).append(node)
    for node in before.nodes:
        yield from _lines_of_one(node, made.get(node.name, []))


def _lines_of_one(before: NodeView, made: Sequence[NodeView]) -> Iterator[Line]:
    lines = [_line(before, node) for node in made]
    if all(line.before is None for line in lines):
        yield Line(Kind.REMOVED, before, None)
    yield from lines


def _line(before: NodeView, after: NodeView) -> Line:
    same_op = SAME_OP.get(before.op, before.op) == SAME_OP.get(after.op, after.op)
    if not (same_op and after.origin in ("", before.name)) and after.op not in REPLACEMENTS:
        return Line(Kind.ADDED, None, after)
    changed = after.op in REPLACEMENTS or (after.form == "compact" and after.origin)
    return Line(Kind.COMPACT if changed else Kind.SAME, before, after)


# ---------------------------------------------------------------------------------------------------------- layers

_LAYER = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<number>\d+)(?=\.|$)")


@dataclass(frozen=True)
class Block:
    """A stretch of lines: one layer, several equal ones that follow each other, or what is between layers.

    ``layers`` has the lines of each; but for the numbers in them they say the same.
    """

    stack: str
    numbers: tuple[int, ...]
    layers: tuple[tuple[Line, ...], ...]

    @property
    def lines(self) -> tuple[Line, ...]:
        """The lines of the first layer."""
        return self.layers[0]

    @property
    def title(self) -> str:
        """``model.layers.1 .. 27 (27 equal layers)``, or empty for what is between layers."""
        if not self.numbers:
            return ""
        first, last = self.numbers[0], self.numbers[-1]
        name = f"{self.stack}.{first}" if self.stack else str(first)
        return name if first == last else f"{name} .. {last} ({len(self.numbers)} equal layers)"


def blocks_of(lines: Iterable[Line]) -> list[Block]:
    """The lines by layer, equal layers together."""
    blocks: list[Block] = []
    for (stack, number), group in groupby(_with_layers(lines), key=lambda pair: pair[0]):
        layer = tuple(line for _, line in group)
        last = blocks[-1] if blocks else None
        if last is not None and number is not None and last.stack == stack and _says(layer) == _says(last.lines):
            blocks[-1] = Block(stack, (*last.numbers, number), (*last.layers, layer))
        else:
            blocks.append(Block(stack, () if number is None else (number,), (layer,)))
    return blocks


def _with_layers(lines: Iterable[Line]) -> Iterator[tuple[tuple[str, int | None], Line]]:
    """Each line with its layer; what belongs to no module (sizes) to that of the line before it."""
    layer: tuple[str, int | None] = ("", None)
    for line in lines:
        if line.module:
            found = _LAYER.match(line.module)
            layer = (found["stack"] or "", int(found["number"])) if found else ("", None)
        yield layer, line


def _says(lines: Sequence[Line]) -> list[tuple[object, ...]]:
    """The part of a line by which layers are compared: all but names and numbers of layers."""
    return [(line.kind, _said(line.before), _said(line.after)) for line in lines]


def _said(node: NodeView | None) -> tuple[object, ...]:
    if node is None:
        return ()
    return node.op, node.arguments, node.shape, node.dtype, node.form, within_layer(node.module), node.value


def within_layer(module: str) -> str:
    """``self_attn.q_proj`` of ``model.layers.3.self_attn.q_proj``."""
    found = _LAYER.match(module)
    return module[found.end() :].lstrip(".") if found else module

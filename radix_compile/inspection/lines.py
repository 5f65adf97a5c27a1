"""Two graphs line by line: the ops that are unchanged, run once per node, are added or are removed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby

from radix_compile.inspection.graph_view import GraphView, NodeView

REPLACEMENTS = ("tree_attention", "token_nll")
"""Our ops that replace an op of another name."""
SAME_OP = {"view": "reshape", "_unsafe_view": "reshape"}


class Kind(Enum):
    """The kind of a line. The value is the first character of the line in text."""

    SAME = " "
    COMPACT = "~"
    ADDED = "+"
    REMOVED = "-"


@dataclass(frozen=True)
class Line:
    """A node of the graph before, of the graph after, or both."""

    kind: Kind
    before: NodeView | None
    after: NodeView | None

    @property
    def node(self) -> NodeView:
        """The node after, or the node before if it was removed."""
        node = self.after or self.before
        assert node is not None
        return node

    @property
    def module(self) -> str:
        return self.node.module or (self.before.module if self.before else "")


def lines_of(before: GraphView, after: GraphView) -> Iterator[Line]:
    """Yield the lines in the order of ``before``. An added node follows the node that it comes from."""
    names_before = {node.name for node in before.nodes}
    after_by_origin: dict[str, list[NodeView]] = {}
    last_origin = before.nodes[0].name if before.nodes else ""
    for node in after.nodes:
        origin = node.origin or node.name
        last_origin = origin if origin in names_before else last_origin
        after_by_origin.setdefault(last_origin, []).append(node)
    for node in before.nodes:
        yield from _lines_of_node(node, after_by_origin.get(node.name, []))


def _lines_of_node(before: NodeView, nodes_after: Sequence[NodeView]) -> Iterator[Line]:
    lines = [_line(before, node) for node in nodes_after]
    if all(line.before is None for line in lines):
        yield Line(Kind.REMOVED, before, None)
    yield from lines


def _line(before: NodeView, after: NodeView) -> Line:
    same_op = SAME_OP.get(before.op, before.op) == SAME_OP.get(after.op, after.op)
    if not (same_op and after.origin in ("", before.name)) and after.op not in REPLACEMENTS:
        return Line(Kind.ADDED, None, after)
    is_compact = after.op in REPLACEMENTS or (after.form in ("compact", "head") and after.origin)
    return Line(Kind.COMPACT if is_compact else Kind.SAME, before, after)


# ---------------------------------------------------------------------------------------------------------- layers

_LAYER = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<number>\d+)(?=\.|$)")


@dataclass(frozen=True)
class Block:
    """Consecutive lines: one layer, several equal layers, or the ops outside layers.

    ``layers`` has the lines of each layer; they differ in names and layer numbers only.
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
        """The name, as in ``model.layers.1 .. 27 (27 equal layers)``; empty outside layers."""
        if not self.numbers:
            return ""
        first, last = self.numbers[0], self.numbers[-1]
        name = f"{self.stack}.{first}" if self.stack else str(first)
        return name if first == last else f"{name} .. {last} ({len(self.numbers)} equal layers)"


def blocks_of(lines: Iterable[Line]) -> list[Block]:
    """Return the lines by layer, with consecutive equal layers in one block."""
    blocks: list[Block] = []
    for (stack, number), group in groupby(_with_layers(lines), key=lambda pair: pair[0]):
        layer = tuple(line for _, line in group)
        last = blocks[-1] if blocks else None
        if (
            last is not None
            and number is not None
            and last.stack == stack
            and _signature(layer) == _signature(last.lines)
        ):
            blocks[-1] = Block(stack, (*last.numbers, number), (*last.layers, layer))
        else:
            blocks.append(Block(stack, () if number is None else (number,), (layer,)))
    return blocks


def _with_layers(lines: Iterable[Line]) -> Iterator[tuple[tuple[str, int | None], Line]]:
    """Yield each line with its layer. A line without a module (sizes) has the layer of the line before."""
    layer: tuple[str, int | None] = ("", None)
    for line in lines:
        if line.module:
            match = _LAYER.match(line.module)
            layer = (match["stack"] or "", int(match["number"])) if match else ("", None)
        yield layer, line


def _signature(lines: Sequence[Line]) -> list[tuple[object, ...]]:
    """Return the contents of the lines without names and layer numbers. Equal layers have equal signatures."""
    return [(line.kind, _node_signature(line.before), _node_signature(line.after)) for line in lines]


def _node_signature(node: NodeView | None) -> tuple[object, ...]:
    if node is None:
        return ()
    return node.op, node.arguments, node.shape, node.dtype, node.form, within_layer(node.module), node.value


def within_layer(module: str) -> str:
    """Return ``self_attn.q_proj`` for ``model.layers.3.self_attn.q_proj``."""
    match = _LAYER.match(module)
    return module[match.end() :].lstrip(".") if match else module

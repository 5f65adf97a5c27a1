"""The token axes of a captured graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from radix_compile.analysis.reach.column_reach import Reaches
from radix_compile.analysis.rules.flex import Blocks
from radix_compile.ir.axes import Layout
from radix_compile.ir.value import Refusal


@dataclass
class Tokens:
    """The token axes of a graph: their sizes, the inputs that are row keys or masks, and where folding stops.

    ``blocks`` are the tables of blocks of flex_attention, which are part of the rows' keys as well.
    ``scans`` are the nodes that are causal by the columns that they read, and what their rules said; ``steps`` those
    on the way there.
    """

    layout: Layout
    keys: list[fx.Node]
    reaches: Reaches
    masks: list[fx.Node] = field(default_factory=list)
    blocks: list[Blocks] = field(default_factory=list)
    refusals: dict[Refusal, fx.Node] = field(default_factory=dict)
    scans: dict[fx.Node, Refusal] = field(default_factory=dict)
    steps: set[fx.Node] = field(default_factory=set)

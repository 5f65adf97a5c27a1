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

    ``blocks``  the block tables of flex_attention, which are part of the row keys too.
    ``scans``   the nodes that are causal by the columns that they read, with the refusals of their rules.
    ``steps``   the nodes without axes from which scans are computed.
    """

    layout: Layout
    keys: list[fx.Node]
    reaches: Reaches
    masks: list[fx.Node] = field(default_factory=list)
    blocks: list[Blocks] = field(default_factory=list)
    refusals: dict[Refusal, fx.Node] = field(default_factory=dict)
    scans: dict[fx.Node, Refusal] = field(default_factory=dict)
    steps: set[fx.Node] = field(default_factory=set)

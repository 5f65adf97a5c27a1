"""What passes say of a captured graph and its nodes to those behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from torch import fx

from radix_compile.ir.value import values_of


class Form(Enum):
    FULL = "full"
    COMPACT = "compact"
    EITHER = "either"


def home(node: fx.Node) -> Form:
    form: Form = node.meta["home"]
    return form


def is_row(node: fx.Node) -> bool:
    """One entry for each row, and position-wise all the way: may have a compact form."""
    return all(value.is_row for value in values_of(node))


def is_arranged(node: fx.Node) -> bool:
    """Rows in sorted order, or numbers about it: each form has its own."""
    return any(value.is_arranged for value in values_of(node))


@dataclass
class Wanted:
    """The forms in which each node's value is wanted, and in which its op therefore runs."""

    forms: dict[fx.Node, set[Form]] = field(default_factory=dict)
    runs: dict[fx.Node, set[Form]] = field(default_factory=dict)

    def is_compact(self, node: fx.Node) -> bool:
        """Has its value a compact form in the folded graph? It may have one though it is only wanted in full form."""
        return Form.COMPACT in self.forms.get(node, ()) or Form.COMPACT in self.runs.get(node, ())

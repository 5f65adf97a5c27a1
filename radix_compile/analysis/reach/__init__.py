"""What ops do to the columns that entries read (``column_reach``): importing this package registers every rule."""

from __future__ import annotations

from typing import Any

from radix_compile.analysis.reach import along, views
from radix_compile.analysis.reach.column_reach import ReachRule
from radix_compile.analysis.reach.pointwise import elementwise_reach
from radix_compile.analysis.reach.table import REACH_RULES
from radix_compile.analysis.rules import rule_for
from radix_compile.analysis.rules.elementwise import elementwise

FAMILIES = (along, views)


def reach_rule_for(op: Any) -> ReachRule | None:
    """The rule of an op: its own, or that of all elementwise ones."""
    return REACH_RULES.get(op) or (elementwise_reach if rule_for(op) is elementwise else None)

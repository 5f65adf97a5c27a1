"""The op rule table, assembled: importing this package registers every row."""

from __future__ import annotations

from typing import Any

import torch

from radix_compile.analysis.rules import (
    attention,
    contractions,
    creation,
    flex,
    indexing,
    reductions,
    sequence,
    sorting,
    views,
)
from radix_compile.analysis.rules.elementwise import elementwise
from radix_compile.analysis.rules.table import RULES, Rule
from radix_compile.torch_internals import OpOverload

FAMILIES = (attention, contractions, creation, indexing, reductions, sequence, sorting, views)


def rule_for(op: Any) -> Rule | None:
    """The rule of an op: its row, or elementwise if torch tags it so and it draws no random numbers."""
    if not isinstance(op, OpOverload):
        return flex.flex_attention if op is flex.FLEX else None
    found = RULES.get(op) or RULES.get(str(op.name()))
    if found is not None:
        return found
    pointwise = torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags
    return elementwise if pointwise and not op._schema.is_mutable else None

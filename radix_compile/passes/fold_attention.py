"""Find the attentions that have a compact form of their own, and what it must carry over of them.

Position-wise work runs once per node because a row reads itself alone. Causal attention reads the rows on the way to
it, and those are the node's ancestors: where all that a mask says can be said of ancestors, attention runs on the tree
too (the op ``radix::tree_attention``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from radix_compile.mask_facts import AtMost, Diff, Formula, Given, Masked, Or, RowTrue, Same, Weights, terms_of
from radix_compile.op_rules.table import VIEW_LIKE, argument
from radix_compile.token_axes import SEQ, Axes, Axis, Feature, Token, Uniform, value_of, values_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Visible:
    """What a mask says, besides that no key is later than its query.

    ``window``  how many of the last columns a row sees, its own included.
    ``shown``   rows ``[B, S]`` whose entry tells of a key whether it can be seen: if it is not zero (or if it is).
    ``runs``    the numbers that tell the sequences of a row apart, if it has several.
    """

    window: int | None = None
    shown: tuple[tuple[fx.Node, bool], ...] = ()
    runs: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class TreeAttention:
    """An attention in terms of ``radix::tree_attention``. ``key`` and ``value`` may have fewer heads than ``query``."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    visible: Visible
    softcap: float | None = None
    sinks: fx.Node | None = None

    @property
    def rows(self) -> list[fx.Node]:
        """The values of rows that it reads."""
        return [self.query, self.key, self.value, *(source for source, _ in self.visible.shown)]


class NotCarried(Exception):  # noqa: N818 - a verdict about an attention
    """An attention has no compact form. The message says why."""


def fold_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """Write a :class:`TreeAttention`, or in words why there is none, to ``node.meta["attention"]``.

    Needs ``mark_token_axes``. Sequences that are packed in a row are taken for told apart by their paths, unless
    ``gm.meta["apart"]`` says that this has been tried and is not so.
    """
    for node in gm.graph.nodes:
        if node.op == "call_function" and values_of(node)[0].attends is not None:
            try:
                node.meta["attention"] = found = _found(node)
                if found.visible.runs is not None and not gm.meta.get("apart", True):
                    raise NotCarried("the sequences of a row cannot be told apart, because rows depend on their column")
            except NotCarried as reason:
                node.meta["attention"] = str(reason)
    return gm


def tree_attention(node: fx.Node) -> TreeAttention | None:
    """The compact form of an attention, if it has one."""
    found = node.meta.get("attention")
    return found if isinstance(found, TreeAttention) else None


def _found(node: fx.Node) -> TreeAttention:
    if node.target is not aten.scaled_dot_product_attention.default:
        raise NotCarried("it is written in a way that is not read")
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    attends = value_of(node).attends
    assert attends is not None
    mask = argument(node, "attn_mask")
    marks = None if mask is None else value_of(mask)
    visible = read_mask(attends)
    if marks is not None and mask.meta["val"].dtype != torch.bool:
        fact = marks.fact
        if not isinstance(fact, Masked) or not fact.zero:
            raise NotCarried("it adds a bias to its scores")
        if not fact.strict and value_of(node).blind:
            raise NotCarried("a row that sees no key attends to all of them")
    size = query.meta["val"].shape[-1]
    scale = argument(node, "scale")
    if not isinstance(size, int):
        raise NotCarried("the size of its heads is not a number")
    scale = 1 / math.sqrt(size) if scale is None else float(scale)
    return checked(TreeAttention(query, narrow(key), narrow(value), scale, visible))


def checked(found: TreeAttention) -> TreeAttention:
    """Can the op take these rows? Raises :class:`NotCarried`."""
    sizes = [heads_of(value_of(row).axes) for row in (found.query, found.key, found.value)]
    (heads, size), (groups, key_size), (value_groups, _) = sizes
    if groups != value_groups or heads % groups or size != key_size:
        raise NotCarried(f"its heads do not fit: {heads} of queries, {groups} of keys, {value_groups} of values")
    if len({row.meta["val"].dtype for row in (found.query, found.key, found.value)}) > 1:
        raise NotCarried("its queries, keys and values have different dtypes")
    for source, _ in found.visible.shown:
        if not value_of(source).is_row:
            raise NotCarried("its mask hides keys by what is not one entry for each row")
    return found


def heads_of(axes: Axes) -> tuple[int, int]:
    """The number and size of heads of rows ``[..., S, E]``."""
    if len(axes) < 3 or axes[-2] != (SEQ,) or not all(isinstance(atom.size, sympy.Integer) for atom in _features(axes)):
        raise NotCarried("its queries, keys or values are not rows of heads")
    atoms = [atom for axis in axes[:-2] for atom in axis if not isinstance(atom, Token)]
    return int(sympy.prod([atom.size for atom in atoms])), int(sympy.prod([atom.size for atom in axes[-1]]))  # type: ignore[union-attr]


def _features(axes: Axes) -> list[Feature | Uniform]:
    return [atom for axis in axes for atom in axis if not isinstance(atom, Token)]


def narrow(node: fx.Node) -> fx.Node:
    """Keys or values without the copies that are made for the heads of a group, whose entries are side by side."""
    wanted, found = _order(value_of(node).axes), node
    while node.target in VIEW_LIKE and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        value = value_of(node)
        if not value.is_row or len(value.axes) < 3 or value.axes[-2] != (SEQ,) or _order(value.axes) != wanted:
            continue
        if not any(isinstance(atom, Uniform) for atom in _features(value.axes)):
            found = node
    return found


def _order(axes: Axes) -> tuple[object, ...]:
    """The atoms, without the copies at the end of the heads."""
    heads: Axis = tuple(atom for axis in axes[:-2] for atom in axis)
    while heads and isinstance(heads[-1], Uniform):
        heads = heads[:-1]
    return (*heads, SEQ, axes[-1])


# -------------------------------------------------------------------------------------------------------------- masks


def read_mask(attends: Weights) -> Visible:
    """What a causal mask says, term by term. Raises :class:`NotCarried` at a term of another kind."""
    query, key = attends.query, attends.key
    window: int | None = None
    shown: dict[tuple[fx.Node, bool], None] = {}
    terms = terms_of(attends.visible)
    runs = [term for term in terms if isinstance(term, Same) and {term.a, term.b} == {query, key}]
    positions = {term.runs_of for term in runs}
    for term in terms:
        bound = _columns(term, positions)
        match term:
            case Same() if term in runs:
                pass
            case RowTrue(source, dim, truth) if dim == key:
                shown[source, truth] = None
            case _ if bound == (key, query, 0):
                pass
            case _ if bound is not None and bound[:2] == (query, key) and bound[2] >= 0:
                window = bound[2] + 1 if window is None else min(window, bound[2] + 1)
            case _:
                raise NotCarried(f"its mask {_in_words(term)}")
    if len({term.source for term in runs}) > 1:
        raise NotCarried("its mask tells sequences apart in two ways")
    return Visible(window, tuple(shown), runs[0].source if runs else None)


def _columns(term: Formula, positions: set[fx.Node | None]) -> tuple[int, int, int] | None:
    """``column[a] - column[b] <= bound``. In a run, positions count as columns do."""
    if isinstance(term, Diff) or (isinstance(term, AtMost) and term.source in positions):
        return term.a, term.b, term.bound
    return None


def _in_words(term: Formula) -> str:
    match term:
        case Given():
            return "was made by the caller"
        case Or():
            return "shows keys for one of several reasons"
        case RowTrue():
            return "hides keys by their query"
        case Diff() | AtMost():
            return "compares columns or positions in another way"
        case _:
            return "is not understood"

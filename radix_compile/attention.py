"""Attention as the op ``radix::tree_attention`` takes it: what is read of a captured one, and what of it is carried."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from radix_compile.cost import flops
from radix_compile.mask_facts import (
    TRUE,
    AtMost,
    Diff,
    Formula,
    Given,
    Masked,
    Or,
    RowTrue,
    Same,
    Weights,
    negation,
    terms_of,
)
from radix_compile.op_rules.flex import Blocks
from radix_compile.op_rules.masks import as_formula
from radix_compile.token_axes import BATCH, SEQ, Axes, Axis, Feature, Token, Uniform, as_size, value_of, values_of

aten = torch.ops.aten


class NotCarried(Exception):  # noqa: N818 - a verdict about an attention
    """An attention has no compact form. The message says why."""


Order = tuple[int | None, ...]
"""A tensor's dimensions in another order; None for one of size one that it does not have. Empty: as they are."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Queries, keys or values: a node whose dimensions, in that ``order``, are ``[..., S, E]``; heads are in front."""

    node: fx.Node
    order: Order = ()

    @property
    def axes(self) -> Axes:
        axes = values_of(self.node)[0].axes
        return tuple(() if dim is None else axes[dim] for dim in self.order) if self.order else axes

    @property
    def is_by_head(self) -> bool:
        """Is it ``[B, H, S, E]`` as it is?"""
        return not self.order and len(self.axes) == 4 and all(isinstance(atom, Token) for atom in self.axes[0])

    def heads(self) -> tuple[int, int]:
        """The number and the size of heads. Raises :class:`NotCarried` if these are not rows of heads."""
        axes = self.axes
        if len(axes) < 3 or axes[-2] != (SEQ,):
            raise NotCarried("its queries, keys or values are not rows of heads")
        front = _sizes([atom for axis in axes[:-2] for atom in axis])
        return int(sympy.prod(front)), int(sympy.prod(_sizes(axes[-1])))


def are_side_by_side(query: Rows, key: Rows, grouped: bool) -> bool:
    """Are the heads of a group of queries, which share a head of keys, side by side?

    They are if a dimension that keys do not have is behind those that they have (or with ``grouped``, torch's
    ``enable_gqa``, which is for one dimension of heads).
    """
    many, few = ([sympy.prod(_sizes(axis)) for axis in rows.axes[:-2]] for rows in (query, key))
    if grouped:
        return len(many) == 2
    few = [sympy.Integer(1)] * (len(many) - len(few)) + few
    behind = itertools.dropwhile(lambda sizes: sizes[0] == sizes[1], zip(many, few, strict=False))
    return len(many) == len(few) and all(size == 1 for _, size in behind)


def _sizes(atoms: Axis | list[object]) -> list[sympy.Expr]:
    sizes = [atom.size for atom in atoms if isinstance(atom, Feature | Uniform)]
    if not all(isinstance(size, sympy.Integer) for size in sizes):
        raise NotCarried("the number or the size of its heads is not a number")
    return sizes


def ancestors(*nodes: fx.Node) -> Iterator[fx.Node]:
    """The nodes, and all that they are computed from."""
    queue = list(dict.fromkeys(nodes))
    seen = set(queue)
    while queue:
        node = queue.pop()
        yield node
        new = [arg for arg in node.all_input_nodes if arg not in seen]
        seen.update(new)
        queue += new


@dataclass(frozen=True, slots=True)
class Bias:
    """What is added to scores, ``factor`` times: read where it is, ``[..., S or 1, S]`` in full form.

    Or a predicate, and keys are hidden where it is what ``hides`` says. ``scores`` has the dimensions in front of the
    last two that it is broadcast to.
    """

    node: fx.Node
    scores: fx.Node
    factor: float = 1.0
    hides: bool | None = None

    @property
    def says(self) -> Formula:
        """Which keys it may leave visible."""
        value = value_of(self.node)
        if self.hides is not None:
            return negation(as_formula(value)) if self.hides else as_formula(value)
        return value.fact.visible if isinstance(value.fact, Masked) else TRUE

    def shape(self) -> tuple[bool, int, bool]:
        """As ``[B or 1, H or 1, S or 1, S]``: is it ``B``, how many heads, is it ``S``? Raises :class:`NotCarried`."""
        front = value_of(self.scores).axes[:-2]
        *outer, query, key = self.node.meta["val"].shape if self.node.meta["val"].ndim > 1 else (1, 1)
        outer = [1] * (len(front) - len(outer)) + outer
        atoms = [atom for axis in front for atom in axis]
        if as_size(key) == 1 or BATCH in atoms[1:]:
            raise NotCarried("it adds a bias that has no entry for each key")
        single = [as_size(size) == 1 for size in outer]
        batched = any(BATCH in axis and not one for axis, one in zip(front, single, strict=True))
        sizes = [int(sympy.prod(_sizes([atom for atom in axis if atom is not BATCH]))) for axis in front]
        heads = int(sympy.prod([1 if one else size for size, one in zip(sizes, single, strict=True)]))
        if heads not in (1, int(sympy.prod(sizes))):
            raise NotCarried("it adds a bias for groups of heads")
        return batched, heads, as_size(query) != 1

    def check(self) -> None:
        """Raises :class:`NotCarried` if it has no such shape, has a gradient, or is computed from rows at some cost."""
        self.shape()
        for node in ancestors(self.node):
            if node.meta.get("needs_gradient"):
                raise NotCarried("it adds a bias that has a gradient")
            if flops(node):
                raise NotCarried("it adds a bias that is a product itself")
            if any(isinstance(arg, torch.SymInt) for arg in node.args):  # what spell_out_flex wrote, not to be run
                raise NotCarried("it adds a bias of a size that is a symbol")


@dataclass(frozen=True, slots=True)
class Parts:
    """What an attention is made of.

    ``softcap``  the scores are ``softcap * tanh(scale * product / softcap)``.
    ``sinks``    one more score for each head, ``[H]``.
    ``grouped``  keys may have fewer heads than queries in a dimension of heads of the same rank.
    ``product``  that of queries and keys, if it is an op of its own.
    ``zero``     a row that sees no key is zero. (Written out, it attends to all keys alike, or is not a number.)
    ``masks``    what hides keys, of which the formula of the attention (``Weights``) says the same.
    ``biases``   what is added to the scores besides.
    ``order``    of the result's dimensions, as that of :class:`Rows`.
    ``blocks``   the tables of blocks of flex_attention: that they say what its mask does is seen in every call.
    """

    query: Rows
    key: Rows
    value: Rows
    scale: float
    softcap: float | None = None
    sinks: fx.Node | None = None
    grouped: bool = False
    product: fx.Node | None = None
    zero: bool = False
    masks: tuple[Bias, ...] = ()
    biases: tuple[Bias, ...] = ()
    order: Order = ()
    blocks: Blocks | None = None


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
    """An attention in terms of ``radix::tree_attention``. Keys and values may have fewer heads than queries.

    ``biases`` are read in full form: those of its parts, and its masks where nothing simpler can be said of them.
    ``needs_sight`` if it is right only in calls in which every row sees a key. ``dtype`` is that of its products: under
    autocast not that of what they read.
    """

    parts: Parts
    visible: Visible
    biases: tuple[Bias, ...]
    needs_sight: bool
    dtype: torch.dtype

    @property
    def inputs(self) -> list[fx.Node]:
        """All that the op reads in compact form: no mask, and what hides keys is in the plan."""
        parts = self.parts
        nodes = [parts.query.node, parts.key.node, parts.value.node]
        return [*nodes, parts.sinks] if parts.sinks is not None else nodes


def is_attention(node: fx.Node) -> bool:
    """Does it attend, causally: attention as one op, or the last product of attention written out?"""
    return node.op == "call_function" and node.target is not operator.getitem and values_of(node)[0].attends is not None


def attention_steps(node: fx.Node) -> list[fx.Node]:
    """The products that an attention on the tree stands for: one op, or the two of attention written out."""
    parts = node.meta.get("parts")
    return [node, parts.product] if isinstance(parts, Parts) and parts.product is not None else [node]


def compact_attention(node: fx.Node) -> TreeAttention | None:
    """The compact form of an attention, if it has one: what the pass ``fold_attention`` found."""
    found = node.meta.get("attention")
    return found if isinstance(found, TreeAttention) else None


SAME_ORDER = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
)
"""Views that leave the dimensions in their order."""


def narrow(rows: Rows) -> Rows:
    """Keys or values without the copies that are made for the heads of a group, whose entries are side by side."""
    wanted, found, node = _order(rows.axes), rows, rows.node
    while not rows.order:
        source = value_of(node).identity or (node.args[0] if node.target in SAME_ORDER else None)
        if not isinstance(source, fx.Node):
            break
        node, candidate = source, Rows(source)
        axes = candidate.axes
        if value_of(node).is_row and len(axes) >= 3 and axes[-2] == (SEQ,) and _order(axes) == wanted:
            found = candidate
    return found


def _order(axes: Axes) -> tuple[object, ...]:
    """The atoms, without the copies at the end of the heads."""
    heads: Axis = tuple(atom for axis in axes[:-2] for atom in axis)
    while heads and isinstance(heads[-1], Uniform):
        heads = heads[:-1]
    return (*heads, SEQ, axes[-1])


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

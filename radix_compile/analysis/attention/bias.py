"""Numbers that are added to scores: tables by position, and masks that nothing simpler describes."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from radix_compile.analysis.attention.rows import NotOnTree, sizes_of
from radix_compile.analysis.flops import flops
from radix_compile.analysis.rules.masks import as_formula, fact_of, size_of
from radix_compile.ir.axes import BATCH, as_size
from radix_compile.ir.facts import ORDINARY, TRUE, Filled, Formula, Masked, negation
from radix_compile.ir.graph import facts
from radix_compile.ir.source import upstream
from radix_compile.ir.value import value_of
from radix_compile.torch_internals import val


@dataclass(frozen=True, slots=True)
class Bias:
    """Numbers added to scores, ``factor`` times: read where they are, ``[..., S or 1, S]`` in full form.

    Or a predicate, and keys are hidden where it is what ``hides`` says. ``scores`` has the dimensions in front of the
    last two that it is broadcast to.
    """

    node: fx.Node
    scores: fx.Node
    factor: float = 1.0
    hides: bool | None = None

    @property
    def dtype(self) -> torch.dtype:
        """In which it is added: that of the sum."""
        value = val(self.scores)
        dtype: torch.dtype = (value[0] if isinstance(value, tuple | list) else value).dtype
        return dtype

    @property
    def says(self) -> Formula:
        """Which keys it may leave visible."""
        value = value_of(self.node)
        if self.hides is not None:
            return negation(as_formula(value)) if self.hides else as_formula(value)
        return value.fact.visible if isinstance(value.fact, Masked) else TRUE

    def shape(self) -> tuple[bool, int, bool]:
        """As ``[B or 1, H or 1, S or 1, S]``: is it ``B``, how many heads, is it ``S``? Raises :class:`NotOnTree`."""
        front = value_of(self.scores).axes[:-2]
        value = val(self.node)
        *outer, query, key = (1,) * (2 - value.ndim) + tuple(value.shape)
        outer = [1] * (len(front) - len(outer)) + outer
        atoms = [atom for axis in front for atom in axis]
        if as_size(key) == 1:
            raise NotOnTree("it adds a bias that has no entry for each key")
        if BATCH in atoms[1:] or len(outer) > len(front):
            raise NotOnTree("it adds a bias whose dimensions are not those of its scores")
        single = [as_size(size) == 1 for size in outer]
        batched = any(BATCH in axis and not one for axis, one in zip(front, single, strict=True))
        sizes = [int(sympy.prod(sizes_of([atom for atom in axis if atom is not BATCH]))) for axis in front]
        heads = int(sympy.prod([1 if one else size for size, one in zip(sizes, single, strict=True)]))
        if heads not in (1, int(sympy.prod(sizes))):
            raise NotOnTree("it adds a bias for groups of heads")
        return batched, heads, as_size(query) != 1

    def may_be_large(self) -> bool:
        """Are there numbers in it far from any score, and not known for the floor of a mask?

        Attention on the tree is put together by the logarithms of sums of exponentials, and its gradient starts from
        them. They have no digits left for a row in which all scores are such numbers.
        """
        fact = value_of(self.node).fact
        if self.hides is not None:
            return False
        if isinstance(fact, Masked):  # of a floor it is known which rows see a key whose score is an ordinary one
            return fact.size > ORDINARY
        if size_of(self.node) <= ORDINARY:
            return False
        numbers = [arg for node in upstream(self.node) for arg in node.args if isinstance(arg, int | float)]
        numbers += [fact.value for node in upstream(self.node) if isinstance(fact := fact_of(node), Filled)]
        return any(abs(number) > ORDINARY for number in numbers)

    def check(self) -> None:
        """Raises :class:`NotOnTree` if it has no such shape, has a gradient, or is computed from rows at some cost."""
        self.shape()
        for node in upstream(self.node):
            if facts(node).needs_gradient:
                raise NotOnTree("it adds a bias that has a gradient")
            if flops(node):
                raise NotOnTree("it adds a bias that is a product itself")
            if any(
                isinstance(arg, torch.SymInt) for arg in node.args
            ):  # what inline_flex_functions wrote, not to be run
                raise NotOnTree("it adds a bias of a size that is a symbol")

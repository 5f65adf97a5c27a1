"""Biases that are added to scores: tables by position, and masks without a simpler description."""

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
    """``factor * node`` is added to scores; or, unless ``hides`` is None, keys are hidden where ``node == hides``.

    ``node`` is ``[..., S or 1, S]`` in full form. ``scores`` has the leading dimensions to which it is broadcast.
    """

    node: fx.Node
    scores: fx.Node
    factor: float = 1.0
    hides: bool | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the sum of scores and bias."""
        value = val(self.scores)
        dtype: torch.dtype = (value[0] if isinstance(value, tuple | list) else value).dtype
        return dtype

    @property
    def visible(self) -> Formula:
        """Return the formula of the keys that the bias may leave visible."""
        value = value_of(self.node)
        if self.hides is not None:
            return negation(as_formula(value)) if self.hides else as_formula(value)
        return value.fact.visible if isinstance(value.fact, Masked) and self.factor > 0 else TRUE

    def shape(self) -> tuple[bool, int, bool]:
        """Return the shape ``[B or 1, H or 1, S or 1, S]`` as (is it B?, number of heads, is it S?).

        Raises :class:`NotOnTree` for any other shape.
        """
        leading = value_of(self.scores).axes[:-2]
        value = val(self.node)
        *outer, query, key = (1,) * (2 - value.ndim) + tuple(value.shape)
        outer = [1] * (len(leading) - len(outer)) + outer
        atoms = [atom for axis in leading for atom in axis]
        if as_size(key) == 1:
            raise NotOnTree("it adds a bias that has no entry for each key")
        if BATCH in atoms[1:] or len(outer) > len(leading):
            raise NotOnTree("it adds a bias whose dimensions do not match those of its scores")
        is_one = [as_size(size) == 1 for size in outer]
        has_batch = any(BATCH in axis and not repeats for axis, repeats in zip(leading, is_one, strict=True))
        sizes = [int(sympy.prod(sizes_of([atom for atom in axis if atom is not BATCH]))) for axis in leading]
        num_heads = int(sympy.prod([1 if repeats else size for size, repeats in zip(sizes, is_one, strict=True)]))
        if num_heads not in (1, int(sympy.prod(sizes))):
            raise NotOnTree("it adds a bias for groups of heads")
        return has_batch, num_heads, as_size(query) != 1

    def may_be_large(self) -> bool:
        """May the bias have numbers far larger than any score that are not known to be the floor of a mask?

        Attention on the tree combines parts by log-sum-exp, and its gradient starts from log-sum-exp. That has no
        precision left for a row in which all scores are so large.
        """
        fact, scale = value_of(self.node).fact, abs(self.factor)
        if self.hides is not None:
            return False
        if isinstance(fact, Masked):  # rows that see a key have a score above the floor; the others are known
            return self.factor <= 0 or fact.size * scale > ORDINARY  # a factor below zero turns the floor upside down
        if size_of(self.node) * scale <= ORDINARY:
            return False
        numbers = [arg for node in upstream(self.node) for arg in node.args if isinstance(arg, int | float)]
        numbers += [fact.value for node in upstream(self.node) if isinstance(fact := fact_of(node), Filled)]
        return any(abs(number) * scale > ORDINARY for number in [1, *numbers])

    def check(self) -> None:
        """Raise :class:`NotOnTree` if the shape is unsupported, or the bias has a gradient or is a matrix product."""
        self.shape()
        for node in upstream(self.node):
            if facts(node).needs_gradient:
                raise NotOnTree("it adds a bias that has a gradient")
            if flops(node):
                raise NotOnTree("it adds a bias that is computed by a matrix product")
            # inline_flex_functions writes nodes with symbolic sizes as arguments, which cannot be executed.
            if any(isinstance(arg, torch.SymInt) for arg in node.args):
                raise NotOnTree("it adds a bias of a symbolic size")

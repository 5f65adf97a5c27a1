"""Compare the annotations of a graph with the numbers that its ops return.

``check_claims`` runs the captured graph and compares each :class:`~radix_compile.ir.value.Value` with the tensor:
uniform dimensions have equal entries, constants do not change with the rows, rows of equal paths are equal, and facts
(columns, integers of rows, formulas, floors of masks, sizes) agree with the entries. So a rule that claims too much
fails at its op, even if no final result is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from radix_compile.analysis.bounds import bounds_of
from radix_compile.ir.axes import BATCH, SEQ, Axis, Longer, Sorted, Uniform
from radix_compile.ir.facts import (
    ORDINARY,
    And,
    AtMost,
    Break,
    Diff,
    Distance,
    Fact,
    Filled,
    Formula,
    Index,
    Masked,
    Ones,
    Or,
    PerRow,
    Predicate,
    RowMax,
    RowTrue,
    Same,
    Score,
    Shifted,
    Step,
    Weights,
    ordered_by,
)
from radix_compile.ir.graph import facts, tokens_of
from radix_compile.ir.value import Value, locate, value_of, values_of
from radix_compile.plan.prefix_plan import PrefixPlan
from radix_compile.runtime.call_planner import may_wrap, rows_without_a_key
from radix_compile.runtime.checks import rows_seen
from radix_compile.runtime.row_contents import row_numbers
from radix_compile.torch_internals import val

ROUNDING = 1e-9
"""The tolerance for equal entries, relative to the largest entry. All runs are in float64."""


BOUND_TOLERANCE = 1e-2
"""The relative tolerance for bounds, sizes and floors, which do not account for rounding (float16 included)."""


class ClaimError(AssertionError):
    """An annotation is not true of the numbers. The message has the claim, the op and its source line."""


def check_claims(gm: fx.GraphModule, args: Sequence[Any], others: Sequence[Any] | None = None) -> None:
    """Raise :class:`ClaimError` at the first node whose annotation is not true of its result for ``args``.

    ``gm`` is a captured graph that ``mark_token_axes`` has annotated, without random ops or block masks. ``args`` are
    real inputs in float64 of the captured sizes. With the row keys of ``others`` in place of those of ``args``,
    constants must stay the same.
    """
    _Claims(gm, args, others).check()


class _Claims:
    def __init__(self, gm: fx.GraphModule, args: Sequence[Any], others: Sequence[Any] | None) -> None:
        self.gm = gm
        self.tokens = tokens_of(gm)
        self.env = _run(gm, args)
        self.others: dict[fx.Node, Any] | None = None
        if others is not None:
            inputs = zip(gm.graph.find_nodes(op="placeholder"), args, others, strict=True)
            self.others = _run(gm, [other if node in self.tokens.keys else arg for node, arg, other in inputs])
        ids = self.env[self.tokens.keys[0]]
        self.batch, self.seq = ids.shape[0], ids.shape[1]
        self.nodes = self._nodes_of_rows()

    def check(self) -> None:
        if not self._has_ordinary_scores():
            return
        for node in self.gm.graph.nodes:
            if node.op == "output" or facts(node).marks is None:
                continue
            for value, tensor, other in zip(values_of(node), *self._results(node), strict=False):
                if value.mixed is None and value.arrangement is None and isinstance(tensor, Tensor):
                    problem = self._wrong_claim(node, value, tensor, other)
                    if problem:
                        raise ClaimError(f"{locate(node, problem)}: {value}")

    def _has_ordinary_scores(self) -> bool:
        """Whether products of rows are at most ``ORDINARY``, as the claims assume."""
        nodes = [node for node in self.gm.graph.nodes if facts(node).marks is not None and node.op != "output"]
        products = [self.env[node] for node in nodes if [value.fact for value in values_of(node)] == [Score(ORDINARY)]]
        return all(not product.numel() or bool(product.abs().max() <= ORDINARY) for product in products)

    def _is_used(self, node: fx.Node, value: Value) -> bool:
        """Whether a product that is not refused reads these weights. (Fully masked rows may be a reason to refuse.)"""
        if not isinstance(value.fact, Weights):
            return True
        users = [(user, result) for user in node.users if user.op != "output" for result in values_of(user)]
        return any(result.mixed is None and self._is_used(user, result) for user, result in users)

    def _results(self, node: fx.Node) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return the tensors of a node for ``args`` and for ``others`` (None without them)."""
        results = self.env[node]
        other = None if self.others is None else self.others[node]
        if not isinstance(results, tuple | list):
            return [results], [other]
        return results, [None] * len(results) if other is None else other

    def _wrong_claim(self, node: fx.Node, value: Value, tensor: Tensor, other: Tensor | None) -> str:
        """Return the claim that does not hold; empty if all hold."""
        if any(isinstance(atom, Sorted) for axis in value.axes for atom in axis):
            return ""
        if self._wraps(value.fact):
            return ""  # calls with such numbers run plain
        if any(not _same(t, t.narrow(dim, 0, 1).expand_as(t)) for t, dim in self._uniform(value, tensor)):
            return "is claimed to be uniform along a dimension, but is not"
        if value.is_constant:
            if other is not None and not _same(tensor, other):
                return "is claimed to be the same for all rows, but is not"
        elif not self._is_determined(value, tensor) and self._is_used(node, value):
            return "is claimed to be determined by the paths of rows, but is not"
        if not self._holds(node, value, tensor):
            return f"is claimed to be {value.fact}, but is not"
        bounds = bounds_of(node) if isinstance(val(node), Tensor) else None
        if bounds is not None and tensor.numel():
            slack = BOUND_TOLERANCE * max(map(abs, bounds))
            if tensor.double().min() < bounds[0] - slack or tensor.double().max() > bounds[1] + slack:
                return f"is claimed to be from {bounds[0]} to {bounds[1]}, but is not"
        return ""

    # ----------------------------------------------------------------------------------------------------- axes

    def _size(self, axis: Axis) -> list[int]:
        sizes = []
        for atom in axis:
            if atom is BATCH:
                sizes.append(self.batch)
            elif atom is SEQ or isinstance(atom, Longer):
                sizes.append(-1 if isinstance(atom, Longer) else self.seq)
            else:
                sizes.append(self.tokens.reaches.number(atom.size))  # type: ignore[union-attr]
        return sizes

    def _by_atom(self, value: Value, tensor: Tensor) -> tuple[Tensor, list[Any]]:
        """Return the tensor with a dimension for each atom, and the atoms (None for a dimension of size one)."""
        sizes: list[int] = []
        atoms: list[Any] = []
        for axis in value.axes:
            sizes += self._size(axis) or [1]
            atoms += axis or (None,)
        return tensor.reshape(sizes), atoms

    def _uniform(self, value: Value, tensor: Tensor) -> Iterable[tuple[Tensor, int]]:
        by_atom, atoms = self._by_atom(value, tensor)
        return [(by_atom, dim) for dim, atom in enumerate(atoms) if isinstance(atom, Uniform) and by_atom.numel()]

    # ----------------------------------------------------------------------------------------------------- paths

    def _nodes_of_rows(self) -> Tensor:
        """Return the nodes ``[B, S]`` of rows. Rows of equal path have equal nodes, except fully masked rows."""
        keys = [self.env[node] for node in self.tokens.keys]
        row_keys = [row_numbers(key) if key.ndim > 2 else key.numpy(force=True) for key in keys]
        row_keys += [seen for seen in (rows_seen(self.env[mask]) for mask in self.tokens.masks) if seen is not None]
        values = (value for node in self.gm.graph.nodes if node.op != "output" for value in values_of(node))
        unique = np.zeros((self.batch, self.seq), np.bool_)
        for fully_masked in {rows for value in values for rows in value.fully_masked}:
            visible = (self._entries(fully_masked.source).numpy(force=True) != 0) == fully_masked.truth
            unique |= rows_without_a_key(np.broadcast_to(visible[:, : self.seq], unique.shape), fully_masked.window)
        plan = PrefixPlan.from_rows(*row_keys, unique=unique)
        return torch.from_numpy(plan.scatter).view(self.batch, self.seq)

    def _is_determined(self, value: Value, tensor: Tensor) -> bool:
        """Whether entries of rows, or of pairs of rows, with equal paths are equal."""
        by_atom, atoms = self._by_atom(value, tensor)
        if BATCH not in atoms:
            return True
        by_sequence = by_atom.movedim(atoms.index(BATCH), 0)
        del atoms[atoms.index(BATCH)]
        column_dims = [dim for dim, atom in enumerate(atoms) if atom is SEQ or isinstance(atom, Longer)]
        for i in range(self.batch):
            for j in range(i):
                is_same = self.nodes[i] == self.nodes[j]
                first, second = by_sequence[i], by_sequence[j]
                for dim in column_dims:
                    kept = torch.cat([is_same, is_same.new_ones(first.shape[dim] - self.seq)])
                    first, second = (t.index_select(dim, kept.nonzero()[:, 0]) for t in (first, second))
                if not _close(first, second):
                    return False
        return True

    # ----------------------------------------------------------------------------------------------------- facts

    def _entries(self, source: fx.Node) -> Tensor:
        """Return the entries of a fact's source: ``[B, S]``, or ``[1, N]`` for a constant."""
        tensor: Tensor = self.env[source]
        if value_of(source).is_constant:
            return tensor.reshape(-1, tensor.shape[-1])[:1]
        return tensor.reshape(self.batch, self.seq)

    def _wraps(self, fact: Fact | None) -> bool:
        match fact:
            case Predicate(formula) | Ones(formula) | Masked(formula) | Weights(formula):
                return any(may_wrap(self._entries(source).numpy(force=True)) for source in ordered_by(formula))
            case _:
                return False

    def _holds(self, node: fx.Node, value: Value, tensor: Tensor) -> bool:
        fact, rank = value.fact, tensor.ndim
        if not tensor.numel():
            return True
        frame = _Frame(self, value, tensor)
        match fact:
            case Filled(number):
                return bool((tensor == number).all()) or bool((tensor - number).abs().max() <= ROUNDING * abs(number))
            case Index(dim, offset):
                return _same(tensor, (frame.index(dim) + offset).expand_as(tensor))
            case Distance(a, b, offset):
                return _same(tensor, (frame.index(a) - frame.index(b) + offset).expand_as(tensor))
            case PerRow(source, dim, exact, counted_from):
                entries = frame.entries(source, dim)
                if entries is None:
                    return True
                if counted_from is not None and source is node and not self._counts_breaks(source, counted_from):
                    return False
                return (
                    _same(tensor, entries.expand_as(tensor))
                    if exact
                    else _same(tensor != 0, (entries != 0).expand_as(tensor))
                )
            case Shifted(source, dim, offset):
                entries = frame.entries(source, dim)
                return entries is None or _same(tensor, (entries + offset).expand_as(tensor))
            case Step(source) | Break(source):
                entries = self._entries(source)
                step = torch.cat([entries.new_ones(len(entries), 1), entries.diff(dim=1)], 1)
                step = step if isinstance(fact, Step) else step != 1
                return _same(tensor.reshape(-1, tensor.shape[-1])[: len(step)], step[:, : tensor.shape[-1]])
            case Predicate(formula):
                certain, possible = frame.formula(formula)
                return bool(((tensor | ~certain) & (possible | ~tensor)).all())
            case Ones(formula):
                certain, possible = frame.formula(formula)
                return bool((((tensor == 1) | ~certain) & ((tensor == 0) | possible)).all())
            case Score(size):
                return bool(tensor.double().abs().max() <= size * (1 + BOUND_TOLERANCE))
            case Masked():
                return self._is_masked(frame, fact, tensor)
            case Weights(visible, _, key):
                certain, possible = frame.formula(visible)
                sees = certain.expand_as(frame.keys_only(tensor)).any(key, keepdim=True)
                return bool(((frame.keys_only(tensor) == 0) | possible | ~sees).all())
            case RowMax(of):
                scores = self.env[of]
                (dim,) = [d for d in range(rank) if tensor.shape[d] != scores.shape[d]] or (0,)
                return _same(tensor, scores.amax(dim, keepdim=True))
            case _:
                return fact is None

    def _is_masked(self, frame: _Frame, fact: Masked, tensor: Tensor) -> bool:
        certain, possible = frame.formula(fact.visible)
        tensor = frame.keys_only(tensor).double()
        certain, hidden = certain.expand_as(tensor), ~possible.expand_as(tensor)
        # If the largest entry of each row is subtracted, the floor does not apply to fully masked rows.
        is_centred = fact.size == math.inf and math.isfinite(fact.gap)
        floor = fact.floor if fact.is_strict else fact.floor + BOUND_TOLERANCE * abs(fact.floor)
        is_low = is_centred or not hidden.any() or bool(tensor[hidden].max() <= floor)
        size = 0.0 if fact.zero else fact.size * (1 + BOUND_TOLERANCE)
        return is_low and (not certain.any() or bool(tensor[certain].abs().max() <= size))

    def _counts_breaks(self, source: fx.Node, counted_from: fx.Node) -> bool:
        counts, positions = self._entries(source), self._entries(counted_from)
        return _same(counts.diff(dim=1) == 0, (positions.diff(dim=1) == 1)[:, : counts.shape[1] - 1])


class _Frame:
    """The dimensions of one tensor. Facts count them from the right."""

    def __init__(self, claims: _Claims, value: Value, tensor: Tensor) -> None:
        self.claims, self.value, self.tensor = claims, value, tensor
        self.rank = tensor.ndim

    def keys_only(self, tensor: Tensor) -> Tensor:
        """Return the tensor without the entries of sinks, to which formulas do not apply."""
        for dim, axis in enumerate(self.value.axes):
            if any(isinstance(atom, Longer) for atom in axis):
                tensor = tensor.narrow(dim, 0, self.claims.seq)
        return tensor

    def index(self, dim: int) -> Tensor:
        size = self.keys_only(self.tensor).shape[dim]
        shape = [1] * self.rank
        shape[dim] = size
        return torch.arange(size).view(shape)

    def entries(self, source: fx.Node, dim: int) -> Tensor | None:
        """Return the entries of a source along ``dim``; None if the tensor's batch is not a separate dimension."""
        rows = self.claims._entries(source)[:, : self.keys_only(self.tensor).shape[dim]]
        shape = [1] * self.rank
        shape[dim] = rows.shape[1]
        if len(rows) > 1:
            batch = [d for d, axis in enumerate(self.value.axes) if BATCH in axis]
            if len(batch) != 1 or len(self.value.axes[batch[0]]) != 1:
                return None
            shape[batch[0]] = len(rows)
            return rows.reshape(shape) if batch[0] < self.rank + dim else rows.mT.reshape(shape)
        return rows.reshape(shape)

    def formula(self, formula: Formula) -> tuple[Tensor, Tensor]:
        """Return where the formula certainly holds, and where it may hold."""
        holds: Tensor | None = None
        match formula:
            case Diff(a, b, bound):
                holds = self.index(a) - self.index(b) <= bound
            case RowTrue(source, dim, truth):
                entries = self.entries(source, dim)
                holds = None if entries is None else (entries != 0) == truth
            case Same(source, a, b):
                first, second = self.entries(source, a), self.entries(source, b)
                holds = None if first is None or second is None else first == second
            case AtMost(source, a, b, bound):
                first, second = self.entries(source, a), self.entries(source, b)
                holds = None if first is None or second is None else first.double() - second.double() <= bound
            case And(terms) | Or(terms):
                is_and = isinstance(formula, And)
                certain = possible = torch.full([1] * self.rank, is_and)
                for term in terms:
                    term_certain, term_possible = self.formula(term)
                    certain = certain & term_certain if is_and else certain | term_certain
                    possible = possible & term_possible if is_and else possible | term_possible
                return certain, possible
        if holds is None:
            return torch.full([1] * self.rank, False), torch.full([1] * self.rank, True)
        return holds, holds


class _Run(fx.Interpreter):
    """Runs a program with zeros for uninitialised memory, about which there are no claims."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        return torch.zeros_like(result) if "empty" in str(target) else result


def _run(gm: fx.GraphModule, args: Sequence[Any]) -> dict[fx.Node, Any]:
    interpreter = _Run(gm, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*args)
    return interpreter.env


def _same(first: Tensor, second: Tensor) -> bool:
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _close(first: Tensor, second: Tensor) -> bool:
    if not first.dtype.is_floating_point and not first.dtype.is_complex:
        return _same(first, second)
    finite = first.isfinite() & second.isfinite()
    if not _same(first[~finite], second[~finite]):
        return False
    largest = first[finite].abs().max() if finite.any() else torch.zeros(())
    return bool(((first - second)[finite].abs() <= ROUNDING * largest.clamp(min=1.0)).all())

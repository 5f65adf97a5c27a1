"""Prove, by running them, that products of rotated queries and keys depend on the distance of columns alone.

The query at column ``c`` is ``M(c) x`` for some ``x``, and the key at column ``d`` is ``N(d) y``: ``find_rotary`` has
seen that each is linear. Both are computed here in float64 for all columns of a call, for a random ``x`` and ``y``. If
``x.T @ M(c).T @ N(d) @ y`` is the same at ``c + 1`` and ``d + 1`` for random ``x`` and ``y``, it is for all. The
products of all pairs are compared at once: as matrices, by their product with a random vector (Freivalds' check).

What the program's own precision does to ``M`` and ``N`` is checked too: each number in a table must be as near to the
one in float64 as it can be. Positions in bfloat16, say, are not.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from radix_compile.ir.axes import SEQ, Axes, Feature, Uniform
from radix_compile.ir.calls import arguments_of
from radix_compile.passes.fold import Fold
from radix_compile.runtime.rotary_programs import Rotated, rotated

log = logging.getLogger(__name__)

radix = torch.ops.radix

WIDER = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
WIDER |= {torch.complex64: torch.complex128}

MARGIN = 64
"""Differences of products up to this many times what rounding makes of one are taken for rounding."""
LIKE_SIZE = 100
"""Rows that differ in size by a larger factor are not compared."""
KEPT = 4
"""For so many values of its inputs, the verdicts of a check are kept."""


@dataclass(frozen=True, eq=False)
class RotatedPair:
    """The queries and the keys of an attention. If ``grouped``, keys may have fewer heads."""

    query: Rotated
    key: Rotated
    grouped: bool

    def depends_on_distance(self, args: Sequence[Any], seq: int, device: torch.device) -> bool:
        """Do the products of a call with these inputs depend on the distance of columns alone?"""
        query, key = (_Replay(side, args, seq, device) for side in (self.query, self.key))
        generator = torch.Generator(device).manual_seed(0)
        vector = torch.randn(seq - 1, dtype=torch.float64, device=device, generator=generator)
        queries, keys = query.run(generator), key.run(generator)
        if not all((query.is_precise(), key.is_precise(), _are_of_like_size(queries), _are_of_like_size(keys))):
            return False
        tables = self.query.tables + self.key.tables
        if not tables:
            return self._are_same(queries, keys, vector, MARGIN * max(seq, MARGIN) * _eps(torch.float64))
        # The rounding of tables that are inputs is large, and could hide one wrong number: look at each for itself.
        tolerance = MARGIN / 8 * (max(map(_eps, tables)) + seq * _eps(torch.float32))
        parts = (query.run(generator, part) for part in range(self.query.size))
        return all(self._are_same(part, keys, vector, tolerance, by_head=True) for part in parts)

    def _are_same(self, query: Tensor, key: Tensor, vector: Tensor, tolerance: float, by_head: bool = False) -> bool:
        """Are the products ``[heads, S, S]`` the same one column further? Their sum over heads, or each."""
        if self.grouped and len(key) < len(query):
            key = key.repeat_interleave(len(query) // len(key), 0)
        here, further = (
            torch.einsum("hse,he->hs", query[:, part], torch.einsum("hte,t->he", key[:, part], vector))
            for part in (slice(None, -1), slice(1, None))
        )
        differences = here - further
        # What a product of a query and a key is in the mean, and a sum of those with all keys.
        sizes = query.square().sum((1, 2)) / query.shape[1] * key.square().mean((1, 2)) * len(vector)
        if not by_head:
            differences, sizes = differences.sum(0), sizes.sum()
        return bool((differences.abs().amax(-1) <= tolerance * sizes.sqrt()).all())


def _are_of_like_size(rows: Tensor) -> bool:
    """Are the rows ``[heads, S, size]`` of all columns of like size? If not, differences of small ones are not seen."""
    sizes = rows.square().sum((0, 2))
    return bool(sizes.max() <= LIKE_SIZE**2 * sizes.min())


class _Replay:
    """Runs a program in float64. Its constants are computed once as the program does, too."""

    def __init__(self, side: Rotated, args: Sequence[Any], seq: int, device: torch.device) -> None:
        self._side, self._seq, self._device = side, seq, device
        self._given = {name: args[place] for name, place in side.inputs.items()}
        self._of_rows: set[fx.Node] = set()
        for node in side.program.graph.nodes:
            if node.name in side.rows or not self._of_rows.isdisjoint(node.all_input_nodes):
                self._of_rows.add(node)
        self._narrow, self._wide = (self._constants(wide) for wide in (False, True))

    def is_precise(self) -> bool:
        """Are the numbers that rows meet as near to those in float64 as their dtype, and that of angles, allows for?

        An angle is a product with a column, of which it is rounded by a share.
        """
        met = {arg for node in self._of_rows for arg in node.all_input_nodes if isinstance(self._wide.get(arg), Tensor)}
        for node in met:
            narrow, wide = self._narrow[node], self._wide[node]
            if not (wide.is_floating_point() or wide.is_complex()):
                continue
            most = (4 * _eps(narrow.dtype) + self._seq * _eps(torch.float32)) * wide.abs().max()
            if not bool((narrow - wide).abs().max() <= most):
                return False
        return True

    def run(self, generator: torch.Generator, part: int | None = None) -> Tensor:
        """Return the result ``[heads, S, size]`` for random rows, the same in all columns.

        Of its features all but each ``size``-th are zero, from a ``part`` on; or none.
        """
        values: dict[fx.Node, Any] = dict(self._wide)
        for node in self._side.program.graph.nodes:
            if node.name in self._side.rows:
                values[node] = self._draw(self._side.rows[node.name], generator, part)
            elif node in self._of_rows and node.op != "output":
                values[node] = _call(node, values, wide=True)
        (output,) = self._side.program.graph.find_nodes(op="output")
        result: Tensor = values[output.all_input_nodes[0]][0]
        return result

    def _constants(self, wide: bool) -> dict[fx.Node, Any]:
        columns = torch.arange(self._seq, device=self._device)
        values: dict[fx.Node, Any] = {}
        for node in self._side.program.graph.nodes:
            if node.op == "placeholder" and node not in self._of_rows:
                value = self._given.get(node.name, columns)
                values[node] = _as_wide(value) if wide else value
            elif node.op == "get_attr":
                values[node] = _as_wide(getattr(self._side.program, node.target))
            elif node.target is radix.gather_columns.default:
                arguments = arguments_of(node)
                values[node] = values[arguments["table"]].index_select(arguments["dim"], columns)
            elif node.op == "call_function" and node not in self._of_rows:
                values[node] = _call(node, values, wide)
        return values

    def _draw(self, axes: Axes, generator: torch.Generator, part: int | None) -> Tensor:
        atoms = [atom for axis in axes for atom in axis]
        features = [int(atom.size) if isinstance(atom, Feature | Uniform) else 1 for atom in atoms]
        drawn = torch.randn(features, dtype=torch.float64, device=self._device, generator=generator)
        if part is not None:
            drawn.view(-1)[torch.arange(drawn.numel(), device=self._device) % self._side.size != part] = 0
        sizes = [self._seq if atom is SEQ else size for atom, size in zip(atoms, features, strict=True)]
        by_axis = iter(sizes)
        return drawn.expand(sizes).reshape([math.prod(itertools.islice(by_axis, len(axis))) for axis in axes])


def _call(node: fx.Node, values: Mapping[fx.Node, Any], wide: bool) -> Any:
    given: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: values[arg])
    args, kwargs = given[0], dict(given[1])
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    if not wide:
        return function(*args, **kwargs)
    args = fx.node.map_aggregate(args, _as_wide)
    if "dtype" in kwargs:
        kwargs |= {"dtype": WIDER.get(kwargs["dtype"], kwargs["dtype"])}
    result = function(*args, **kwargs)
    if isinstance(result, Tensor) and result.dtype in WIDER and "dtype" not in kwargs:  # of integers: 1 / positions
        args = fx.node.map_aggregate(args, lambda arg: arg.double() if isinstance(arg, Tensor) else arg)
        result = function(*args, **kwargs)
    return _as_wide(result)


def _as_wide(value: Any) -> Any:
    return value.detach().to(WIDER.get(value.dtype, value.dtype)) if isinstance(value, Tensor) else value


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@dataclass(frozen=True, eq=False)
class RotaryCheck:
    """Checks for a call that all products of rotated queries and keys depend on the distance of columns alone.

    ``inputs``    the positions of the inputs that it takes,
    ``contents``  and of the tensors among them of which more is read than their sizes.
    ``proved``    what was found for the values of these tensors: the verdict by the number of columns, the sizes and
                  the numbers of the call. The last values come last.
    """

    pairs: tuple[RotatedPair, ...]
    inputs: tuple[int, ...]
    contents: tuple[int, ...]
    proved: list[tuple[list[Tensor], dict[tuple[Any, ...], bool]]] = field(default_factory=list, repr=False)

    def __call__(self, args: Sequence[Any], seq: int, device: torch.device) -> bool:
        if seq < 2:
            return True
        verdicts = self._verdicts([args[place] for place in self.contents])
        given = [args[place] for place in self.inputs]
        call = seq, *(tuple(one.shape) if isinstance(one, Tensor) else one for one in given)
        if call not in verdicts:
            try:
                with torch.no_grad():
                    verdicts[call] = all(pair.depends_on_distance(args, seq, device) for pair in self.pairs)
            except RuntimeError as error:  # no kernel for float64, or too little memory
                log.warning("rotary embeddings could not be checked, so that left padding costs sharing: %s", error)
                return False
            if not verdicts[call]:
                log.info("scores of rotary embeddings depend on more than distances, for %d columns", seq)
        return verdicts[call]

    def _verdicts(self, contents: list[Tensor]) -> dict[tuple[Any, ...], bool]:
        for kept, verdicts in self.proved:
            if all(map(torch.equal, kept, contents)):
                return verdicts
        self.proved.append(([one.detach().clone() for one in contents], {}))
        del self.proved[:-KEPT]
        return self.proved[-1][1]


def rotary_check(fold: Fold) -> RotaryCheck | None:
    """Return the check of a fold; None if it has no rotary embeddings."""
    if fold.rotary is None:
        return None
    pairs: dict[tuple[str, str, bool], RotatedPair] = {}
    inputs: set[int] = set()
    contents: set[int] = set()
    for pair in fold.rotary.pairs:
        query, key = (rotated(fold, rows, fold.rotary.nodes) for rows in (pair.query, pair.key))
        about = query.text(), key.text(), pair.grouped
        if about not in pairs:
            pairs[about] = RotatedPair(query, key, pair.grouped)
            inputs.update(query.inputs.values(), key.inputs.values())
            contents.update(query.contents(), key.contents())
    return RotaryCheck(tuple(pairs.values()), tuple(sorted(inputs)), tuple(sorted(contents)))

"""Prove, by running them, that products of rotated queries and keys depend on the distance of columns alone.

The query at column ``c`` is ``M(c) x`` for some ``x``, and the key at column ``d`` is ``N(d) y``: ``find_rotary`` has
seen that each is linear. Both are computed here for all columns of a call, for a random ``x`` and ``y``. If the product
``x.T @ M(c).T @ N(d) @ y`` is the same at ``c + 1`` and ``d + 1`` for random ``x`` and ``y``, it is for all. The
products of all pairs are compared at once: as matrices, by their product with a random vector (Freivalds' check).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.flops import flops
from radix_compile.ir.axes import SEQ, Axes, Feature, Uniform
from radix_compile.ir.calls import arguments_of
from radix_compile.ir.value import is_row, value_of
from radix_compile.passes.find_rotary import is_linear
from radix_compile.passes.fold import Fold, Pair
from radix_compile.passes.fold_graph import compact_part
from radix_compile.torch_internals import val

log = logging.getLogger(__name__)

aten = torch.ops.aten
radix = torch.ops.radix

DRAWS = 2
"""How many random ``x`` and ``y`` are tried."""
EXACT = 1e-9
"""The largest difference of products, of the sizes of their factors, in float64: that of rounding is below 1e-12."""

WIDER = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
WIDER |= {torch.complex64: torch.complex128}
LOW = {torch.float16, torch.bfloat16}
"""Angles of these are none: they have too few digits for columns."""
KEPT = 4
"""For so many values of its inputs, the verdicts of a check are kept."""


@dataclass(frozen=True, eq=False)
class RotatedPair:
    """A program for the queries and keys of an attention, ``[1, heads, S, features]``.

    ``inputs``  the positions of the call's inputs that it takes, by the names of its placeholders,
    ``rows``    the axes of values of rows, likewise,
    ``tables``  the placeholders of inputs that may be tables with an entry for each column.
    """

    program: fx.GraphModule
    grouped: bool
    inputs: Mapping[str, int]
    rows: Mapping[str, Axes]
    tables: tuple[str, ...]

    def depends_on_distance(self, args: Sequence[Any], seq: int, device: torch.device) -> bool:
        given = {name: args[place] for name, place in self.inputs.items()}
        generator = torch.Generator(device).manual_seed(0)
        exact = not self.tables
        for _ in range(DRAWS):
            drawn = [self._draw(seq, device, generator) for _ in range(2)]
            vector = torch.randn(seq - 1, dtype=torch.float64, device=device, generator=generator)
            if exact and not self._is_same(_Replay(self, given, seq, device, wide=True), drawn, vector, EXACT):
                return False
            replay = _Replay(self, given, seq, device, wide=False)
            if not self._is_same(replay, drawn, vector, None):
                return False
        return True

    def _draw(self, seq: int, device: torch.device, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: _same_in_all_columns(axes, seq, device, generator) for name, axes in self.rows.items()}

    def _is_same(
        self, replay: _Replay, drawn: list[dict[str, Tensor]], vector: Tensor, tolerance: float | None
    ) -> bool:
        query, key = (replay.results(rows)[i][0] for i, rows in enumerate(drawn))
        if self.grouped and len(key) < len(query):
            key = key.repeat_interleave(len(query) // len(key), 0)
        here = torch.einsum("hse,hte,t->s", query[:, :-1], key[:, :-1], vector)
        next_to_it = torch.einsum("hse,hte,t->s", query[:, 1:], key[:, 1:], vector)
        sizes = [one.square().sum((0, 2)).max().sqrt() for one in (query, key)]
        most = sizes[0] * sizes[1] * len(vector) ** 0.5
        tolerance = replay.precision() if tolerance is None else tolerance
        return bool((here - next_to_it).abs().max() <= tolerance * most)


class _Replay(fx.Interpreter):
    """Run the program of a pair on rows of float64. Its constants are computed as captured, or ``wide``: in float64."""

    def __init__(self, pair: RotatedPair, given: Mapping[str, Any], seq: int, device: torch.device, wide: bool) -> None:
        super().__init__(pair.program, garbage_collect_values=False)
        self._given = dict(given)
        self._wide, self._seq = wide, seq
        self._columns = torch.arange(seq, device=device)
        self._dtypes: set[torch.dtype] = set()
        self._met: set[torch.dtype] = set()
        self._is_row: dict[fx.Node, bool] = {}

    def results(self, rows: Mapping[str, Tensor]) -> list[Tensor]:
        self._rows = rows
        result: list[Tensor] = self.run()
        return result

    def precision(self) -> float:
        """The largest difference of products that comes of the precision of tables, and of the angles in them.

        An angle is a product with a column, which rounds by a share of itself.
        """
        return 4 * (_eps(self._met) + self._seq * _eps(self._dtypes - LOW))

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            self._is_row[n] = n.name in self._rows
            if n.name in self._rows:
                return self._rows[n.name]
            value = self._given.get(n.name, self._columns)
            return self._noted(value.detach() if isinstance(value, Tensor) else value)
        self._is_row[n] = any(self._is_row[arg] for arg in n.all_input_nodes)
        if n.op != "call_function":
            return super().run_node(n)
        if self._is_row[n]:
            return self._run_rows(n)
        if n.target is radix.gather_columns.default:
            arguments = arguments_of(n)
            table = self.env[arguments["table"]]
            return table.index_select(arguments["dim"], self._columns)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return self._noted(n.target(*args, **(_widened(kwargs) if self._wide else kwargs)))  # type: ignore[operator]

    def _run_rows(self, n: fx.Node) -> Any:
        for arg in n.all_input_nodes:
            value = self.env[arg]
            if not self._is_row[arg] and isinstance(value, Tensor):
                self._met.add(value.dtype)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args = fx.node.map_aggregate(args, _as_wide)
        return n.target(*args, **_widened(kwargs))  # type: ignore[operator]

    def _noted(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._dtypes.add(value.dtype)
            return _as_wide(value) if self._wide else value
        return value


def _as_wide(value: Any) -> Any:
    return value.to(WIDER.get(value.dtype, value.dtype)) if isinstance(value, Tensor) else value


def _widened(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: WIDER.get(value, value) if name == "dtype" else value for name, value in kwargs.items()}


def _eps(dtypes: Collection[torch.dtype]) -> float:
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex), default=0.0)


def _same_in_all_columns(axes: Axes, seq: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random features ``[1, S, ...]`` in compact form, the same for each row."""
    atoms = [atom for axis in axes for atom in axis]
    features = [int(atom.size) if isinstance(atom, Feature | Uniform) else 1 for atom in atoms]
    drawn = torch.randn(features, dtype=torch.float64, device=device, generator=generator)
    sizes = [seq if atom is SEQ else size for atom, size in zip(atoms, features, strict=True)]
    by_axis = iter(sizes)
    return drawn.expand(sizes).reshape([math.prod(itertools.islice(by_axis, len(axis))) for axis in axes])


@dataclass(frozen=True, eq=False)
class RotaryCheck:
    """Checks for a call that all products of rotated queries and keys depend on the distance of columns alone.

    ``contents``  the positions of the inputs that tables are made of,
    ``proved``    and what was found for their values: the verdict by the number of columns. The last values come last.
    """

    pairs: tuple[RotatedPair, ...]
    contents: tuple[int, ...]
    proved: list[tuple[list[Tensor], dict[int, bool]]] = field(default_factory=list, repr=False)

    def __call__(self, args: Sequence[Any], seq: int, device: torch.device) -> bool:
        if seq < 2:
            return True
        verdicts = self._verdicts([args[place] for place in self.contents])
        if seq not in verdicts:
            try:
                with torch.no_grad():
                    verdicts[seq] = all(pair.depends_on_distance(args, seq, device) for pair in self.pairs)
            except RuntimeError as error:  # no kernel for float64, or too little memory
                log.warning("rotary embeddings could not be checked, so that left padding costs sharing: %s", error)
                return False
            if not verdicts[seq]:
                log.info("scores of rotary embeddings depend on more than distances, for %d columns", seq)
        return verdicts[seq]

    def _verdicts(self, contents: list[Tensor]) -> dict[int, bool]:
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
    pairs: dict[str, RotatedPair] = {}
    contents: set[int] = set()
    for pair in fold.rotary.pairs:
        made = _rotated_pair(fold, pair, fold.rotary.nodes)
        if pairs.setdefault(_text_of(made), made) is made:
            placeholders = {node.name: node for node in made.program.graph.find_nodes(op="placeholder")}
            contents.update(place for name, place in made.inputs.items() if _is_read(placeholders[name]))
    return RotaryCheck(tuple(pairs.values()), tuple(sorted(contents)))


def _is_read(node: fx.Node) -> bool:
    """Is more of an input read than its sizes?"""
    return is_tensor(node) and any(user.target is not aten.sym_size.int for user in node.users)


def _rotated_pair(fold: Fold, pair: Pair, rotated: Collection[fx.Node]) -> RotatedPair:
    nodes = _computed_cheaply((pair.query.node, pair.key.node), rotated)
    program, sources = compact_part(fold, (pair.query, pair.key), nodes)
    placeholders = program.graph.find_nodes(op="placeholder")
    count = len(fold.captured.graph.find_nodes(op="placeholder"))
    inputs = {node.name: place for place, node in enumerate(placeholders[:count]) if node.users}
    tables = tuple(node.name for node in placeholders[:count] if _is_read(node) and _may_be_a_table(val(node)))
    rows = placeholders[len(placeholders) - len(sources) :]
    axes = {node.name: value_of(source).axes for node, source in zip(rows, sources, strict=True)}
    return RotatedPair(program, pair.grouped, inputs, axes, tables)


def _computed_cheaply(ends: tuple[fx.Node, ...], rotated: Collection[fx.Node]) -> list[fx.Node]:
    """The rotated values in front of these nodes, and what of other rows they are computed from by cheap linear ops.

    Two halves of one row are no different rows, and neither is the negative of one.
    """
    found: set[fx.Node] = set()
    queue = list(ends)
    while queue:
        node = queue.pop()
        is_part = node in rotated or (node.op == "call_function" and is_linear(node) and not flops(node))
        if node not in found and is_row(node) and is_part:
            found.add(node)
            queue += node.all_input_nodes
    return [node for node in ends[0].graph.nodes if node in found]


def _may_be_a_table(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and sum(size != 1 for size in tensor.shape) > 1


def _text_of(pair: RotatedPair) -> str:
    """The text of a program, which is the same for the same ops on the same inputs."""
    numbers: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in pair.program.graph.nodes:
        numbers[node] = f"%{len(numbers)}"
        args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: numbers[arg])
        about = pair.inputs.get(node.name, pair.rows.get(node.name)) if node.op == "placeholder" else node.target
        lines.append(f"{node.op} {about} {args}")
    return "\n".join([*lines, str(pair.grouped)])

"""Check the invariants of a graph after a pass. A broken one is a bug of the pass, and raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.ir.axes import BATCH, SEQ, Axis, Layout, Sorted, Token, as_size
from radix_compile.ir.calls import arguments_of
from radix_compile.ir.graph import Form, facts, graph_facts, source_of_fold, tokens_of
from radix_compile.ir.plan_arrays import BY_NAME, BY_PLACEHOLDER, PLAN_ARRAYS
from radix_compile.ir.value import Value, locate, values_of
from radix_compile.passes.choose_cuts import has_compact_form
from radix_compile.torch_internals import val

NODES = 1_000_003
"""The number of nodes with which shapes are computed: a large prime, so that no other size can equal it by chance."""

HEAD = 1_000_033
"""The number of nodes of the head: another large prime."""

SIZES = {
    **{"nodes": NODES, "nodes + 1": NODES + 1, "head": HEAD, "head + 1": HEAD + 1, "head pieces": 19},
    **{"windows": 2, "windows + 1": 3, "torch tiles": 4, "tile keys": 13, "pairs": 17},
    **{"stretches": 5, "tiles + 1": 9, "keys": 64, "parts": 11, "divided": 2},
    "pieces": 7,
}
"""The sizes of the plan arrays with which shapes are computed."""

INDEX_OPS = "radix"
"""The namespace of the ops that convert between the forms, and may read both."""


class InvariantError(AssertionError):
    """A pass made a graph that does not compute what the captured one does. The message has the node and its source."""


def verify_graph(gm: fx.GraphModule, homes: Mapping[fx.Node, Form] | None = None, with_shapes: bool = True) -> None:
    """Raise :class:`InvariantError` unless every node has the expected form, shape and dtype.

    Before ``fold_graph``: the axes of each node have the sizes of its shape, and each compact node has one entry per
    row. After it: no op reads both forms, and with ``NODES`` nodes, each node has the shape and dtype of its captured
    node in that form, and each output those of the captured output. Shapes take most of the time: ``with_shapes`` may
    be False if the same code was verified before.
    """
    gm.graph.lint()
    stated = graph_facts(gm)
    if stated.source is not None:
        _verify_forms(gm)
        if with_shapes:
            _verify_shapes(gm)
    elif stated.tokens is not None:
        _verify_marks(gm, homes or {})


def _expect(holds: bool, node: fx.Node, problem: str) -> None:
    if not holds:
        raise InvariantError(f"{locate(node, problem)} (node {node.name})")


# ------------------------------------------------------------------------------------------------- before the fold


def _verify_marks(gm: fx.GraphModule, homes: Mapping[fx.Node, Form]) -> None:
    layout = tokens_of(gm).layout
    for node in gm.graph.nodes:
        if node.op == "output" or facts(node).marks is None:
            continue
        for value, result in zip(values_of(node), _results(val(node)), strict=False):
            if value.mixed is None and value.arrangement is None and isinstance(result, torch.Tensor):
                sizes = [layout.axis_size(axis) for axis in value.axes]
                shape = [as_size(size) for size in result.shape]
                _expect(_same(sizes, shape), node, f"its axes {value.axes} are not those of its shape {shape}")
        if homes.get(node) is Form.COMPACT:
            _expect(has_compact_form(node), node, "it is planned to run compact, but does not have one entry per row")


# -------------------------------------------------------------------------------------------------- after the fold


def _verify_forms(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if getattr(node.target, "namespace", None) == INDEX_OPS:
            _verify_plan_arguments(node)
            continue
        if node.target is torch.ops.aten.sym_size.int:
            continue
        forms = {arg: facts(arg).form for arg in node.all_input_nodes}
        compact = [arg for arg, form in forms.items() if form in (Form.COMPACT, Form.HEAD)]
        head = [arg for arg in compact if forms[arg] is Form.HEAD]
        if 0 < len(head) < len(compact):
            _expect(False, node, "it reads nodes of the head and all nodes")
        full = [arg for arg, form in forms.items() if form is Form.FULL and _has_rows(arg)]
        if compact and full:
            _expect(False, node, f"it reads {compact[0].name} in compact and {full[0].name} in full form")


def _verify_plan_arguments(node: fx.Node) -> None:
    """Check that each plan array is passed to the argument that takes it, and that all arrays of an op fit together."""
    taken = {name: BY_PLACEHOLDER.get(str(given)) for name, given in arguments_of(node).items() if name in BY_NAME}
    for name, array in taken.items():
        given = arguments_of(node)[name]
        fits = given is None or (array is not None and (array.argument or array.name) == name)
        _expect(fits, node, f"it takes {given} for the plan's {name}")
    kinds = {array.indexes for array in taken.values() if array is not None}
    _expect(len(kinds) <= 1, node, f"it takes plan arrays of {' and of '.join(sorted(kinds))}")


def _has_rows(node: fx.Node) -> bool:
    """Whether a node has entries per row, and is not constant."""
    origin = facts(node).origin
    assert origin is not None
    return any(not value.is_constant for value in values_of(origin))


def _verify_shapes(gm: fx.GraphModule) -> None:
    source = source_of_fold(gm)
    layout = tokens_of(source).layout
    try:
        fake_results = internals.fake_results(gm, plan_shapes(gm))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InvariantError(f"the folded graph does not run: {error}") from error
    for node in gm.graph.nodes:
        origin, form = facts(node).origin, facts(node).form
        if origin is None:
            continue
        values, results = values_of(origin), _results(fake_results[node])
        for value, result, captured in zip(values, results, _results(val(origin)), strict=False):
            if not isinstance(captured, torch.Tensor):
                continue
            shape, expected_shape = [as_size(size) for size in result.shape], _shape(value, captured, form, layout)
            if expected_shape is not None:
                _expect(
                    _same(shape, expected_shape), node, f"its shape is {shape} in {form} form, not {expected_shape}"
                )
            _expect(result.dtype == captured.dtype, node, f"its dtype is {result.dtype}, not {captured.dtype}")
    for node, captured in zip(_outputs(gm), _outputs(source), strict=True):
        if isinstance(node, fx.Node) and isinstance(expected := val(captured), torch.Tensor):
            result = fake_results[node]
            is_same = _same([as_size(s) for s in result.shape], [as_size(s) for s in expected.shape])
            is_same &= result.dtype == expected.dtype and result.device == expected.device
            _expect(is_same, node, f"as an output it is {result}, and {expected} was captured")


def plan_shapes(gm: fx.GraphModule) -> dict[str, tuple[Any, ...]]:
    """Return the shapes of the plan arrays that the graph takes, by placeholder name, with ``NODES`` nodes."""
    ids = val(tokens_of(gm).keys[0])
    sizes = {**SIZES, "rows": ids.shape[0] * ids.shape[1]}
    inputs = {node.name for node in gm.graph.find_nodes(op="placeholder")}
    return {array.placeholder: array.sized(sizes) for array in PLAN_ARRAYS if array.placeholder in inputs}


def _shape(value: Value, captured: torch.Tensor, form: Form | None, layout: Layout) -> list[sympy.Expr] | None:
    """Return the shape of the captured value in this form; None if it is not known."""
    if form not in (Form.COMPACT, Form.HEAD):
        return [as_size(size) for size in captured.shape]
    if value.mixed is not None or value.arrangement is not None:
        return None
    return [_compact_size(axis, layout, HEAD if form is Form.HEAD else NODES) for axis in value.axes]


def _compact_size(axis: Axis, layout: Layout, nodes: int) -> sympy.Expr:
    atoms = [inner for atom in axis for inner in (atom.axis if isinstance(atom, Sorted) else (atom,))]
    sizes = {BATCH: 1, SEQ: nodes}
    product = sympy.prod([sizes[atom] if isinstance(atom, Token) else layout.atom_size(atom) for atom in atoms])
    return sympy.sympify(product)


def _outputs(gm: fx.GraphModule) -> list[Any]:
    (output,) = gm.graph.find_nodes(op="output")
    return list(output.args[0])


def _results(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _same(first: list[sympy.Expr], second: list[sympy.Expr]) -> bool:
    return len(first) == len(second) and all(_equal(a, b) for a, b in zip(first, second, strict=True))


def _equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether sizes are equal as expressions, or at numbers with many divisors (``s**2 // s`` and ``s``)."""
    if sympy.expand(a - b) == 0:
        return True
    symbols = sorted((a - b).free_symbols, key=str)
    numbers = {symbol: 5040 * sympy.prime(100 + position) for position, symbol in enumerate(symbols)}
    return bool((a - b).subs(numbers) == 0)

"""Invariants of a graph after every pass. A pass that breaks one has a bug: better an error than a wrong number."""

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
from radix_compile.ir.plan_arrays import BY_NAME, PLAN_ARRAYS
from radix_compile.ir.value import Value, locate, values_of
from radix_compile.passes.choose_cuts import has_compact_form
from radix_compile.torch_internals import val

NODES = 1_000_003
"""The number of nodes to compute shapes with. A prime that is no other size, so that no shape is right by chance."""

SIZES = {
    **{"nodes": NODES, "nodes + 1": NODES + 1},
    **{"windows": 2, "windows + 1": 3, "torch tiles": 4, "tile keys": 13, "pairs": 17},
    **{"stretches": 5, "tiles + 1": 9, "keys": 64, "parts": 11, "divided": 2},
    "pieces": 7,
}
"""The sizes of the plan's arrays to compute shapes with."""

INDEX_OPS = "radix"
"""The namespace of the ops that may read both forms: they are what leads from the one to the other."""


class InvariantError(AssertionError):
    """A pass made a graph that does not mean what the captured one means. The message names the node and its source."""


def verify_graph(gm: fx.GraphModule, homes: Mapping[fx.Node, Form] | None = None, with_shapes: bool = True) -> None:
    """Raise :class:`InvariantError` unless every node has the form, shape and dtype that it should have.

    Before ``fold_graph``, each marked node's axes multiply out to its shape, and what runs compact is one value for
    each row. After it, no op reads both forms, and computing all shapes anew for a number of nodes that is no other
    size gives each node the shape and dtype that the captured node has in that form. The outputs are those of the
    captured graph. Shapes take most of the time: ``with_shapes`` may be False if the same code was verified before.
    """
    gm.graph.lint()
    known = graph_facts(gm)
    if known.source is not None:
        _verify_forms(gm)
        if with_shapes:
            _verify_shapes(gm)
    elif known.tokens is not None:
        _verify_marks(gm, homes or {})


def _expect(holds: bool, node: fx.Node, what: str) -> None:
    if not holds:
        raise InvariantError(f"{locate(node, what)} (node {node.name})")


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
            _expect(has_compact_form(node), node, "it is to run compact, and is not one value for each row")


# -------------------------------------------------------------------------------------------------- after the fold


def _verify_forms(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if getattr(node.target, "namespace", None) == INDEX_OPS:
            _verify_plan_arguments(node)
            continue
        if node.target is torch.ops.aten.sym_size.int:
            continue
        forms = {arg: facts(arg).form for arg in node.all_input_nodes}
        compact = [arg for arg, form in forms.items() if form is Form.COMPACT]
        full = [arg for arg, form in forms.items() if form is Form.FULL and _has_rows(arg)]
        if compact and full:
            _expect(False, node, f"it reads {compact[0].name} in compact and {full[0].name} in full form")


def _verify_plan_arguments(node: fx.Node) -> None:
    """Each index array of the plan is passed as what it is."""
    for name, given in arguments_of(node).items():
        if name in BY_NAME and given is not None:
            _expect(str(given) == BY_NAME[name].placeholder, node, f"it takes {given} for the plan's {name}")


def _has_rows(node: fx.Node) -> bool:
    """Is it the value of rows, and not one of the call?"""
    origin = facts(node).origin
    assert origin is not None
    return any(not value.is_constant for value in values_of(origin))


def _verify_shapes(gm: fx.GraphModule) -> None:
    source = source_of_fold(gm)
    layout = tokens_of(source).layout
    try:
        found = internals.fake_results(gm, plan_shapes(gm))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InvariantError(f"the folded graph does not run: {error}") from error
    for node in gm.graph.nodes:
        origin, form = facts(node).origin, facts(node).form
        if origin is None:
            continue
        values, results = values_of(origin), _results(found[node])
        for value, result, captured in zip(values, results, _results(val(origin)), strict=False):
            if not isinstance(captured, torch.Tensor):
                continue
            shape, wanted = [as_size(size) for size in result.shape], _shape(value, captured, form, layout)
            if wanted is not None:
                _expect(_same(shape, wanted), node, f"its shape is {shape} in {form} form, not {wanted}")
            _expect(result.dtype == captured.dtype, node, f"its dtype is {result.dtype}, not {captured.dtype}")
    for node, captured in zip(_outputs(gm), _outputs(source), strict=True):
        if isinstance(node, fx.Node) and isinstance(wanted := val(captured), torch.Tensor):
            result = found[node]
            same = _same([as_size(s) for s in result.shape], [as_size(s) for s in wanted.shape])
            same &= result.dtype == wanted.dtype and result.device == wanted.device
            _expect(same, node, f"as an output it is {result}, and {wanted} was captured")


def plan_shapes(gm: fx.GraphModule) -> dict[str, tuple[Any, ...]]:
    ids = val(tokens_of(gm).keys[0])
    sizes = {**SIZES, "rows": ids.shape[0] * ids.shape[1]}
    inputs = {node.name for node in gm.graph.find_nodes(op="placeholder")}
    return {array.placeholder: array.sized(sizes) for array in PLAN_ARRAYS if array.placeholder in inputs}


def _shape(value: Value, captured: torch.Tensor, form: Form | None, layout: Layout) -> list[sympy.Expr] | None:
    """The shape of the captured value in that form; None where it is not known."""
    if form is not Form.COMPACT:
        return [as_size(size) for size in captured.shape]
    if value.mixed is not None or value.arrangement is not None:
        return None
    return [_compact_size(axis, layout) for axis in value.axes]


def _compact_size(axis: Axis, layout: Layout) -> sympy.Expr:
    atoms = [inner for atom in axis for inner in (atom.axis if isinstance(atom, Sorted) else (atom,))]
    sizes = {BATCH: 1, SEQ: NODES}
    product = sympy.prod([sizes[atom] if isinstance(atom, Token) else layout.atom_size(atom) for atom in atoms])
    return sympy.sympify(product)


def _outputs(gm: fx.GraphModule) -> list[Any]:
    (output,) = gm.graph.find_nodes(op="output")
    return list(output.args[0])


def _results(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _same(one: list[sympy.Expr], other: list[sympy.Expr]) -> bool:
    return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))


def _equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """As expressions, or (``s**2 // s`` and ``s``) for numbers that are multiples of whatever shapes are divided by."""
    if sympy.expand(a - b) == 0:
        return True
    symbols = sorted((a - b).free_symbols, key=str)
    numbers = {symbol: 5040 * sympy.prime(100 + position) for position, symbol in enumerate(symbols)}
    return bool((a - b).subs(numbers) == 0)

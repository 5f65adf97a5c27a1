"""The table of ops is the one place that says what an op is."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch._ops import OpOverload

import radix_compile
from radix_compile.analysis.op_info import OP_INFO, UNKNOWN

PACKAGE = Path(radix_compile.__file__).parent
TABLE = "analysis/op_table.py"
SAMPLES = "testing/samples/"
FEW = 2

PATTERNS = {
    "passes/read_attention.py": "each is one step of scores that are written out, and has its own arguments",
    "passes/fold_cross_entropy.py": "the ops between the logits and their loss, in programs that were looked at",
}
"""Modules that match several ops as one step of a pattern, and why that says nothing about the ops elsewhere."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(SAMPLES):
            yield name, ast.parse(path.read_text())


def overload(node: ast.AST | None) -> str | None:
    """``name.overload``, if that is an overload of aten."""
    match node:
        case ast.Attribute(ast.Attribute(ast.Name("aten") | ast.Attribute(attr="aten"), name), kind):
            return f"{name}.{kind}"
        case _:
            return None


def overloads(tree: ast.AST) -> list[str]:
    return [found for node in ast.walk(tree) if (found := overload(node)) is not None]


def collections(tree: ast.AST) -> Iterator[list[str]]:
    """The overloads in each literal collection, and in the arguments of each call."""
    for node in ast.walk(tree):
        match node:
            case ast.Tuple(members) | ast.List(members) | ast.Set(members) | ast.Dict(members) | ast.Call(args=members):
                yield [found for member in members if (found := overload(member)) is not None]


def test_no_other_module_says_what_several_ops_are() -> None:
    kept = {name: [ops for ops in collections(tree) if len(ops) > FEW] for name, tree in modules() if name != TABLE}
    kept = {name: found for name, found in kept.items() if found}
    assert set(kept) == set(PATTERNS), kept


def test_such_a_collection_is_found() -> None:
    source = "{aten.a.default, torch.ops.aten.b.default, aten.c.int}; rule(aten.a.x, aten.b.x, aten.c.x); {aten.a.x: 1}"
    assert list(map(len, filter(None, collections(ast.parse(source))))) == [3, 3, 1]


def test_every_op_that_an_analysis_names_has_a_row() -> None:
    named = {op for name, tree in modules() if name.startswith("analysis/") for op in overloads(tree)}
    rows = {str(op).removeprefix("aten.") for op in OP_INFO}
    assert len(named) > 100
    assert named <= rows, named - rows


def test_every_op_has_one_row() -> None:
    written = Counter(overloads(ast.parse((PACKAGE / TABLE).read_text())))
    assert not [op for op, times in written.items() if times > 1]
    assert set(written) == {str(op).removeprefix("aten.") for op in OP_INFO if isinstance(op, OpOverload)}


@pytest.mark.parametrize("op", OP_INFO, ids=str)
def test_every_row_says_something(op: Any) -> None:
    assert OP_INFO[op] != UNKNOWN

"""Facts are kept in one place, and are frozen."""

from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from torch import fx

import radix_compile
from radix_compile.ir.graph import (
    Form,
    GraphFacts,
    NodeFacts,
    facts,
    graph_facts,
    set_facts,
    set_graph_facts,
    tokens_of,
)


def test_a_copy_of_a_node_has_its_facts_and_does_not_share_changes() -> None:
    graph, other = fx.Graph(), fx.Graph()
    node = graph.placeholder("x")
    assert facts(node) == NodeFacts()
    set_facts(node, NodeFacts(is_static=True))
    copy = other.node_copy(node)
    set_facts(copy, replace(facts(copy), form=Form.FULL))
    assert facts(copy) == NodeFacts(is_static=True, form=Form.FULL)
    assert facts(node) == NodeFacts(is_static=True)
    with pytest.raises(FrozenInstanceError):
        facts(node).is_static = False  # type: ignore[misc]


def test_what_a_pass_has_not_stated_yet() -> None:
    gm = fx.GraphModule({}, fx.Graph())
    assert graph_facts(gm) == GraphFacts()
    set_graph_facts(gm, GraphFacts(model="Qwen3"))
    assert graph_facts(gm).model == "Qwen3"
    with pytest.raises(AssertionError, match="mark_token_axes has not run"):
        tokens_of(gm)


def string_keys(source: str) -> list[int]:
    """The lines that read or write ``meta`` by a string."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="meta"), slice=ast.Constant(value=str())):
                found.append(node.lineno)
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="meta")), args=[ast.Constant(value=str()), *_]):
                found.append(node.lineno)
            case ast.Compare(left=ast.Constant(value=str()), comparators=[ast.Attribute(attr="meta")]):
                found.append(node.lineno)
            case _:
                pass
    return found


def test_meta_is_read_in_one_place() -> None:
    """What torch keeps there is read in ``torch_internals``, what passes state in ``ir.graph``, by one key."""
    assert string_keys('a.meta["b"]\na.meta.get("b", 1)\n"b" in a.meta\na.meta[b]\na.meta.update(b)') == [1, 2, 3]
    root = Path(radix_compile.__file__).parent
    files = [file for file in root.rglob("*.py") if file.parent != root / "torch_internals"]
    assert {file.name: lines for file in files if (lines := string_keys(file.read_text()))} == {}

"""Graphs before and after: what each line says, layers that are equal, one pass, and the forms that it is shown in."""

from __future__ import annotations

import json

import pytest
import torch

import radix_compile
from radix_compile.inspection.diff import GraphDiff
from radix_compile.inspection.lines import Kind, lines_of
from tests.models import build, paths, shared_batch

BATCH, SEQ, SHARED = 6, 40, 30


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return shared_batch(BATCH, SEQ, SHARED)


@pytest.fixture(scope="module")
def diff(ids: torch.Tensor) -> GraphDiff:
    model = build("Qwen3", head_dim=16, num_hidden_layers=5)
    return radix_compile.graph_diff(model, ids, use_cache=False)


def test_each_line_says_what_became_of_a_node(diff: GraphDiff) -> None:
    (pair,) = diff.pairs
    lines = list(lines_of(pair.before, pair.after))
    by_op = {(line.kind, line.node.op) for line in lines}
    assert {(Kind.COMPACT, "linear"), (Kind.COMPACT, "tree_attention"), (Kind.ADDED, "fold_rows")} <= by_op
    assert (Kind.REMOVED, "cumsum") in by_op  # of the mask, which attention on the tree does not read
    assert (Kind.SAME, "cos") in by_op
    for line in lines:
        if line.before is not None and line.after is not None and line.after.origin:
            assert line.after.origin == line.before.name
    # Every node of both graphs is in one line.
    for side, view in (("before", pair.before), ("after", pair.after)):
        shown = [getattr(line, side).name for line in lines if getattr(line, side) is not None]
        assert len(set(shown)) == len(view.nodes)
    linear = next(line for line in lines if line.node.op == "linear")
    assert (linear.before.shape, linear.after.shape) == ("[6, 40, 64]", "[1, T', 64]")  # type: ignore[union-attr]
    assert linear.node.module == "model.layers.0.self_attn.q_proj"
    assert "q_proj(" in linear.node.source
    assert "contractions" in linear.before.rule  # type: ignore[union-attr]


def test_sizes_are_those_of_the_call(diff: GraphDiff, ids: torch.Tensor) -> None:
    (pair,) = diff.pairs
    nodes = paths(ids)
    assert (pair.rows, pair.nodes) == (BATCH * SEQ, nodes)
    after = {node.name: node for node in pair.after.nodes}
    fold = next(node for node in after.values() if node.op == "fold_rows")
    assert fold.size(nodes) == 8 * nodes
    assert fold.moved(nodes) == 16 * nodes
    scatter = next(node for node in after.values() if node.op == "scatter_rows")
    logits = next(node for node in pair.before.nodes if node.op == "linear" and node.module == "lm_head")
    assert scatter.size(nodes) == logits.size(nodes)
    assert pair.moved == sum(node.moved(nodes) for node in after.values()) > 0
    assert (pair.edges[0].start, pair.edges[0].stop, pair.edges[0].count) == (0, SHARED, BATCH)
    assert sum((edge.stop - edge.start) for edge in pair.edges) == nodes
    assert pair.edge_ids[0] == tuple(ids[0, :24].tolist())


def test_equal_layers_are_one_block(diff: GraphDiff) -> None:
    blocks = diff.pairs[0].blocks()
    assert [block.numbers for block in blocks if block.numbers] == [
        (0,),
        (1, 2, 3, 4),
    ]  # tables are gathered in layer 0
    equal = next(block for block in blocks if len(block.numbers) > 1)
    assert equal.title == "model.layers.1 .. 4 (4 equal layers)"
    assert len({len(layer) for layer in equal.layers}) == 1
    text = diff.text()
    assert text.count("model.layers.1 .. 4 (4 equal layers)") == 1
    assert "scaled_dot_product_attention -> tree_attention" in text
    assert "modeling_qwen3.py:" in text


def test_one_layer(diff: GraphDiff) -> None:
    text = diff.of_layer(3).text()
    assert "@@ model.layers.3 @@" in text
    assert "fold_rows" not in text
    with pytest.raises(ValueError, match="no layer 7; the layers are 0 to 4"):
        diff.of_layer(7)


def test_one_pass(diff: GraphDiff) -> None:
    merged = diff.across("merge_duplicates").pairs[0]
    assert len(merged.after.nodes) < len(merged.before.nodes)
    assert {line.kind for line in lines_of(merged.before, merged.after)} == {Kind.SAME, Kind.REMOVED}
    folded = diff.across("fold_graph").pairs[0]
    assert any(node.op == "fold_rows" for node in folded.after.nodes)
    assert not any(node.op == "fold_rows" for node in folded.before.nodes)
    with pytest.raises(ValueError, match=r"no pass 'fold' ran here; .*fold_graph"):
        diff.across("fold")


def test_data_and_page(diff: GraphDiff, tmp_path) -> None:
    data = json.loads(json.dumps(diff.to_dict()))
    (graph,) = data["graphs"]
    assert graph["nodes"] == diff.pairs[0].nodes
    kinds = {line["kind"] for block in graph["blocks"] for line in block["lines"]}
    assert kinds == {"same", "compact", "added", "removed"}
    html = diff.html(tmp_path / "diff.html")
    assert (tmp_path / "diff.html").read_text() == html
    assert all(f'"{op}"' in html for op in ("tree_attention", "fold_rows", "scaled_dot_product_attention"))
    assert "srcdoc" in diff._repr_html_()
    assert "run once per node" in repr(diff)


def test_a_graph_that_is_left_alone_says_why() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.linear(self.embedding(ids).flip(1))

    diff = radix_compile.graph_diff(Model(), torch.randint(0, 9, (4, 8)))
    (pair,) = diff.pairs
    assert "not folded: aten.flip" in diff.text()
    assert {line.kind for line in lines_of(pair.before, pair.after)} == {Kind.SAME}
    linear = next(node for node in pair.before.nodes if node.op == "linear")
    flip = next(node for node in pair.before.nodes if node.op == "flip")
    assert flip.reason == "reverses the sequence axis, so it reads other rows"
    assert linear.value.startswith("mixing")
    assert "reverses the sequence axis" in linear.reason


def test_explanations_have_the_diff(ids: torch.Tensor) -> None:
    explanation = radix_compile.explain(build("Qwen3", head_dim=16), ids, use_cache=False)
    assert explanation.diff.pairs[0].report is explanation.graphs[0]

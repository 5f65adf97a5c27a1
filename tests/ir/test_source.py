"""Nodes that the passes make say where they come from, as torch's own tools read it."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from radix_compile.backend import RadixBackend
from radix_compile.ir.graph import source_of_fold
from radix_compile.ir.source import origin_name
from tests.models import build, shared_batch


class Watching(RadixBackend):
    """Keeps the graph as it is behind each pass."""

    def compile(self, gm, example_inputs, options, observe=None):  # type: ignore[no-untyped-def]
        self.seen: dict[str, fx.GraphModule] = {}
        observe = lambda after, gm, fold=None: self.seen.__setitem__(after, gm)  # noqa: E731
        return super().compile(gm, example_inputs, options, observe)


@pytest.mark.parametrize("on_the_tree", [True, False])
def test_every_op_comes_from_a_captured_node(on_the_tree: bool) -> None:
    ids = shared_batch(4, 12, 8)
    backend = Watching(inner_backend="eager", fold="always", fold_attention=on_the_tree)
    torch.compile(build("Qwen3"), backend=backend)(ids, labels=ids, use_cache=False)
    folded = backend.seen["lower_index_ops"]
    captured = {node.name: node for node in source_of_fold(folded).graph.nodes}
    made = [node for node in folded.graph.nodes if node.op == "call_function"]
    ops = {str(node.target) for node in made}
    assert {"radix.fold_rows.default", "radix.token_nll.default"} <= ops
    assert ("radix.tree_attention.default" in ops) == on_the_tree
    sizes = torch.ops.aten.sym_size.int
    assert all(origin_name(node) in captured for node in made if node.target is not sizes)
    for node in made:
        if node.target in (torch.ops.aten.linear.default, torch.ops.radix.scatter_rows.default):
            origin = captured[origin_name(node) or ""]
            assert node.meta["nn_module_stack"] == origin.meta["nn_module_stack"]
            assert node.meta["stack_trace"] == origin.meta["stack_trace"]
            assert node.meta["from_node"][-1].pass_name == "radix: fold_graph"

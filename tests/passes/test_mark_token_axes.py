"""The annotation: axes of real graphs, and graphs that cannot be annotated at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import radix_compile
from radix_compile.ir.axes import BATCH, SEQ, Feature
from radix_compile.ir.graph import facts, source_of_fold, tokens_of
from radix_compile.ir.value import value_of
from radix_compile.runtime.call_planner import plan_inputs
from tests.graphs import calls, fold_of, folded
from tests.models import VOCABULARY, build, shared_batch

aten = torch.ops.aten


@pytest.mark.parametrize("dynamic", [False, True])
def test_axes_of_attention(dynamic: bool) -> None:
    gm = folded(build("Qwen3", num_hidden_layers=1), shared_batch(4, 8, 4), dynamic=dynamic, use_cache=False)
    (attention,) = calls(source_of_fold(gm), aten.scaled_dot_product_attention.default)
    value = value_of(attention)
    assert value.axes == ((BATCH,), (Feature(4),), (SEQ,), (Feature(8),))  # four sequences, four heads, eight columns
    assert value.full_only
    assert value.attends is not None


def test_every_node_is_annotated() -> None:
    gm = folded(build("GPT2"), shared_batch(4, 12, 8), use_cache=False)
    for node in source_of_fold(gm).graph.nodes:
        assert node.op == "output" or facts(node).marks is not None


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (torch.zeros(12, dtype=torch.long), r"token ids have the shape \[12\]; expected \[batch, sequence\]"),
        (torch.zeros(1, 12, dtype=torch.long), "one sequence only"),
        (torch.zeros(12, 1, dtype=torch.long), "sequences of one token"),
    ],
)
def test_graphs_without_a_batch(ids: Tensor, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        folded(Bag(), ids)


def test_a_graph_that_starts_at_hidden_states() -> None:
    gm = folded(nn.Linear(16, 16), torch.zeros(4, 12, 16))
    assert [tuple(key.meta["val"].shape) for key in tokens_of(gm).keys] == [(4, 12, 16)]


def test_a_graph_of_images() -> None:
    with pytest.raises(Exception, match="takes no token ids"):
        folded(nn.Linear(16, 16), torch.zeros(4, 3, 12, 16))


def test_only_what_is_read_is_a_row_key() -> None:
    """An input that nothing folded depends on does not split nodes."""
    model = Bag()

    def program(ids: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return model(ids), other.sum()

    fold = fold_of(program, shared_batch(4, 12, 8), torch.arange(48).view(4, 12))
    assert len(tokens_of(fold.captured).keys) == 2
    assert len(plan_inputs(fold).keys) == 1


def test_what_reads_a_refused_value_is_no_refusal_of_its_own() -> None:
    """An op with several results neither."""

    class Mixed(Bag):
        def forward(self, ids: Tensor) -> Tensor:
            first, second = self.head(self.embedding(ids).flip(1)).split(8, -1)
            return first * second

    with torch.no_grad():
        explanation = radix_compile.explain(Mixed(), torch.zeros(4, 12, dtype=torch.long))
    assert [refusal.op for refusal in explanation.refusals] == ["aten.flip.default"]

"""Writes a captured graph by hand, one op at a time, with the inputs that every sample may use.

The sizes collide on purpose: as many heads as sequences, features and head features as long as the sequence. A rule
that goes by a size instead of by the structure of the program is caught by that.
"""

from __future__ import annotations

import operator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

aten = torch.ops.aten

BATCH, SEQ, HEADS, FEATURES = 4, 6, 4, 6
VOCABULARY = 31


def sample_inputs() -> dict[str, Tensor]:
    """The inputs of every sample, by name, in float64. Two groups of sequences share prefixes of different length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (BATCH, SEQ), generator=generator)
    ids[2, :4] = ids[0, :4]
    ids[3, :3] = ids[1, :3]
    positions = torch.tensor([0, 1, 2, 0, 1, 2]).expand(BATCH, SEQ).contiguous()  # two packed documents

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "ids": ids,
        "positions": positions,
        "padding": (torch.arange(SEQ) >= torch.tensor([1, 0, 1, 0])[:, None]).long(),
        "table": floats(VOCABULARY, FEATURES),
        "wide_table": floats(VOCABULARY, HEADS * SEQ),
        "weight": floats(FEATURES, FEATURES),
        "bias": floats(FEATURES),
        "columns": floats(SEQ, 1),
        "square": floats(SEQ, SEQ),
        "sequences": floats(BATCH, 1, 1),
    }


def shuffle_later(inputs: dict[str, Tensor], column: int) -> dict[str, Tensor]:
    """The same inputs with other ids from ``column`` on."""
    ids = inputs["ids"].clone()
    ids[:, column:] = (ids[:, column:] + 7) % VOCABULARY
    return {**inputs, "ids": ids}


class Recorder:
    """A graph in the making. Call it with an op and its arguments: the node comes back, with its ``val``."""

    ids: fx.Node
    positions: fx.Node
    padding: fx.Node
    table: fx.Node
    wide_table: fx.Node
    weight: fx.Node
    bias: fx.Node
    columns: fx.Node
    square: fx.Node
    sequences: fx.Node

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        for name, tensor in inputs.items():
            node = self.graph.placeholder(name)
            node.meta["val"] = self.mode.from_tensor(tensor)
            setattr(self, name, node)

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        with self.mode:
            node.meta["val"] = op(*map_arg(args, _fake), **map_arg(kwargs, _fake))
        return node

    def item(self, node: fx.Node, position: int) -> fx.Node:
        return self(operator.getitem, node, position)

    def finish(self, *results: fx.Node) -> fx.GraphModule:
        self.graph.output(results)
        gm = fx.GraphModule({}, self.graph)
        gm.meta.update(differentiable=True, grad_mode=True)
        return gm

    # ------------------------------------------------------------------------------- values to start from

    @cached_property
    def x(self) -> fx.Node:
        """``[B, S, D]``, one vector for each row."""
        return self(aten.embedding.default, self.table, self.ids)

    @cached_property
    def wide(self) -> fx.Node:
        """``[B, S, H, E]``."""
        return self(
            aten.view.default, self(aten.embedding.default, self.wide_table, self.ids), [BATCH, SEQ, HEADS, SEQ]
        )

    @cached_property
    def heads(self) -> fx.Node:
        """``[B, H, S, E]``: queries, keys and values of attention."""
        return self(aten.transpose.int, self.wide, 1, 2)

    @cached_property
    def scores(self) -> fx.Node:
        """``[B, H, S, S]``."""
        return self(aten.matmul.default, self.heads, self(aten.transpose.int, self.heads, 2, 3))

    @cached_property
    def causal(self) -> fx.Node:
        """``[S, S]``, true where key <= query."""
        return self.key_minus_query_at_most(0)

    def key_minus_query_at_most(self, bound: int) -> fx.Node:
        query = self(aten.unsqueeze.default, self(aten.arange.default, SEQ), 1)
        key = self(aten.unsqueeze.default, self(aten.arange.default, SEQ), 0)
        return self(aten.le.Tensor, self(aten.add.Tensor, key, -bound), query)

    @cached_property
    def same_token(self) -> fx.Node:
        """``[B, 1, S, S]``, true where query and key are the same token."""
        query = self(aten.unsqueeze.default, self(aten.unsqueeze.default, self.ids, 1), 3)
        key = self(aten.unsqueeze.default, self(aten.unsqueeze.default, self.ids, 1), 2)
        return self(aten.eq.Tensor, query, key)

    @cached_property
    def visible_keys(self) -> fx.Node:
        """``[B, 1, 1, S]``, true where the key is no padding."""
        shown = self(aten.ne.Scalar, self.padding, 0)
        return self(aten.unsqueeze.default, self(aten.unsqueeze.default, shown, 1), 1)

    @cached_property
    def weights(self) -> fx.Node:
        """``[B, H, S, S]``, causal attention weights."""
        return self(aten.softmax.int, self.masked(self.causal), -1)

    def masked(self, visible: fx.Node, floor: float = float("-inf")) -> fx.Node:
        return self(aten.where.ScalarOther, visible, self.scores, floor)

    @cached_property
    def full_weights(self) -> fx.Node:
        """``[B, H, S, S]``, pairs of rows of which nothing is known."""
        return self(aten.sigmoid.default, self.scores)


def _fake(node: fx.Node) -> Any:
    return node.meta["val"]

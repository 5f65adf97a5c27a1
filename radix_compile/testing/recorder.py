"""Builds the captured graph of a sample, op by op, with inputs that all samples share.

Sizes collide on purpose: there are as many heads as sequences, and as many features as columns. So a rule that
identifies axes by their sizes fails.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from radix_compile.ir.graph import GraphFacts, set_graph_facts
from radix_compile.torch_internals import SET_GRAD_ENABLED, FakeTensorMode, set_val, val

aten = torch.ops.aten

BATCH, SEQ, HEADS, FEATURES = 4, 6, 4, 6
VOCABULARY = 31


def sample_inputs() -> dict[str, Tensor]:
    """Return the inputs of every sample by name, in float64. Two pairs of sequences share prefixes."""
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
        "long_columns": floats(2 * SEQ + 1, 1),
        "long_row": (torch.arange(BATCH * SEQ)[None] % 5 != 1).long(),  # reshaped to [B, S], its rows differ
    }


def shuffle_later(inputs: dict[str, Tensor], column: int) -> dict[str, Tensor]:
    """Return the inputs with other ids and positions from ``column`` on."""
    ids, positions = inputs["ids"].clone(), inputs["positions"].clone()
    ids[:, column:] = (ids[:, column:] + 7) % VOCABULARY
    positions[:, column:] = 2 * positions[:, column:] + 1
    return {**inputs, "ids": ids, "positions": positions}


class Variant(Enum):
    """Variants of the inputs: of the same shapes, with other properties."""

    AS_WRITTEN = "random weights and tables; masks from int64 columns, with float64 floors"
    UNIFORM = "weights and tables of equal entries; the sample is also recorded in a region without gradients"
    TABLES = "rows that depend on their column, tables and padding sliced from longer buffers; also without gradients"
    FLOORS = "masks from int32 columns that wrap around, with float16 floors and large biases"


class Recorder:
    """A graph that is being built. A call with an op and its arguments returns the new node, with its ``val``."""

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
    long_columns: fx.Node
    long_row: fx.Node

    def __init__(self, inputs: dict[str, Tensor], variant: Variant = Variant.AS_WRITTEN) -> None:
        self.variant = variant
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        for name, tensor in inputs.items():
            node = self.graph.placeholder(name)
            set_val(node, self.mode.from_tensor(tensor))
            setattr(self, name, node)
        if variant is Variant.UNIFORM:
            for name in ("weight", "bias", "columns", "square", "sequences"):
                setattr(self, name, self(aten.full.default, inputs[name].shape, 0.5, dtype=torch.float64))
        if variant is Variant.TABLES:
            self.columns = self(aten.slice.Tensor, self.long_columns, 0, 0, SEQ)
            visible = self(aten.slice.Tensor, self.long_row, 1, 0, SEQ)
            self.padding = self(aten.mul.Tensor, self.padding, visible)

    @contextlib.contextmanager
    def without_gradients(self) -> Iterator[None]:
        """A context in which ops are recorded without gradients. ``x``, ``heads`` and ``scores`` keep theirs."""
        _ = self.x, self.heads, self.scores  # recorded before the region
        self.graph.call_function(SET_GRAD_ENABLED, (False,))
        yield
        self.graph.call_function(SET_GRAD_ENABLED, (True,))

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        with self.mode:
            set_val(node, op(*map_arg(args, _fake), **map_arg(kwargs, _fake)))
        return node

    def item(self, node: fx.Node, position: int) -> fx.Node:
        return self(operator.getitem, node, position)

    def finish(self, *results: fx.Node) -> fx.GraphModule:
        self.graph.output(results)
        gm = fx.GraphModule({}, self.graph)
        set_graph_facts(gm, GraphFacts(is_differentiable=True))
        return gm

    # ------------------------------------------------------------------------------- inputs of the op under test

    @cached_property
    def x(self) -> fx.Node:
        """``[B, S, D]``, one vector for each row."""
        embedded = self(aten.embedding.default, self.table, self.ids)
        return self(aten.add.Tensor, embedded, self.columns) if self.variant is Variant.TABLES else embedded

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
    def heads_in_a_row(self) -> fx.Node:
        """``[B, H, S, E]``, contiguous, unlike scattered rows."""
        contiguous = self(aten.clone.default, self.heads, memory_format=torch.contiguous_format)
        return self(aten.tanh.default, contiguous)

    @cached_property
    def scores(self) -> fx.Node:
        """``[B, H, S, S]``."""
        return self(aten.matmul.default, self.heads, self(aten.transpose.int, self.heads, 2, 3))

    @cached_property
    def causal(self) -> fx.Node:
        """``[S, S]``, true where key <= query."""
        return self.key_minus_query_at_most(0)

    def key_minus_query_at_most(self, bound: int) -> fx.Node:
        options = {"dtype": torch.int32} if self.variant is Variant.FLOORS else {}
        query = self(aten.unsqueeze.default, self(aten.arange.default, SEQ, **options), 1)
        key = self(aten.unsqueeze.default, self(aten.arange.default, SEQ, **options), 0)
        if self.variant is Variant.FLOORS:  # the last columns wrap around to the lowest numbers
            query, key = (self(aten.add.Tensor, column, 2**31 - 3) for column in (query, key))
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
        is_token = self(aten.ne.Scalar, self.padding, 0)
        return self(aten.unsqueeze.default, self(aten.unsqueeze.default, is_token, 1), 1)

    @cached_property
    def weights(self) -> fx.Node:
        """``[B, H, S, S]``, causal attention weights."""
        return self(aten.softmax.int, self.masked(self.causal), -1)

    def masked(self, visible: fx.Node, floor: float = float("-inf")) -> fx.Node:
        if self.variant is not Variant.FLOORS:
            return self(aten.where.ScalarOther, visible, self.scores, floor)
        zero, lowest = (self(aten.full.default, [], number, dtype=torch.float16) for number in (0.0, -65504.0))
        scores = self(aten.add.Tensor, self.scores, self(aten.where.self, visible, zero, lowest))
        large = self(aten.mul.Tensor, self(aten.arange.default, SEQ, dtype=torch.float64), 3e4)
        return self(aten.add.Tensor, scores, large)

    @cached_property
    def full_weights(self) -> fx.Node:
        """``[B, H, S, S]``, entries of pairs of rows without any facts."""
        return self(aten.sigmoid.default, self.scores)


def _fake(node: fx.Node) -> Any:
    return val(node)

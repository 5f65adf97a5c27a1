"""Small programs that compute something for each row before a call runs: the few ops of the graph that lead to it.

They run on the host where their inputs are small integers, as token ids and masks are: one copy of all of these costs
less than the launches of each op, and the wait for each result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from radix_compile.ir.graph import tokens_of
from radix_compile.ir.source import upstream
from radix_compile.ir.value import values_of
from radix_compile.passes.fold import Fold
from radix_compile.plan.prefix_plan import with_earlier_rows
from radix_compile.runtime.call_inputs import CallInputs
from radix_compile.torch_internals import numel_hint, size_hint, val

BoolArray = NDArray[np.bool_]

SMALL = 4
"""Tensors with at most this many entries for each row of a call are small."""


@dataclass(frozen=True, eq=False)
class RowProgram:
    """A ``[B, S]`` tensor computed from the call's inputs.

    ``inputs``       the positions of those that it takes.
    ``on_host``      it runs on the host.
    ``is_constant``  it is the same for all sequences.
    ``last``         the result for the sizes of the previous call, if it depends on no tensor: most often, position ids
                     do not.
    """

    run: Callable[..., Tensor]
    inputs: tuple[int, ...]
    on_host: bool
    is_constant: bool
    last: dict[tuple[int, ...], NDArray[Any]] = field(default_factory=dict, repr=False)

    def __call__(self, args: CallInputs, shape: tuple[int, int]) -> NDArray[Any]:
        if self not in args.results:
            args.results[self] = self._result(_given(self, args), shape)
        result: NDArray[Any] = args.results[self]
        return result

    def _result(self, given: list[Any], shape: tuple[int, int]) -> NDArray[Any]:
        if any(isinstance(one, Tensor) for one in given):
            return self._computed(given, shape)
        sizes = (*given, *shape)
        if sizes not in self.last:
            rows = self._computed(given, shape)
            rows.flags.writeable = False
            self.last.clear()
            self.last[sizes] = rows
        return self.last[sizes]

    def _computed(self, given: Sequence[Any], shape: tuple[int, int]) -> NDArray[Any]:
        rows = self.run(*given)
        if self.is_constant:  # perhaps a buffer for longer sequences, of which the columns in front are read
            rows = rows.reshape(-1, rows.shape[-1])[:1, : shape[1]].expand(shape)
        result: NDArray[Any] = rows.reshape(shape).numpy(force=True)
        return result


@dataclass(frozen=True, eq=False)
class ReadProgram:
    """The rows that have to be computed: those whose results are read, and the earlier rows that these depend on.

    ``hidden``, a program for rows and the truth value of those that are shown, says on which none depends. The rest is
    as in :class:`RowProgram`.
    """

    run: Callable[..., Tensor]
    inputs: tuple[int, ...]
    on_host: bool
    reads_earlier: bool
    hidden: tuple[RowProgram, bool] | None
    last: dict[tuple[int, int], BoolArray] = field(default_factory=dict, repr=False)

    def __call__(self, args: CallInputs, shape: tuple[int, int]) -> BoolArray:
        """Return the rows whose results are read, ``[B, S]``."""
        if self.inputs:
            return self._computed(_given(self, args), shape)
        if shape not in self.last:
            self.last.clear()
            self.last[shape] = self._computed([], shape)
        return self.last[shape]

    def with_earlier(
        self, read: BoolArray, args: CallInputs, shape: tuple[int, int], breaks: BoolArray | None
    ) -> BoolArray:
        """Return the rows that have to be computed."""
        if not self.reads_earlier:
            return read
        hidden = None
        if self.hidden is not None:
            program, truth = self.hidden
            hidden = (program(args, shape) != 0) != truth
        return with_earlier_rows(read, hidden, breaks)

    def _computed(self, given: Sequence[Any], shape: tuple[int, int]) -> BoolArray:
        device = next((one.device for one in given if isinstance(one, Tensor)), torch.device("cpu"))
        with torch.no_grad():
            read: BoolArray = self.run(*shape, device, *given).numpy(force=True)
        return read


def _given(program: RowProgram | ReadProgram, args: CallInputs) -> list[Any]:
    return args.on_host(program.inputs) if program.on_host else [args[place] for place in program.inputs]


class RowPrograms:
    """The programs of one captured graph, one for each ``[B, S]`` value."""

    def __init__(self, captured: fx.GraphModule) -> None:
        self._captured = captured
        self._made: dict[fx.Node, RowProgram] = {}

    def of(self, source: fx.Node) -> RowProgram:
        if source not in self._made:
            self._made[source] = _row_program(self._captured, source)
        return self._made[source]

    def read_by(self, fold: Fold) -> ReadProgram | None:
        """Return the program for the rows that are read; None if all may be."""
        found = fold.read_rows
        if found is None:
            return None
        hidden = None if found.hidden is None else (self.of(found.hidden.source), found.hidden.truth)
        on_host = _move_to_host(found.program.graph, self._captured)
        found.program.recompile()
        return ReadProgram(found.program, found.inputs, on_host, found.reads_earlier, hidden)

    def inputs_on_host(self) -> set[int]:
        """Return the positions of the inputs that the programs made so far take on the host."""
        return {place for program in self._made.values() if program.on_host for place in program.inputs}


def _row_program(captured: fx.GraphModule, source: fx.Node) -> RowProgram:
    needed = set(upstream(source))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[int] = []
    for position, node in enumerate(captured.graph.find_nodes(op="placeholder")):
        if node in needed:
            inputs.append(position)
            copies[node] = graph.placeholder(node.name)
            copies[node].meta.update(node.meta)
    for node in captured.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[source])
    on_host = _move_to_host(graph, captured)
    return RowProgram(fx.GraphModule(captured, graph), tuple(inputs), on_host, values_of(source)[0].is_constant)


def _move_to_host(graph: fx.Graph, captured: fx.GraphModule) -> bool:
    """Let a program create its tensors on the host; False if it has to run where its inputs are.

    It has if one of its tensors is large, or is no integer: floating-point ops may differ in the last bit.
    """
    batch, seq = val(tokens_of(captured).keys[0]).shape[:2]
    most = SMALL * size_hint(batch) * size_hint(seq)
    for node in graph.nodes:
        value = val(node)
        tensors = [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, Tensor)]
        if node.op == "get_attr" or any(isinstance(arg, torch.device) for arg in node.args):
            return False
        if any(one.is_floating_point() or one.is_complex() for one in tensors):
            return False
        if any(numel_hint(one) > most for one in tensors):
            return False
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cpu"))
    return True

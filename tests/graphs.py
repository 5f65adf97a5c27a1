"""The folded graph of a program, for tests of the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from radix_compile.backend import capture_and_annotate, expect_enough
from radix_compile.options import Options
from radix_compile.passes.capture import capture
from radix_compile.passes.fold import FULL_FOLD, POSITION_WISE_FOLD, Fold
from radix_compile.passes.pipeline import fold_as
from radix_compile.passes.report import report_on
from radix_compile.runtime.call_planner import plan_inputs


def folded(
    program: Callable[..., Any], *args: Any, dynamic: bool | None = None, on_rows: bool = False, **kwargs: Any
) -> fx.GraphModule:
    """The folded program of the last graph that Dynamo captures of ``program(*args, **kwargs)``.

    With ``on_rows`` attention stays in full form.
    """
    return fold_of(program, *args, dynamic=dynamic, on_rows=on_rows, **kwargs).program


def fold_of(
    program: Callable[..., Any], *args: Any, dynamic: bool | None = None, on_rows: bool = False, **kwargs: Any
) -> Fold:
    """As :func:`folded`, with all that the passes have decided."""
    options = Options()
    folds: list[Fold] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        annotated = capture_and_annotate(gm, inputs, options)
        folds.append(fold_as(POSITION_WISE_FOLD if on_rows else FULL_FOLD, annotated, options))
        expect_enough(report_on(folds[-1]))
        plan_inputs(folds[-1])
        return gm.forward

    with torch.no_grad():
        torch.compile(program, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return folds[-1]


def captured(program: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """The graph of ``program(*args)`` that the passes start from."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(capture(gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(program, backend=backend, fullgraph=True)(*args)
    return graphs[-1]


def scattered(gm: fx.GraphModule) -> list[fx.Node]:
    """The compact tensors that are scattered, one by one or together."""
    together = calls(gm, torch.ops.radix.foreach_scatter_rows.default)
    one_by_one = calls(gm, torch.ops.radix.scatter_rows.default)
    return [node.args[0] for node in one_by_one] + [one for node in together for one in node.args[0]]  # type: ignore


def calls(gm: fx.GraphModule, op: Any) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=op))

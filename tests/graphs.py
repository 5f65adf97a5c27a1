"""The folded graph of a program, for tests of the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from radix_compile.backend import rewrite
from radix_compile.options import Options
from radix_compile.passes.capture import capture
from radix_compile.passes.report import GraphReport


def folded(
    program: Callable[..., Any], *args: Any, dynamic: bool | None = None, on_rows: bool = False, **kwargs: Any
) -> fx.GraphModule:
    """The last graph that Dynamo captures of ``program(*args, **kwargs)``, through the whole pipeline.

    With ``on_rows`` attention stays in full form.
    """
    options = Options(fold_attention=not on_rows)
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        _, rewritten, _ = rewrite(gm, inputs, options, GraphReport(folded=False))
        graphs.append(rewritten)
        return gm.forward

    with torch.no_grad():
        torch.compile(program, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return graphs[-1]


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

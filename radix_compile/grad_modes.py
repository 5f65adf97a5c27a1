"""Where in a graph gradients are recorded: ``torch.no_grad()`` and ``torch.enable_grad()`` in a program are nodes."""

from __future__ import annotations

from torch import fx

from radix_compile.torch_internals import sets_grad_mode


def grad_modes(graph: fx.Graph, outside: bool) -> dict[fx.Node, bool]:
    """For each node, whether gradients are recorded there; ``outside`` is the mode that the program is called in."""
    found: dict[fx.Node, bool] = {}
    mode = outside
    for node in graph.nodes:
        if node.op == "call_function" and sets_grad_mode(node.target):
            mode = bool(node.args[0])
        found[node] = mode
    return found

"""Where a node that a pass made comes from: its place in the user's program, and the node it stands for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx
from torch.fx.traceback import NodeSource, NodeSourceAction

PLACE = ("stack_trace", "nn_module_stack", "source_fn_stack")
"""What says where in the user's program a node comes from."""
OURS = "radix: "


def trace_back(origin: fx.Node, by: str, first: fx.Node, behind: fx.Node | None = None) -> None:
    """Say of the nodes from ``first`` to the last, or to the one in front of ``behind``, that they are of ``origin``.

    ``by`` is the pass that made them. It is written where torch itself and its tools look for it (``from_node``, and
    the stack trace in generated code).
    """
    node = first
    while node is not behind and node.op != "root":
        for key in PLACE:
            if key in origin.meta:
                node.meta.setdefault(key, origin.meta[key])
        kept = node.op == origin.op and node.target == origin.target
        action = NodeSourceAction.REPLACE if kept else NodeSourceAction.CREATE
        node.meta["from_node"] = [NodeSource(origin, OURS + by, action)]
        node = node.next


def origin_name(node: fx.Node) -> str | None:
    """The name of the captured node that a node of the folded graph was made of; None if it was made of none."""
    sources = node.meta.get("from_node")  # torch writes there too
    return sources[-1].name if sources and sources[-1].pass_name.startswith(OURS) else None


def ancestors(*nodes: fx.Node) -> Iterator[fx.Node]:
    """The nodes, and all that they are computed from."""
    queue = list(dict.fromkeys(nodes))
    seen = set(queue)
    while queue:
        node = queue.pop()
        yield node
        new = [arg for arg in node.all_input_nodes if arg not in seen]
        seen.update(new)
        queue += new

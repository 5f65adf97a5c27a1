"""The origin of nodes that passes make: the place in the user's program, and the captured node."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from radix_compile.torch_internals import copy_place, made_from, set_made_from

OURS = "radix: "


def trace_back(origin: fx.Node, pass_name: str, first: fx.Node, stop: fx.Node | None = None) -> None:
    """Record that ``pass_name`` made the nodes from ``first`` up to ``stop`` from ``origin``.

    ``stop`` is not included; None means the end of the graph.
    """
    node = first
    while node is not stop and node.op != "root":
        copy_place(node, origin)
        set_made_from(node, origin, OURS + pass_name)
        node = node.next


def origin_name(node: fx.Node) -> str | None:
    """Return the name of the captured node that a node of a folded graph was made from, or None."""
    source = made_from(node)
    return source[0] if source is not None and source[1].startswith(OURS) else None


def upstream(*nodes: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes, and all nodes from which they are computed."""
    queue = list(dict.fromkeys(nodes))
    visited = set(queue)
    while queue:
        node = queue.pop()
        yield node
        new = [arg for arg in node.all_input_nodes if arg not in visited]
        visited.update(new)
        queue += new

"""Where a node that a pass made comes from: its place in the user's program, and the node it stands for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from radix_compile.torch_internals import copy_place, made_from, set_made_from

OURS = "radix: "


def trace_back(origin: fx.Node, by: str, first: fx.Node, behind: fx.Node | None = None) -> None:
    """Say of the nodes from ``first`` to the last, or to the one in front of ``behind``, that they are of ``origin``.

    ``by`` is the pass that made them.
    """
    node = first
    while node is not behind and node.op != "root":
        copy_place(node, origin)
        set_made_from(node, origin, OURS + by)
        node = node.next


def origin_name(node: fx.Node) -> str | None:
    """The name of the captured node that a node of the folded graph was made of; None if it was made of none."""
    source = made_from(node)
    return source[0] if source is not None and source[1].startswith(OURS) else None


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

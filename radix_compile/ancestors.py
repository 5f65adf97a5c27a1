"""Walking a graph backwards."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx


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

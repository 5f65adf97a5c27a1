"""Symbolic sizes: their hints, their bounds, and the guards that comparing them adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


def size_hint(size: int | torch.SymInt) -> int:
    """Return the size in the call that is compiled for, or 1 for an unbacked size."""
    if isinstance(size, int):
        return size
    return 1 if size.node.hint is None else int(size.node.hint)


def numel_hint(tensor: torch.Tensor) -> int:
    """Return the number of entries in the call that is compiled for."""
    return math.prod(size_hint(size) for size in tensor.shape)


def unknown_dim(value: Any) -> int | None:
    """Return a tensor's first dimension whose size is a symbol without a hint (``mark_unbacked``), or None."""
    sizes: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else ()
    return next((dim for dim, size in enumerate(sizes) if not isinstance(size, int) and size.node.hint is None), None)


def upper_bound(size: int | torch.SymInt) -> int:
    """Return an integer size itself; for a symbol, a number well above its hint, guarded to bound the size."""
    if isinstance(size, int):
        return size
    bound: int = max(2**16, 1 << (2 * int(size.node.hint)).bit_length())
    assert bool(size <= bound)
    return bound


def same_size(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Are two sizes equal in this call? If they are and one is a symbol, this adds a guard that they stay equal.

    Unbacked sizes are equal only if torch knows that without a guard.
    """
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    hints = [size if isinstance(size, int) else size.node.hint for size in (left, right)]
    if None in hints:
        return statically_known_true(left == right)
    return hints[0] == hints[1] and bool(left == right)


def size_symbols(graph: fx.Graph) -> dict[sympy.Symbol, tuple[int, int, int]]:
    """Map each symbol that is an input's size to (input position, dimension, hint), from the first such input."""
    symbols: dict[sympy.Symbol, tuple[int, int, int]] = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        sizes: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else ()
        for dim, size in enumerate(sizes):
            symbol = getattr(getattr(size, "node", None), "expr", None)
            if isinstance(symbol, sympy.Symbol):
                symbols.setdefault(symbol, (position, dim, int(size.node.hint)))
    return symbols


def hints_of(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """Map each symbol that is an input's size to its hint, the size in the call that is compiled for."""
    return {symbol: hint for symbol, (*_, hint) in size_symbols(graph).items()}

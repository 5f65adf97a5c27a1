"""Masks that the caller made, ``[B, H, S, S]``: taken for causal when compiling, and checked by value in every call."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from radix_compile import torch_internals as internals
from radix_compile.mask_facts import Given, Masked, Predicate
from radix_compile.row_contents import RunsPlain
from radix_compile.token_axes import BATCH, SEQ, Axis, Value, as_size, plain_axes, plain_axis


def given_masks(graph: fx.Graph, ids: fx.Node) -> list[fx.Node]:
    """The inputs with an entry for each pair of rows of a sequence; one sequence may stand for all of them."""
    return [node for node in graph.find_nodes(op="placeholder") if _is_given_mask(node, ids)]


def _is_given_mask(node: fx.Node, ids: fx.Node) -> bool:
    tensor, (batch, seq) = node.meta.get("val"), ids.meta["val"].shape[:2]
    if not isinstance(tensor, Tensor) or tensor.ndim != 4 or node.meta.get("is_static"):
        return False
    if not (tensor.dtype == torch.bool or tensor.dtype.is_floating_point):
        return False
    first, _, query, key = tensor.shape
    pairs = internals.same_size(query, seq) and internals.same_size(key, seq)
    return pairs and (as_size(first) == 1 or internals.same_size(first, batch))


def given_mask_value(node: fx.Node) -> Value:
    """What is known of such an input if :func:`rows_seen` accepts it."""
    tensor = node.meta["val"]
    visible = Given(node, -2, -1)
    is_bool = tensor.dtype == torch.bool
    fact = Predicate(visible) if is_bool else Masked.of(visible, torch.finfo(tensor.dtype).min / 2, 0.0)
    if as_size(tensor.shape[0]) == 1:
        return Value(plain_axes(node), fact=fact)
    heads: Axis = plain_axis(as_size(tensor.shape[1]))
    return Value(((BATCH,), heads, (SEQ,), (SEQ,)), fact=fact)


def rows_seen(mask: Tensor) -> NDArray[np.int64] | None:
    """Numbers ``[B, S]``, equal for rows of a mask ``[B, H, S, S]`` that see the same columns; None if B is one.

    Raises :class:`RunsPlain` unless a bool mask shows (and a float mask leaves at zero) nothing behind a row and the
    row itself, and a float mask hides with one number, the lowest of its dtype or nearly, or minus infinity.
    """
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool:
        hidden = mask[~visible]
        if hidden.numel() and not (hidden[0] <= torch.finfo(mask.dtype).min / 2 and (hidden == hidden[0]).all()):
            raise RunsPlain("the given attention mask is not of zeros and one number near the lowest of its dtype")
    if visible.triu(1).any():
        raise RunsPlain("the given attention mask lets a token see later ones")
    if not visible.diagonal(dim1=-2, dim2=-1).all():
        raise RunsPlain("the given attention mask hides a token from itself")
    if mask.shape[0] == 1:
        return None
    batch, _, seq, _ = mask.shape
    bits = np.packbits(visible.transpose(1, 2).reshape(batch * seq, -1).numpy(force=True), axis=1)
    _, numbers = np.unique(bits.view(f"V{bits.shape[1]}").ravel(), return_inverse=True)
    return numbers.astype(np.int64).reshape(batch, seq)

"""The gradient of an embedding table without atomic additions.

ATen's kernels add up the rows of a token in a fixed order; inductor would decompose them into atomic additions, whose
order changes from run to run. As an op of its own the gradient stays whole. Importing this module registers it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from radix_compile.kernels.index_ops import library

aten, radix = torch.ops.aten, torch.ops.radix


def embedding_gradient(grad: Tensor, indices: Tensor, rows: int, padding_idx: int, by_frequency: bool) -> Tensor:
    result: Tensor = aten.embedding_dense_backward(grad, indices, rows, padding_idx, by_frequency)
    return result


def _fake(grad: Tensor, indices: Tensor, rows: int, *_: Any) -> Tensor:
    return grad.new_empty((rows, grad.shape[-1]))


library.define(
    "embedding_gradient(Tensor grad, Tensor indices, SymInt rows, SymInt padding_idx, bool by_frequency) -> Tensor"
)
library.impl("embedding_gradient", embedding_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("radix::embedding_gradient", _fake, lib=library)

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.embedding_dense_backward.default: radix.embedding_gradient.default
}

"""Ops whose row of the table says that they are linear, executed: op(2 x - 3 y) = 2 op(x) - 3 op(y)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from radix_compile.analysis.op_info import OP_INFO

aten = torch.ops.aten

MATRIX = torch.randn(6, 6, dtype=torch.float64)
INDEX = torch.tensor([[5, 0, 3, 3, 1, 2]])

Calls = dict[Any, list[Callable[..., Any]]]

ALL: Calls = {
    aten.alias.default: [aten.alias],
    aten.clone.default: [aten.clone],
    aten.contiguous.default: [aten.contiguous],
    aten.detach.default: [aten.detach],
    aten.lift_fresh_copy.default: [aten.lift_fresh_copy],
    aten._to_copy.default: [lambda x: aten._to_copy(x, dtype=torch.complex128)],
    aten.to.dtype: [lambda x: aten.to.dtype(x, torch.complex128)],
    aten.to.dtype_layout: [lambda x: aten.to.dtype_layout(x, dtype=torch.complex128)],
    aten.view.default: [lambda x: aten.view(x, [3, 12])],
    aten._unsafe_view.default: [lambda x: aten._unsafe_view(x, [3, 12])],
    aten.reshape.default: [lambda x: aten.reshape(x, [3, 12])],
    aten.expand.default: [lambda x: aten.expand(x, [2, 6, 6])],
    aten.unsqueeze.default: [lambda x: aten.unsqueeze(x, 1)],
    aten.squeeze.dim: [lambda x: aten.squeeze.dim(x[None], 0)],
    aten.squeeze.dims: [lambda x: aten.squeeze.dims(x[None], [0])],
    aten.permute.default: [lambda x: aten.permute(x, [1, 0])],
    aten.transpose.int: [lambda x: aten.transpose(x, 0, 1)],
    aten.t.default: [aten.t],
    aten.mT.default: [lambda x: x.mT],
    aten.numpy_T.default: [lambda x: x.T],
    aten.view_as_complex.default: [lambda x: aten.view_as_complex(x.view(6, 3, 2))],
    aten.view_as_real.default: [lambda x: aten.view_as_real(torch.complex(x, 2 * x))],
    aten.slice.Tensor: [lambda x: aten.slice(x, 1, 2, 5, 2)],
    aten.select.int: [lambda x: aten.select(x, 1, 4)],
    aten.split.Tensor: [lambda x: aten.split.Tensor(x, 4)],
    aten.split_with_sizes.default: [lambda x: aten.split_with_sizes(x, [1, 5])],
    aten.chunk.default: [lambda x: aten.chunk(x, 2)],
    aten.unbind.int: [aten.unbind],
    aten.cat.default: [lambda x: aten.cat([x[:2], x, 3 * x])],
    aten.stack.default: [lambda x: aten.stack([x, -x], 1)],
    aten.repeat.default: [lambda x: aten.repeat(x, [1, 2])],
    aten.repeat_interleave.self_int: [lambda x: aten.repeat_interleave.self_int(x, 2, 1)],
    aten.flip.default: [lambda x: aten.flip(x, [1])],
    aten.complex.default: [lambda x: aten.complex(x, x.T.contiguous())],
    aten.add.Tensor: [lambda x: aten.add(x, x.T), lambda x: aten.add(x, x.T, alpha=2)],
    aten.sub.Tensor: [lambda x: aten.sub(x, x.T), lambda x: aten.sub(x, x.T, alpha=2)],
    aten.neg.default: [aten.neg],
}
EACH: Calls = {
    aten.mul.Tensor: [lambda x: aten.mul(x, MATRIX), lambda x: aten.mul(MATRIX, x), lambda x: aten.mul(x, 2.5)],
    aten.mm.default: [lambda x: aten.mm(x, MATRIX), lambda x: aten.mm(MATRIX, x)],
    aten.bmm.default: [lambda x: aten.bmm(x[None], MATRIX[None]), lambda x: aten.bmm(MATRIX[None], x[None])],
    aten.matmul.default: [lambda x: aten.matmul(x, MATRIX), lambda x: aten.matmul(MATRIX, x)],
    aten.einsum.default: [
        lambda x: aten.einsum("ij,kj->ik", [x, MATRIX]),
        lambda x: aten.einsum("ij,kj->ik", [MATRIX, x]),
    ],
}
FIRST: Calls = {
    aten.mul.Scalar: [lambda x: aten.mul.Scalar(x, 2.5)],
    aten.div.Tensor: [lambda x: aten.div(x, MATRIX)],
    aten.div.Scalar: [lambda x: aten.div.Scalar(x, 2.5)],
    aten.gather.default: [lambda x: aten.gather(x, 1, INDEX)],
    aten.index_select.default: [lambda x: aten.index_select(x, 1, INDEX[0])],
    aten.index.Tensor: [lambda x: aten.index(x, [None, INDEX])],
}


@pytest.mark.parametrize(("kind", "calls"), [("all", ALL), ("each", EACH), ("first", FIRST)])
def test_every_op_that_is_said_to_be_linear_is(kind: str, calls: Calls) -> None:
    assert set(calls) == {op for op, info in OP_INFO.items() if info.linear == kind}
    x, y = torch.randn(2, 6, 6, dtype=torch.float64)
    for op, made in calls.items():
        for function in made:
            mixed, of_x, of_y = (_tensors(function(one)) for one in (2 * x - 3 * y, x, y))
            for result, first, second in zip(mixed, of_x, of_y, strict=True):
                torch.testing.assert_close(result, 2 * first - 3 * second, msg=str(op))


def _tensors(results: Any) -> list[Tensor]:
    return [one for one in pytree.tree_leaves(results) if isinstance(one, Tensor)]

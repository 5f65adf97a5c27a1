"""The embedding gradient as an op that no compiler takes apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from radix_compile.kernels import embedding

radix = torch.ops.radix


def test_is_that_of_autograd() -> None:
    table = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2, 2], [5, 1, 0]])
    grad = torch.randn(2, 3, 3, dtype=torch.float64)
    for padding in (-1, 2):
        looked_up = F.embedding(ids, table, padding_idx=None if padding < 0 else padding)
        (expected,) = torch.autograd.grad(looked_up, table, grad)
        ours = radix.embedding_gradient(grad, ids, 7, padding, False)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        assert ours.any()


def test_opcheck() -> None:
    arguments = (torch.randn(2, 3, 4), torch.tensor([[1, 2, 2], [5, 1, 0]]), 7, -1, False)
    torch.library.opcheck(radix.embedding_gradient.default, arguments)


def test_stands_in_for_what_inductor_would_decompose() -> None:
    assert {
        torch.ops.aten.embedding_dense_backward.default: radix.embedding_gradient.default
    } == embedding.DECOMPOSITIONS

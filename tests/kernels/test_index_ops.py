"""The index ops against indexing written out, in any axis order, with gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from radix_compile.kernels import index_ops

BATCH, SEQ, HEADS, WIDTH = 3, 4, 2, 5
FOLD = torch.tensor([0, 1, 5, 7, 11])
SCATTER = torch.tensor([0, 1, 2, 2, 0, 2, 1, 3, 0, 1, 4, 4])


def laid_out(order: tuple[int, ...], batch: int, seq: int) -> torch.Tensor:
    """Random ``[batch, seq, heads, width]`` with its dimensions in that order, and strides that are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, seq, HEADS, WIDTH, generator=generator, dtype=torch.float64).permute(order)


ORDERS = list(itertools.permutations(range(4)))


@pytest.mark.parametrize("order", ORDERS)
def test_fold_rows(order: tuple[int, ...]) -> None:
    full = laid_out(order, BATCH, SEQ)
    batch_dim, seq_dim = order.index(0), order.index(1)
    compact = torch.ops.radix.fold_rows(full, FOLD, batch_dim, seq_dim)
    back = compact.permute([order.index(dim) for dim in range(4)])
    assert back.shape == (1, len(FOLD), HEADS, WIDTH)
    rows = full.permute([order.index(dim) for dim in range(4)]).reshape(BATCH * SEQ, HEADS, WIDTH)
    for node, row in enumerate(FOLD.tolist()):
        torch.testing.assert_close(back[0, node], rows[row], rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_scatter_rows(order: tuple[int, ...]) -> None:
    compact = laid_out(order, 1, len(FOLD))
    batch_dim, seq_dim = order.index(0), order.index(1)
    full = torch.ops.radix.scatter_rows(compact, SCATTER, BATCH, SEQ, batch_dim, seq_dim)
    inverse = [order.index(dim) for dim in range(4)]
    rows, nodes = full.permute(inverse), compact.permute(inverse)
    assert rows.shape == (BATCH, SEQ, HEADS, WIDTH)
    for row, node in enumerate(SCATTER.tolist()):
        torch.testing.assert_close(rows[row // SEQ, row % SEQ], nodes[0, node], rtol=0, atol=0)


def test_holes_come_back_as_zeros() -> None:
    scatter = SCATTER.clone()
    scatter[[3, 7]] = -1
    full = index_ops.scatter_rows(torch.ones(1, 5, 2), scatter, BATCH, SEQ, 0, 1, holes=True)
    assert full.view(-1, 2).sum(1).tolist() == [0 if row in (3, 7) else 2 for row in range(12)]


def test_gather_columns() -> None:
    table = torch.arange(SEQ * 2.0).view(1, SEQ, 2)
    assert index_ops.gather_columns(table, FOLD, SEQ, 1)[0, :, 0].tolist() == [2 * (row % SEQ) for row in FOLD.tolist()]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gradients(dtype: torch.dtype) -> None:
    full = torch.randn(BATCH, SEQ, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: torch.ops.radix.fold_rows(x, FOLD.to(dtype), 0, 1), full)
    compact = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    scatter = SCATTER.to(dtype)
    assert torch.autograd.gradcheck(lambda x: torch.ops.radix.scatter_rows(x, scatter, BATCH, SEQ, 0, 1), compact)


def test_no_rows() -> None:
    assert torch.ops.radix.fold_rows(torch.ones(2, 3, 4), FOLD[:0], 0, 1).shape == (1, 0, 4)


@pytest.mark.parametrize("name", ["fold_rows", "scatter_rows", "gather_columns"])
def test_opcheck(name: str) -> None:
    arguments = {
        "fold_rows": (torch.randn(BATCH, SEQ, 2), FOLD, 0, 1),
        "scatter_rows": (torch.randn(1, 5, 2), SCATTER, BATCH, SEQ, 0, 1),
        "gather_columns": (torch.randn(1, SEQ, 2), FOLD, SEQ, 1),
    }[name]
    torch.library.opcheck(getattr(torch.ops.radix, name).default, arguments)

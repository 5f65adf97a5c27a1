"""The index ops against indexing written out, in any axis order, with gradients; what a compiler is told about them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from radix_compile.kernels import index_ops
from tests.kernels.plans import Plan, plan_of, shared, tree, values

radix = torch.ops.radix

BATCH, SEQ, HEADS, WIDTH = 3, 4, 2, 5
PLAN = plan_of(torch.tensor([[1, 2, 3, 3], [1, 3, 2, 1], [1, 2, 3, 4]]))
HOLES = tree(BATCH, SEQ, needed=torch.arange(12).view(BATCH, SEQ) % 4 != 3)
LISTS = PLAN.lists


def laid_out(order: tuple[int, ...], batch: int, seq: int) -> Tensor:
    """Random ``[batch, seq, heads, width]`` with its dimensions in that order, and strides that are not contiguous."""
    return values((batch, seq, HEADS, WIDTH), torch.float64).permute(order)


ORDERS = list(itertools.permutations(range(4)))


def test_the_plan_has_something_to_share() -> None:
    assert PLAN.nodes == 8
    assert PLAN.starts.diff().max() == 3
    assert (HOLES.scatter < 0).any()


@pytest.mark.parametrize("order", ORDERS)
def test_fold_rows(order: tuple[int, ...]) -> None:
    full = laid_out(order, BATCH, SEQ)
    batch_dim, seq_dim = order.index(0), order.index(1)
    compact = radix.fold_rows(full, PLAN.fold, PLAN.scatter, batch_dim, seq_dim)
    back = compact.permute([order.index(dim) for dim in range(4)])
    assert back.shape == (1, PLAN.nodes, HEADS, WIDTH)
    rows = full.permute([order.index(dim) for dim in range(4)]).reshape(BATCH * SEQ, HEADS, WIDTH)
    for node, row in enumerate(PLAN.fold.tolist()):
        torch.testing.assert_close(back[0, node], rows[row], rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_scatter_rows(order: tuple[int, ...]) -> None:
    compact = laid_out(order, 1, PLAN.nodes)
    batch_dim, seq_dim = order.index(0), order.index(1)
    full = radix.scatter_rows(compact, *LISTS, BATCH, SEQ, batch_dim, seq_dim, False)
    inverse = [order.index(dim) for dim in range(4)]
    rows, nodes = full.permute(inverse), compact.permute(inverse)
    assert rows.shape == (BATCH, SEQ, HEADS, WIDTH)
    for row, node in enumerate(PLAN.scatter.tolist()):
        torch.testing.assert_close(rows[row // SEQ, row % SEQ], nodes[0, node], rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_sum_rows(order: tuple[int, ...]) -> None:
    full = laid_out(order, BATCH, SEQ)
    batch_dim, seq_dim = order.index(0), order.index(1)
    inverse = [order.index(dim) for dim in range(4)]
    sums = radix.sum_rows(full, *LISTS, batch_dim, seq_dim).permute(inverse)
    rows = full.permute(inverse).reshape(BATCH * SEQ, HEADS, WIDTH)
    for node in range(PLAN.nodes):
        torch.testing.assert_close(sums[0, node], rows[PLAN.scatter == node].sum(0))


def test_place_rows_leaves_zero_where_no_node_is_represented() -> None:
    full = radix.place_rows(torch.ones(1, PLAN.nodes, 2), PLAN.fold, PLAN.scatter, BATCH, SEQ, 0, 1)
    represented = full.view(-1, 2).sum(1).nonzero().flatten()
    assert represented.tolist() == sorted(PLAN.fold.tolist())
    assert len(represented) < BATCH * SEQ


@pytest.mark.parametrize("op", ["scatter_rows", "place_rows"])
def test_rows_left_out_come_back_as_zeros(op: str) -> None:
    nodes = torch.ones(1, HOLES.nodes, 2)
    if op == "scatter_rows":
        full = radix.scatter_rows(nodes, HOLES.scatter, *[None] * 4, BATCH, SEQ, 0, 1, True)
        assert torch.equal(full.view(-1, 2)[:, 0] == 0, HOLES.scatter < 0)
    else:
        full = radix.place_rows(nodes, HOLES.fold, HOLES.scatter, BATCH, SEQ, 0, 1)
        assert not full.view(-1, 2)[HOLES.scatter < 0].any()


def test_gather_columns() -> None:
    table = torch.arange(SEQ * 2.0).view(1, SEQ, 2)
    looked_up = radix.gather_columns(table, PLAN.fold, PLAN.scatter, BATCH, SEQ, 1)
    assert looked_up[0, :, 0].tolist() == [2 * (row % SEQ) for row in PLAN.fold.tolist()]


def calls(plan: Plan, holes: bool) -> dict[str, tuple[Any, ...]]:
    """For each op, arguments that are differentiable in the first."""
    size = plan.batch, plan.seq
    full = values((*size, 2), torch.float64).requires_grad_()
    compact = values((1, plan.nodes, 2), torch.float64).requires_grad_()
    heads = values((1, 2, plan.nodes), torch.float64).requires_grad_()
    table = values((1, plan.seq, 2), torch.float64).requires_grad_()
    lists = plan.lists
    return {
        "fold_rows": (full, plan.fold, plan.scatter, 0, 1),
        "place_rows": (compact, plan.fold, plan.scatter, *size, 0, 1),
        "scatter_rows": (compact, *lists, *size, 0, 1, holes),
        "sum_rows": (full, *lists, 0, 1),
        "foreach_scatter_rows": ([compact, heads], *lists, *size, [0, 0], [1, 2], holes),
        "foreach_sum_rows": ([full, full.detach().clone().transpose(1, 2).requires_grad_()], *lists, [0, 0], [1, 2]),
        "gather_columns": (table, plan.fold, plan.scatter, *size, 1),
    }


NAMES = list(calls(PLAN, False))
plans = pytest.mark.parametrize(("plan", "holes"), [(PLAN, False), (HOLES, True)], ids=["whole", "holes"])


@plans
@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_their_gradients(name: str, plan: Plan, holes: bool) -> None:
    moved, *rest = calls(plan, holes)[name]
    inputs = tuple(moved) if isinstance(moved, list) else (moved,)

    def apply(*tensors: Tensor) -> Any:
        result = getattr(radix, name)(list(tensors) if isinstance(moved, list) else tensors[0], *rest)
        return tuple(result) if isinstance(result, list) else result

    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


@plans
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, plan: Plan, holes: bool) -> None:
    torch.library.opcheck(getattr(radix, name).default, calls(plan, holes)[name])


def test_padding_of_the_nodes_takes_no_part_in_gradients() -> None:
    """It repeats a row whose gradient belongs to its node alone: nothing reads the padding."""
    plan = plan_of(torch.zeros(2, 3, dtype=torch.long), pad=8)
    assert plan.fold.tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
    full = torch.ones(2, 3, 1, requires_grad=True)
    folded = radix.fold_rows(full, plan.fold, plan.scatter, 0, 1)
    folded[:, :3].sum().backward()
    assert full.grad is not None
    assert full.grad.flatten().tolist() == [1, 1, 1, 0, 0, 0]
    sums = radix.sum_rows(full, *plan.lists, 0, 1)
    assert sums.flatten().tolist() == [2, 2, 2, 0, 0, 0, 0, 0]


def test_half_width_sums_are_accumulated_in_float32() -> None:
    plan = shared(4096, 1, 1)
    ones = torch.ones(4096, 1, 3, dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    lists = plan.lists
    assert radix.sum_rows(ones, *lists, 0, 1).tolist() == [[[4096.0] * 3]]


def test_complex_rows() -> None:
    """Rotary embeddings may be written with complex numbers."""
    plan, full = PLAN, torch.complex(values((BATCH, SEQ, 3), torch.float64), values((BATCH, SEQ, 3), torch.float64) + 1)
    compact = radix.fold_rows(full, plan.fold, plan.scatter, 0, 1)
    sums = radix.sum_rows(full, *plan.lists, 0, 1)
    expected = torch.zeros_like(compact[0]).index_add_(0, plan.scatter, full.flatten(0, 1))
    torch.testing.assert_close(sums[0], expected)
    assert sums.stride() == compact.stride()


def test_integers_move_along_without_a_gradient() -> None:
    floats, numbers = values((1, PLAN.nodes, 3), torch.float64).requires_grad_(), values((1, PLAN.nodes), torch.int64)
    moved = [numbers, floats, numbers > 0]
    full = radix.foreach_scatter_rows(moved, *LISTS, BATCH, SEQ, [0] * 3, [1] * 3, False)
    (gradient,) = torch.autograd.grad(full[1].sum(), floats)
    assert gradient[0, :, 0].tolist() == PLAN.starts.diff().tolist()


@pytest.mark.parametrize("name", ["scatter_rows", "foreach_scatter_rows"])
def test_gradient_without_row_lists(name: str) -> None:
    moved, scatter, _, _, _, _, *rest = calls(PLAN, False)[name]
    result = getattr(radix, name)(moved, scatter, *[None] * 4, *rest)
    with pytest.raises(RuntimeError, match="pass `fold`, `rows`, `starts` and `pieces`"):
        (result[0] if isinstance(result, list) else result).sum().backward()


def test_no_rows() -> None:
    assert radix.fold_rows(torch.ones(2, 3, 4), PLAN.fold[:0], PLAN.scatter, 0, 1).shape == (1, 0, 4)


def test_the_sums_are_never_given_to_a_compiler_as_indexing() -> None:
    for device in ("cpu", "cuda"):
        names = {op.name() for op in index_ops.decompositions(torch.device(device))}
        assert ("radix::gather_columns" in names) is (device == "cpu")
        assert not any("sum_rows" in name for name in names)

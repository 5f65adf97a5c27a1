"""The Triton kernels against the torch reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from radix_compile.kernels import reference
from tests.kernels.plans import Plan, shared, tolerance, tree, values
from tests.models import DEVICE

triton_rows = pytest.importorskip("radix_compile.kernels.triton_rows", reason="needs Triton")
triton_sums = pytest.importorskip("radix_compile.kernels.triton_sums", reason="needs Triton")

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.int32, torch.int8, torch.bool]
PLANS = {
    "one row": shared(1, 1, 0, device=DEVICE),
    "nothing shared": shared(3, 5, 0, device=DEVICE),
    "all equal": shared(4, 6, 6, device=DEVICE),
    "a prefix": shared(5, 7, 4, device=DEVICE),
    "a tree": tree(9, 11, device=DEVICE),
    "holes": tree(6, 9, needed=torch.arange(54).view(6, 9) % 9 <= 6, device=DEVICE),
    "padded fold": tree(4, 5, pad=16, device=DEVICE),
    "long lists": shared(150, 3, 2, device=DEVICE),
    "long and short lists": tree(200, 6, device=DEVICE),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def widths() -> list[int]:
    """Ragged around the sizes of blocks, and wide enough for several of them."""
    widest = triton_rows.TILE // 4
    return [1, 3, 17, 64, widest, widest * 2 + 5]


def full(plan: Plan, *features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return values((plan.batch, plan.seq, *features), dtype, DEVICE)


def compact(plan: Plan, *features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return values((1, plan.nodes, *features), dtype, DEVICE)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    assert ours.stride() == expected.stride()
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS])
@plans
def test_gathers(plan: Plan, dtype: torch.dtype) -> None:
    for width in (1, 24):
        rows, nodes = full(plan, width, dtype=dtype), compact(plan, width, dtype=dtype)
        indices = plan.fold, plan.scatter
        size = plan.batch, plan.seq
        assert_same(triton_rows.fold_rows(rows, *indices, 0, 1), reference.fold_rows(rows, *indices, 0, 1))
        ours = triton_rows.place_rows(nodes, *indices, *size, 0, 1)
        assert_same(ours, reference.place_rows(nodes, *indices, *size, 0, 1))
        (ours,) = triton_rows.foreach_scatter_rows([nodes], plan.scatter, *[None] * 4, *size, [0], [1], True)
        assert_same(ours, reference.scatter_rows(nodes, plan.scatter, *[None] * 4, *size, 0, 1, True))


@pytest.mark.parametrize("dim", [0, 1, 2])
@plans
def test_tables_by_column(plan: Plan, dim: int) -> None:
    table = values((3, 4, plan.seq), torch.float32, DEVICE).movedim(2, dim)
    arguments = table, plan.fold, plan.scatter, plan.batch, plan.seq, dim
    assert_same(triton_rows.gather_columns(*arguments), reference.gather_columns(*arguments))


def test_lists_come_in_pieces_and_whole() -> None:
    assert PLANS["long lists"].pieces.tolist() == [0, 64, 128, 150, 214, 278]
    assert 0 < len(PLANS["long and short lists"].pieces) < len(PLANS["long and short lists"].fold)
    assert not len(PLANS["a tree"].pieces)


@pytest.mark.parametrize("dtype", FLOATS)
@plans
def test_sums(plan: Plan, dtype: torch.dtype) -> None:
    lists = plan.lists
    for width in (1, 24):
        rows = full(plan, width, dtype=dtype)
        (ours,) = triton_sums.foreach_sum_rows([rows], *lists, [0], [1])
        exact = reference.sum_rows(rows.double(), *lists, 0, 1)
        torch.testing.assert_close(ours, exact.to(dtype), **tolerance(plan.batch, dtype))
        assert ours.stride() == exact.stride()


@pytest.mark.parametrize("name", ["long lists", "long and short lists", "a tree"])
def test_sums_do_not_depend_on_how_many_pieces_come_again(name: str) -> None:
    plan = PLANS[name]
    again = torch.nn.functional.pad(plan.pieces, (0, 3), value=plan.pieces[-1]) if len(plan.pieces) else plan.pieces
    rows = full(plan, 24)
    ours, expected = (
        triton_sums.foreach_sum_rows([rows], *plan.lists[:-1], pieces, [0], [1])[0] for pieces in (again, plan.pieces)
    )
    assert_same(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths(dtype: torch.dtype) -> None:
    plan = tree(5, 4, device=DEVICE)
    for width in widths():
        rows, nodes = full(plan, width, dtype=dtype), compact(plan, width, dtype=dtype)
        lists = plan.lists
        (ours,) = triton_rows.foreach_scatter_rows([nodes], *lists, 5, 4, [0], [1], False)
        assert_same(ours, reference.scatter_rows(nodes, *lists, 5, 4, 0, 1, False))
        (ours,) = triton_sums.foreach_sum_rows([rows], *lists, [0], [1])
        exact = reference.sum_rows(rows.double(), *lists, 0, 1)
        torch.testing.assert_close(ours, exact.to(dtype), **tolerance(5, dtype))


STRIDED = {
    "heads first": lambda batch, seq: (values((batch, 3, seq, 8), torch.float32, DEVICE), 0, 2),
    "heads first, rows contiguous": lambda b, s: (values((b, s, 3, 8), torch.float32, DEVICE).transpose(1, 2), 0, 2),
    "sequence first": lambda batch, seq: (values((seq, batch, 8), torch.float32, DEVICE), 1, 0),
    "features first": lambda batch, seq: (values((8, batch, seq), torch.float32, DEVICE), 1, 2),
    "every second feature": lambda batch, seq: (values((batch, seq, 16), torch.float32, DEVICE)[..., ::2], 0, 1),
    "a slice": lambda batch, seq: (values((batch, seq + 3, 16), torch.float32, DEVICE)[:, 1 : seq + 1, 4:9], 0, 1),
    "expanded": lambda batch, seq: (values((batch, seq, 1, 8), torch.float32, DEVICE).expand(-1, -1, 4, -1), 0, 1),
    "three feature strides": lambda b, s: (values((b, 2, s, 3, 4), torch.float32, DEVICE).transpose(3, 4), 0, 2),
    "no feature": lambda batch, seq: (values((batch, seq), torch.float32, DEVICE), 0, 1),
}


@pytest.mark.parametrize("case", STRIDED)
def test_strides(case: str) -> None:
    plan = tree(5, 7, device=DEVICE)
    rows, *axes = STRIDED[case](5, 7)
    nodes, *_ = STRIDED[case](1, plan.nodes)
    indices, lists = (plan.fold, plan.scatter), plan.lists
    assert_same(triton_rows.fold_rows(rows, *indices, *axes), reference.fold_rows(rows, *indices, *axes))
    assert_same(
        triton_rows.place_rows(nodes, *indices, 5, 7, *axes), reference.place_rows(nodes, *indices, 5, 7, *axes)
    )
    each = [[axis] for axis in axes]
    (ours,) = triton_rows.foreach_scatter_rows([nodes], *lists, 5, 7, *each, False)
    assert_same(ours, reference.scatter_rows(nodes, *lists, 5, 7, *axes, False))
    (ours,) = triton_sums.foreach_sum_rows([rows], *lists, *each)
    expected = reference.sum_rows(rows, *lists, *axes)
    torch.testing.assert_close(ours, expected, **tolerance(5, torch.float32))
    assert ours.stride() == expected.stride()


def test_several_tensors_in_one_launch() -> None:
    plan = tree(6, 5, device=DEVICE)
    lists = plan.lists
    narrow, wide = full(plan, 3, dtype=torch.bfloat16), full(plan, 4, triton_rows.TILE // 4)
    rows, axes = [narrow, wide.transpose(1, 2), full(plan)], ([0, 0, 0], [1, 2, 1])
    sums = triton_sums.foreach_sum_rows(rows, *lists, *axes)
    for one, ours, *at in zip(rows, sums, *axes, strict=True):
        exact = reference.sum_rows(one.double(), *lists, *at)
        torch.testing.assert_close(ours, exact.to(one.dtype), **tolerance(6, one.dtype))
    back = triton_rows.foreach_scatter_rows(sums, *lists, 6, 5, *axes, False)
    for one, ours, *at in zip(sums, back, *axes, strict=True):
        assert_same(ours, reference.scatter_rows(one, *lists, 6, 5, *at, False))


def test_nothing_to_move() -> None:
    plan = tree(4, 5, device=DEVICE)
    lists = plan.lists
    for features in [(0,), (3, 0)]:
        assert triton_rows.fold_rows(full(plan, *features), plan.fold, plan.scatter, 0, 1).numel() == 0
        assert triton_sums.foreach_sum_rows([full(plan, *features)], *lists, [0], [1])[0].numel() == 0
    assert triton_rows.fold_rows(full(plan, 2), plan.fold[:0], plan.scatter, 0, 1).shape == (1, 0, 2)


def test_every_entry_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an output holds before the launch must not matter: it starts as NaN."""
    empty = triton_rows.Moved.empty

    def poisoned(*args: Any) -> list[Tensor]:
        return [one.fill_(float("nan")) for one in empty(*args)]

    monkeypatch.setattr(triton_rows.Moved, "empty", poisoned)
    for plan in PLANS.values():
        lists = plan.lists
        outputs = [
            triton_rows.fold_rows(full(plan, 5), plan.fold, plan.scatter, 0, 1),
            triton_rows.place_rows(compact(plan, 5), plan.fold, plan.scatter, plan.batch, plan.seq, 0, 1),
            *triton_rows.foreach_scatter_rows([compact(plan, 5)], *lists, plan.batch, plan.seq, [0], [1], True),
            *triton_sums.foreach_sum_rows([full(plan, 5)], *lists, [0], [1]),
        ]
        assert not any(output.isnan().any() for output in outputs)


def test_sums_have_the_same_bits_each_time() -> None:
    plan = tree(150, 4, device=DEVICE)
    rows = full(plan, 40)
    sums = [triton_sums.foreach_sum_rows([rows], *plan.lists, [0], [1])[0] for _ in range(3)]
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", ["rows contiguous", "heads first", "features first"])
def test_offsets_beyond_32_bits(layout: str) -> None:
    """More than 2**31 entries in the full tensor, of which the last are looked at as well."""
    batch = seq = 128
    plan = shared(batch, seq, 4, device=DEVICE)
    heads, width = 4, 2**31 // (batch * seq * 4) + 64
    nodes = torch.randn(1, plan.nodes, heads, width, dtype=torch.bfloat16, device=DEVICE)
    lists = plan.lists
    (rows,) = triton_rows.foreach_scatter_rows([nodes], *lists, batch, seq, [0], [1], False)
    assert rows.numel() > 2**31
    torch.testing.assert_close(rows[-1, -1], nodes[0, plan.scatter[-1]], rtol=0, atol=0)
    axes = [0, 1]
    if layout == "heads first":
        rows, nodes, axes = rows.transpose(1, 2).contiguous(), nodes.transpose(1, 2), [0, 2]
    elif layout == "features first":
        order = (2, 3, 0, 1)
        rows, nodes, axes = rows.permute(order).contiguous(), nodes.permute(order), [2, 3]
    back = triton_rows.fold_rows(rows, plan.fold, plan.scatter, *axes)
    assert torch.equal(back, nodes)
    (sums,) = triton_sums.foreach_sum_rows([rows], *lists, *[[axis] for axis in axes])
    expected = nodes.clone()
    expected.narrow(axes[1], 0, 4).mul_(batch)
    assert torch.equal(sums, expected)

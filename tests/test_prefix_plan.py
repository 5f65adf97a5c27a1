"""Prefix plans against brute force, and the published function against the radix-mlp package."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from radix_mlp import compute_fold_and_scatter as reference
from radix_mlp.torch import compute_fold_and_scatter_torch as reference_torch

from radix_compile import prefix_plan
from radix_compile.prefix_plan import PrefixPlan, compute_fold_and_scatter, compute_fold_and_scatter_torch

settings.register_profile("prefix_plan", deadline=None, max_examples=150)
settings.load_profile("prefix_plan")


def u32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint32)


# ---------------------------------------------------------------------------------------------- from_rows


def brute_force(keys: list[np.ndarray], unique: np.ndarray, skip: np.ndarray, plan: PrefixPlan) -> np.ndarray:
    """The scatter index by its definition: walk the sequences in the plan's order with a dict of paths."""
    batch, length = keys[0].shape
    scatter = np.full((batch, length), -1)
    nodes: dict[tuple, int] = {}
    count = 0
    for b in plan.order:
        path: tuple = ()
        for s in range(length):
            path += (tuple(int(k[b, s]) for k in keys),)
            if skip[b, s]:
                continue
            if path not in nodes or unique[b, s]:
                nodes[path] = count
                count += 1
            scatter[b, s] = nodes[path]
    return scatter.ravel()


def check_plan(plan: PrefixPlan, keys: list[np.ndarray], unique: np.ndarray, skip: np.ndarray) -> None:
    batch, length = keys[0].shape
    expected = brute_force(keys, unique, skip, plan)
    np.testing.assert_array_equal(plan.scatter, expected)
    nodes = int(expected.max(initial=-1)) + 1
    assert plan.compact_tokens == nodes
    assert plan.tokens == batch * length - int(skip.sum())
    assert plan.compression == (nodes / plan.tokens if plan.tokens else 1.0)
    # `fold` picks one row of each node, nodes in order.
    np.testing.assert_array_equal(plan.scatter[plan.fold[:nodes]], np.arange(nodes))
    assert all(a.dtype == np.int64 and a.flags.c_contiguous for a in (plan.fold, plan.scatter, plan.order, plan.shared))
    # `order` is a permutation, and sorted: equal prefixes are adjacent, `shared` is the true common prefix.
    assert sorted(plan.order.tolist()) == list(range(batch))
    paths = [[tuple(int(k[b, s]) for k in keys) for s in range(length)] for b in plan.order]
    common = [0] + [next((j for j in range(length) if p[j] != q[j]), length) for p, q in pairwise(paths)]
    assert plan.shared.tolist() == common[:batch]
    for s in range(1, length + 1):
        prefixes = [tuple(p[:s]) for p in paths]
        changes = sum(p != q for p, q in pairwise(prefixes))
        assert changes == max(len(set(prefixes)) - 1, 0), "equal prefixes are not adjacent"


DTYPES = (np.int64, np.int32, np.bool_, np.uint8, np.int16, np.uint64)


@st.composite
def row_keys(draw: Any) -> list[np.ndarray]:
    batch, length = draw(st.integers(0, 7)), draw(st.integers(0, 9))
    columns = []
    for _ in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(DTYPES))
        kind = draw(st.sampled_from(("random", "positions", "few")))
        rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        if kind == "positions":
            column = np.broadcast_to(np.arange(length), (batch, length)).astype(dtype)
        else:
            # 256 and 2**40 differ from 0 in one byte that is not the lowest, -1 in all of them.
            column = rng.choice(np.array([0, 1, 256, -1, 2**40] if kind == "random" else [0, 1]), (batch, length))
            column = column.astype(dtype)
        layout = draw(st.sampled_from(("plain", "transposed", "strided", "tensor")))
        if layout == "transposed":
            column = np.asfortranarray(column)
        elif layout == "strided":
            wide = np.full((batch, 2 * length), 1).astype(dtype)
            wide[:, ::2] = column
            column = wide[:, ::2]
        columns.append((column, layout))
    return columns


def path_mask(keys: list[np.ndarray], salt: int, share: int) -> np.ndarray:
    """A pseudo-random bool mask that is a function of the path."""
    batch, length = keys[0].shape
    mask = np.zeros((batch, length), bool)
    for b in range(batch):
        path = salt
        for s in range(length):
            path = hash((path, *(int(k[b, s]) for k in keys)))
            mask[b, s] = path % 8 < share
    return mask


@given(row_keys(), st.integers(0, 5), st.sampled_from((None, 0, 2, 8)), st.sampled_from((None, 0, 2, 8)))
def test_from_rows_is_the_prefix_tree(
    columns: list, salt: int, unique_share: int | None, skip_share: int | None
) -> None:
    keys = [column for column, _ in columns]
    arguments = [torch.from_numpy(c) if layout == "tensor" else c for c, layout in columns]
    none = np.zeros(keys[0].shape, bool)
    unique = None if unique_share is None else path_mask(keys, salt, unique_share)
    skip = None if skip_share is None else path_mask(keys, salt + 100, skip_share)
    plan = PrefixPlan.from_rows(*arguments, unique=unique, skip=skip)
    check_plan(plan, keys, none if unique is None else unique, none if skip is None else skip)


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 18])
def test_from_rows_in_blocks(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_plan, "BLOCK_BYTES", block_bytes)
    keys = [np.random.default_rng(0).integers(0, 2, (23, 6)), np.random.default_rng(1).integers(0, 2, (23, 6))]
    none = np.zeros((23, 6), bool)
    check_plan(PrefixPlan.from_rows(*keys), keys, none, none)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 0), (1, 1), (1, 7), (3, 1)])
def test_from_rows_corner_shapes(shape: tuple[int, int]) -> None:
    keys = [np.zeros(shape, np.int64), np.ones(shape, np.bool_)]
    none = np.zeros(shape, bool)
    plan = PrefixPlan.from_rows(*keys, unique=none, skip=none, pad_multiple_of=4)
    assert plan.order.shape == plan.shared.shape == (shape[0],)
    assert len(plan.fold) == (-(-shape[1] // 4) * 4 if shape[0] else 0)
    check_plan(plan, keys, none, none)


def test_from_rows_numbers_depth_first() -> None:
    plan = PrefixPlan.from_rows(np.array([[7, 2, 1], [5, 5, 5], [7, 2, 3], [5, 5, 5]], np.uint8))
    assert plan.order.tolist() == [1, 3, 0, 2]
    assert plan.shared.tolist() == [0, 3, 0, 2]
    assert plan.scatter.reshape(4, 3).tolist() == [[3, 4, 5], [0, 1, 2], [3, 4, 6], [0, 1, 2]]
    assert plan.fold.tolist() == [3, 4, 5, 0, 1, 2, 8]
    assert (plan.tokens, plan.compact_tokens, plan.compression) == (12, 7, 7 / 12)


def test_from_rows_unique_and_skip_by_hand() -> None:
    keys = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 4]])
    unique, skip = np.array([[False, True, False]] * 3), np.array([[True, False, False]] * 3)
    assert PrefixPlan.from_rows(keys, unique=unique).scatter.tolist() == [0, 1, 2, 0, 3, 2, 0, 4, 5]
    assert PrefixPlan.from_rows(keys, skip=skip).scatter.tolist() == [-1, 0, 1, -1, 0, 1, -1, 0, 2]
    both = PrefixPlan.from_rows(keys, unique=unique, skip=unique)
    assert both.scatter.tolist() == [0, -1, 1, 0, -1, 1, 0, -1, 2]
    assert both.tokens == 6
    nothing = PrefixPlan.from_rows(keys, skip=np.ones((3, 3), bool), pad_multiple_of=8)
    assert (nothing.fold.size, nothing.tokens, nothing.compression) == (0, 0, 1.0)


def test_from_rows_padding_repeats_the_first_row() -> None:
    keys = np.array([[9, 1], [5, 1], [5, 2]])
    bare, padded = PrefixPlan.from_rows(keys), PrefixPlan.from_rows(keys, pad_multiple_of=np.int64(4))
    assert padded.fold.tolist() == [*bare.fold.tolist(), *[bare.fold[0]] * 3]
    assert bare.fold[0] != 0
    assert padded.compact_tokens == bare.compact_tokens == 5
    assert PrefixPlan.from_rows(keys, pad_multiple_of=5).fold.tolist() == bare.fold.tolist()


def test_from_rows_does_not_write_to_its_arguments() -> None:
    keys, mask = np.random.default_rng(0).integers(0, 2, (6, 8)), np.zeros((6, 8), bool)
    keys.flags.writeable = mask.flags.writeable = False
    first = PrefixPlan.from_rows(keys, unique=mask, skip=mask)
    second = PrefixPlan.from_rows(keys, unique=mask, skip=mask)
    for name in ("fold", "scatter", "order", "shared"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_uint64_keys_above_int64_stay_apart() -> None:
    big = np.array([[2**63, 1], [2**63 + 1, 1], [2**63, 1]], np.uint64)
    other = np.array([[0, 1], [0, 1], [0, 2]], np.int32)
    assert PrefixPlan.from_rows(big, other).compact_tokens == 5
    assert PrefixPlan.from_rows(big).compact_tokens == 4


def test_keys_that_differ_above_32_bits_stay_apart() -> None:
    wide = np.array([[0, 1], [2**40, 1], [0, 2]])
    assert PrefixPlan.from_rows(wide, np.array([[0, 1], [0, 2], [0, 1]], np.int32)).compact_tokens == 5


def test_equal_sequences_keep_their_order() -> None:
    keys = np.arange(200)[:, None] % 2 + np.zeros((200, 3), np.int64)
    assert PrefixPlan.from_rows(keys).order.tolist() == [*range(0, 200, 2), *range(1, 200, 2)]


KEY, MASK = np.zeros((2, 3), np.int64), np.zeros((2, 3), bool)


@pytest.mark.parametrize(
    ("error", "match", "keys", "options"),
    [
        (ValueError, "keys", (), {}),
        (ValueError, r"keys\[0\]", (np.zeros(3, np.int64),), {}),
        (ValueError, r"keys\[0\]", (np.zeros((2, 3, 1), np.int64),), {}),
        (ValueError, r"keys\[1\]", (KEY, np.zeros((2, 4), np.int64)), {}),
        (ValueError, r"keys\[1\]", (KEY, np.zeros(3, np.int64)), {}),
        (ValueError, "unique", (KEY,), {"unique": np.zeros((3, 3), bool)}),
        (ValueError, "skip", (KEY,), {"skip": np.zeros((1, 3), bool)}),
        (ValueError, "pad_multiple_of", (KEY,), {"pad_multiple_of": 0}),
        (TypeError, r"keys\[0\]", (np.zeros((2, 3)),), {}),
        (TypeError, r"keys\[0\]", ([[1, 2]],), {}),
        (TypeError, r"keys\[0\]", (np.zeros((2, 3), object),), {}),
        (TypeError, r"keys\[1\]", (KEY, torch.zeros(2, 3)), {}),
        (TypeError, r"keys\[1\]", (KEY, torch.zeros(2, 3, dtype=torch.bfloat16)), {}),
        (TypeError, r"keys\[1\]", (KEY, torch.zeros(2, 3, dtype=torch.complex64)), {}),
        (TypeError, "unique", (KEY,), {"unique": np.zeros((2, 3), np.int64)}),
        (TypeError, "skip", (KEY,), {"skip": True}),
        (TypeError, "pad_multiple_of", (KEY,), {"pad_multiple_of": 2.0}),
    ],
)
def test_from_rows_errors_name_the_argument(error: type, match: str, keys: tuple, options: dict) -> None:
    with pytest.raises(error, match=match):
        PrefixPlan.from_rows(*keys, **options)


# ------------------------------------------------------------------------------------ the published function


@st.composite
def packed_batches(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences grown from prefixes of earlier ones: copies, proper prefixes, branches, empty ones."""
    equal = draw(st.one_of(st.none(), st.integers(0, 12)))
    alphabet = draw(st.sampled_from(([0, 1], [0, 1, 256, 2**31, 2**32 - 1], list(range(50)))))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    sequences: list[list[tuple[int, int]]] = []
    shift_positions = draw(st.booleans())
    for _ in range(draw(st.integers(0, 12))):
        length = int(rng.integers(0, 30)) if equal is None else equal
        stem = sequences[rng.integers(len(sequences))] if sequences and rng.random() < 0.8 else []
        row = stem[: rng.integers(0, length + 1)]
        base = int(rng.integers(0, 2)) if shift_positions else 0
        row = row + [(int(rng.choice(alphabet)), base + s) for s in range(len(row), length)]
        sequences.append(row)
    rows = [row for sequence in sequences for row in sequence]
    bounds = np.cumsum([0, *map(len, sequences)])
    return u32(*(i for i, _ in rows)), u32(*(p for _, p in rows)), bounds.astype(np.uint32)


def assert_same(ours: tuple, theirs: tuple) -> None:
    assert isinstance(ours, tuple)
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


paddings = st.one_of(st.none(), st.integers(1, 20))
# The batches are small: with the limit at 0 they all go the way of large batches.
limits = st.sampled_from((0, prefix_plan.TOKEN_LOOP_LIMIT, 10**6))


@given(packed_batches(), paddings, limits, st.sampled_from((None, True, False)))
@example((u32(1, 2, 3, 1, 2, 1, 2, 3, 4), u32(0, 1, 2, 0, 1, 0, 1, 2, 3), u32(0, 3, 5, 5, 9)), None, 0, None)
@example((u32(5, 0, 5, 5, 0, 0), u32(0, 0, 0, 0, 0, 0), u32(0, 2, 3, 6)), None, 0, None)  # ids equal to padding
@example((u32(1, 1), u32(0, 1), u32(0, 1, 2)), None, 0, None)  # one id at two positions
@example((u32(), u32(), u32()), 8, 0, None)
@example((u32(), u32(), u32(0)), 8, 0, None)
@example((u32(), u32(), u32(0, 0, 0)), 8, 0, None)
def test_published_function_is_the_packages(
    batch: tuple, multiple: int | None, limit: int, checks: bool | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_plan, "TOKEN_LOOP_LIMIT", limit)
        ours = compute_fold_and_scatter(*batch, multiple, checks)
    assert_same(ours, reference(*batch, multiple))
    assert all(array.flags.writeable for array in ours)
    assert not np.shares_memory(ours[2], ours[3])


@given(
    packed_batches(),
    paddings,
    limits,
    st.sampled_from((torch.int32, torch.int64)),
    st.sampled_from((torch.int32, torch.int64, torch.int16, torch.uint8)),
)
def test_torch_form_is_the_packages(
    batch: tuple, multiple: int | None, limit: int, id_dtype: torch.dtype, small_dtype: torch.dtype
) -> None:
    ids, positions, bounds = (torch.from_numpy(array.astype(np.int64)) for array in batch)
    if id_dtype == torch.int32:
        ids = (ids - ((ids >= 2**31) * 2**32)).to(torch.int32)
    arguments = (ids, positions.to(small_dtype), bounds.to(torch.int32 if len(ids) > 100 else small_dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_plan, "TOKEN_LOOP_LIMIT", limit)
        ours = compute_fold_and_scatter_torch(*arguments, multiple)
    for a, b in zip(ours, reference_torch(*arguments, multiple), strict=True):
        assert a.dtype == torch.int32
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("vary_positions", [True, False])
def test_large_batches(equal: bool, vary_positions: bool) -> None:
    """Past the token loop, with long prefixes, repeated sequences and more than one block of comparisons."""
    rng = np.random.default_rng(3)
    stems = rng.integers(0, 50_000, (5, 300))
    lengths = np.full(400, 300) if equal else rng.integers(0, 300, 400)
    parts = []
    for length in lengths:
        row = stems[rng.integers(5)][:length].copy()
        row[rng.integers(0, 400) :] = rng.integers(0, 3)
        parts.append(row)
    ids = np.concatenate(parts).astype(np.uint32)
    bounds = np.concatenate([[0], lengths.cumsum()]).astype(np.uint32)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.uint32)
    if vary_positions:
        positions += np.repeat(rng.integers(0, 2, 400), lengths).astype(np.uint32)
    ours = compute_fold_and_scatter(ids, positions, bounds)
    assert_same(ours, reference(ids, positions, bounds))
    assert_same(compute_fold_and_scatter(ids, positions, bounds), ours)
    assert 0 < len(ours[3]) < len(ids)


def test_ragged_batch_needs_memory_for_its_tokens_only() -> None:
    """One sequence of 200 000 tokens beside 10 000 of one: a padded matrix would have 2 * 10**9 entries."""
    ids = np.concatenate([np.arange(200_000), np.arange(10_000) % 7]).astype(np.uint32)
    positions = np.concatenate([np.arange(200_000), np.zeros(10_000)]).astype(np.uint32)
    bounds = np.concatenate([[0], 200_000 + np.arange(10_001)]).astype(np.uint32)
    tracemalloc.start()
    ours = compute_fold_and_scatter(ids, positions, bounds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_same(ours, reference(ids, positions, bounds))
    assert peak < 200 * len(ids)


def test_padding_appends_zeros_to_all_but_scatter() -> None:
    ids, positions, scatter, fold = compute_fold_and_scatter(u32(4, 5, 4), u32(3, 4, 3), u32(0, 2, 3), 4)
    assert ids.tolist() == [4, 5, 0, 0]
    assert positions.tolist() == [3, 4, 0, 0]
    assert scatter.tolist() == [0, 1, 0]
    assert fold.tolist() == [0, 1, 0, 0]


def test_inputs_may_be_read_only_and_strided() -> None:
    """The package refuses strided arrays; the values are the same here."""
    rng = np.random.default_rng(0)
    ids, positions = rng.integers(0, 2, 160).astype(np.uint32), np.tile(np.arange(8, dtype=np.uint32), 20)
    bounds = np.arange(0, 161, 8, dtype=np.uint32)
    wide = np.zeros((160, 2), np.uint32)
    wide[:, 0] = ids
    wide.flags.writeable = positions.flags.writeable = False
    assert_same(compute_fold_and_scatter(wide[:, 0], positions, bounds), reference(ids, positions, bounds))


GOOD = (u32(1, 2), u32(0, 1), u32(0, 2))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("bad", [np.array([0, 2]), np.array([0.0, 2.0]), [0, 2], None, torch.tensor([0, 2])])
def test_kind_errors_name_the_argument(index: int, bad: object) -> None:
    arguments: list[Any] = list(GOOD)
    arguments[index] = bad
    with pytest.raises(TypeError, match=("input_ids", "position_ids", "cu_seq_lengths")[index]):
        compute_fold_and_scatter(*arguments)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_shape_errors_name_the_argument(index: int) -> None:
    name = ("input_ids", "position_ids", "cu_seq_lengths")[index]
    arguments: list[Any] = list(GOOD)
    arguments[index] = GOOD[index][None]
    with pytest.raises(ValueError, match=f"^{name}"):
        compute_fold_and_scatter(*arguments)
    with pytest.raises(ValueError, match=f"^{name}"):
        compute_fold_and_scatter_torch(*(torch.from_numpy(a.astype(np.int64)) for a in arguments))


def test_length_mismatch() -> None:
    with pytest.raises(ValueError, match="position_ids"):
        compute_fold_and_scatter(u32(1, 2), u32(0, 1, 2), u32(0, 2))
    with pytest.raises(ValueError, match="position_ids"):
        compute_fold_and_scatter_torch(torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([0, 2]))


@pytest.mark.parametrize("tokens", [0, 3, 500])
def test_cu_seq_lengths_must_describe_the_batch(tokens: int) -> None:
    ids = np.zeros(tokens, np.uint32)
    bad = [u32(1, tokens), u32(0, tokens + 1), u32(0, tokens + 2, tokens), u32(tokens + 1)]
    if tokens:
        bad += [u32(), u32(0), u32(0, tokens - 1), u32(0, 2, 1, tokens)]
    for bounds in bad:
        with pytest.raises(ValueError, match="cu_seq_lengths"):
            compute_fold_and_scatter(ids, ids, bounds)
        with pytest.raises(ValueError, match="cu_seq_lengths"):
            compute_fold_and_scatter_torch(*(torch.from_numpy(a.astype(np.int64)) for a in (ids, ids, bounds)))


def test_bound_checks_can_be_left_out() -> None:
    bad = (u32(1, 2), u32(0, 1), u32(1, 2))
    for checks in (None, True):
        with pytest.raises(ValueError, match="cu_seq_lengths"):
            compute_fold_and_scatter(*bad, bound_checks=checks)
    compute_fold_and_scatter(*bad, bound_checks=False)  # what comes out is the caller's business


@pytest.mark.parametrize("function", [compute_fold_and_scatter, compute_fold_and_scatter_torch])
@pytest.mark.parametrize(("multiple", "error"), [(0, ValueError), (-4, ValueError), (1.5, TypeError), ("8", TypeError)])
def test_pad_multiple_of_errors(function: Any, multiple: Any, error: type) -> None:
    arguments: tuple = GOOD
    if function is compute_fold_and_scatter_torch:
        arguments = tuple(torch.from_numpy(a.astype(np.int64)) for a in GOOD)
    with pytest.raises(error, match="pad_multiple_of"):
        function(*arguments, multiple)


# ------------------------------------------------------------------------------------------- torch specifics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.complex64])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_torch_dtype_errors_name_the_argument(dtype: torch.dtype, index: int) -> None:
    arguments = [torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0, 2])]
    arguments[index] = arguments[index].to(dtype)
    with pytest.raises(TypeError, match=("input_ids", "position_ids", "cu_seq_lengths")[index]):
        compute_fold_and_scatter_torch(*arguments)


def test_torch_form_refuses_arrays_and_lists() -> None:
    good = torch.tensor([0, 2])
    with pytest.raises(TypeError, match="input_ids"):
        compute_fold_and_scatter_torch(u32(1, 2), good, good)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cu_seq_lengths"):
        compute_fold_and_scatter_torch(good, good, [0, 2])  # type: ignore[arg-type]


def test_torch_devices_must_agree() -> None:
    good = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="position_ids"):
        compute_fold_and_scatter_torch(good, good.to("meta"), good)
    with pytest.raises(ValueError, match="cu_seq_lengths"):
        compute_fold_and_scatter_torch(good, good, good.to("meta"))


@pytest.mark.parametrize("value", [2**32, -(2**31) - 1, 2**32 + 1, 2**40, -(2**63)])
@pytest.mark.parametrize("index", [0, 1])
def test_values_beyond_32_bits_are_refused(value: int, index: int) -> None:
    arguments = [torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([0, 1, 2])]
    arguments[index][1] = value
    with pytest.raises(ValueError, match=("input_ids", "position_ids")[index]):
        compute_fold_and_scatter_torch(*arguments)


def test_values_that_just_fit_are_bit_patterns() -> None:
    values = [2**32 - 1, -1, 2**31, -(2**31), 2**31 - 1, 0]  # two pairs of equal patterns
    tensors = (torch.tensor(values), torch.zeros(6, dtype=torch.int64), torch.arange(7))
    ids, _, scatter, fold = compute_fold_and_scatter_torch(*tensors)
    assert ids.tolist() == [-1, -(2**31), 2**31 - 1, 0]
    assert scatter.tolist() == [0, 0, 1, 1, 2, 3]
    assert fold.tolist() == [0, 2, 4, 5]
    for a, b in zip((ids, scatter, fold), np.array(reference_torch(*tensors), object)[[0, 2, 3]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.int8])
def test_other_integer_dtypes(dtype: torch.dtype) -> None:
    tensors = [torch.tensor(v).to(dtype) for v in ([1, 2, 1, 3], [0, 1, 0, 1], [0, 2, 4])]
    ids, positions, scatter, fold = compute_fold_and_scatter_torch(*tensors)
    assert (ids.tolist(), positions.tolist()) == ([1, 2, 3], [0, 1, 1])
    assert (scatter.tolist(), fold.tolist()) == ([0, 1, 0, 2], [0, 1, 3])
    assert ids.dtype == positions.dtype == scatter.dtype == fold.dtype == torch.int32


def test_strided_tensors_and_inputs_left_alone() -> None:
    wide = torch.zeros(100, 2, dtype=torch.int64)
    wide[:, 0] = torch.arange(100) % 3
    before = wide.clone()
    positions, bounds = torch.arange(100) % 10, torch.arange(0, 101, 10)
    outputs = compute_fold_and_scatter_torch(wide[:, 0], positions, bounds)
    for a, b in zip(outputs, reference_torch(wide[:, 0].contiguous(), positions, bounds), strict=True):
        assert torch.equal(a, b)
    outputs[0].fill_(77)
    assert torch.equal(wide, before)

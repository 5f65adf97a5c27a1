"""Prefix plans against brute force."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radix_compile.plan import fold_and_scatter, prefix_plan, prefix_sort
from radix_compile.plan.prefix_plan import PrefixPlan, with_earlier_rows

settings.register_profile("prefix_plan", deadline=None, max_examples=150)
settings.load_profile("prefix_plan")


Sequences = list[list[tuple[int, int]]]
"""The rows ``(b, s)`` of each sequence."""


def split(shape: tuple[int, ...], breaks: np.ndarray | None = None) -> Sequences:
    sequences: Sequences = []
    for b, s in np.ndindex(*shape):
        if s == 0 or (breaks is not None and breaks[b, s]):
            sequences.append([])
        sequences[-1].append((b, s))
    return sequences if shape[1] else [[] for _ in range(shape[0])]


def paths_of(sequence: list[tuple[int, int]], keys: list[np.ndarray]) -> list[tuple]:
    return [tuple(int(k[row]) for k in keys) for row in sequence]


def common_prefix(one: list[tuple], other: list[tuple]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def brute_force(
    keys: list[np.ndarray], unique: np.ndarray, needed: np.ndarray, plan: PrefixPlan, sequences: Sequences
) -> np.ndarray:
    """The scatter index by its definition: walk the sequences in the plan's order with a dict of paths."""
    scatter = np.full(keys[0].shape, -1)
    nodes: dict[tuple, int] = {}
    outside = []
    for number in plan.order:
        path: tuple = ()
        for row, key in zip(sequences[number], paths_of(sequences[number], keys), strict=True):
            path += (key,)
            if unique[row]:
                outside.append(row)
            else:
                scatter[row] = nodes.setdefault(path, len(nodes))
    for number, row in enumerate(outside):
        scatter[row] = len(nodes) + number
    kept = {node: number for number, node in enumerate(np.unique(scatter[needed]).tolist())}
    return np.array([kept.get(node, -1) for node in scatter.ravel().tolist()], np.int64)


def check_tree(plan: PrefixPlan, unique: np.ndarray, sequences: Sequences) -> None:
    """``tree`` against its definition: the nodes of the rows in front of each row, in its own sequence."""
    begin, end = plan.tree()
    assert begin.dtype == end.dtype == np.int64
    assert begin.shape == end.shape == plan.fold.shape
    scatter, node = plan.scatter.reshape(unique.shape), np.arange(len(plan.fold))
    seen = set()
    for sequence in sequences:
        path: list[int] = []
        for row in sequence:
            if scatter[row] >= 0 and not unique[row]:
                i = scatter[row]
                path.append(i)
                seen.add(i)
                assert np.flatnonzero((node <= i) & (i < end)).tolist() == path
                on_the_way = plan.scatter[begin[i] : plan.fold[i]]
                assert [j for j in on_the_way if 0 <= j < plan.tree_nodes] == path[:-1]
    assert seen == set(range(plan.tree_nodes))
    assert (begin[plan.tree_nodes :] == plan.fold[plan.tree_nodes :]).all()
    assert not end[plan.tree_nodes :].any()
    rows = plan.fold[: plan.tree_nodes]
    for i, number in enumerate(plan.order):
        new = np.flatnonzero((plan.bounds[number] <= rows) & (rows < plan.bounds[number + 1]))
        assert new.tolist() == list(range(plan.first_nodes[i], plan.first_nodes[i + 1]))
    assert plan.pairs == (rows - begin[: plan.tree_nodes] + 1).sum()


def check_plan(
    plan: PrefixPlan,
    keys: list[np.ndarray],
    unique: np.ndarray | None = None,
    needed: np.ndarray | None = None,
    breaks: np.ndarray | None = None,
) -> None:
    _, length = keys[0].shape
    unique = np.zeros(keys[0].shape, bool) if unique is None else unique
    needed = np.ones(keys[0].shape, bool) if needed is None else needed
    sequences = split(keys[0].shape, breaks)
    expected = brute_force(keys, unique, needed, plan, sequences)
    np.testing.assert_array_equal(plan.scatter, expected)
    nodes = int(expected.max(initial=-1)) + 1
    check_tree(plan, unique, sequences)
    assert plan.compact_tokens == nodes
    assert plan.tokens == (expected >= 0).sum() >= needed.sum()
    assert plan.compression == (nodes / plan.tokens if plan.tokens else 1.0)
    # `fold` picks one row of each node, nodes in order.
    np.testing.assert_array_equal(plan.scatter[plan.fold[:nodes]], np.arange(nodes))
    arrays = (plan.fold, plan.scatter, plan.order, plan.shared, plan.bounds, plan.begin)
    assert all(a.dtype == np.int64 and a.flags.c_contiguous for a in arrays)
    assert plan.bounds.tolist() == [0, *np.cumsum([len(sequence) for sequence in sequences])]
    # `order` is a permutation, and sorted: equal prefixes are adjacent, `shared` is the true common prefix.
    assert sorted(plan.order.tolist()) == list(range(len(sequences)))
    paths = [paths_of(sequences[number], keys) for number in plan.order]
    common = [0] + [common_prefix(*pair) for pair in pairwise(paths)]
    assert plan.shared.tolist() == common[: len(sequences)]
    for s in range(1, length + 1):
        prefixes = [tuple(p[:s]) for p in paths if len(p) >= s]
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


def path_mask(keys: list[np.ndarray], salt: int, share: int, breaks: np.ndarray | None = None) -> np.ndarray:
    """A pseudo-random bool mask that is a function of the path."""
    mask = np.zeros(keys[0].shape, bool)
    for sequence in split(keys[0].shape, breaks):
        path = salt
        for row, key in zip(sequence, paths_of(sequence, keys), strict=True):
            path = hash((path, key))
            mask[row] = path % 8 < share
    return mask


def random_mask(keys: list[np.ndarray], seed: int, eighths: int | None) -> np.ndarray | None:
    """A mask that says something else about rows of equal paths, true for that many eighths of them."""
    if eighths is None:
        return None
    return np.random.default_rng(seed).integers(0, 8, keys[0].shape) < eighths


@given(row_keys(), st.integers(0, 5), st.sampled_from((None, 0, 2, 8)), st.sampled_from((None, 0, 2, 8)))
def test_from_rows_is_the_prefix_tree(
    columns: list, salt: int, unique_share: int | None, needed_share: int | None
) -> None:
    keys = [column for column, _ in columns]
    arguments = [torch.from_numpy(c) if layout == "tensor" else c for c, layout in columns]
    unique = None if unique_share is None else path_mask(keys, salt, unique_share)
    needed = random_mask(keys, salt, needed_share)
    plan = PrefixPlan.from_rows(*arguments, unique=unique, needed=needed)
    check_plan(plan, keys, unique, needed)


@given(row_keys(), st.integers(0, 2**16))
def test_paths_may_start_at_different_columns(columns: list, seed: int) -> None:
    keys = [column for column, _ in columns]
    batch, length = keys[0].shape
    start = np.random.default_rng(seed).integers(0, max(length, 1), batch)
    plan = PrefixPlan.from_rows(*keys, start=torch.from_numpy(start) if seed % 2 else start)
    path: dict[tuple[int, int], Any] = {}
    for b, first in enumerate(start.tolist()):
        for s in range(length):
            own = tuple(tuple(int(k[b, i]) for k in keys) for i in range(first, s + 1))
            path[b, s] = own if s >= first else (b, s)
    nodes = dict(zip(path, plan.scatter.tolist(), strict=True))
    assert len(set(path.values())) == plan.compact_tokens == len(plan.fold)
    assert {(one, nodes[at]) for at, one in path.items()} == set(zip(path.values(), nodes.values(), strict=True))
    assert len({(one, nodes[at]) for at, one in path.items()}) == plan.compact_tokens
    assert plan.scatter[plan.fold].tolist() == list(range(plan.compact_tokens))
    in_front = np.arange(length) < start[:, None]
    check_tree(plan, in_front, [[(b, s) for s in range(first, length)] for b, first in enumerate(start.tolist())])
    rows, starts, _ = plan.row_lists()
    for node in range(len(plan.fold)):
        listed = rows[starts[node] : starts[node + 1]].tolist()
        assert sorted(listed) == np.flatnonzero(plan.scatter == node).tolist()
        assert listed[0] == plan.fold[node]


def test_what_is_in_front_of_one_sequence_is_not_the_end_of_another() -> None:
    plan = PrefixPlan.from_rows(np.array([[0, 0, 5], [5, 0, 0]]), start=np.array([2, 0]))
    first, second = plan.scatter.reshape(2, 3).tolist()
    assert first[2] == second[0]
    assert len({*first, *second}) == 5


@given(row_keys(), st.integers(0, 5), st.sampled_from((None, 2)), st.sampled_from((None, 2)), st.floats(0, 1))
def test_sequences_packed_in_rows_have_paths_of_their_own(
    columns: list, salt: int, unique_share: int | None, needed_share: int | None, often: float
) -> None:
    keys = [column for column, _ in columns]
    breaks = np.random.default_rng(salt).random(keys[0].shape) < often
    unique = None if unique_share is None else path_mask(keys, salt, unique_share, breaks)
    needed = random_mask(keys, salt, needed_share)
    before = breaks.copy()
    plan = PrefixPlan.from_rows(*keys, unique=unique, needed=needed, breaks=breaks)
    check_plan(plan, keys, unique, needed, breaks)
    np.testing.assert_array_equal(breaks, before)


@pytest.mark.parametrize("packed", [False, True])
@given(row_keys(), st.integers(0, 5), st.sampled_from((None, 2)), st.sampled_from((None, 2)), st.integers(1, 5))
def test_row_lists_hold_the_rows_of_each_node(
    packed: bool, columns: list, salt: int, unique_share: int | None, needed_share: int | None, pad: int
) -> None:
    keys = [column for column, _ in columns]
    breaks = np.random.default_rng(salt).random(keys[0].shape) < 0.4 if packed else None
    unique = None if unique_share is None else path_mask(keys, salt, unique_share, breaks)
    needed = random_mask(keys, salt, needed_share)
    plan = PrefixPlan.from_rows(*keys, unique=unique, needed=needed, breaks=breaks, pad_multiple_of=pad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_plan, "PIECE_SIZE", 2)
        rows, starts, pieces = plan.row_lists()
    assert rows.dtype == starts.dtype == pieces.dtype == np.int64
    assert (rows.shape, starts.shape) == (plan.scatter.shape, (len(plan.fold) + 1,))
    for node in range(len(plan.fold)):
        listed = rows[starts[node] : starts[node + 1]].tolist()
        assert sorted(listed) == np.flatnonzero(plan.scatter == node).tolist()
        assert not listed or listed[0] == plan.fold[node]
    assert not rows[starts[-1] :].any()
    long = [(a, b) for a, b in pairwise(starts.tolist()) if b - a > 2]
    assert pieces.tolist() == [place for a, b in long for place in range(a, b, 2)]


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 18])
def test_from_rows_in_blocks(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_sort, "BLOCK_BYTES", block_bytes)
    keys = [np.random.default_rng(0).integers(0, 2, (23, 6)), np.random.default_rng(1).integers(0, 2, (23, 6))]
    check_plan(PrefixPlan.from_rows(*keys), keys)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 0), (1, 1), (1, 7), (3, 1)])
def test_from_rows_corner_shapes(shape: tuple[int, int]) -> None:
    keys = [np.zeros(shape, np.int64), np.ones(shape, np.bool_)]
    none = np.zeros(shape, bool)
    plan = PrefixPlan.from_rows(*keys, unique=none, needed=~none, pad_multiple_of=4)
    assert plan.order.shape == plan.shared.shape == (shape[0],)
    assert len(plan.fold) == (-(-shape[1] // 4) * 4 if shape[0] else 0)
    check_plan(plan, keys)


def test_from_rows_numbers_depth_first() -> None:
    plan = PrefixPlan.from_rows(np.array([[7, 2, 1], [5, 5, 5], [7, 2, 3], [5, 5, 5]], np.uint8))
    assert plan.order.tolist() == [1, 3, 0, 2]
    assert plan.shared.tolist() == [0, 3, 0, 2]
    assert plan.scatter.reshape(4, 3).tolist() == [[3, 4, 5], [0, 1, 2], [3, 4, 6], [0, 1, 2]]
    assert plan.fold.tolist() == [3, 4, 5, 0, 1, 2, 8]
    assert (plan.tokens, plan.compact_tokens, plan.compression) == (12, 7, 7 / 12)


def test_from_rows_unique_and_needed_by_hand() -> None:
    keys = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 4]])
    unique, needed = np.array([[False, True, False]] * 3), np.array([[False, True, True]] * 3)
    assert PrefixPlan.from_rows(keys, unique=unique).scatter.tolist() == [0, 3, 1, 0, 4, 1, 0, 5, 2]
    assert PrefixPlan.from_rows(keys, needed=needed).scatter.tolist() == [-1, 0, 1, -1, 0, 1, -1, 0, 2]
    both = PrefixPlan.from_rows(keys, unique=unique, needed=~unique)
    assert both.scatter.tolist() == [0, -1, 1, 0, -1, 1, 0, -1, 2]
    assert both.tokens == 6
    one = PrefixPlan.from_rows(keys, needed=np.array([[False] * 3, [False, False, True], [False] * 3]))
    assert one.scatter.tolist() == [-1, -1, 0, -1, -1, 0, -1, -1, -1]  # the first row shares the node
    nothing = PrefixPlan.from_rows(keys, needed=np.zeros((3, 3), bool), pad_multiple_of=8)
    assert (nothing.fold.size, nothing.tokens, nothing.compression) == (0, 0, 1.0)


@given(row_keys(), st.integers(0, 2**16), st.booleans(), st.booleans())
def test_earlier_rows_of_those_that_are_read(columns: list, seed: int, packed: bool, hides: bool) -> None:
    keys = [column for column, _ in columns]
    random = np.random.default_rng(seed)
    read, hidden = (random.random(keys[0].shape) < share for share in (0.2, 0.5))
    breaks = random.random(keys[0].shape) < 0.3 if packed else None
    found = with_earlier_rows(read, hidden if hides else None, breaks)
    for sequence in split(keys[0].shape, breaks):
        for i, row in enumerate(sequence):
            is_earlier = any(read[later] for later in sequence[i + 1 :]) and not (hides and hidden[row])
            assert found[row] == (read[row] or is_earlier)


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
    first = PrefixPlan.from_rows(keys, unique=mask, needed=mask)
    second = PrefixPlan.from_rows(keys, unique=mask, needed=mask)
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
        (ValueError, "needed", (KEY,), {"needed": np.zeros((1, 3), bool)}),
        (ValueError, "start", (KEY,), {"start": np.zeros(3, np.int64)}),
        (ValueError, "start", (KEY,), {"start": np.array([0, 3])}),
        (ValueError, "start", (KEY,), {"start": np.array([-1, 0])}),
        (TypeError, "start", (KEY,), {"start": np.zeros(2)}),
        (ValueError, "breaks", (KEY,), {"breaks": MASK[:1]}),
        (ValueError, "start and breaks", (KEY,), {"breaks": MASK, "start": np.zeros(2, np.int64)}),
        (TypeError, "breaks", (KEY,), {"breaks": KEY}),
        (ValueError, "pad_multiple_of", (KEY,), {"pad_multiple_of": 0}),
        (TypeError, r"keys\[0\]", (np.zeros((2, 3)),), {}),
        (TypeError, r"keys\[0\]", ([[1, 2]],), {}),
        (TypeError, r"keys\[0\]", (np.zeros((2, 3), object),), {}),
        (TypeError, r"keys\[1\]", (KEY, torch.zeros(2, 3)), {}),
        (TypeError, r"keys\[1\]", (KEY, torch.zeros(2, 3, dtype=torch.bfloat16)), {}),
        (TypeError, r"keys\[1\]", (KEY, torch.zeros(2, 3, dtype=torch.complex64)), {}),
        (TypeError, "unique", (KEY,), {"unique": np.zeros((2, 3), np.int64)}),
        (TypeError, "needed", (KEY,), {"needed": True}),
        (TypeError, "pad_multiple_of", (KEY,), {"pad_multiple_of": 2.0}),
    ],
)
def test_from_rows_errors_name_the_argument(error: type, match: str, keys: tuple, options: dict) -> None:
    with pytest.raises(error, match=match):
        PrefixPlan.from_rows(*keys, **options)


def test_the_published_function_is_here_too() -> None:
    assert prefix_plan.compute_fold_and_scatter is fold_and_scatter.compute_fold_and_scatter
    assert prefix_plan.compute_fold_and_scatter_torch is fold_and_scatter.compute_fold_and_scatter_torch

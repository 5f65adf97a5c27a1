"""Batches of shared prefixes, against brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from benchmarks.bench_orders import cases, rows
from radix_compile.plan import batching
from radix_compile.plan.batching import SharedPrefixBatchSampler, order_for_sharing, sharing
from radix_compile.plan.prefix_plan import PrefixPlan

settings.register_profile("batching", deadline=None, max_examples=150)
settings.load_profile("batching")

FORMS: list[Callable[[list[int]], Any]] = [
    list,
    tuple,
    lambda ids: np.array(ids, np.int64),
    lambda ids: np.array(ids, np.int32),
    lambda ids: torch.tensor(ids, dtype=torch.int64),
]

# Few values, so that prefixes are shared. The characters have 1, 2, 3 and 4 bytes in UTF-8; one is half a pair.
TEXTS = st.lists(st.text("ab\xe9\u4e2d\U0001f600\ud800", max_size=8), max_size=20)
IDS = st.lists(st.lists(st.sampled_from([0, 1, 2, 256, -1, 2**40]), max_size=8), max_size=20)


def brute_force(sequences: list, batches: list[list[int]]) -> float:
    tokens = sum(len(sequences[i]) for batch in batches for i in batch)
    paths = [{tuple(sequences[i][:n]) for i in batch for n in range(1, len(sequences[i]) + 1)} for batch in batches]
    return sum(map(len, paths)) / tokens if tokens else 1.0


def stretches(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def prompts(queries: int, passages: tuple[int, int], length: int, tail: int) -> list[list[int]]:
    """`queries` prompts with some continuations each, all shuffled."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(queries):
        prompt = rng.integers(1000, size=length).tolist()
        rows += [prompt + rng.integers(1000, size=tail).tolist() for _ in range(rng.integers(*passages, endpoint=True))]
    return [rows[i] for i in rng.permutation(len(rows))]


@given(TEXTS | IDS)
def test_order_is_a_stable_lexicographic_sort(sequences: list) -> None:
    order = order_for_sharing(sequences)
    assert order == [i for _, i in sorted((list(s), i) for i, s in enumerate(sequences))]
    assert all(type(i) is int for i in order)


@given(IDS, st.data())
def test_forms_of_integers_are_equal(sequences: list, data: st.DataObject) -> None:
    small = [[i % 7 for i in ids] for ids in sequences]
    mixed = [data.draw(st.sampled_from(FORMS))(ids) for ids in small]
    assert order_for_sharing(mixed) == order_for_sharing(small)
    assert sharing(mixed, [range(len(mixed))]) == sharing(small, [range(len(small))])


def test_arrays_as_a_whole() -> None:
    rows = np.array([[2, 1], [1, 3], [2, 0]], np.uint64)
    assert order_for_sharing(rows) == order_for_sharing(torch.from_numpy(rows.astype(np.int16))) == [1, 2, 0]
    assert order_for_sharing(np.array(["b", "a", "ab"])) == order_for_sharing(("b", "a", "ab")) == [1, 2, 0]


@given(TEXTS | IDS, st.data())
def test_sharing_counts_distinct_prefixes(sequences: list, data: st.DataObject) -> None:
    indices = st.lists(st.integers(0, len(sequences) - 1), max_size=8) if sequences else st.just([])
    batches = data.draw(st.lists(indices, max_size=5))
    assert sharing(sequences, batches) == brute_force(sequences, batches)


def test_sharing_of_one_batch_is_the_compression_of_its_plan() -> None:
    rows = np.random.default_rng(0).integers(0, 3, (40, 6))
    assert sharing(rows, [range(40)]) == PrefixPlan.from_rows(rows).compression < 0.9


def test_sharing_by_hand() -> None:
    texts = ["to be", "to go", "so"]
    assert sharing(texts, [[0, 1, 2]]) == 9 / 12
    assert sharing(texts, [[0, 2], [1]]) == 1.0
    assert sharing(texts, [[1, 1]]) == 0.5
    assert sharing(texts, []) == sharing(texts, [[]]) == sharing(["", ""], [[0, 1]]) == 1.0


def test_neighbours_share_more_than_random_or_length_order() -> None:
    rows = prompts(64, (8, 8), length=60, tail=20)
    order = order_for_sharing(rows)
    # 16 rows are two prompts and 16 tails, and a first token here or there.
    assert 0.27 < sharing(rows, stretches(order, 16)) <= (2 * 60 + 16 * 20) / (16 * 80)
    assert sharing(rows, stretches([*range(len(rows))], 16)) > 0.8
    assert sharing(rows, SharedPrefixBatchSampler(rows, 16)) == sharing(rows, stretches(order, 16))


def computed(sequences: list, batches: list[list[int]], padding: bool) -> int:
    """The distinct prefixes of each batch, and the distinct rows of padding, which is put behind the sequences."""
    count = 0
    for batch in batches:
        longest = max((len(sequences[i]) for i in batch), default=0)
        rows = [[*sequences[i], *[None] * (longest - len(sequences[i]) if padding else 0)] for i in batch]
        count += len({tuple(row[: n + 1]) for row in rows for n in range(len(row))})
    return count


@given(TEXTS | IDS, st.integers(1, 12), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_no_more_is_computed_than_in_other_orders(
    sequences: list, size: int, shuffle: bool, drop_last: bool, padding: bool, data: st.DataObject
) -> None:
    groups = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=len(sequences), max_size=len(sequences)))
    options: dict[str, Any] = {"shuffle": shuffle, "drop_last": drop_last, "padding": padding, "groups": groups}
    sampler = SharedPrefixBatchSampler(sequences, size, **options)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    found = [i for batch in batches for i in batch]
    assert sorted({*found}) == sorted(found)
    if drop_last:
        assert all(len(batch) == size for batch in batches)
        assert len(found) == len(sequences) // size * size
    else:
        assert len(found) == len(sequences)
        assert all(1 <= len(batch) <= size for batch in batches)
        by_length = stretches(sorted(order_for_sharing(sequences), key=lambda i: len(sequences[i])), size)
        assert computed(sequences, batches, padding) <= computed(sequences, by_length, padding)


@given(TEXTS | IDS, st.data())
def test_sharing_counts_padding(sequences: list, data: st.DataObject) -> None:
    indices = st.lists(st.integers(0, len(sequences) - 1), max_size=8) if sequences else st.just([])
    batches = data.draw(st.lists(indices, max_size=5))
    tokens = sum(len(sequences[i]) for batch in batches for i in batch)
    expected = computed(sequences, batches, padding=True) / tokens if tokens else 1.0
    assert sharing(sequences, batches, padding=True) == expected


def test_padding_is_counted_as_a_plan_does() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, rng.integers(1, 9)).tolist() for _ in range(40)]
    ids, mask = np.zeros((2, 40, 8), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    plan = PrefixPlan.from_rows(ids, mask)
    assert sharing(rows, [range(40)], padding=True) * sum(map(len, rows)) == plan.compact_tokens


def test_groups_stay_together_short_ones_first() -> None:
    groups = ["b", "a", "b", "a", "c"]
    sequences = [[1, 2, 3], [5], [1, 2, 4], [4, 4], [9, 9, 9, 9]]
    assert order_for_sharing(sequences, groups) == [3, 1, 0, 2, 4]
    batches = list(SharedPrefixBatchSampler(sequences, 2, groups=groups))
    assert [sorted(batch) for batch in batches] == [[1, 3], [0, 2], [4]]
    with pytest.raises(ValueError, match="groups must have one entry for each of the 5 sequences, not 2"):
        order_for_sharing(sequences, ["a", "b"])


@pytest.mark.parametrize("size", [8, 32])
def test_the_sampler_is_within_five_percent_of_the_best(size: int) -> None:
    for case in cases():
        for padding in (True, False):
            found = rows(case, size, padding)
            assert found["sampler"] <= found["length"], case.name
            assert found["sampler"] <= 1.05 * min(found.values()), case.name


def brute_common(a: Any, b: Any) -> int:
    return max(n for n in range(min(len(a), len(b)) + 1) if list(a[:n]) == list(b[:n]))


def test_cutting_early_keeps_prompts_whole() -> None:
    rows = prompts(40, (3, 7), length=100, tail=5)
    order = order_for_sharing(rows)
    sampler = SharedPrefixBatchSampler(rows, 32)
    assert sharing(rows, sampler) < 0.9 * sharing(rows, stretches(order, 32))
    assert len(sampler) <= len(order) / 24 + 1


def test_batches_are_cut_early_only_for_half_of_the_prefix() -> None:
    for front, sizes in (("", [8, 10, 2]), ("pp", [8, 10, 2]), ("ppp", [10, 10])):
        texts = [f"{front}x{end}" for end in "abcdefgh"] + [f"{front}yy{end}" for end in "abcdefghijkl"]
        assert [len(batch) for batch in SharedPrefixBatchSampler(texts, 10)] == sizes


@pytest.mark.parametrize("shuffle", [False, True])
def test_data_loader_yields_every_index_once(shuffle: bool) -> None:
    rows = prompts(10, (3, 7), length=6, tail=3)
    loader: DataLoader = DataLoader(
        torch.arange(len(rows)), batch_sampler=SharedPrefixBatchSampler(rows, 8, shuffle=shuffle)
    )
    for _ in range(2):
        batches = [batch.tolist() for batch in loader]
        assert len(batches) == len(loader)
        assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))


def test_shuffle_changes_the_order_of_batches_only() -> None:
    rows = prompts(20, (3, 7), length=6, tail=3)
    plain = list(SharedPrefixBatchSampler(rows, 8))
    assert plain == list(SharedPrefixBatchSampler(rows, 8))
    samplers = [
        SharedPrefixBatchSampler(rows, 8, shuffle=True, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    state = torch.get_rng_state()
    (first, second), again = ([list(samplers[0]) for _ in range(2)], [list(samplers[1]) for _ in range(2)])
    assert [first, second] == again
    assert torch.equal(torch.get_rng_state(), state)
    assert first != plain
    assert second not in (plain, first)
    assert sorted(first) == sorted(second) == sorted(plain)


def test_shuffle_without_a_generator_is_seeded_by_torch() -> None:
    sampler = SharedPrefixBatchSampler(prompts(20, (3, 7), length=6, tail=3), 8, shuffle=True)
    epochs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[1] != epochs[2]


def test_batches_are_the_callers_to_change() -> None:
    sampler = SharedPrefixBatchSampler(["a", "b", "c"], 2)
    for batch in sampler:
        batch.clear()
    assert list(sampler) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("sequences", "match"),
    [
        (5, "got int"),
        ("text", "got str"),
        (np.array(5), "got ndarray of int64"),
        ({"a": 1}, "got dict"),
        ((text for text in "ab"), "got generator"),
        ([1, 2], r"sequences\[0\] is int"),
        (torch.tensor([1, 2]), r"sequences\[0\] is int"),
        ([[1], "a"], r"sequences\[1\] is str"),
        (["a", [1]], r"sequences\[1\] is list"),
        (["a", None], r"sequences\[1\] is NoneType"),
        ([b"a"], r"sequences\[0\] is bytes"),
        ([{1: 2}], r"sequences\[0\] is dict"),
        ([[1], [1.0]], r"sequences\[1\] is list"),
        ([[], ["a"]], r"sequences\[1\] is list"),
        ([[[1]]], r"sequences\[0\] is list"),
        ([np.zeros((1, 2), np.int64)], r"sequences\[0\] is ndarray of int64"),
        ([torch.zeros(2)], r"sequences\[0\] is Tensor of torch.float32"),
        ([torch.tensor(1)], r"sequences\[0\] is Tensor of torch.int64"),
        ([[2**63]], r"sequences\[0\] is list"),
        ([np.array([2**63], np.uint64)], r"sequences\[0\] is ndarray of uint64"),
    ],
)
def test_errors_name_what_was_expected(sequences: Any, match: str) -> None:
    expected = f"^sequences must be .*strings, or of lists.*integers.*{match}$"
    for call in (order_for_sharing, lambda s: sharing(s, []), lambda s: SharedPrefixBatchSampler(s, 2)):
        with pytest.raises(TypeError, match=expected):
            call(sequences)


@pytest.mark.parametrize("size", [0, -3])
def test_batch_size_below_one(size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
        SharedPrefixBatchSampler(["a"], size)


@pytest.mark.parametrize("size", [2.0, "2", None, True])
def test_batch_size_is_an_int(size: Any) -> None:
    with pytest.raises(TypeError, match="batch_size must be an int"):
        SharedPrefixBatchSampler(["a"], size)


def test_sharing_checks_the_indices() -> None:
    with pytest.raises(IndexError):
        sharing(["a"], [[1]])


def test_nothing_at_all() -> None:
    assert order_for_sharing([]) == []
    for drop_last in (False, True):
        sampler = SharedPrefixBatchSampler([], 3, drop_last=drop_last)
        assert (len(sampler), list(sampler)) == (0, [])
    assert sharing([], []) == 1.0


def test_public_names() -> None:
    assert batching.__all__ == ["SharedPrefixBatchSampler", "order_for_sharing", "sharing"]

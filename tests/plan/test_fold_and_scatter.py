"""The published function, in C and in NumPy, against the radix-mlp package."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from radix_mlp import compute_fold_and_scatter as reference
from radix_mlp.torch import compute_fold_and_scatter_torch as reference_torch

from radix_compile.plan import fold_and_scatter
from radix_compile.plan.fold_and_scatter import compute_fold_and_scatter, compute_fold_and_scatter_torch

settings.register_profile("fold_and_scatter", deadline=None, max_examples=150)
settings.load_profile("fold_and_scatter")


@pytest.fixture(scope="module", params=["extension", "numpy"], autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of this module runs with the C extension and without it."""
    if request.param == "extension" and fold_and_scatter.extension is None:
        pytest.skip("radix-compile-native is not installed: every call takes the NumPy path")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(fold_and_scatter, "extension", None)
        yield request.param


def u32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint32)


def test_path_is_the_one_that_runs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy_calls = []
    monkeypatch.setattr(fold_and_scatter, "_split", lambda *arguments: numpy_calls.append(arguments) or 1 / 0)
    if path == "numpy":
        with pytest.raises(ZeroDivisionError):
            compute_fold_and_scatter(*GOOD)
    else:
        assert_same(compute_fold_and_scatter(*GOOD, np.int64(2), False), reference(*GOOD, 2))
    assert len(numpy_calls) == (path == "numpy")


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


@given(packed_batches(), paddings, st.sampled_from((None, True, False)))
@example((u32(1, 2, 3, 1, 2, 1, 2, 3, 4), u32(0, 1, 2, 0, 1, 0, 1, 2, 3), u32(0, 3, 5, 5, 9)), None, None)
@example((u32(5, 0, 5, 5, 0, 0), u32(0, 0, 0, 0, 0, 0), u32(0, 2, 3, 6)), None, None)  # ids equal to padding
@example((u32(1, 1), u32(0, 1), u32(0, 1, 2)), None, None)  # one id at two positions
@example((u32(), u32(), u32()), 8, None)
@example((u32(), u32(), u32(0)), 8, None)
@example((u32(), u32(), u32(0, 0, 0)), 8, None)
def test_published_function_is_the_packages(batch: tuple, multiple: int | None, checks: bool | None) -> None:
    ours = compute_fold_and_scatter(*batch, multiple, checks)
    assert_same(ours, reference(*batch, multiple))
    assert all(array.flags.writeable for array in ours)
    assert not np.shares_memory(ours[2], ours[3])


@given(
    packed_batches(),
    paddings,
    st.sampled_from((torch.int32, torch.int64)),
    st.sampled_from((torch.int32, torch.int64, torch.int16, torch.uint8)),
)
def test_torch_form_is_the_packages(
    batch: tuple, multiple: int | None, id_dtype: torch.dtype, small_dtype: torch.dtype
) -> None:
    ids, positions, bounds = (torch.from_numpy(array.astype(np.int64)) for array in batch)
    if id_dtype == torch.int32:
        ids = (ids - ((ids >= 2**31) * 2**32)).to(torch.int32)
    arguments = (ids, positions.to(small_dtype), bounds.to(torch.int32 if len(ids) > 100 else small_dtype))
    ours = compute_fold_and_scatter_torch(*arguments, multiple)
    for a, b in zip(ours, reference_torch(*arguments, multiple), strict=True):
        assert a.dtype == torch.int32
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("vary_positions", [True, False])
def test_large_batches(equal: bool, vary_positions: bool) -> None:
    """With long prefixes, repeated sequences and more than one block of comparisons."""
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


@pytest.mark.parametrize("seed", range(12))
def test_large_ragged_batches(seed: int) -> None:
    """Sequences grown from earlier ones, of very different lengths; the first seeds release the interpreter lock."""
    rng = np.random.default_rng(seed)
    longest, vocabulary = (2000, 300, 40)[seed // 4], (2, 3, 50, 50_000)[seed % 4]
    sequences = [np.zeros((0, 2), np.int64)]
    for _ in range(300):
        stem = sequences[rng.integers(len(sequences))]
        stem = stem[: rng.integers(len(stem) + 1)] if rng.random() < 0.7 else stem
        new = rng.integers(0, vocabulary, (int(longest * rng.random() ** 3), 2))
        new[:, 1] = np.arange(len(stem), len(stem) + len(new)) if rng.random() < 0.9 else new[:, 1] % 2
        sequences.append(np.concatenate([stem, new])[:longest])
    ids, positions = np.concatenate(sequences).astype(np.uint32).T.copy()
    bounds = np.cumsum([0, *map(len, sequences)]).astype(np.uint32)
    ours = compute_fold_and_scatter(ids, positions, bounds, 64)
    assert_same(ours, reference(ids, positions, bounds, 64))
    assert len(ours[3]) < len(ids)


@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 200])
@pytest.mark.parametrize("distinct", [1, 2, 40])
def test_sequences_that_come_again(length: int, distinct: int) -> None:
    rng = np.random.default_rng(length)
    pool = rng.integers(0, 9, (distinct, length))
    for choice in (np.repeat(np.arange(distinct), 5), rng.integers(0, distinct, 100)):
        ids = pool[choice].astype(np.uint32).ravel()
        positions = np.tile(np.arange(length, dtype=np.uint32), len(choice))
        bounds = np.arange(0, len(ids) + 1, length, dtype=np.uint32)
        assert_same(compute_fold_and_scatter(ids, positions, bounds), reference(ids, positions, bounds))


def test_threads_get_their_own_results() -> None:
    rng = np.random.default_rng(0)
    bounds = np.arange(0, 40_001, 50, dtype=np.uint32)
    batches = [(rng.integers(0, k, 40_000, np.uint32), np.tile(np.arange(50, dtype=np.uint32), 800)) for k in (1, 2, 9)]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda batch: compute_fold_and_scatter(*batch, bounds), batches * 4))
    for batch, ours in zip(batches * 4, results, strict=True):
        assert_same(ours, reference(*batch, bounds))


def test_padding_appends_zeros_to_all_but_scatter() -> None:
    ids, positions, scatter, fold = compute_fold_and_scatter(u32(4, 5, 4), u32(3, 4, 3), u32(0, 2, 3), 4)
    assert ids.tolist() == [4, 5, 0, 0]
    assert positions.tolist() == [3, 4, 0, 0]
    assert scatter.tolist() == [0, 1, 0]
    assert fold.tolist() == [0, 1, 0, 0]


def test_inputs_may_be_read_only_strided_and_unaligned() -> None:
    """The package refuses strided arrays; the values are the same here."""
    rng = np.random.default_rng(0)
    ids, positions = rng.integers(0, 2, 160).astype(np.uint32), np.tile(np.arange(8, dtype=np.uint32), 20)
    bounds = np.arange(0, 161, 8, dtype=np.uint32)
    wide = np.zeros((160, 2), np.uint32)
    wide[:, 0] = ids
    wide.flags.writeable = positions.flags.writeable = False
    expected = reference(ids, positions, bounds)
    assert_same(compute_fold_and_scatter(wide[:, 0], positions, bounds), expected)
    unaligned = np.frombuffer(b"x" + ids.tobytes(), np.uint32, offset=1)
    assert_same(compute_fold_and_scatter(unaligned, positions, bounds), expected)
    backwards = ids[::-1].copy()[::-1]
    assert_same(compute_fold_and_scatter(backwards, positions, bounds), expected)


def test_other_byte_order_is_refused() -> None:
    swapped = u32(1, 2).astype(np.dtype(np.uint32).newbyteorder())
    with pytest.raises(TypeError, match="input_ids"):
        compute_fold_and_scatter(swapped, *GOOD[1:])


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

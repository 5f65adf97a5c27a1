"""Sequences packed in a row have paths of their own exactly where no row sees, or can tell, what is in front."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import radix_compile
from radix_compile import backend
from radix_compile.runtime.call_planner import numbers_in_paths, sequence_breaks
from tests.graphs import fold_of
from tests.models import VOCABULARY, assert_as_exact, build, in_float64
from tests.tiers import slow_unless

WIDTH = 8
TEXTS = ([5, 6, 7, 8], [5, 6, 7, 9, 4], [5, 6, 7], [9, 6, 7, 8, 3, 4, 5], [5, 6, 7, 9, 4], [5, 6, 2, 4, 4, 4])
"""In one row, or the first three and the last three in a row each. Two of them are equal."""

Documents = Callable[[Tensor, Tensor, Tensor], Tensor]
Mask = Callable[[Tensor, Tensor, Tensor], Tensor]


def packed(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions that restart with each text, the numbers of the texts; padded with texts of one token."""
    texts = np.array_split(np.array(TEXTS, dtype=object), rows)
    longest = max(sum(map(len, part)) for part in texts)
    ids, positions, numbers = (torch.zeros(rows, longest, dtype=torch.long) for _ in range(3))
    for row, part in enumerate(texts):
        filled = [*part, *[[1]] * (longest - sum(map(len, part)))]
        ids[row] = torch.tensor([token for text in filled for token in text])
        positions[row] = torch.tensor([place for text in filled for place in range(len(text))])
        numbers[row] = torch.tensor([number for number, text in enumerate(filled) for _ in text])
    return ids, positions, numbers


def paths_by_text(ids: Tensor, positions: Tensor) -> int:
    """How many distinct rows there are if each text is by itself."""
    distinct = set()
    for row, places in zip(ids.tolist(), positions.tolist(), strict=True):
        for end, place in enumerate(places):
            distinct.add(tuple(row[end - place : end + 1]))
    return len(distinct)


def runs(positions: Tensor) -> Tensor:
    return (torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)


def pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[:, None, :, None], rows[:, None, None, :]


def same(rows: Tensor) -> Tensor:
    query, key = pairs(rows)
    return query == key


def columns(positions: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(positions.shape[1])
    return index[:, None], index[None, :]


def causal(positions: Tensor) -> Tensor:
    query, key = columns(positions)
    return key <= query


def by_runs(ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    query, key = pairs(positions)
    return same(runs(positions)) & (key <= query)


def by_runs_in_a_window(ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    query, key = pairs(positions)
    return same(runs(positions)) & (key <= query) & (key > query - 3)


def by_runs_and_columns(ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    query, key = columns(positions)
    return same(runs(positions)) & (key <= query) & (key > query - 4)


def by_numbers(ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    return same(numbers) & causal(positions)


def by_counting(ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    return same((positions == 0).cumsum(-1)) & causal(positions)


def everything(ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    return causal(positions).expand(len(ids), 1, -1, -1)


def same_or_near(ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    query, key = columns(positions)
    return (same(runs(positions)) & (key <= query)) | ((key == query - 1) & (key <= query))


def not_same(ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    query, key = columns(positions)
    return (~same(runs(positions)) | (query == key)) & (key <= query)


def of_even_runs(ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    """Whether a row is in the first text tells it where it is."""
    query, key = columns(positions)
    return same(runs(positions)) & (key <= query) & (pairs(runs(positions))[1].bool() | (query == key))


def nothing(x: Tensor, ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    return x


def run_numbers(x: Tensor, ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    return x + runs(positions)[..., None]


def column_table(x: Tensor, ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    return x * torch.arange(ids.shape[1])[:, None].cos()


def running_sum(x: Tensor, ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    return x.cumsum(1)


def counted_tokens(x: Tensor, ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
    return x + (ids == 5).cumsum(1)[..., None]


@pytest.fixture(autouse=True)
def _folds_little_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "LEAST_SHARE", 0.0)


class Program(nn.Module):
    """Two layers of attention, each with a mask of its own."""

    def __init__(self, masks: tuple[Mask, Mask], before: Callable[..., Tensor] = nothing) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(99, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.masks, self.before = masks, before

    def forward(self, ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
        x = self.before(self.embedding(ids) + self.places(positions), ids, positions, numbers)
        for layer, mask in zip(self.layers, self.masks, strict=False):
            heads = layer(x)[:, None]
            x = x + F.scaled_dot_product_attention(heads, heads, heads, mask(ids, positions, numbers))[:, 0]
        return self.layers[-1](x)


APART = {
    "runs of positions": (by_runs, by_runs),
    "a window": (by_runs, by_runs_in_a_window),
    "columns": (by_runs_and_columns, by_runs),
    "numbers that are given": (by_numbers, by_numbers),
    "numbers that are counted": (by_counting, by_counting),
}
TOGETHER = {
    "no mask": ((everything, everything), nothing),
    "one layer sees all": ((by_runs, everything), nothing),
    "two ways to number": ((by_runs, by_numbers), nothing),
    "the last of the one before": ((by_runs, same_or_near), nothing),
    "all others": ((by_runs, not_same), nothing),
    "the numbers in a mask": ((by_runs, of_even_runs), nothing),
    "the numbers in rows": ((by_runs, by_runs), run_numbers),
    "a table by column": ((by_runs, by_runs), column_table),
    "a running sum": ((by_runs, by_runs), running_sum),
    "tokens that are counted": ((by_runs, by_runs), counted_tokens),
}


def compact_rows(model: nn.Module, *args: Tensor) -> int:
    """How many rows were computed, of a result that is right; 0 if the plain program ran."""
    options = {"inner_backend": "aot_eager", "fold": "always"}
    radix_compile.reset_stats()
    with torch.no_grad():
        ours, plain, exact = (
            program(*args)
            for program in (torch.compile(model, backend="radix", options=options), model, in_float64(model))
        )
    assert_as_exact(ours, plain, exact.double())
    return radix_compile.stats().compact_tokens


@pytest.mark.parametrize(
    ("name", "rows"),
    slow_unless(lambda name, rows: rows == 2 or name == "columns", itertools.product(APART, [1, 2])),
)
def test_texts_share_wherever_they_are(name: str, rows: int) -> None:
    ids, positions, numbers = packed(rows)
    model = Program(APART[name]).eval()
    with torch.no_grad():
        assert fold_of(model, ids, positions, numbers).starts.sequence_ids is not None
    assert compact_rows(model, ids, positions, numbers) == paths_by_text(ids, positions) < ids.numel()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", TOGETHER)
def test_not_where_a_row_can_tell_what_is_in_front(name: str, rows: int) -> None:
    ids, positions, numbers = packed(rows)
    model = Program(*TOGETHER[name]).eval()
    if rows > 1:
        with torch.no_grad():
            assert fold_of(model, ids, positions, numbers).starts.sequence_ids is None
    found = compact_rows(model, ids, positions, numbers)
    assert found == 0 if rows == 1 else found > paths_by_text(ids, positions)


def test_a_text_that_goes_on_later_is_one_with_what_is_between() -> None:
    ids, positions, numbers = packed(2)
    numbers[0, -2:] = numbers[0, 0]
    model = Program((by_numbers, by_numbers)).eval()
    apart = positions.clone()
    apart[0] = torch.arange(ids.shape[1])  # the first row is one sequence
    assert compact_rows(model, ids, positions, numbers) == paths_by_text(ids, apart)


@pytest.mark.parametrize(
    ("rows", "options"),
    [(2, {}), (1, {}), (1, {"sliding_window": 3})],
)
@pytest.mark.slow  # "packed in one row" of the compatibility tests is the same model by default
def test_a_model_of_transformers(rows: int, options: dict[str, int]) -> None:
    """Padding-free: all texts in a row, and positions that restart. The second call compiles nothing."""
    model = build("Mistral" if options else "Qwen3", **options)
    exact = in_float64(model)
    settings = {"inner_backend": "aot_eager", "fold": "always", "strict": True, "verify": True}
    compiled = torch.compile(model, backend="radix", options=settings, dynamic=True)
    radix_compile.reset_stats()
    ids, positions, _ = packed(rows)
    for times in (2, 1):
        call = {"input_ids": ids.repeat(1, times), "position_ids": positions.repeat(1, times), "use_cache": False}
        with torch.no_grad():
            assert_as_exact(compiled(**call).logits, model(**call).logits, exact(**call).logits)
    stats = radix_compile.stats()
    assert (stats.plain_compiles, stats.folded_calls) == (
        1,
        2,
    )  # Dynamo may start over before it compiles the plain one
    assert stats.compact_tokens == 2 * paths_by_text(ids, positions)


@pytest.mark.slow  # gradients where paths start at other columns: tests/passes/test_prove_shift.py
def test_training() -> None:
    model = build("Qwen3").train()
    exact = in_float64(model)
    ids, positions, _ = packed(1)
    labels = ids.masked_fill(positions == 0, -100)  # the first token of a text is not for the one before to predict
    args = {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}
    radix_compile.reset_stats()
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    grads = []
    for one, program in ((model, compiled), (model, model), (exact, exact)):
        program(**args).loss.backward()
        grads.append([parameter.grad.clone() for parameter in one.parameters()])
        one.zero_grad()
    assert radix_compile.stats().compact_tokens == paths_by_text(ids, positions)
    for ours, plain, reference in zip(*grads, strict=True):
        assert_as_exact(ours, plain, reference)


def test_one_sequence_is_left_alone_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    model = build("Qwen3")
    ids = torch.tensor([TEXTS[3]])
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "eager", "fold": "always", "strict": True}
    )
    radix_compile.reset_stats()
    with torch.no_grad():
        for more in ({}, {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(7)[None]}):
            torch.testing.assert_close(compiled(ids, **more).logits, model(ids, **more).logits)
    assert radix_compile.stats().folded_compiles == 0
    assert not [one for one in recwarn if "radix" in str(one.message)]


def test_numbers_that_come_back() -> None:
    numbers = np.array([[0, 0, 1, 1, 2], [0, 1, 1, 0, 2], [2, 1, 1, 0, 0], [3, 3, 3, 3, 3]])
    breaks, come_back = sequence_breaks(numbers)
    assert come_back.tolist() == [False, True, False, False]
    assert breaks is not None
    assert breaks.astype(int).tolist() == [[0, 0, 1, 0, 1], [0] * 5, [0, 1, 0, 1, 0], [0] * 5]
    breaks, come_back = sequence_breaks(numbers[3:])
    assert breaks is None
    assert not come_back.any()


def test_paths_where_numbers_come_back() -> None:
    """Equal up to where other rows go together."""
    numbers = np.array([[0, 0, 1, 0], [2, 2, 1, 0], [0, 0, 1, 0], [5, 5, 5, 5]])
    keys = np.stack(numbers_in_paths(numbers, np.array([True, True, True, False])), -1).tolist()
    assert keys[0] == keys[2]
    assert keys[0][:2] == keys[1][:2] == keys[3][:2]
    assert keys[0][2:] != keys[1][2:]
    assert keys[3][2] != keys[0][2]

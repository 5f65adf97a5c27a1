"""Rotary embeddings by column: rows of the same text are one node if scores depend on the distance of columns alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import radix_compile
from radix_compile.runtime import rotary_check
from tests.graphs import fold_of
from tests.models import VOCABULARY, build

B, S, H, E = 4, 12, 2, 8
STARTS = (0, 3, 1, 5)
OPTIONS: dict[str, Any] = {"fold": "always", "inner_backend": "aot_eager"}
FREQUENCIES = 1 / 100 ** (torch.arange(E // 2, dtype=torch.float64) * 2 / E)


def text(seq: int = S, starts: tuple[int, ...] = STARTS) -> tuple[Tensor, Tensor]:
    """The same text in every sequence, from where its padding ends: ``seq`` distinct rows, and padding."""
    padded = (torch.arange(seq) >= torch.tensor(starts)[:, None]).long()
    ids = torch.stack([F.pad(torch.arange(3, 3 + seq - start), (start, 0)) for start in starts])
    return ids, padded


def angles(x: Tensor) -> Tensor:
    """``[S, E / 2]``"""
    return torch.arange(x.shape[2], device=x.device)[:, None] * FREQUENCIES


def half_split(x: Tensor, by: Tensor | None = None) -> Tensor:
    both = torch.cat([angles(x) if by is None else by] * 2, -1)
    first, second = x.chunk(2, -1)
    return x * both.cos() + torch.cat([-second, first], -1) * both.sin()


def interleaved(x: Tensor) -> Tensor:
    both = angles(x).repeat_interleave(2, -1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * both.cos() + turned * both.sin()


def partial(x: Tensor) -> Tensor:
    by = angles(x)[:, : E // 4]
    return torch.cat([half_split(x[..., : E // 2], by), x[..., E // 2 :]], -1)


def as_complex(x: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(turned * torch.polar(torch.ones_like(angles(x)), angles(x))).flatten(-2)


def several_axes(x: Tensor) -> Tensor:
    """As in Qwen2-VL: parts of the angles are of other positions, which are the same in text."""
    positions = torch.arange(x.shape[2])[None, :, None].expand(3, x.shape[2], 1)
    by = torch.cat([part[i % 3] for i, part in enumerate((positions * FREQUENCIES).split([1, 1, 2], -1))], -1)
    return half_split(x, by)


def scaled(x: Tensor) -> Tensor:
    return half_split(x, angles(x) / 4) * 1.2


def decaying(sign: int) -> Callable[[Tensor], Tensor]:
    """As in xPos: queries grow as keys shrink."""
    return lambda x: half_split(x) * 1.1 ** (sign * torch.arange(x.shape[2]).double())[:, None]


def growing(sign: int) -> Callable[[Tensor], Tensor]:
    """By so much that it cannot be checked."""
    return lambda x: half_split(x) * 3.0 ** (sign * torch.arange(x.shape[2]).double())[:, None]


def as_it_is(x: Tensor) -> Tensor:
    return x


def backwards(x: Tensor) -> Tensor:
    return half_split(x, -angles(x))


def squared(x: Tensor) -> Tensor:
    return half_split(x, angles(x) ** 2)


def periodic(x: Tensor) -> Tensor:
    return half_split(x, angles(x) % 2)


def perturbed(x: Tensor) -> Tensor:
    return half_split(x) + x * 1e-6 * torch.arange(x.shape[2])[:, None]


def not_linear(x: Tensor) -> Tensor:
    return half_split(x).relu()


def in_bfloat16(x: Tensor) -> Tensor:
    """Positions above 256 collapse in bfloat16. (Here they start at 250.)"""
    positions = torch.arange(250, 250 + x.shape[2], dtype=torch.bfloat16)
    return half_split(x, positions.double()[:, None] * FREQUENCIES)


class Program(nn.Module):
    """One layer of attention with a padding mask, whose queries and keys are turned."""

    def __init__(self, query: Callable[..., Tensor], key: Callable[..., Tensor] | None = None, size: int = E) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = size
        self.embedding = nn.Embedding(VOCABULARY, H * size)
        self.query, self.key, self.value, self.last = (nn.Linear(H * size, H * size) for _ in range(4))
        self.turn_query, self.turn_key = query, key or query

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (H, self.size)).transpose(1, 2)

    def forward(self, ids: Tensor, padded: Tensor) -> Tensor:
        x = self.embedding(ids)
        query, key, value = (self.heads(one(x)) for one in (self.query, self.key, self.value))
        return self.attend(x, self.turn_query(query), self.turn_key(key), value, mask_of(padded))

    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        return self.last(F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))


def mask_of(padded: Tensor) -> Tensor:
    i = torch.arange(padded.shape[1], device=padded.device)
    return (i <= i[:, None]) & (padded != 0)[:, None, None]


def table(length: int = 64, size: int = E) -> Tensor:
    by = torch.arange(length)[:, None] / 100 ** (torch.arange(size // 2, dtype=torch.float64) * 2 / size)
    return torch.cat([by.cos(), by.sin()], -1)


def table_with_an_error() -> Tensor:
    numbers = table()
    numbers[7, 2] += 1e-3
    return numbers


class Tabled(nn.Module):
    """Turns by a buffer ``[N, E]``, the cosines and the sines of each column."""

    def __init__(self, numbers: Tensor, learned: bool = False) -> None:
        super().__init__()
        self.numbers = nn.Parameter(numbers) if learned else nn.Buffer(numbers)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.numbers[: x.shape[2]].chunk(2, -1)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def distinct(model: nn.Module, *args: Tensor, **options: Any) -> int:
    """Compile, compare results and gradients, and return how many rows are computed, padding not counted."""
    model = model.double()
    torch._dynamo.reset()
    radix_compile.reset_stats()
    compiled = torch.compile(model, backend="radix", options=OPTIONS | options)
    weights = list(model.parameters())
    ours, plain = compiled(*args), model(*args)
    count = radix_compile.stats().compact_tokens - int((args[1] == 0).sum())
    for mine, other in zip(as_tuple(ours), as_tuple(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    results = [torch.autograd.grad(as_tuple(result)[0].sum(), weights, allow_unused=True) for result in (ours, plain)]
    for mine, other in zip(*results, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)
    return count


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


ROTARY: dict[str, Callable[[], Program]] = {
    "half-split": lambda: Program(half_split),
    "interleaved": lambda: Program(interleaved),
    "partial": lambda: Program(partial),
    "complex": lambda: Program(as_complex),
    "several axes": lambda: Program(several_axes),
    "scaled": lambda: Program(scaled),
    "decaying": lambda: Program(decaying(1), decaying(-1)),
    "a table in a buffer": lambda: Program(Tabled(table())),
}

OTHERS: dict[str, Callable[[], Program]] = {
    "queries alone": lambda: Program(half_split, as_it_is),
    "keys alone": lambda: Program(as_it_is, half_split),
    "the other way round": lambda: Program(half_split, backwards),
    "other angles": lambda: Program(half_split, scaled),
    "squares": lambda: Program(squared),
    "a period": lambda: Program(periodic),
    "a little more": lambda: Program(perturbed),
    "not linear": lambda: Program(not_linear),
    "bfloat16": lambda: Program(in_bfloat16),
    "decaying alike": lambda: Program(decaying(1)),
    "one number of a table": lambda: Program(Tabled(table_with_an_error())),
    "growing fast": lambda: Program(growing(1), growing(-1)),
    "a random table": lambda: Program(Tabled(torch.randn(64, E))),
}


@pytest.mark.parametrize("name", ROTARY)
def test_rows_of_the_same_text_are_one_node(name: str) -> None:
    assert distinct(ROTARY[name](), *text()) == S


@pytest.mark.parametrize("name", OTHERS)
def test_not_where_scores_depend_on_more_than_distances(name: str) -> None:
    ids, padded = text()
    assert distinct(OTHERS[name](), ids, padded) == int(padded.sum())


def test_attention_on_rows() -> None:
    ids, padded = text()
    assert distinct(Program(half_split), ids, padded, fold_attention=False) == S
    assert distinct(Program(half_split, as_it_is), ids, padded, fold_attention=False) == int(padded.sum())


def test_a_learned_table_gets_its_gradient() -> None:
    """It would be that of other columns."""
    model = Program(Tabled(table(), learned=True))
    ids, padded = text()
    assert distinct(model, ids, padded) == int(padded.sum())
    with torch.no_grad():
        radix_compile.reset_stats()
        torch.testing.assert_close(
            torch.compile(model, backend="radix", options=OPTIONS)(ids, padded), model(ids, padded)
        )
    assert radix_compile.stats().compact_tokens - int((padded == 0).sum()) == S


def test_the_option_turns_it_off() -> None:
    ids, padded = text()
    assert distinct(Program(half_split), ids, padded, shift_rotary=False) == int(padded.sum())


# ------------------------------------------------------------------------------------- what else reads such a value


class Returned(Program):
    """The keys are returned, as caches are."""

    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        return super().attend(x, query, key, value, mask), key, query.mean(2)


class Added(Program):
    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        return super().attend(x, query, key, value, mask) + key.transpose(1, 2).flatten(2)


class AsValue(Program):
    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        return super().attend(x, query, key, key, mask)


class Residual(Program):
    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        return (super().attend(x, query, key, value, mask) + key.transpose(1, 2).flatten(2)).tanh()


class InTwoProducts(Program):
    """A second product of rotated queries, with keys that are not."""

    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        scores = query @ key.transpose(2, 3) + query @ self.heads(x).transpose(2, 3)
        weights = scores.masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1)
        return self.last((weights @ value).transpose(1, 2).flatten(2))


class TwiceScaled(Program):
    """Attention in several ops, with a factor between the product and the softmax."""

    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        scores = (query * 0.5) @ key.transpose(2, 3) * 0.3
        weights = scores.masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1)
        return self.last((weights @ value).transpose(1, 2).flatten(2))


class MaskAdded(Program):
    """Rows of padding see all keys, with the same weights whatever the scores are; but scores have a gradient there."""

    def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        hidden = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        return self.last(F.scaled_dot_product_attention(query, key, value, hidden).transpose(1, 2).flatten(2) ** 2)


def test_the_gradient_of_padding_that_sees_all_keys() -> None:
    ids, padded = text()
    assert distinct(MaskAdded(half_split), ids, padded) == S


@pytest.mark.parametrize("program", [Returned, Added])
@pytest.mark.parametrize("fold_attention", [True, False], ids=["tree", "rows"])
def test_values_that_are_returned_have_the_columns_of_the_program(program: type[Program], fold_attention: bool) -> None:
    assert distinct(program(half_split), *text(), fold_attention=fold_attention) == S


@pytest.mark.parametrize("program", [AsValue, Residual, InTwoProducts])
def test_not_where_another_op_reads_rotated_rows(program: type[Program]) -> None:
    ids, padded = text()
    assert distinct(program(half_split), ids, padded) == int(padded.sum())


def test_positions_that_are_computed_from_the_content() -> None:
    class ByContent(Program):
        def forward(self, ids: Tensor, padded: Tensor) -> Any:
            x = self.embedding(ids)
            query, key, value = (self.heads(one(x)) for one in (self.query, self.key, self.value))
            by = (ids % 3).cumsum(1)[:, None, :, None] * FREQUENCIES
            return self.attend(x, half_split(query, by), half_split(key, by), value, mask_of(padded))

    ids, padded = text()
    assert distinct(ByContent(half_split), ids, padded) == int(padded.sum())


@pytest.mark.parametrize("differ", [False, True])
def test_positions_of_several_axes_from_the_caller(differ: bool) -> None:
    """``[3, B, S]``, as Qwen2-VL takes them. Images have other positions on each axis."""

    class Axes(Program):
        def forward(self, ids: Tensor, padded: Tensor, positions: Tensor) -> Any:
            x = self.embedding(ids)
            query, key, value = (self.heads(one(x)) for one in (self.query, self.key, self.value))
            by = positions[..., None] * FREQUENCIES
            by = torch.cat([part[i % 3] for i, part in enumerate(by.split([1, 1, 2], -1))], -1)[:, None]
            return self.attend(x, half_split(query, by), half_split(key, by), value, mask_of(padded))

    ids, padded = text()
    positions = (padded.cumsum(1) - 1).clamp(min=0).expand(3, B, S).clone()
    if differ:
        positions[1, 2:] += 3 * (ids[2:] > 7)
    distinct(Axes(half_split), ids, padded, positions)  # which compares


def test_a_cache_that_is_filled_in_two_calls() -> None:
    model = build("Qwen3").double()
    compiled = torch.compile(model, backend="radix", options=OPTIONS)
    ids, padded = text()
    results = []
    for one in (compiled, model):
        with torch.no_grad():
            cache = one(ids[:, :7], attention_mask=padded[:, :7], use_cache=True).past_key_values
            results.append(one(ids[:, 7:], attention_mask=padded, past_key_values=cache, use_cache=True).logits)
    # The tables of transformers are in float32.
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert radix_compile.stats().folded_calls == 1


def test_attention_in_several_ops() -> None:
    assert distinct(TwiceScaled(interleaved), *text()) == S


def test_sequences_packed_in_a_row() -> None:
    class Packed(Program):
        def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
            x = self.embedding(ids)
            query, key, value = (self.heads(one(x)) for one in (self.query, self.key, self.value))
            i = torch.arange(ids.shape[1])
            mask = (i <= i[:, None]) & (numbers[:, :, None] == numbers[:, None])
            return self.attend(x, self.turn_query(query), self.turn_key(key), value, mask[:, None])

    ids = torch.tensor([[3, 4, 5, 6, 3, 4, 5, 7], [3, 4, 3, 4, 5, 6, 7, 8]])
    numbers = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2, 2, 2]])
    assert distinct(Packed(half_split), ids, numbers) == 7
    assert distinct(Packed(squared), ids, numbers) > 7


# ------------------------------------------------------------------------------------------- the check in each call


def test_a_table_that_is_changed_is_checked_again() -> None:
    turn = Tabled(table())
    model = Program(turn).double()
    compiled = torch.compile(model, backend="radix", options=OPTIONS)
    ids, padded = text()
    with torch.no_grad():
        for numbers, expected in ((table(), S), (torch.randn(64, E).double(), int(padded.sum())), (table(), S)):
            turn.numbers.data.copy_(numbers)  # which no version counts
            radix_compile.reset_stats()
            torch.testing.assert_close(compiled(ids, padded), model(ids, padded), rtol=1e-9, atol=1e-9)
            assert radix_compile.stats().compact_tokens - int((padded == 0).sum()) == expected


@pytest.mark.parametrize("error", [0.0, 0.2])
def test_rounding_does_not_hide_a_wrong_number(error: float) -> None:
    """In a product of 64 features, it would be no more than the rounding of a table in bfloat16."""
    numbers = table(size=64)
    numbers[7, 2] += error
    turn = Tabled(numbers.bfloat16())
    ids, padded = text()
    model = Program(lambda x: turn(x), size=64).double()
    args = [ids, padded, turn.numbers]
    fold = fold_of(model, ids, padded)
    check = rotary_check.rotary_check(fold)
    assert check is not None
    (place,) = check.contents
    given = [args[2] if i == place else ids for i in range(len(fold.captured.graph.find_nodes(op="placeholder")))]
    assert check(given, S, torch.device("cpu")) == (not error)


def test_a_number_of_the_call_is_checked_again() -> None:
    """The angles are those of a rotary embedding up to a number that the caller gives, as in dynamic scaling."""

    class Scaled(Program):
        def forward(self, ids: Tensor, padded: Tensor, most: int) -> Any:
            x = self.embedding(ids)
            query, key, value = (self.heads(one(x)) for one in (self.query, self.key, self.value))
            by = torch.arange(ids.shape[1]).clamp(max=most)[:, None] * FREQUENCIES
            return self.attend(x, half_split(query, by), half_split(key, by), value, mask_of(padded))

    model = Scaled(half_split).double()
    compiled = torch.compile(model, backend="radix", options=OPTIONS, dynamic=True)
    ids, padded = text()
    with torch.no_grad():
        for most, expected in ((50, S), (S - 5, int(padded.sum())), (60, S)):
            radix_compile.reset_stats()
            torch.testing.assert_close(compiled(ids, padded, most), model(ids, padded, most), rtol=1e-9, atol=1e-9)
            assert radix_compile.stats().compact_tokens - int((padded == 0).sum()) == expected


def test_each_size_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    check = rotary_check.RotatedPair.depends_on_distance

    def count(self: Any, args: Any, seq: int, device: torch.device) -> bool:
        checked.append(seq)
        return check(self, args, seq, device)

    monkeypatch.setattr(rotary_check.RotatedPair, "depends_on_distance", count)
    model = build("Qwen3", num_hidden_layers=3)
    compiled = torch.compile(model, backend="radix", options=OPTIONS, dynamic=True)
    with torch.no_grad():
        compiled(text(12)[0], attention_mask=text(12)[1], use_cache=False)
        checked.clear()  # Dynamo may have called the backend more than once
        for seq in (12, 9, 12, 9):
            ids, padded = text(seq)
            compiled(ids, attention_mask=padded, use_cache=False)
        assert checked == [9]  # and one layer stands for all
        before = radix_compile.stats().graphs
        for seq in (8, 10, 11):
            ids, padded = text(seq)
            compiled(ids, attention_mask=padded, use_cache=False)
        assert checked == [9, 8, 10, 11]
        assert radix_compile.stats().graphs == before  # no check has made a guard about the number of columns
        compiled(ids, attention_mask=torch.ones_like(padded), use_cache=False)
        ids, padded = text(7)
        compiled(ids.flip(1), attention_mask=padded.flip(1), use_cache=False)
    assert checked == [9, 8, 10, 11]  # nothing starts at a later column


def test_a_check_that_cannot_run_costs_sharing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> bool:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(rotary_check.RotatedPair, "depends_on_distance", fail)
    ids, padded = text()
    assert distinct(Program(half_split), ids, padded) == int(padded.sum())


def test_one_warning_where_the_check_fails() -> None:
    ids, padded = text()
    for turn, expected in ((half_split, 0), (squared, 1)):
        torch._dynamo.reset()
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            torch.compile(Program(turn).double(), backend="radix", options=OPTIONS)(ids, padded)
        found = [str(one.message) for one in caught if "left padding" in str(one.message)]
        assert len(found) == expected
        assert all("test_find_rotary.py" in one and "pass position_ids" in one for one in found)


def test_nothing_is_searched_without_padding() -> None:
    ids, padded = text()
    model = Program(half_split).double()

    assert fold_of(model, ids, padded).rotary is not None

    class Causal(Program):
        def attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    assert fold_of(Causal(half_split).double(), ids, padded).rotary is None


# --------------------------------------------------------------------------------------------------- the error bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_angles_at_other_columns(dtype: torch.dtype) -> None:
    """The results are as far from those in float64 as the plain program's are."""
    length = 512
    model = build("Qwen3").to(dtype)
    exact = build("Qwen3").double()
    torch.manual_seed(0)
    prompt = torch.randint(3, VOCABULARY, (length,))
    starts = torch.tensor([0, 100, 200, 300])
    ids = torch.stack([F.pad(prompt[: length - start], (start, 0)) for start in starts.tolist()])
    padded = (torch.arange(length) >= starts[:, None]).long()
    compiled = torch.compile(model, backend="radix", options=OPTIONS)
    with torch.no_grad():
        ours, plain, right = (
            one(ids, attention_mask=padded, use_cache=False).logits[padded.bool()].double()
            for one in (compiled, model, exact)
        )
    assert radix_compile.stats().compact_tokens < 0.6 * ids.numel() + starts.sum()
    error, expected = ((one - right).square().mean().sqrt() for one in (ours, plain))
    assert error <= 1.5 * expected

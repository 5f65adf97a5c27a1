"""Kinds of programs that once returned wrong numbers: masks by column, buffers, mask values, integers that wrap around.

Each may fold or not. Its numbers, NaN included, must be those of the plain program. ``docs/soundness.md`` names the
claim of the analysis that each test is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import radix_compile
from radix_compile import backend

B, S, D = 4, 12, 8
VOCABULARY = 16
LOWEST = torch.finfo(torch.float64).min

Step = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def everything_folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fold graphs with any share of token-wise arithmetic, and compute in float64."""
    monkeypatch.setattr(backend, "LEAST_SHARE", 0.0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Model(nn.Module):
    """An embedding, a projection, ``step(model, x, ids, *inputs)`` with ``x`` ``[B, S, D]``, and another projection."""

    def __init__(self, step: Step, buffer: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.last = nn.Embedding(VOCABULARY, D), nn.Linear(D, D), nn.Linear(D, D)
        self.positions = nn.Parameter(torch.randn(S, D))
        self.register_buffer("buffer", buffer)
        self.step = step

    def forward(self, ids: Tensor, *inputs: Tensor) -> Tensor:
        return self.last(self.step(self, self.first(self.embedding(ids)), ids, *inputs))


def shared_ids() -> Tensor:
    """``[B, S]`` token ids with seven equal columns in front."""
    ids = torch.randint(1, VOCABULARY, (B, S), generator=torch.Generator().manual_seed(0))
    ids[1:, :7] = ids[0, :7]
    return ids


# The same text after different amounts of left padding, and in packed documents.
STARTS = torch.tensor([0, 3, 5, 3])[:, None]
PADDING = (torch.arange(S) >= STARTS).long()
PADDED = torch.where(PADDING != 0, 2 + torch.arange(S) - STARTS, 1)
POSITIONS = (PADDING.cumsum(1) - 1).clamp(min=0)
DOCUMENTS = torch.tensor([[0] * 6 + [1] * 6] * 2 + [[0] * 3 + [1] * 6 + [2] * 3] * 2)
PACKED = torch.arange(1, 7).repeat(B, 2)


def check(step: Step, ids: Tensor, *inputs: Tensor, buffer: Tensor | None = None, folds: bool | None = None) -> None:
    """Compare with the plain model, NaN included. If ``folds`` is not None, the call must fold or must not."""
    model = Model(step, buffer)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"})
    with torch.no_grad():
        expected = model(ids, *inputs)
        ours = compiled(ids, *inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert not expected.isnan().all()
    if folds is not None:
        assert radix_compile.stats().folded_calls == folds


def compact_tokens() -> int:
    return radix_compile.stats().compact_tokens


def causal() -> Tensor:
    return torch.arange(S)[None] <= torch.arange(S)[:, None]


def same(numbers: Tensor) -> Tensor:
    return numbers[:, :, None] == numbers[:, None, :]


def attention(
    x: Tensor, mask: Tensor, floor: float = -math.inf, change: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    scores = x @ x.mT / math.sqrt(D)
    scores = scores if change is None else change(scores)
    return torch.where(mask, scores, floor).softmax(-1) @ x


def as_one_op(x: Tensor, mask: Tensor) -> Tensor:
    heads = x[:, None]
    return F.scaled_dot_product_attention(heads, heads, heads, mask[:, None] if mask.ndim == 3 else mask)[:, 0]


# ------------------------------------------------------------------------------ masks by column, in shifted sequences


def columns() -> Tensor:
    return torch.arange(S)


BY_COLUMN: dict[str, Callable[[], Tensor]] = {
    "chunks": lambda: same(columns()[None] // 4)[0],
    "a window and sink columns": lambda: (columns()[:, None] - columns()[None] < 2) | (columns()[None] < 4),
    "sink columns, negated": lambda: ~((columns()[:, None] - columns()[None] >= 2) & ~(columns()[None] < 4)),
    "from a query column on": lambda: (columns()[:, None] >= 6) | (columns()[:, None] - columns()[None] < 2),
    "to a query column": lambda: ~(columns()[:, None] >= 6) | (columns()[:, None] - columns()[None] < 2),
    "a window for each column": lambda: columns()[:, None] - columns()[None] < (1 + columns() % 3)[:, None],
    "chunks or a window": lambda: same(columns()[None] // 4)[0] | (columns()[:, None] - columns()[None] < 2),
    "columns ordered modulo": lambda: (columns() % 5)[None] <= (columns() % 5)[:, None],
}
RELATIVE: dict[str, Callable[[], Tensor]] = {
    "a window": lambda: columns()[:, None] - columns()[None] < 3,
    "near or far": lambda: (columns()[:, None] - columns()[None] < 2) | (columns()[:, None] - columns()[None] >= 4),
}


@pytest.mark.parametrize("attend", [attention, as_one_op])
@pytest.mark.parametrize("name", [*BY_COLUMN, *RELATIVE])
@pytest.mark.parametrize("first", ["tables", "documents"])
def test_packed_documents(name: str, first: str, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A mask by column differs from document to document. It is joined with the causal mask or the documents first."""
    table = {**BY_COLUMN, **RELATIVE}[name]

    def step(model: Model, x: Tensor, ids: Tensor, documents: Tensor) -> Tensor:
        if first == "tables":
            mask = (causal() & table())[None] & same(documents)
        else:
            mask = (table()[None] & same(documents)) & causal()
        return attend(x, mask)

    check(step, PACKED, DOCUMENTS)
    if name in RELATIVE:
        assert compact_tokens() == 12  # the paths of 1 to 6, and of 4 to 6 followed by 1 to 3


@pytest.mark.parametrize("attend", [lambda x, mask: attention(x, mask, LOWEST), as_one_op])
@pytest.mark.parametrize("name", [*BY_COLUMN, *RELATIVE])
@pytest.mark.parametrize("first", ["tables", "padding"])
def test_left_padding(name: str, first: str, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
    table = {**BY_COLUMN, **RELATIVE}[name]

    def step(model: Model, x: Tensor, ids: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
        x = x + F.embedding(positions, model.positions)
        seen = (padding != 0)[:, None, :]
        mask = (causal() & table())[None] & seen if first == "tables" else (table() & seen) & causal()
        return attend(x, mask)

    check(step, PADDED, PADDING, POSITIONS)


SHOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all but a column": lambda padding, ids: padding * (columns() != 6),
    "every other column": lambda padding, ids: padding * (columns() % 2),
    "by tokens": lambda padding, ids: padding * (ids % 5 != 0),
    "by tokens and columns": lambda padding, ids: padding * ((ids + columns()) % 5 != 0),
    "by a count of tokens": lambda padding, ids: padding * ((ids % 3 == 0).cumsum(1) % 2),
}


@pytest.mark.parametrize("attend", [lambda x, mask: attention(x, mask, LOWEST), as_one_op])
@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("kind", ["packed", "left padding"])
def test_shown_keys(name: str, kind: str, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
    """With attention on the tree, only the plan reads the mask of hidden keys. This mask may depend on the column."""

    def packed(model: Model, x: Tensor, ids: Tensor, documents: Tensor) -> Tensor:
        shown = SHOWN[name](torch.ones_like(ids), ids) != 0
        sees = (shown[:, None, :] & causal()) | (columns() == columns()[:, None])
        return attend(x, sees & same(documents))

    def padded(model: Model, x: Tensor, ids: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
        x = x + F.embedding(positions, model.positions)
        return attend(x, causal() & (SHOWN[name](padding, ids) != 0)[:, None, :])

    if kind == "packed":
        check(packed, PACKED, DOCUMENTS)
    else:
        check(padded, PADDED, PADDING, POSITIONS)


def by_column(scores: Tensor) -> Tensor:
    return torch.where(~(columns()[None] < 4), 3 * scores, scores)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "a boost by key": by_column,
    "a boost by query": lambda scores: torch.where(~(columns()[:, None] < 4), 3 * scores, scores),
    "a boost by chunk": lambda scores: torch.where(same(columns()[None] // 4), 3 * scores, scores),
    "a bias by key": lambda scores: scores + 0.3 * columns(),
    "a bias by query and key": lambda scores: scores + 0.1 * columns() * columns()[:, None],
    "a factor by query": lambda scores: scores * (1 + columns()[:, None]),
    "a bias by chunk": lambda scores: scores + (columns()[None] // 4 == columns()[:, None] // 4),
    "a bias where columns are few": lambda scores: scores + (columns() < 4),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("kind", ["packed", "left padding"])
def test_scores_by_column(name: str, kind: str) -> None:
    def packed(model: Model, x: Tensor, ids: Tensor, documents: Tensor) -> Tensor:
        return attention(x, causal() & same(documents), change=SCORES[name])

    def padded(model: Model, x: Tensor, ids: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
        x = x + F.embedding(positions, model.positions)
        return attention(x, causal() & (padding != 0)[:, None, :], change=SCORES[name])

    if kind == "packed":
        check(packed, PACKED, DOCUMENTS)
    else:
        check(padded, PADDED, PADDING, POSITIONS)


def test_bias_of_padding_by_query_column() -> None:
    """The query columns are a feature dimension of the bias until it is added to the scores."""

    def step(model: Model, x: Tensor, ids: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
        x = x + F.embedding(positions, model.positions)
        bias = torch.where(
            (padding != 0)[:, None, :] & causal(), 0.2 * columns()[:, None] * (ids % 3)[:, None, :], LOWEST
        )
        return (x @ x.mT + bias).softmax(-1) @ x

    check(step, PADDED, PADDING, POSITIONS)


def test_numbers_of_sequences_that_are_the_same_in_all_rows() -> None:
    """A constant table may mark where sequences start. Paths start there."""

    def step(model: Model, x: Tensor, ids: Tensor) -> Tensor:
        return attention(x, causal() & same((columns() // 6)[None]))

    check(step, PACKED, folds=True)
    assert compact_tokens() == 6


# ------------------------------------------------------------------------------------------------------ long buffers


def holes(length: int, *at: int) -> Tensor:
    buffer = torch.ones(1, length, dtype=torch.long)
    buffer[0, list(at)] = 0
    return buffer


BUFFERS: dict[str, Callable[[Tensor], Tensor]] = {
    "the truth": lambda buffer: (buffer[:, :S] != 0)[:, None, :],
    "the truth, then cut": lambda buffer: (buffer != 0)[:, :S][:, None, :],
    "as bool": lambda buffer: buffer.bool()[:, None, :S],
    "repeated": lambda buffer: (buffer.expand(B, -1)[:, :S] != 0)[:, None, :],
    "compared": lambda buffer: same(buffer[:, :S]),
    "ordered": lambda buffer: buffer[:, None, :S] <= buffer[:, :S, None],
    "from the middle": lambda buffer: (buffer[:, 1 : S + 1] != 0)[:, None, :],
    "in pairs, then cut": lambda buffer: (buffer[:, None, :] == buffer[:, :, None])[:, :S, :S],
    "runs": lambda buffer: same((torch.diff(buffer, prepend=buffer[:, :1] - 1) != 1).cumsum(-1)[:, :S]),
}


@pytest.mark.parametrize("length", [S, B * S, B * S + 5, S + 1])
@pytest.mark.parametrize("name", BUFFERS)
def test_row_buffers(name: str, length: int) -> None:
    if name == "from the middle":
        length += 1

    def step(model: Model, x: Tensor, ids: Tensor) -> Tensor:
        assert isinstance(model.buffer, Tensor)
        return attention(x, causal() & BUFFERS[name](model.buffer), LOWEST)

    check(step, shared_ids(), buffer=holes(length, 0, 1, 6, S - 1))


# ------------------------------------------------------------------------------------------------ masks in a baddbmm


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0, -1.0])
@pytest.mark.parametrize("floor", [LOWEST, -math.inf])
@pytest.mark.parametrize("hidden", [LOWEST, -math.inf])
def test_baddbmm_with_a_mask(beta: float, floor: float, hidden: float) -> None:
    def step(model: Model, x: Tensor, ids: Tensor, padding: Tensor) -> Tensor:
        bias = torch.where((padding != 0)[:, None, :], 0.0, floor).expand(B, S, S)
        scores = torch.baddbmm(bias, x, x.mT, beta=beta, alpha=0.5)
        return torch.where(causal(), scores, hidden).softmax(-1) @ x

    right = torch.ones(B, S, dtype=torch.long)
    right[1, 3] = right[2, 5] = right[3, 8:] = 0
    for padding in (right, PADDING):
        torch._dynamo.reset()
        check(step, shared_ids() if padding is right else PADDED, padding)


@pytest.mark.parametrize("floor", [LOWEST, -1e9, -math.inf])
@pytest.mark.parametrize("select", [True, False])
def test_gradients_of_rows_that_see_nothing_but_a_floor(floor: float, select: bool) -> None:
    """Fully masked rows attend to all hidden keys equally, which a log-sum-exp of such low scores cannot represent."""

    def step(model: Model, x: Tensor, ids: Tensor, padding: Tensor) -> Tensor:
        bias = torch.where((padding != 0)[:, None, None, :], 0.0, floor)
        bias = (
            bias[:, 0] if select else bias.squeeze(1).cos().acos() + bias.squeeze(1)
        )  # in ops that the analysis does not follow
        scores = torch.baddbmm(bias.expand(B, S, S), x.tanh(), x.mT)
        return torch.where(causal(), scores, -math.inf).softmax(-1) @ x

    model = Model(step)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"})
    gradients = []
    for run in (compiled, model):
        result = run(PADDED, PADDING)
        factors = torch.arange(result.numel()).view(result.shape).cos()
        gradients.append(torch.autograd.grad((result * factors).nansum(), [model.embedding.weight, model.first.weight]))
    for ours, expected in zip(*gradients, strict=True):
        known = ~expected.isnan()
        torch.testing.assert_close(ours[known], expected[known], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_rows_that_are_no_numbers_stay_in_their_sequences(layers: int) -> None:
    """A fully masked row of padding is NaN, and so are rows that read it, even with a weight of zero."""

    def step(model: Model, x: Tensor, ids: Tensor, padding: Tensor) -> Tensor:
        for _ in range(layers):
            x = x + model.first(attention(x, causal() & (padding != 0)[:, None, :]))
        return x

    check(step, PADDED, PADDING)


# ----------------------------------------------------------------------------------- tables made of uniform tensors

NOT_UNIFORM: dict[str, Callable[[], Tensor]] = {
    "diff": lambda: torch.diff(torch.zeros(S), prepend=torch.zeros(S)[:1] - 1),
    "diff of rows": lambda: torch.diff(torch.zeros(1, S), prepend=torch.zeros(1, S)[:, :1] - 1)[0],
    "cumsum": lambda: torch.ones(S).cumsum(0),
    "cumprod": lambda: torch.full((S,), 1.1).cumprod(0),
    "pad": lambda: F.pad(torch.ones(S - 1), (1, 0)),
    "cat": lambda: torch.cat([torch.ones(3), torch.zeros(S - 3)]),
    "stack": lambda: torch.stack([torch.ones(S // 2), torch.zeros(S // 2)], 1).flatten(),
    "repeat": lambda: torch.cat([torch.ones(1), torch.zeros(2)]).repeat(S // 3),
    "interleaved": lambda: torch.cat([torch.ones(1), torch.zeros(2)]).repeat_interleave(S // 3),
    "tril": lambda: torch.ones(S, S).tril().sum(0),
    "triu": lambda: torch.ones(S, S).triu()[3],
    "index_put": lambda: torch.zeros(S).index_put((torch.tensor([2, 3]),), torch.tensor(1.0)),
    "scatter": lambda: torch.zeros(S).scatter(0, torch.arange(3), 1.0),
    "index_fill": lambda: torch.zeros(S).index_fill(0, torch.tensor([1, 4]), 1.0),
    "sort": lambda: torch.zeros(S).sort().indices.double(),
    "argsort": lambda: torch.ones(S).argsort(stable=True).double(),
    "topk": lambda: torch.ones(2 * S).topk(S).indices.double(),
    "roll": lambda: F.pad(torch.ones(1), (0, S - 1)).roll(2),
    "slice_scatter": lambda: torch.zeros(S).slice_scatter(torch.ones(3), 0, 2, 5),
    "select_scatter": lambda: torch.zeros(S).select_scatter(torch.ones(()), 0, 4),
    "linear": lambda: F.linear(torch.ones(1, 2), torch.ones(S, 2), torch.arange(S).double())[0],
    "one_hot": lambda: F.one_hot(torch.ones(1, dtype=torch.long), S)[0].double(),
    "eye": lambda: torch.eye(S)[2],
    "masked": lambda: torch.ones(S).masked_fill(torch.arange(S) < 3, 0.0),
    "embedding": lambda: F.embedding(torch.arange(S), torch.eye(S)).sum(0).cumsum(0),
    "gather": lambda: torch.ones(S).cumsum(0).gather(0, torch.arange(S)),
    "diagonal": lambda: torch.diag_embed(torch.ones(S)).triu(1).sum(1) + torch.ones(S, S).tril().diagonal(),
    "bucketize": lambda: torch.bucketize(torch.arange(S), torch.tensor([2, 5])).double(),
    "linspace": lambda: torch.linspace(0, 1, S),
    "flip": lambda: torch.ones(S).cumsum(0).flip(0),
    "unfold": lambda: torch.ones(2 * S).cumsum(0).unfold(0, 2, 2).sum(1),
    "baddbmm": lambda: torch.baddbmm(torch.arange(S).double(), torch.ones(1, 1, 2), torch.ones(1, 2, S))[0, 0],
    "addmm": lambda: torch.addmm(torch.arange(S).double(), torch.ones(1, 2), torch.ones(2, S))[0],
    "einsum": lambda: torch.einsum("i,ij->j", torch.ones(S), torch.ones(S, S).tril()),
    "layer_norm": lambda: F.layer_norm(torch.ones(1, S), (S,), torch.arange(S).double())[0] + torch.arange(S),
    "searchsorted": lambda: torch.searchsorted(torch.arange(S), torch.arange(S)).double(),
}


@pytest.mark.parametrize("name", NOT_UNIFORM)
def test_tables_of_uniform_tensors(name: str) -> None:
    def step(model: Model, x: Tensor, ids: Tensor) -> Tensor:
        return x + NOT_UNIFORM[name]()[:, None]

    check(step, shared_ids(), folds=True)


# ----------------------------------------------------------------------------------------- mask values in other types


def floor_of(dtype: torch.dtype) -> Tensor:
    return torch.where(causal(), torch.tensor(0.0, dtype=dtype), torch.tensor(torch.finfo(dtype).min, dtype=dtype))


FLOORS: dict[str, Callable[[Tensor], Tensor]] = {
    "cast, then a bias": lambda scores: scores + floor_of(torch.float16).double() + 3e4 * columns(),
    "promoted, then a bias": lambda scores: scores + floor_of(torch.float16) + 3e4 * columns(),
    "a bias first": lambda scores: scores + 3e4 * columns() + floor_of(torch.float16),
    "by way of float32": lambda scores: scores + (floor_of(torch.float16).float() + 7e3 * columns().float()),
    "small biases one after the other": lambda scores: (
        scores
        + floor_of(torch.float16)
        + 9e3 * (columns() == 11)
        + 9e3 * (columns() == 11)
        + 9e3 * (columns() == 11)
        + 9e3 * (columns() == 11)
        + 9e3 * (columns() == 11)
        + 9e3 * (columns() == 11)
        + 9e3 * (columns() == 11)
    ),
    "of float32": lambda scores: scores + floor_of(torch.float32) + 1e38 * columns() * (columns() > 3),
    "scaled": lambda scores: (scores + floor_of(torch.float16)) / 2 + 3e3 * columns(),
    "scaled twice": lambda scores: (scores + floor_of(torch.float32)) / 1e30 / 1e6 + columns(),
    "subtracted from": lambda scores: centred(scores + floor_of(torch.float16)) + 6e3 * columns(),
    "raised": lambda scores: torch.maximum(scores + floor_of(torch.float64), torch.tensor(-65504.0)) + 3e4 * columns(),
    "two masks": lambda scores: (
        scores + floor_of(torch.float16) + torch.where(causal().mT, 0.0, -math.inf).mT.neg().neg()
    ),
    "a narrow mask in a wide one": lambda scores: torch.where(causal(), scores + floor_of(torch.float16), LOWEST),
    "to a narrower type": lambda scores: (scores + floor_of(torch.float64) - 3e4).half().double() + columns(),
}


def centred(scores: Tensor) -> Tensor:
    return scores - scores.amax(-1, keepdim=True)


@pytest.mark.parametrize("name", FLOORS)
def test_floors(name: str) -> None:
    def step(model: Model, x: Tensor, ids: Tensor) -> Tensor:
        return FLOORS[name](x @ x.mT).softmax(-1) @ x

    check(step, shared_ids())


# ------------------------------------------------------------------------------------------------ integers that wrap

LARGE = 2**31 - 4


def int32() -> Tensor:
    return torch.arange(S, dtype=torch.int32)


WRAPPING: dict[str, Callable[[], Tensor]] = {
    "columns": lambda: int32()[None] + LARGE <= int32()[:, None] + LARGE,
    "one of them": lambda: int32()[None] <= int32()[:, None] + LARGE,
    "in two steps": lambda: int32()[None] + 2**30 + 2**30 - 4 <= int32()[:, None] + 2**30 + 2**30 - 4,
    "subtracted": lambda: int32()[None] - LARGE - 10 <= int32()[:, None] - LARGE - 10,
    "a distance": lambda: int32()[None] - int32()[:, None] + LARGE <= LARGE,
    "a distance and a number": lambda: (int32()[None] - LARGE) - (int32()[:, None] + LARGE) <= 8,
    "narrow": lambda: (torch.arange(S).to(torch.int8) + 120)[None] <= (torch.arange(S).to(torch.int8) + 120)[:, None],
    "int64": lambda: torch.arange(S)[None] + (2**63 - 4) <= torch.arange(S)[:, None] + (2**63 - 4),
}


@pytest.mark.parametrize("name", WRAPPING)
def test_columns_that_wrap(name: str) -> None:
    def step(model: Model, x: Tensor, ids: Tensor) -> Tensor:
        return attention(x, WRAPPING[name]() & causal() if name == "int64" else WRAPPING[name](), LOWEST)

    check(step, shared_ids())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offset", [0, 5])
def test_positions_that_wrap(dtype: torch.dtype, offset: int) -> None:
    """The positions of a document grow by one per column, and past the largest number of their dtype."""
    most = torch.iinfo(dtype).max

    def step(model: Model, x: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        runs = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        return attention(x, same(runs) & (positions[:, None, :] + offset <= positions[:, :, None] + offset), LOWEST)

    ordinary = torch.arange(S, dtype=dtype).expand(B, S).contiguous()
    check(step, shared_ids(), ordinary, folds=True)
    for start in (most - 4, most - 12, most - 20):
        radix_compile.reset_stats()
        torch._dynamo.reset()
        check(step, shared_ids(), start + ordinary)

"""Programs made to mislead the analysis. All of them must give the numbers of the plain model.

``FOLDS`` look dangerous but are not, and must fold. ``REFUSED`` look harmless but are not, and must not fold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, arange, nn

import radix_compile
from tests.models import VOCABULARY, shared_batch

B, S, D = 6, 12, 12
"""There are as many features as columns, so that no size reveals the meaning of a dimension."""

Trick = Callable[..., Tensor]


class Model(nn.Module):
    """Token-wise layers with ``trick(x, ids, *rest)`` between them; ``x`` is ``[B, S, D]``."""

    def __init__(self, trick: Trick) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.before = nn.Linear(D, D)
        self.trick = trick
        self.after = nn.Sequential(
            nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)
        )

    def forward(self, ids: Tensor, *rest: Tensor) -> Tensor:
        return self.after(self.trick(self.before(self.embedding(ids)), ids, *rest))


def batch() -> Tensor:
    """Token ids of two groups of sequences. Each group shares a prefix, and the groups alternate."""
    ids, other = shared_batch(B, S, 7), shared_batch(B, S, 5, seed=1)
    ids[::2] = other[::2]
    return ids


def run(trick: Trick, *rest: Tensor, dynamic: bool | None = None) -> int:
    """Compare with the plain model in float64. Returns the number of folded calls."""
    model, ids = Model(trick).double(), batch()
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "eager", "fold": "always"}, dynamic=dynamic
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, *rest), model(ids, *rest), rtol=1e-9, atol=1e-9)
    return radix_compile.stats().folded_calls


# -------------------------------------------------------------------------------------------------------- attention


LOWEST = torch.finfo(torch.float64).min


def columns() -> tuple[Tensor, Tensor]:
    """Query and key columns, ``[S, 1]`` and ``[1, S]``."""
    return arange(S)[:, None], arange(S)[None, :]


def causal() -> Tensor:
    query, key = columns()
    return key <= query


def attention(x: Tensor, visible: Tensor, floor: float = LOWEST) -> Tensor:
    scores = x @ x.mT / math.sqrt(D)
    return torch.where(visible, scores, floor).softmax(-1) @ x


def sdpa(x: Tensor, visible: Tensor | None = None, **kwargs: Any) -> Tensor:
    heads = x[:, None]
    return F.scaled_dot_product_attention(heads, heads, heads, visible, **kwargs)[:, 0]


def seeing(visible: Callable[[], Tensor]) -> Trick:
    return lambda x, ids: attention(x, visible())


def packed(
    runs: Callable[[Tensor], Tensor], number: Callable[[Tensor], Tensor] = lambda positions: positions, dim: int = -1
) -> Trick:
    """Attention within documents, which ``runs`` numbers from where ``number(positions)`` does not grow by one."""

    def trick(x: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        counted = number(positions)
        first = counted[:, :1] if dim == -1 else counted[:1]
        document = runs(torch.diff(counted, dim=dim, prepend=first - 1) != 1)
        same = document[:, None, :] == document[:, :, None]
        return attention(x, same & (positions[:, None, :] <= positions[:, :, None]))

    return trick


POSITIONS = arange(S).remainder(4).expand(B, S).contiguous()
PADDING = torch.ones(B, S, dtype=torch.long)
PADDING[:, :3] = 0
GAP = PADDING.clone()
GAP[:, 5:10] = 0


def real(padding: Tensor) -> Tensor:
    """A mask of the keys that are no padding."""
    return padding[:, None, :] != 0


def window(width: int) -> Tensor:
    query, key = columns()
    return causal() & (key > query - width)


def mask_of_masked_rows(x: Tensor, ids: Tensor, padding: Tensor) -> Tensor:
    """The second mask depends on the first layer, whose fully masked rows attend to later rows."""
    first = attention(x, causal() & real(padding))
    query, key = columns()
    shown = (first.sum(-1) * 1e4).long() % 2 == 0
    return sdpa(x, causal() & (shown[:, None, None, :] | (query == key)))


def grouped_sequences(x: Tensor, ids: Tensor) -> Tensor:
    """Without a head dimension, grouped queries read the keys of another sequence."""
    queries = torch.stack([x, 2 * x]).reshape(2 * B, S, D)
    return F.scaled_dot_product_attention(queries, x, x, is_causal=True, enable_gqa=True).reshape(2, B, S, D).sum(0)


def narrow_columns(x: Tensor, ids: Tensor) -> Tensor:
    """A mask of column numbers that wrap around below zero."""
    count = arange(S, dtype=torch.uint8)
    return attention(x, (count[None, :] <= (count - 5)[:, None]) | (arange(S)[None, :] == arange(S)[:, None]))


# ----------------------------------------------------------------------------------------------------------- tables


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def empty_changes_dtype(x: Tensor, ids: Tensor) -> Tensor:
    """A concatenation with an empty float tensor turns bytes into floats, which do not overflow."""
    joined = torch.cat([torch.empty(0), ids.to(torch.uint8)], 1)
    return x + (joined * 100).double()[..., None]


def biased(x: Tensor, bias: Tensor) -> Tensor:
    """Biased attention whose mask is the lowest number, not minus infinity."""
    heads = x[:, None].expand(B, B, S, D)
    return (torch.where(causal(), heads @ heads.mT + bias, LOWEST).softmax(-1) @ heads).mean(1)


def by_distance(x: Tensor, ids: Tensor) -> Tensor:
    query, key = columns()
    slopes = torch.pow(torch.tensor(2.0**-2), arange(1, B + 1)).double()
    return biased(x, slopes[:, None, None] * (key - query))


def as_low_as_the_mask(x: Tensor, ids: Tensor, slope: Tensor) -> Tensor:
    """A bias as low as the mask, so that the first row attends to all others."""
    query, _ = columns()
    return biased(x, slope * (S - query))


def masked_rows_times(x: Tensor, ids: Tensor, padding: Tensor, factor: Tensor) -> Tensor:
    """All rows read the fully masked rows in the second layer. A factor of zero makes these rows zero."""
    first = attention(x, causal() & real(padding)) * factor[:, :, None]
    return attention(first, causal())


FOLDS: dict[str, tuple[Any, ...]] = {
    "rows that saw no key, times zero": (
        lambda x, ids, padding: masked_rows_times(x, ids, padding, padding),
        PADDING,
    ),
    "weights times a table": (
        lambda x, ids, table: torch.where(causal(), x @ x.mT, LOWEST).softmax(-1) @ table,
        numbers(S, D),
    ),
    "a reshape that cuts rows, and the one back": (lambda x, ids: x.reshape(B, S // 2, 2 * D).reshape(B, S, D),),
    "a bias by distance": (by_distance,),
    "an empty tensor that changes the dtype": (empty_changes_dtype,),
    "window": (lambda x, ids: attention(x, window(3)),),
    "not the future": (seeing(lambda: ~(columns()[1] > columns()[0])),),
    "transposed twice": (lambda x, ids: torch.where(causal(), x @ x.mT, -math.inf).mT.softmax(-2).mT @ x,),
    "weights applied twice": (
        lambda x, ids: (lambda weights: weights @ (weights @ x))(
            torch.where(causal(), x @ x.mT, -math.inf).softmax(-1)
        ),
    ),
    "minus infinity plus anything": (
        lambda x, ids, bias: (torch.where(causal(), x @ x.mT, -math.inf) + bias).softmax(-1) @ x,
        numbers(S, S),
    ),
    "a bias for each head": (
        lambda x, ids, slopes: F.scaled_dot_product_attention(
            *[x[:, None].expand(B, B, S, D)] * 3,
            torch.where(causal(), slopes[:, None, None] * arange(S).double(), -math.inf),
        ).mean(1),
        numbers(B),
    ),
    "mask for some heads, as many as sequences": (
        lambda x, ids: F.scaled_dot_product_attention(
            *[x[:, None].expand(B, B, S, D)] * 3,
            causal() & (arange(B)[:, None, None] < 3) | (columns()[0] == columns()[1]),
        ).mean(1),
    ),
    "packed documents": (packed(lambda breaks: breaks.cumsum(-1)), POSITIONS),
    "packed documents, one row of positions": (packed(lambda breaks: breaks.cumsum(-1)), POSITIONS[:1]),
    "padding": (lambda x, ids, padding: attention(x, causal() & real(padding)), PADDING),
    "padding, inverted": (lambda x, ids, padding: attention(x, causal() & (padding[:, None, :] == 0)), PADDING),
    "padding, the same for all": (lambda x, ids, padding: attention(x, causal() & real(padding)), PADDING[:1]),
    "padding, in a window, then in none": (
        lambda x, ids, padding: attention(attention(x, window(3) & real(padding)), causal() & real(padding)),
        GAP,
    ),
    "padding, in none, then in a window": (
        lambda x, ids, padding: attention(attention(x, causal() & real(padding)), window(3) & real(padding)),
        GAP,
    ),
    "a table of columns": (lambda x, ids, table: x + table, numbers(S, D)),
    "a table as wide as the sequence": (lambda x, ids, table: x @ table, numbers(S, S)),
    "a table by column and token": (
        lambda x, ids, table: x + table.expand(B, S, D).gather(2, ids.remainder(D)[..., None]),
        numbers(S, D),
    ),
    "looked up by column and token": (
        lambda x, ids, table: x + table[arange(S), ids.remainder(D)][..., None],
        numbers(S, D),
    ),
    "sequences and columns swapped, and back": (
        lambda x, ids: x.transpose(0, 1).reshape(S * B, D).relu().reshape(S, B, D).transpose(0, 1),
    ),
    "indices that count": (lambda x, ids: x[arange(B)[:, None, None], arange(S)[:, None], arange(D)],),
    # Tables made of uniform tensors that are not uniform any more.
    "the order of ties": (lambda x, ids: x + torch.zeros(S).sort(stable=True).indices[:, None],),
    "uniform weights, a bias": (lambda x, ids, bias: x + F.linear(ones(1, D), ones(S, D), bias).T, numbers(S)),
    "uniform product, a bias": (lambda x, ids, bias: x + torch.addmm(bias, ones(1, D), ones(D, S)).T, numbers(S)),
    "uniform norm, a weight": (lambda x, ids, w: x + F.layer_norm(ones(S), (S,), w, w)[:, None], numbers(S)),
    "uniform running sum": (lambda x, ids: x + ones(1, S, 1).cumsum(1),),
}

REFUSED: dict[str, tuple[Any, ...]] = {
    "rows that saw no key, times something else": (masked_rows_times, PADDING, torch.ones_like(PADDING)),
    "a bias as low as the mask": (as_low_as_the_mask, ones(1) * LOWEST / S),
    "a bias as low as the mask, computed": (
        lambda x, ids: as_low_as_the_mask(x, ids, torch.pow(ones(1) * 2, arange(1023, 1024)) * (-2 / S)),
    ),
    "one column too many": (seeing(lambda: columns()[1] <= columns()[0] + 1),),
    "strictly earlier": (seeing(lambda: columns()[1] < columns()[0]),),
    "before the window": (seeing(lambda: causal() & (columns()[1] < columns()[0] - 3)),),
    "mask transposed": (lambda x, ids: attention(x, causal().mT),),
    "scores transposed": (lambda x, ids: torch.where(causal(), x @ x.mT, -math.inf).mT.softmax(-1) @ x,),
    "weights transposed": (lambda x, ids: torch.where(causal(), x @ x.mT, -math.inf).softmax(-1).mT @ x,),
    "softmax over queries": (lambda x, ids: torch.where(causal(), x @ x.mT, -math.inf).softmax(-2) @ x,),
    "mask after the softmax": (lambda x, ids: (x @ x.mT).softmax(-1) * causal() @ x,),
    "mask as a factor": (lambda x, ids: ((x @ x.mT) * causal()).softmax(-1) @ x,),
    "mask too high": (lambda x, ids: attention(x, causal(), -5.0),),
    "mask lower than most scores": (
        lambda x, ids: torch.where(causal(), -(1e6 * x) @ (1e6 * x).mT, -1e9).softmax(-1) @ x,
    ),
    "mask made high by a factor": (lambda x, ids: (torch.where(causal(), x @ x.mT, LOWEST) * 1e-308).softmax(-1) @ x,),
    "mask made high by tanh": (lambda x, ids: torch.where(causal(), x @ x.mT, LOWEST).tanh().softmax(-1) @ x,),
    "mask made high by clamp": (lambda x, ids: torch.where(causal(), x @ x.mT, LOWEST).clamp(min=-3).softmax(-1) @ x,),
    "mask undone by an input": (
        lambda x, ids, bias: (torch.where(causal(), x @ x.mT, LOWEST) + bias).softmax(-1) @ x,
        (~causal()).double() * -LOWEST,
    ),
    "weights moved away from zero": (lambda x, ids: (torch.where(causal(), x @ x.mT, LOWEST).softmax(-1) - 0.1) @ x,),
    "mask for some sequences": (lambda x, ids: sdpa(x, causal() & (arange(B)[:, None, None, None] < 3)),),
    # A dimension of size one broadcasts: its entry does not belong to the column that it meets.
    "one key column": (seeing(lambda: arange(1)[None, :] <= columns()[0]),),
    "one key column, expanded": (seeing(lambda: arange(1).expand(S)[None, :] <= columns()[0]),),
    "first column of the mask": (seeing(lambda: causal()[:, :1]),),
    "triangle of one column": (seeing(lambda: torch.ones(S, 1, dtype=torch.bool).tril()),),
    # Numbers that differ from those they were computed from.
    "column numbers that wrap around": (narrow_columns,),
    "runs by product": (packed(lambda breaks: breaks.cumprod(-1)), POSITIONS),
    "runs along the batch": (packed(lambda breaks: breaks.cumsum(0)), POSITIONS[:1]),
    "steps along the batch": (packed(lambda breaks: breaks.cumsum(-1), dim=0), POSITIONS[:1]),
    "steps of the truth": (
        packed(lambda breaks: breaks.cumsum(-1), lambda positions: (positions != 0).long()),
        torch.tensor([0, -3]).repeat(B, S // 2),
    ),
    # Fully masked rows, and rows that read them.
    "fully masked rows, then all see them": (
        lambda x, ids, padding: sdpa(attention(x, causal() & real(padding)), is_causal=True),
        PADDING,
    ),
    "fully masked rows, then a running sum": (
        lambda x, ids, padding: attention(x, causal() & real(padding)).cumsum(1),
        PADDING,
    ),
    "fully masked rows, then a mask made of them": (mask_of_masked_rows, PADDING),
    "two paddings": (
        lambda x, ids, padding: attention(x, causal() & real(padding) & (ids[:, None, :] != 20)),
        PADDING,
    ),
    "padding of queries": (lambda x, ids, padding: attention(x, causal() & (padding[:, :, None] != 0)), PADDING),
    "padding or causal": (lambda x, ids, padding: attention(x, causal() | (padding[:, None, :] == 0)), PADDING),
    # Rows that read other sequences.
    "grouped queries of other sequences": (grouped_sequences,),
    "a table of sequences": (lambda x, ids, table: x + table, numbers(B, 1, 1)),
    "looked up by sequence": (
        lambda x, ids, table: x + table[arange(B)[:, None], ids.remainder(D)][..., None],
        numbers(B, D),
    ),
    "features and columns added": (lambda x, ids: x + (x + x.mT).mean(-1, keepdim=True),),
    "swapped, and not back": (lambda x, ids: x.transpose(0, 1).reshape(S * B, D).relu().reshape(B, S, D),),
    "a table as long as the sequence": (lambda x, ids, table: table @ x, numbers(S, S)),
    "gathered columns": (lambda x, ids: x.gather(1, ids.remainder(S)[..., None].expand(B, S, D)),),
    # Uniform tensors beside merged dimensions, in ops that do not broadcast.
    "uniform weights for each head": (
        lambda x, ids: (
            torch.bmm(x.view(B, S, 2, 6).transpose(1, 2).reshape(B * 2, S, 6), ones(6, 6).expand(B * 2, 6, 6))
            .view(B, 2, S, 6)
            .transpose(1, 2)
            .reshape(B, S, D)
        ),
    ),
    "uniform features for merged rows": (
        lambda x, ids: torch.cat([x.view(B * S * 2, 6), ones(6).expand(B * S * 2, 6)], -1).view(B, S, 2 * D)[..., :D],
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str) -> None:
    assert run(*FOLDS[name]) == 1


@pytest.mark.filterwarnings("ignore:radix")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    assert run(*REFUSED[name]) == 0


@pytest.mark.parametrize(
    "nothing",
    [
        lambda: torch.full((S, S), 0.5).long().bool(),
        lambda: torch.full((S, S), 0.5, dtype=torch.int64).bool(),
        lambda: torch.full((S, S), 1e-50).bool(),
        lambda: torch.full((S, S), 256).to(torch.uint8).bool(),
    ],
    ids=["truncated", "filled", "underflow", "overflow"],
)
def test_mask_that_is_zero_in_its_dtype(nothing: Callable[[], Tensor]) -> None:
    """All rows are fully masked, and the mask is finite, so all rows attend to everything."""
    run(lambda x, ids: attention(x, causal() & nothing()))


def test_triangle_with_a_symbolic_diagonal() -> None:
    def trick(x: Tensor, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        return x + torch.ones(length, D, dtype=torch.float64).tril(length - S)

    assert run(trick, dynamic=True) == 1


def test_gradient_that_counts_the_tokens_of_the_batch() -> None:
    """``scale_grad_by_freq`` divides by the count of a token in the batch, not among the nodes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, D, scale_grad_by_freq=True), nn.Linear(D, 4 * D)).double()
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always"})
    gradients = []
    for run_model in (model, compiled):
        (gradient,) = torch.autograd.grad(run_model(batch()).square().sum(), [model[0].weight])
        gradients.append(gradient)
    assert radix_compile.stats().folded_calls == 1
    torch.testing.assert_close(gradients[1], gradients[0])

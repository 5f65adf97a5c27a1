"""Attentions whose form on the tree is easy to get wrong. Each is compared with the plain model, folded or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import radix_compile
from tests.models import VOCABULARY, assert_as_exact, features_apart, in_float64

B, S, H, E = 4, 12, 4, 6
INF = math.inf


class Model(nn.Module):
    """Token-wise layers around ``attend(q, k, v, *rest)``. Scores are scaled up, so that attention weights differ."""

    def __init__(self, attend: Callable[..., Tensor], heads: int = H) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.q, self.k, self.v = (nn.Linear(24, heads * E) for _ in "qkv")
        self.after = nn.Sequential(nn.Linear(H * E, 96), nn.GELU(), nn.Linear(96, 24))
        self.attend = attend

    def forward(self, ids: Tensor, *rest: Any) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (layer(x).view(*ids.shape, -1, E).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = self.attend(3 * q, 3 * k, v, *rest)
        result: Tensor = self.after(attended.transpose(1, 2).reshape(*ids.shape, -1))
        return result


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_ids(batch: int, seq: int, shared: int) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (batch, seq), generator=generator())
    ids[:, :shared] = ids[0, :shared]
    return ids


IDS = random_ids(B, S, 8)
TABLE = torch.rand(S, S, generator=generator(), dtype=torch.float64) * 6
SINKS = torch.arange(1.0, H + 1, dtype=torch.float64)


def behind(seq: int = S) -> Tensor:
    """``[seq, seq]``: by how many columns a key is behind its query."""
    return torch.arange(seq)[:, None] - torch.arange(seq)


def attend(scores: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = behind(scores.shape[-1]) >= 0 if mask is None else mask
    return torch.where(mask, scores, -INF).softmax(-1).to(v.dtype) @ v


def centred(scores: Tensor) -> Tensor:
    return scores - scores.max(-1, keepdim=True).values


def capped(scores: Tensor) -> Tensor:
    return 5 * torch.tanh(scores / 5)


def with_sinks(
    scores: Tensor, v: Tensor, mask: Tensor | None = None, before: Any = torch.clone, after: Any = torch.clone
) -> Tensor:
    scores = before(torch.where(behind() >= 0 if mask is None else mask, scores, -INF))
    scores = torch.cat([scores, SINKS.to(scores).view(1, H, 1, 1).expand(len(scores), H, S, 1)], -1)
    return after(scores).softmax(-1)[..., :S] @ v


def opaque(near: int) -> Tensor:
    """A mask whose values are not in the graph, except that rows see themselves."""
    return torch.tensor((behind() < near).tolist()) | (torch.arange(S)[:, None] <= torch.arange(S))


def junk_ignored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    scores = torch.baddbmm(torch.full((1, S, S), math.nan).to(q), q, k.mT, beta=0, alpha=0.4)
    return attend(scores, v).view(-1, H, S, E)


CASES: dict[str, Callable[..., Tensor]] = {
    "features that are not side by side": lambda q, k, v: F.scaled_dot_product_attention(
        *map(features_apart, (q, k, v)), is_causal=True
    ),
    "a bias that is no number where it is hidden": lambda q, k, v: attend(q @ k.mT + torch.log(behind().to(q) + 1), v),
    "a bias that is infinite where it is hidden": lambda q, k, v: attend(q @ k.mT + 1 / (behind().to(q) + 1), v),
    "a bool bias": lambda q, k, v: attend(q @ k.mT + (behind() < 3), v),
    "two bool biases": lambda q, k, v: attend(q @ k.mT + (behind() < 3) + (behind() < 5), v),
    "biases that would wrap around": lambda q, k, v: attend(
        q @ k.mT + (behind() * 10).to(torch.int8) + (behind() * 10).to(torch.int8), v
    ),
    "a bias of integers, scaled": lambda q, k, v: attend((q @ k.mT + behind()) * 0.3, v),
    "masks that are not understood, one under a cap": lambda q, k, v: attend(
        capped(torch.where(opaque(3), q @ k.mT, -INF)), v, (behind() >= 0) & opaque(6)
    ),
    "the largest score subtracted under a cap": lambda q, k, v: attend(
        capped(centred(torch.where(behind() >= 0, q @ k.mT, -INF))), v
    ),
    "sinks that are scaled": lambda q, k, v: with_sinks(q @ k.mT, v, after=lambda scores: scores * 0.5),
    "sinks behind centred scores": lambda q, k, v: with_sinks(q @ k.mT, v, before=centred),
    "whole scores": lambda q, k, v: attend((q @ k.mT).to(torch.int64).to(q), v),
    "a bias that is not added": junk_ignored,
}
ONE_HEAD: dict[str, Callable[..., Tensor]] = {
    "a mask of more heads": lambda q, k, v: attend(q @ k.mT, v, (behind() >= 0).expand(1, H, S, S)),
    "a bias of more heads": lambda q, k, v: attend(q @ k.mT + TABLE.to(q) * SINKS.to(q)[:, None, None], v),
    "scores of more heads": lambda q, k, v: attend((q @ k.mT).expand(-1, H, -1, -1), v),
}


def check(model: nn.Module, *args: Any, dynamic: bool | None = None) -> radix_compile.Stats:
    model = model.double()
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "eager", "fold": "always"}, dynamic=dynamic
    )
    with torch.no_grad():
        plain = model(*args)
        assert plain.isfinite().all()
        torch.testing.assert_close(compiled(*args), plain, rtol=1e-9, atol=1e-9)
    return radix_compile.stats()


@pytest.mark.parametrize("name", CASES)
def test_scores(name: str) -> None:
    assert check(Model(CASES[name]), IDS).folded_calls == 1


@pytest.mark.parametrize("name", ONE_HEAD)
def test_one_head_of_queries(name: str) -> None:
    assert check(Model(ONE_HEAD[name], heads=1), IDS).folded_calls == 1


def test_a_bias_of_ids() -> None:
    model = Model(lambda q, k, v, ids: attend(q @ k.mT + (ids[:, None, :, None] == ids[:, None, None, :]), v))
    stats = check(model, IDS, IDS)
    assert stats.tree_pairs


BASE = torch.randint(3, VOCABULARY, (S,), generator=generator())


def test_a_table_of_columns_where_prompts_start_at_different_ones() -> None:
    """Attention on the tree reads the table; no op of the folded graph adds it to the scores."""
    ids, padding = torch.zeros(B, S, dtype=torch.long), torch.zeros(B, S, dtype=torch.long)
    for b, length in enumerate((12, 10, 9, 7)):
        ids[b, S - length :], padding[b, S - length :] = BASE[:length], 1

    def attend_padded(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return with_sinks(q @ k.mT + TABLE.to(q), v, (behind() >= 0) & (padding[:, None, None] != 0))

    assert check(Model(attend_padded), ids, padding).folded_calls == 1


def same(numbers: Tensor) -> Tensor:
    return (behind() >= 0) & (numbers[:, None, :, None] == numbers[:, None, None, :])


def test_a_table_of_columns_on_packed_sequences() -> None:
    numbers = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 4 + [1] * 5 + [2] * 3, [0] * 12, [0] * 3 + [1] * 9])
    ids = torch.stack([torch.cat([BASE[: int((row == n).sum())] for n in row.unique()]) for row in numbers])
    model = Model(lambda q, k, v, numbers: attend(q @ k.mT + TABLE.to(q), v, same(numbers)))
    assert check(model, ids, numbers).folded_calls == 1


def test_numbers_of_packed_sequences_that_come_back() -> None:
    """All sequences have equal ids, but group their rows differently."""
    numbers = torch.tensor(
        [
            [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1],
            [0, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1],
            [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
            [0] * 12,
        ]
    )
    model = Model(lambda q, k, v, numbers: attend(q @ k.mT, v, same(numbers)))
    assert check(model, BASE.expand(B, S).contiguous(), numbers).folded_calls == 1


WINDOWS, LENGTHS = torch.tensor([3, 5, 7, 4]), torch.tensor([12, 7, 6, 5])


@pytest.mark.parametrize(
    "mask_mod",
    [
        lambda b, h, q, k: (q >= k) & (q - k < WINDOWS[b]),
        lambda b, h, q, k: (q >= k) & (k < LENGTHS[b]),
        lambda b, h, q, k: (q >= k) & ((b != 1) | (k != 2)),
    ],
)
def test_a_block_mask_that_depends_on_the_sequence(mask_mod: Any) -> None:
    """The block table is the same for all sequences, because a block is longer than a sequence."""
    mask = create_block_mask(mask_mod, B, None, S, S, device="cpu")
    check(Model(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask)), IDS, mask)


@pytest.mark.parametrize(
    ("score_mod", "dynamic"),
    [
        (lambda s, b, h, q, k: s + TABLE[0, k], None),
        (lambda s, b, h, q, k: s + torch.log((q - k + 1).double()), None),
        (lambda s, b, h, q, k: s + (q - k < 5), None),
        (lambda s, b, h, q, k: s + TABLE[q, k], True),
    ],
)
def test_score_mods(score_mod: Any, dynamic: bool | None) -> None:
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, S, S, device="cpu")
    model = Model(lambda q, k, v, mask: flex_attention(q, k, v, score_mod=score_mod, block_mask=mask))
    assert check(model, IDS, mask, dynamic=dynamic).graphs == 1


@pytest.mark.parametrize("far", [lambda n: 0.3 * torch.arange(n), lambda n: 9000 - 0.3 * behind(n)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_bias_stays_one(dtype: torch.dtype, far: Callable[[int], Tensor]) -> None:
    """In the 16-bit dtype of the queries, neighbouring entries of the bias would be equal."""
    columns = 256
    model = Model(lambda q, k, v: attend((q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) + far(columns), v))
    ids, model = random_ids(B, columns, 220), model.to(dtype)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"})
    with torch.no_grad():
        assert_as_exact(compiled(ids), model(ids), in_float64(model)(ids))
    assert radix_compile.stats().tree_pairs

"""Batches of token ids that share prefixes, for the benchmarks of attention and of models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from radix_compile.plan.prefix_plan import PrefixPlan


@dataclass(frozen=True, eq=False)
class PrefixBatch:
    """Right-padded token ids ``[B, S]`` and the length of each sequence.

    The batch has ``groups`` groups of equal size, in order. The sequences of a group share at least ``prefix`` tokens.
    """

    name: str
    ids: Tensor
    lengths: Tensor
    groups: int
    prefix: int

    @property
    def mask(self) -> Tensor:
        """The attention mask, int64 ``[B, S]``: 1 for tokens, 0 for padding."""
        return (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def is_padded(self) -> bool:
        return self.tokens < self.ids.numel()

    def plan(self) -> PrefixPlan:
        """Return the plan of the batch without its padding."""
        return PrefixPlan.from_rows(self.ids, self.mask, needed=self.mask != 0)


def one_prefix(batch: int, prefix: int, suffix: int, vocabulary: int = 30_000) -> PrefixBatch:
    """Return a batch whose sequences share the first ``prefix`` tokens and nothing else."""
    ids = _random(batch, prefix + suffix, vocabulary)
    ids[:, :prefix] = ids[0, :prefix]
    return PrefixBatch(f"{batch} x ({prefix} + {suffix})", ids, torch.full((batch,), prefix + suffix), 1, prefix)


def rerank(
    queries: int = 8, passages: int = 8, instruction: int = 64, query: int = 40, vocabulary: int = 30_000
) -> PrefixBatch:
    """Return a batch with a shared instruction, a query for each group, and passages of 60 to 120 tokens."""
    batch = queries * passages
    lengths = instruction + query + torch.randint(60, 121, (batch,), generator=_generator())
    ids = _random(batch, int(lengths.max()), vocabulary)
    ids[:, :instruction] = ids[0, :instruction]
    for first in range(0, batch, passages):
        ids[first : first + passages, : instruction + query] = ids[first, : instruction + query]
    batch_of_ids = PrefixBatch(f"rerank {queries} x {passages}", ids, lengths, queries, instruction + query)
    ids.masked_fill_(batch_of_ids.mask == 0, 0)
    return batch_of_ids


def rerank_stream(
    count: int, queries: int = 4, passages: int = 10, vocabulary: int = 30_000, left: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``count`` batches for reranking, ids and mask ``[B, S]``, of which hardly two have the same sizes.

    Each sequence is an instruction of 60 tokens, a query of 6 to 24, a passage of 40 to 130 and 9 closing tokens, as
    the template of Qwen3-Reranker has them. The padding is on the right, or on the ``left``.
    """
    generator = _generator()

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def tokens(length: int) -> Tensor:
        return torch.randint(1, vocabulary, (length,), generator=generator)

    instruction, closing = tokens(60), tokens(9)
    for _ in range(count):
        sequences = []
        for _ in range(queries):
            query = tokens(draw(6, 24))
            sequences += [torch.cat([instruction, query, tokens(draw(40, 130)), closing]) for _ in range(passages)]
        side = "left" if left else "right"
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_side=side)
        ones = [torch.ones(len(sequence), dtype=torch.long) for sequence in sequences]
        yield ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def _random(batch: int, columns: int, vocabulary: int) -> Tensor:
    return torch.randint(1, vocabulary, (batch, columns), generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)

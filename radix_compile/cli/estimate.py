"""Count the prefixes that the sequences of a data set share, and bound the speedup. No model is needed.

Three orders are compared: the order of the file, sorted by length, and batches of ``SharedPrefixBatchSampler``. "rows"
are those of the padded batches, "read" those that are no padding. "distinct" are their distinct prefixes, which are
computed if no result reads padding, and "and padding" is what is computed if every row is a result. "distinct / read"
is over all batches; "best", "median" and "worst" are those of single batches. The speedups are upper bounds from FLOPs,
for models of the sizes of Qwen3, against batches without padding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from radix_compile.cli.inputs import FIELDS, load_tokenizer, positive, read_texts
from radix_compile.inspection.prefix_tree import depth_and_fan_out, edges
from radix_compile.plan.batching import SharedPrefixBatchSampler, sharing
from radix_compile.plan.prefix_plan import PrefixPlan

SIZES = {
    "0.6B": {"hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 128, "intermediate": 3072},
    "4B": {"hidden": 2560, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 9728},
    "8B": {"hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 12288},
}
"""Sizes of a layer, from the published configurations of Qwen3."""


@dataclass(frozen=True)
class Order:
    """The result for one order: rows over all batches, distinct / read of all and of single ones, and speedups by size
    of model. ``with_padding`` are the rows that are computed if padding is a result, too.
    """

    name: str
    batches: int
    rows: int
    read: int
    distinct: int
    with_padding: int
    compression: float
    best: float
    median: float
    worst: float
    speedup: dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE.jsonl", help="one text per line: a string, or an object with a text field"
    )
    parser.add_argument("--field", help=f"field with the text (default: the first of {', '.join(FIELDS)})")
    parser.add_argument("--tokenizer", metavar="NAME", help="a name on the hub or a path (default: count bytes)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="default: %(default)s")


def run(options: argparse.Namespace, console: Console) -> int:
    tokenize = load_tokenizer(options.tokenizer) if options.tokenizer else lambda text: list(text.encode())
    sequences = [list(tokenize(text)) for text in read_texts(options.file, options.field)]
    batches_by_order = _batches_by_order(sequences, options.batch_size)
    orders = [_evaluate(name, sequences, batches) for name, batches in batches_by_order.items()]
    tree = _prefix_tree(sequences)
    unit = "tokens" if options.tokenizer else "bytes"
    if options.json:
        print(json.dumps({"unit": unit, "tree": tree, "orders": [asdict(order) for order in orders]}, indent=2))
        return 0
    console.print(
        f"{len(sequences):,} sequences, {tree['tokens']:,} {unit}, {tree['nodes']:,} distinct prefixes "
        f"({tree['tokens'] / max(tree['nodes'], 1):.2f}x if all sequences were one batch)"
    )
    console.print(
        f"prefix tree: at most {tree['depth']} branchings from root to leaf,"
        f" {tree['fan_out']:.1f} branches each on average"
    )
    table = Table("batches of " + str(options.batch_size), box=None)
    for name in ("rows", "read", "distinct", "and padding", "distinct / read", "best", "median", "worst"):
        table.add_column(name, justify="right")
    for size in SIZES:
        table.add_column(f"{size} at most", justify="right")
    for order in orders:
        numbers = (order.compression, order.best, order.median, order.worst)
        table.add_row(
            order.name,
            *(f"{count:,}" for count in (order.rows, order.read, order.distinct, order.with_padding)),
            *(f"{number:.3f}" for number in numbers),
            *(f"{speedup:.2f}x" for speedup in order.speedup.values()),
        )
    console.print(table)
    if unit == "bytes":
        console.print("[dim]counted in bytes; pass --tokenizer to count tokens[/]")
    return 0


def _split(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _batches_by_order(sequences: Sequence[list[int]], size: int) -> dict[str, list[Any]]:
    """Return the batches of each order, as indices into ``sequences``."""
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    sampler = SharedPrefixBatchSampler(sequences, size)
    return {
        "as they come": _split(range(len(sequences)), size),
        "by length": _split(by_length, size),
        "for sharing": list(sampler),
    }


def plan_of(sequences: Sequence[list[int]]) -> PrefixPlan:
    """Return the plan of a right-padded batch whose padding is left out."""
    longest = max(1, *map(len, sequences)) if sequences else 1
    ids = np.zeros((len(sequences), longest), np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    lengths = np.array([len(sequence) for sequence in sequences])
    is_token = np.arange(longest) < lengths[:, None]
    return PrefixPlan.from_rows(ids, is_token.astype(np.int64), needed=is_token)


def _evaluate(name: str, sequences: Sequence[list[int]], batches: Sequence[Sequence[int]]) -> Order:
    counts = []
    for batch in batches:
        members = [sequences[i] for i in batch]
        plan = plan_of(members)
        pairs = sum(len(sequence) * (len(sequence) + 1) // 2 for sequence in members)
        counts.append((plan.tokens, plan.compact_tokens, pairs, plan.pairs))
    tokens, nodes, pairs, tree_pairs = (sum(column) for column in zip(*counts, strict=True))
    shares = [batch_nodes / batch_tokens for batch_tokens, batch_nodes, *_ in counts if batch_tokens] or [1.0]
    speedup = {size: _flops(size, tokens, pairs) / max(_flops(size, nodes, tree_pairs), 1) for size in SIZES}
    rows = sum(len(batch) * max((len(sequences[i]) for i in batch), default=0) for batch in batches)
    with_padding = round(tokens * sharing(sequences, batches, padding=True))
    compression = nodes / tokens if tokens else 1.0
    shares_of = min(shares), median(shares), max(shares)
    return Order(name, len(counts), rows, tokens, nodes, with_padding, compression, *shares_of, speedup)


def _flops(size: str, tokens: int, pairs: int) -> int:
    """Return the multiplications of a layer: its weights once per token, attention once per visible query-key pair."""
    layer = SIZES[size]
    attention_width = layer["heads"] * layer["head_dim"]
    kv_width = layer["kv_heads"] * layer["head_dim"]
    weights = layer["hidden"] * (2 * attention_width + 2 * kv_width + 3 * layer["intermediate"])
    return tokens * weights + 2 * pairs * attention_width


def _prefix_tree(sequences: Sequence[list[int]]) -> dict[str, Any]:
    """Return the size and shape of the prefix tree of all sequences."""
    ordered = sorted(sequences)
    shared = [0, *(_common_length(previous, sequence) for previous, sequence in pairwise(ordered))][: len(ordered)]
    tokens = sum(map(len, sequences))
    depth, fan_out = depth_and_fan_out(edges([len(sequence) for sequence in ordered], shared))
    return {"tokens": tokens, "nodes": tokens - sum(shared), "depth": depth, "fan_out": fan_out}


def _common_length(first: list[int], second: list[int]) -> int:
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))

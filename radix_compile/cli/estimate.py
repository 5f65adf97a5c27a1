"""Say how much the sequences of a data set share, and what that is worth: no model is needed.

Batches are made in the order of the file, sorted by length, and ordered for sharing. The predicted speedup is the bound
by arithmetic, weights and attention, for a model of one of Qwen3's sizes, over batches without their padding.
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

from radix_compile.cli.inputs import load_tokenizer, positive, read
from radix_compile.inspection.prefix_tree import depth_and_fan_out, edges
from radix_compile.plan.batching import SharedPrefixBatchSampler
from radix_compile.plan.prefix_plan import PrefixPlan

SIZES = {
    "0.6B": {"hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 128, "intermediate": 3072},
    "4B": {"hidden": 2560, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 9728},
    "8B": {"hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 12288},
}
"""Sizes of a layer, from the published configurations of Qwen3."""


@dataclass(frozen=True)
class Order:
    """The outcome of one way to make batches: nodes per token, over all and by batch, and speedups by size of model."""

    name: str
    batches: int
    compression: float
    best: float
    median: float
    worst: float
    speedup: dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.jsonl", help="a text on each line, as a string or in a field")
    parser.add_argument("--field", help="the field that has the text")
    parser.add_argument("--tokenizer", metavar="NAME", help="a name on the hub or a path; without, bytes are counted")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="default: %(default)s")


def run(options: argparse.Namespace, console: Console) -> int:
    by = load_tokenizer(options.tokenizer) if options.tokenizer else lambda text: list(text.encode())
    rows = [list(by(text)) for text in read(options.file, options.field)]
    orders = [_order(name, rows, batches) for name, batches in _ways(rows, options.batch_size).items()]
    tree = _tree(rows)
    unit = "tokens" if options.tokenizer else "bytes"
    if options.json:
        print(json.dumps({"unit": unit, "tree": tree, "orders": [asdict(order) for order in orders]}, indent=2))
        return 0
    console.print(
        f"{len(rows):,} sequences, {tree['tokens']:,} {unit}, {tree['nodes']:,} distinct prefixes "
        f"({tree['tokens'] / max(tree['nodes'], 1):.2f}x if all were one batch)"
    )
    console.print(f"the tree parts {tree['depth']} times on the longest way, into {tree['fan_out']:.1f} on average")
    table = Table(
        "batches of " + str(options.batch_size), f"nodes per {unit[:-1]}", "best", "median", "worst", box=None
    )
    for size in SIZES:
        table.add_column(f"{size} up to", justify="right")
    for order in orders:
        numbers = (order.compression, order.best, order.median, order.worst)
        table.add_row(
            order.name, *(f"{one:.3f}" for one in numbers), *(f"{one:.2f}x" for one in order.speedup.values())
        )
    console.print(table)
    if unit == "bytes":
        console.print("[dim]counted in bytes: with --tokenizer in tokens[/]")
    return 0


def _in_batches(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _ways(rows: Sequence[list[int]], size: int) -> dict[str, list[Any]]:
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    sampler = SharedPrefixBatchSampler(rows, size)
    return {
        "as they come": _in_batches(range(len(rows)), size),
        "by length": _in_batches(by_length, size),
        "for sharing": list(sampler),
    }


def plan_of(rows: Sequence[list[int]]) -> PrefixPlan:
    longest = max(1, *map(len, rows)) if rows else 1
    ids = np.zeros((len(rows), longest), np.int64)
    for row, found in zip(ids, rows, strict=True):
        row[: len(found)] = found
    lengths = np.array([len(row) for row in rows])
    there = np.arange(longest) < lengths[:, None]
    return PrefixPlan.from_rows(ids, there.astype(np.int64), skip=~there)


def _order(name: str, rows: Sequence[list[int]], batches: Sequence[Sequence[int]]) -> Order:
    counts = []
    for batch in batches:
        chosen = [rows[i] for i in batch]
        plan = plan_of(chosen)
        counts.append(
            (plan.tokens, plan.compact_tokens, sum(len(row) * (len(row) + 1) // 2 for row in chosen), plan.pairs)
        )
    tokens, nodes, pairs, tree_pairs = (sum(column) for column in zip(*counts, strict=True))
    shares = [batch[1] / batch[0] for batch in counts if batch[0]] or [1.0]
    speedup = {size: _flops(size, tokens, pairs) / max(_flops(size, nodes, tree_pairs), 1) for size in SIZES}
    return Order(
        name, len(counts), nodes / tokens if tokens else 1.0, min(shares), median(shares), max(shares), speedup
    )


def _flops(size: str, tokens: int, pairs: int) -> int:
    """Multiplications of a layer: of weights by token, of attention by pair of a query and a key that it sees."""
    of = SIZES[size]
    inner = of["heads"] * of["head_dim"]
    weights = of["hidden"] * (2 * inner + 2 * of["kv_heads"] * of["head_dim"] + 3 * of["intermediate"])
    return tokens * weights + 2 * pairs * inner


def _tree(rows: Sequence[list[int]]) -> dict[str, Any]:
    """The sum over all sequences."""
    ordered = sorted(rows)
    shared = [0, *(_common(one, other) for one, other in pairwise(ordered))][: len(ordered)]
    tokens = sum(map(len, rows))
    depth, fan_out = depth_and_fan_out(edges([len(row) for row in ordered], shared))
    return {"tokens": tokens, "nodes": tokens - sum(shared), "depth": depth, "fan_out": fan_out}


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

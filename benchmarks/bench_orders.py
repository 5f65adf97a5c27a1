"""Count the rows that are computed for data sets in batches of several orders. No model is run.

Run as `python -m benchmarks.bench_orders`. The data sets are random tokens with the shapes of evaluation, reranking,
embedding and training (`cases`), in random order. The orders:

    file       as they come
    length     sorted by length, as tools do
    sampler    `SharedPrefixBatchSampler(sequences, batch_size)`
    groups     the same with `groups=`: the document, query or prompt of each sequence

Two numbers for each: rows computed if every row is a result, so that padding is computed, and if no padding is read
(the samplers with `padding=False`). "best" is what the sampler's are, divided by the least of the four orders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.demo import positive
from radix_compile.plan.batching import SharedPrefixBatchSampler, sharing

VOCABULARY = 30_000


@dataclass(frozen=True)
class Case:
    """Sequences of token ids, and which group each belongs to."""

    name: str
    sequences: list[list[int]]
    groups: list[int]


def cases(seed: int = 0) -> Iterator[Case]:
    """Yield data sets with lengths like those of the tasks they are named after."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int | None = None) -> list[int]:
        count = low if high is None else int(rng.integers(low, high + 1))
        return [int(token) for token in rng.integers(3, VOCABULARY, count)]

    def case(name: str, groups: int, members: int, prompt: Callable[[], list[int]], low: int, high: int) -> Case:
        prompts = [prompt() for _ in range(groups)]
        of = [group for group in range(groups) for _ in range(members)]
        of = [of[place] for place in rng.permutation(len(of))]
        return Case(name, [prompts[group] + text(low, high) for group in of], of)

    fixed, instruction, template = text(600), text(30), text(60)
    yield case("5-shot choice, fixed examples", 100, 4, lambda: fixed + text(40, 120), 3, 12)
    yield case("5-shot choice, drawn examples", 100, 4, lambda: text(450, 750) + text(40, 120), 3, 12)
    yield case("0-shot choice", 200, 4, lambda: text(40, 120), 3, 12)
    yield case("continuation choice", 200, 4, lambda: text(30, 100), 10, 40)
    yield case("reranking 4 x 16", 4, 16, lambda: template + text(6, 24), 49, 139)
    yield case("reranking 100 x 8", 100, 8, lambda: template + text(6, 24), 49, 139)
    yield case("instruction + query", 600, 1, lambda: instruction, 5, 60)
    yield case("GRPO, groups of 16", 32, 16, lambda: text(80, 250), 50, 400)


def batches(case: Case, size: int, padding: bool) -> dict[str, list[list[int]]]:
    """Return the batches of each order, of which padding is computed, or not."""
    in_file = list(range(len(case.sequences)))
    by_length = sorted(in_file, key=lambda i: len(case.sequences[i]))

    def split(order: Sequence[int]) -> list[list[int]]:
        return [list(order[start : start + size]) for start in range(0, len(order), size)]

    return {
        "file": split(in_file),
        "length": split(by_length),
        "sampler": list(SharedPrefixBatchSampler(case.sequences, size, padding=padding)),
        "groups": list(SharedPrefixBatchSampler(case.sequences, size, padding=padding, groups=case.groups)),
    }


def rows(case: Case, size: int, padding: bool) -> dict[str, float]:
    """Return the rows that are computed in the batches of each order."""
    tokens = sum(map(len, case.sequences))
    orders = batches(case, size, padding)
    return {name: tokens * sharing(case.sequences, order, padding=padding) for name, order in orders.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its rows and return the exit code."""
    parser = argparse.ArgumentParser(prog="bench_orders", description="Count rows by the order of a data set.")
    parser.add_argument("--batch-size", type=positive, default=32, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    print(f"batches of {options.batch_size}: rows that are computed, in thousands, with padding / without")
    names = ("file", "length", "sampler", "groups")
    print(f"{'case':<31}{'tokens':>8}" + "".join(f"{name:>16}" for name in names) + f"{'best':>14}")
    for case in cases():
        computed = [rows(case, options.batch_size, padding) for padding in (True, False)]
        best = [found["sampler"] / min(found.values()) for found in computed]
        counts = "".join(f"{computed[0][name] / 1e3:>8.1f} /{computed[1][name] / 1e3:>6.1f}" for name in names)
        tokens = sum(map(len, case.sequences)) / 1e3
        print(f"{case.name:<31}{tokens:>8.1f}{counts}{best[0]:>7.2f} / {best[1]:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

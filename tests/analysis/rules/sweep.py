"""``python -m tests.analysis.rules.sweep [OP ...]``: execute the rule table, or the rows of some ops."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from radix_compile.analysis.op_info import OP_INFO, info_of
from radix_compile.testing import Sample, check_rule
from tests.analysis.rules.samples import NEVER_FOLDS, NEVER_REFUSED, NO_RULE, POINTWISE, SAMPLES

FOLDS = ("compact", "full", "pair", "constant", "arranged")
USED_OPS = Path(__file__).with_name("used_ops.txt")
"""The ops in the graphs of the models on the compatibility page: ``python -m tests.compatibility.ops`` writes them."""


@dataclass(frozen=True)
class Case:
    op: OpOverload | str
    number: int
    sample: Sample

    def __str__(self) -> str:
        return f"{self.op}-{self.number}-{self.sample.verdict}"


def cases() -> Iterator[Case]:
    """Every sample of every row, and of some of the ops that need no row."""
    table: dict[Any, list[Sample]] = {**SAMPLES, **POINTWISE}
    for op, samples in table.items():
        for number, sample in enumerate(samples):
            yield Case(op, number, sample)


def gaps() -> list[str]:
    """What is missing: rows without a sample, samples without a row, rows that are never seen to fold or to refuse."""
    found = [f"{op}: no sample" for op in with_rule() if not SAMPLES.get(op)]
    found += [f"{op}: samples, but no rule" for op in SAMPLES if op not in with_rule()]
    for op, samples in SAMPLES.items():
        verdicts = {sample.verdict for sample in samples}
        if (op in NEVER_FOLDS) == bool(verdicts & set(FOLDS)):
            found.append(f"{op}: no sample that folds")
        if (op in NEVER_REFUSED) == ("refused" in verdicts):
            found.append(f"{op}: no sample that is refused")
    return found


def with_rule() -> list[OpOverload | str]:
    """The rows with a rule. (No sample can record flex_attention.)"""
    return [op for op, info in OP_INFO.items() if isinstance(op, OpOverload | str) and info.rule is not None]


def used_ops() -> list[str]:
    return USED_OPS.read_text().split()


def used_without_rule() -> dict[str, str]:
    """The used ops at which folding stops, and why that is so; an empty reason is a gap in the table."""
    return {name: NO_RULE.get(name, "") for name in used_ops() if info_of(named(name)).rule is None}


def named(name: str) -> OpOverload | None:
    """The op called ``aten.add.Tensor``, if there is one."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, OpOverload) else None


def main(argv: Sequence[str] | None = None) -> int:
    """Prints wrong rules and missing ones apart; returns 1 if there is any, 2 if no row is called so."""
    parser = argparse.ArgumentParser(prog="python -m tests.analysis.rules.sweep", description="Check the op rules.")
    parser.add_argument("ops", nargs="*", metavar="OP", help="aten.add, aten.add.Tensor, ... (default: all)")
    options = parser.parse_args(argv)
    wanted = [case for case in cases() if not options.ops or _is_called(str(case.op), options.ops)]
    if not wanted:
        print(f"no row is called {' or '.join(options.ops)}", file=sys.stderr)
        return 2
    wrong = 0
    for case in wanted:
        try:
            check_rule(case.op, case.sample)
        except AssertionError as error:
            wrong += 1
            print(f"wrong    {case}: {' '.join(str(error).split())[:300]}", flush=True)
    missing = [] if options.ops else gaps()
    for gap in missing:
        print(f"missing  {gap}")
    unknown = {} if options.ops else used_without_rule()
    for op, reason in unknown.items():
        print(f"no rule  {op}: {reason or 'models use it, and nobody has looked at it'}")
    ops = len({case.op for case in wanted})
    print(
        f"checked {len(wanted)} samples of {ops} ops: {wrong} wrong, {len(missing)} missing,"
        f" {len(unknown)} ops without a rule"
    )
    return int(bool(wrong or missing or not all(unknown.values())))


def _is_called(op: str, names: Sequence[str]) -> bool:
    return any(op == name or op.rpartition(".")[0] == name for name in names)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m radix_compile.testing [OP ...]``: execute the rule table, or the rows of some ops."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from radix_compile.testing import cases, check, gaps, used_without_rule


def main(argv: Sequence[str] | None = None) -> int:
    """Prints wrong rules and missing ones apart; returns 1 if there is any, 2 if no row is called so."""
    parser = argparse.ArgumentParser(prog="python -m radix_compile.testing", description="Check the op rules.")
    parser.add_argument("ops", nargs="*", metavar="OP", help="aten.add, aten.add.Tensor, ... (default: all)")
    options = parser.parse_args(argv)
    wanted = [case for case in cases() if not options.ops or _is_called(str(case.op), options.ops)]
    if not wanted:
        print(f"no row is called {' or '.join(options.ops)}", file=sys.stderr)
        return 2
    wrong = 0
    for case in wanted:
        try:
            check(case)
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

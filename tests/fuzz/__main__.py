"""Compare many random programs, folded and plain: ``python -m tests.fuzz --count 20000``."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

import torch

from tests.fuzz.check import FAILURES, Outcome, check, draw_example, minimised


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="the number of examples")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first example; the seeds are consecutive")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this many seconds")
    parser.add_argument("--compiled", type=float, default=0.1, help="the share of examples through torch.compile")
    parser.add_argument("--inductor", type=float, default=0.0, help="the share of examples through inductor (slow)")
    parser.add_argument("--only", nargs="+", default=[], help="draw mostly the pieces with these names")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first example that fails")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    outcome, started = Outcome(), time.monotonic()
    failed: list[int] = []
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        example = draw_example(seed, arguments.compiled, arguments.inductor, tuple(arguments.only))
        try:
            check(example, outcome)
        except FAILURES:
            traceback.print_exc()
            print(f"\nfailed after {outcome.examples} examples\n\n{example}", flush=True)
            print(f"a smaller example:\n\n{minimised(example)}")
            settings = f"--compiled {arguments.compiled} --inductor {arguments.inductor}"
            if arguments.only:
                settings += f" --only {' '.join(arguments.only)}"
            print(f"run it again: python -m tests.fuzz --count 1 --seed {seed} {settings}")
            failed.append(seed)
            if not arguments.keep_going:
                break
        spent = time.monotonic() - started
        if outcome.examples % 100 == 0 or spent > arguments.seconds or outcome.examples == arguments.count:
            print(f"seed {seed}, {spent:.0f} s: {outcome}", flush=True)
        if spent > arguments.seconds:
            break
    if failed:
        print(f"failed: seeds {', '.join(map(str, failed))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

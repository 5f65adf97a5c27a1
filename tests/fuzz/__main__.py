"""The long mode: ``python -m tests.fuzz --count 20000``. Stops at the first example that fails, unless told not to."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

import torch

from tests.fuzz.check import FAILURES, Outcome, check, draw_example, minimised


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="how many examples")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first; the next has the next number")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that many")
    parser.add_argument("--compiled", type=float, default=0.1, help="the share that goes through torch.compile")
    parser.add_argument("--inductor", type=float, default=0.0, help="the share that does so with inductor: slow")
    parser.add_argument("--only", nargs="+", default=[], help="names of pieces that are to be most of the programs")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at an example that fails")
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
            print(f"smaller:\n\n{minimised(example)}")
            shares = f"--compiled {arguments.compiled} --inductor {arguments.inductor}"
            if arguments.only:
                shares += f" --only {' '.join(arguments.only)}"
            print(f"again: python -m tests.fuzz --count 1 --seed {seed} {shares}")
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

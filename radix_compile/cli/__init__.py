"""The command line: ``radix-compile explain``, ``diff``, ``estimate``, ``bench`` and ``doctor``.

Exit codes: 0 if all is well, 1 if the answer is no (nothing folds, a check fails), 2 if the question was wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

try:
    from rich.console import Console
except ModuleNotFoundError as missing:
    raise SystemExit("radix-compile needs an extra: pip install 'radix-compile[cli]'") from missing

from radix_compile.cli.inputs import UsageError

PIPED = 200
"""Columns of a table that goes to a file."""
COMMANDS = ("explain", "diff", "estimate", "bench", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run the command and return the exit code. An error of the user's is one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="radix-compile", description="What torch.compile(model, backend='radix') does to a model, and what for."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: import_module(f"radix_compile.cli.{name}") for name in COMMANDS}
    for name, module in modules.items():
        about = (module.__doc__ or name).splitlines()[0]
        command = commands.add_parser(name, help=about, description=module.__doc__)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print data instead of text")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")  # what they would say is in the report
    for noisy in ("transformers", "huggingface_hub", "torch", "torchao"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPED)
    try:
        code: int = modules[options.command].run(options, console)
    except UsageError as error:
        print(f"radix-compile {options.command}: {error}", file=sys.stderr)
        return 2
    return code

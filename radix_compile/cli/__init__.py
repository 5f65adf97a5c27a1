"""The command line: ``radix-compile explain``, ``diff``, ``estimate``, ``bench`` and ``doctor``.

Exit codes: 0 for success, 1 if nothing folds or a check fails, 2 for wrong arguments or input.
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
except ModuleNotFoundError as error:
    raise SystemExit("radix-compile needs an extra: pip install 'radix-compile[cli]'") from error

from radix_compile.cli.inputs import UsageError

PIPED_WIDTH = 200
"""Width of the output in characters if it is no terminal."""
COMMANDS = ("explain", "diff", "estimate", "bench", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. Wrong arguments or input print one line to stderr."""
    parser = argparse.ArgumentParser(
        prog="radix-compile",
        description="Show, measure and predict the effect of torch.compile(model, backend='radix').",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: import_module(f"radix_compile.cli.{name}") for name in COMMANDS}
    for name, module in modules.items():
        summary = (module.__doc__ or name).splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")  # the output of the command has our warnings
    for package in ("transformers", "huggingface_hub", "torch", "torchao"):
        logging.getLogger(package).setLevel(logging.ERROR)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    try:
        code: int = modules[options.command].run(options, console)
    except UsageError as error:
        print(f"radix-compile {options.command}: {error}", file=sys.stderr)
        return 2
    return code

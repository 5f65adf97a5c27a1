"""Run the end-to-end tests with other versions of torch and transformers: ``make test-versions``.

Each pair of versions has its own virtual environment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

VERSIONS = (("2.11.0", "5.17.0"), ("2.13.0", "5.23.0"), ("2.15.0", "5.23.0"))
"""Versions of torch and transformers: the oldest supported, those of development, and the newest."""

RESULTS = Path(__file__).with_name("versions.json")
ROOT = Path(__file__).parents[2]
REQUIREMENTS = ("hypothesis", "peft", "pytest", "pytest-xdist", "sentence-transformers", "torchao")


def table() -> Iterator[str]:
    """The lines of the page's section on versions, from the results of the last run."""
    yield "## Versions\n"
    yield "Results of the end-to-end tests with other versions (`make test-versions`).\n"
    yield "| torch | transformers | Python | passed | failed | skipped |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in json.loads(RESULTS.read_text()):
        yield f"| {' | '.join(str(value) for value in row.values())} |"


def run_tests(folder: Path, torch: str, transformers: str, workers: int) -> dict[str, str | int]:
    """Create the environment if it is missing, run the tests in it and count their outcomes."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"torch=={torch}", "numpy"], check=True)
    subprocess.run(
        [*install, f"torch=={torch}", f"transformers=={transformers}", *REQUIREMENTS, "-e", ROOT], check=True
    )
    report = folder / "tests.xml"
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-n",
        str(workers),
        f"--junitxml={report}",
        "--everything",
        "tests/end_to_end",
    ]
    subprocess.run(command, cwd=ROOT, check=False)
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    tests, failed, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "skipped"))
    failed += int(suite.attrib["errors"])
    version = subprocess.run([python, "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    counts = {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}
    return {"torch": torch, "transformers": transformers, "python": version, **counts}


def main() -> int:
    parser = argparse.ArgumentParser(prog="versions", description="Run the end-to-end tests with other versions.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="the folder of the environments")
    parser.add_argument(
        "--torch", nargs="*", choices=[torch for torch, _ in VERSIONS], help="run these versions only (default: all)"
    )
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rows = {row["torch"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for torch, transformers in VERSIONS:
        if not options.torch or torch in options.torch:
            rows[torch] = run_tests(options.folder / f"torch-{torch}", torch, transformers, options.workers)
            RESULTS.write_text(json.dumps([rows[torch] for torch in sorted(rows)], indent=1) + "\n")
    print("\n".join(table()))
    return int(any(row["failed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())

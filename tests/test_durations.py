"""The default tests stay short: ``make durations`` writes down what each takes, and here that is looked at."""

from __future__ import annotations

import json
from pathlib import Path

LONGEST = 20.0
ALLOWED = {
    "tests/test_docs.py::test_snippets_run[README.md]": "the README's programs, compiled by inductor as they stand"
}
"""The tests that may take longer, and why."""


def test_no_default_test_is_long_without_a_reason() -> None:
    seconds = json.loads(Path(__file__).with_name("durations.json").read_text())
    assert len(seconds) > 100
    too_long = {name: took for name, took in seconds.items() if took > LONGEST and name not in ALLOWED}
    assert not too_long, "make these smaller, or mark them slow"

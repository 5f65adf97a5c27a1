"""Which cases of a test run by default, and which with ``--everything`` (``make test-all``) only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(quick: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """``cases`` for ``parametrize``, marked slow where ``quick(*case)`` (or ``quick(case)``) does not hold."""
    values = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [case if quick(*of) else pytest.param(*of, marks=pytest.mark.slow) for case, of in values]

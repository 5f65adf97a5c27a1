"""Select the cases of a test that run by default. The others run with ``--everything`` (``make test-all``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(quick: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """``cases`` for ``parametrize``. Those for which ``quick(*case)`` (or ``quick(case)``) is false are marked slow."""
    arguments = [(case, case if isinstance(case, tuple) else (case,)) for case in cases]
    return [case if quick(*args) else pytest.param(*args, marks=pytest.mark.slow) for case, args in arguments]

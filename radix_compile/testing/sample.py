"""A sample: what a row of the rule table is executed on, and the verdict that is expected.

It is a function of a :class:`~radix_compile.testing.recorder.Recorder` ``t`` (its inputs, and ``t(op, ...)`` to
record one more op) and of the op under test; it returns the result to compare. ``t.x`` is ``[B, S, D]``, ``t.heads`` is
``[B, H, S, E]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from radix_compile.testing.recorder import Recorder

Build = Callable[[Recorder, Any], fx.Node]


@dataclass(frozen=True)
class Sample:
    """``verdict`` on the op: "compact", "full", "pair", "constant", "arranged" or "refused", then for ``reason``."""

    build: Build
    verdict: str
    reason: str = ""


def compact(build: Build) -> Sample:
    return Sample(build, "compact")


def full(build: Build) -> Sample:
    """Determined, in full form only. (Later rows are perturbed, and earlier results must stay.)"""
    return Sample(build, "full")


def pair(build: Build) -> Sample:
    return Sample(build, "pair")


def constant(build: Build) -> Sample:
    return Sample(build, "constant")


def arranged(build: Build) -> Sample:
    """Rows in sorted order or numbers about it, other ones in compact form."""
    return Sample(build, "arranged")


def refused(reason: str, build: Build) -> Sample:
    return Sample(build, "refused", reason)

"""Samples: small programs on which rules are tested, with the expected verdict.

A program is a function of a :class:`~radix_compile.testing.recorder.Recorder` ``t`` and of the op under test. It calls
``t(op, ...)`` to record ops on the inputs (``t.x`` is ``[B, S, D]``, ``t.heads`` is ``[B, H, S, E]``, ...), and returns
the result.
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
    """A program and the expected verdict on the op: "compact", "full", "pair", "constant", "arranged" or "refused".

    ``reason`` is a part of the expected reason of a refusal.
    """

    build: Build
    verdict: str
    reason: str = ""


def compact(build: Build) -> Sample:
    """A sample whose op is position-wise, and runs compact."""
    return Sample(build, "compact")


def full(build: Build) -> Sample:
    """A sample whose op is causal, and runs in full form. (Later rows are changed, and earlier results must stay.)"""
    return Sample(build, "full")


def pair(build: Build) -> Sample:
    """A sample whose op has one entry for each pair of a query and a key."""
    return Sample(build, "pair")


def constant(build: Build) -> Sample:
    """A sample whose op is the same for all rows."""
    return Sample(build, "constant")


def arranged(build: Build) -> Sample:
    """A sample whose op returns sorted rows or indices of them, which differ in compact form."""
    return Sample(build, "arranged")


def refused(reason: str, build: Build) -> Sample:
    """A sample whose op is refused, with ``reason`` in the text of the refusal."""
    return Sample(build, "refused", reason)

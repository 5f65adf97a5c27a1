"""Verdicts against folding: of a whole graph, of one call, or of one attention."""

from __future__ import annotations

from dataclasses import dataclass


class CannotFold(Exception):  # noqa: N818 - a verdict about a graph, not an error in it
    """The graph as a whole cannot be folded. The message is the reason.

    ``expected`` if that says nothing about the model (a batch of one), so that nobody need be warned.
    """

    def __init__(self, reason: str, expected: bool = False) -> None:
        super().__init__(reason)
        self.expected = expected


@dataclass(frozen=True, slots=True)
class Declined:
    """Stands where a result would be, and says why there is none."""

    reason: str


class RunsPlain(Exception):  # noqa: N818 - a verdict about a call, not an error in it
    """This call cannot run folded. The message is the reason."""

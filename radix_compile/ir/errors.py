"""Verdicts that end in the plain program: about a whole graph, or about one call."""

from __future__ import annotations


class CannotFold(Exception):  # noqa: N818 - a verdict about a graph, not an error in it
    """The graph as a whole cannot be folded. The message is the reason.

    It ends in the plain program; with the option ``strict`` it is raised, and the message has all reasons.
    ``expected`` if that says nothing about the model (a batch of one), so that nobody need be warned.
    """

    def __init__(self, reason: str, expected: bool = False) -> None:
        super().__init__(reason)
        self.expected = expected


class RunsPlain(Exception):  # noqa: N818 - a verdict about a call, not an error in it
    """This call cannot run folded. The message is the reason."""

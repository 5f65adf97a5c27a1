"""Verdicts against folding: of a whole graph, of one call, or of one attention."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto


class RefusalCode(StrEnum):
    """The kind of a refusal. The codes are stable; the sentences that come with them may be reworded.

    ``radix_compile.inspection.advice`` says what to do about each.
    """

    # an op
    NO_RULE = auto()
    CUSTOM_RULE = auto()
    """The user's rule refuses, or does not fit the op."""
    MIXES_TOKENS = auto()
    """The op reads along the sequence, but not causally."""
    MIXES_SEQUENCES = auto()
    """The op reads along the batch, or tells sequences apart by their number."""
    ORDER_OF_ROWS = auto()
    """The op computes with the order of all rows sorted (for example tokens by expert)."""
    INDEXES_ROWS = auto()
    """The op reads or writes rows by an index or a mask, which may move rows."""
    DIFFERS_BY_ROW = auto()
    """Weights, a table or an index are not the same for every row."""
    UNCLEAR_DIMENSIONS = auto()
    """The op's dimensions cannot be matched to token axes."""
    UNSUPPORTED_ARGUMENTS = auto()
    """The op's rule does not support these arguments."""
    DROPOUT = auto()
    # attention
    BIDIRECTIONAL = auto()
    MASK_NOT_CAUSAL = auto()
    MASK_NOT_UNDERSTOOD = auto()
    ATTENTION_NOT_UNDERSTOOD = auto()
    ROWS_WITHOUT_KEYS = auto()
    """Fully masked rows may be read by other rows."""
    FUSED_LAYER = auto()
    BLOCK_MASK_IN_GRAPH = auto()
    FILLED_CACHE = auto()
    # a graph
    SWITCHED_OFF = auto()
    """The option ``fold`` is "never"."""
    NOTHING_TO_SHARE = auto()
    """The batch is one sequence, or each sequence is one token."""
    NO_ARITHMETIC = auto()
    """No arithmetic in the graph is token-wise."""
    NO_TOKEN_IDS = auto()
    EMBEDDINGS_WITH_GRADIENT = auto()
    IN_PLACE = auto()
    """The graph writes to its inputs."""
    SYMBOLIC_SIZE = auto()
    """A size is symbolic where folding needs a number."""
    TORCH_FUNC = auto()
    UNSUPPORTED_GRADIENT = auto()
    """Lowering would lose a gradient."""
    LOWERING_FAILED = auto()
    INNER_BACKEND = auto()
    """The inner backend cannot compile the folded program."""
    INTERNAL_ERROR = auto()
    """A bug in this package."""


class CannotFold(Exception):  # noqa: N818 - a verdict about a graph, not an error in it
    """The graph as a whole cannot be folded. The message is the reason, and ``code`` its kind.

    The plain program runs instead; with the option ``strict`` the exception is raised, and its message has all reasons.
    ``expected`` if the reason is not about the model (a batch of one), so that no warning is needed.
    """

    def __init__(self, reason: str, code: RefusalCode, expected: bool = False) -> None:
        super().__init__(reason)
        self.code = code
        self.expected = expected


@dataclass(frozen=True, slots=True)
class Declined:
    """The reason why there is no result, in its place."""

    reason: str


class RunsPlain(Exception):  # noqa: N818 - a verdict about a call, not an error in it
    """This call cannot run folded. The message is the reason."""

"""Verdicts against folding: of a whole graph, of one call, or of one attention."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto


class RefusalCode(StrEnum):
    """Why folding stops, in kinds: the sentences beside them may be reworded, these are to be relied on.

    ``radix_compile.inspection.advice`` says what to do about each.
    """

    # an op
    NO_RULE = auto()
    CUSTOM_RULE = auto()
    """A rule of the user's refuses, or does not fit the op."""
    MIXES_TOKENS = auto()
    """It reads along the sequence, other than causally."""
    MIXES_SEQUENCES = auto()
    """It reads along the batch, or tells sequences apart by their number."""
    ORDER_OF_ROWS = auto()
    """It computes with the order of a sort of all rows, as of tokens by expert."""
    INDEXES_ROWS = auto()
    """It reads or writes rows by an index or a mask, which may move them."""
    DIFFERS_BY_ROW = auto()
    """Weights, a table or an index are not the same for every row."""
    UNCLEAR_DIMENSIONS = auto()
    """Tokens cannot be followed through its dimensions."""
    UNSUPPORTED_ARGUMENTS = auto()
    """Its rule does not read such arguments."""
    DROPOUT = auto()
    # attention
    BIDIRECTIONAL = auto()
    MASK_NOT_CAUSAL = auto()
    MASK_NOT_UNDERSTOOD = auto()
    ATTENTION_NOT_UNDERSTOOD = auto()
    ROWS_WITHOUT_KEYS = auto()
    """Rows that see no key may be read by others."""
    FUSED_LAYER = auto()
    BLOCK_MASK_IN_GRAPH = auto()
    FILLED_CACHE = auto()
    # a graph
    SWITCHED_OFF = auto()
    """The option ``fold`` is "never"."""
    NOTHING_TO_SHARE = auto()
    """One sequence, or one token of each."""
    NO_ARITHMETIC = auto()
    """Nothing in it is token-wise."""
    NO_TOKEN_IDS = auto()
    EMBEDDINGS_WITH_GRADIENT = auto()
    IN_PLACE = auto()
    """It writes to its inputs."""
    SYMBOLIC_SIZE = auto()
    """A size is a symbol where a number is needed."""
    TORCH_FUNC = auto()
    UNSUPPORTED_GRADIENT = auto()
    """Lowered, it would lose a gradient."""
    LOWERING_FAILED = auto()
    INNER_BACKEND = auto()
    """The inner backend does not compile what it became."""
    INTERNAL_ERROR = auto()
    """A mistake in this package."""


class CannotFold(Exception):  # noqa: N818 - a verdict about a graph, not an error in it
    """The graph as a whole cannot be folded. The message is the reason, and ``code`` its kind.

    It ends in the plain program; with the option ``strict`` it is raised, and the message has all reasons.
    ``expected`` if that says nothing about the model (a batch of one), so that nobody need be warned.
    """

    def __init__(self, reason: str, code: RefusalCode, expected: bool = False) -> None:
        super().__init__(reason)
        self.code = code
        self.expected = expected


@dataclass(frozen=True, slots=True)
class Declined:
    """Stands where a result would be, and says why there is none."""

    reason: str


class RunsPlain(Exception):  # noqa: N818 - a verdict about a call, not an error in it
    """This call cannot run folded. The message is the reason."""

"""Leave out the rows that the attention mask hides, if it is proved that no other row reads them."""

from __future__ import annotations

import logging

import torch
from torch import fx

from radix_compile.ir.calls import set_arguments
from radix_compile.ir.facts import FullyMasked, Score
from radix_compile.ir.graph import Form
from radix_compile.ir.value import is_row, values_of
from radix_compile.passes.choose_cuts import is_light, is_view, thin_source
from radix_compile.passes.fold import Fold
from radix_compile.passes.prove_shift import hidden_padding

log = logging.getLogger(__name__)


class PaddingIsRead(Exception):  # noqa: N818 - a verdict about a graph, not an error in it
    """Padded rows cannot be left out. The message is the reason."""


def skip_padding(fold: Fold) -> None:
    """With ``padding="skip"``, let every scatter leave out the rows without a node, which come back as zeros.

    States the rows to leave out, for the plan. Needs ``fold_graph``. Where the proof fails it changes nothing, and the
    report has a note that says why.
    """
    if fold.options.padding != "skip":
        return
    try:
        fold.left_out = _padding(fold)
    except PaddingIsRead as verdict:
        fold.notes.append(f'padding="skip" is off: {verdict}')
        log.info(fold.notes[-1])
        return
    for node in fold.program.graph.find_nodes(op="call_function", target=torch.ops.radix.scatter_rows.default):
        set_arguments(node, holes=True)


def _padding(fold: Fold) -> FullyMasked:
    """The rows every attention hides, if nothing else reads them."""
    padding = hidden_padding(fold.captured)
    if padding is None:
        raise PaddingIsRead("there is no padding mask that every attention applies to its keys")
    for node in fold.wanted.forms:
        reader = _reader_of_padding(node, fold)
        if reader is not None:
            raise PaddingIsRead(f"{reader.target} ({reader.name}) may read padded rows")
    return padding


def _reader_of_padding(node: fx.Node, fold: Fold) -> fx.Node | None:
    """An op that takes ``node`` in full form and would notice that the padded rows were never computed.

    Attention does not (it hides them), pairs on their way to it do not, a view passes them on, and the program's
    outputs may have them if they come straight from a scatter, which makes them zero. But a mask with zeros in their
    place would show them: what masks are made of has to come from the inputs themselves, in full form.
    """
    pair = all(value.is_pair for value in values_of(node))
    if node.op != "call_function" or not (pair or is_row(node)) or is_light(node, fold):
        return None
    for user in node.users:
        if user.op == "output":
            if pair or not _is_scattered(node, fold):
                return user
        elif Form.FULL in fold.wanted.runs.get(user, set()):
            values = values_of(user)
            harmless = any(v.attends is not None for v in values) or all(v.is_pair for v in values)
            if (not pair and _is_about_masks(node)) or (not harmless and not (is_row(user) and is_view(user))):
                return user
    return None


def _is_about_masks(node: fx.Node) -> bool:
    return any(value.fact is not None and not isinstance(value.fact, Score) for value in values_of(node))


def _is_scattered(node: fx.Node, fold: Fold) -> bool:
    while Form.FULL in fold.wanted.runs[node]:
        source = thin_source(node)
        if source is None or fold.homes[node] is Form.FULL:
            return False
        node = source
    return True

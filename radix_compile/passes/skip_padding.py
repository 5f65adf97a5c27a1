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
    """Padded rows cannot be left out, because another row may read them. The message is the reason."""


def skip_padding(fold: Fold) -> None:
    """With ``padding="skip"``, set ``fold.left_out``, and let every scatter write zeros to these rows.

    Needs ``fold_graph``. If the proof fails, nothing changes, and the report has a note with the reason.
    """
    if fold.options.padding != "skip":
        return
    try:
        fold.left_out = _unread_padding(fold)
    except PaddingIsRead as error:
        fold.notes.append(f'padding="skip" is off: {error}')
        log.info(fold.notes[-1])
        return
    for node in fold.program.graph.find_nodes(op="call_function", target=torch.ops.radix.scatter_rows.default):
        set_arguments(node, holes=True)


def _unread_padding(fold: Fold) -> FullyMasked:
    """Return the rows that every attention hides, if no other op reads them. Raises :class:`PaddingIsRead`."""
    padding = hidden_padding(fold.captured)
    if padding is None:
        raise PaddingIsRead("there is no padding mask that every attention applies to its keys")
    for node in fold.wanted.forms:
        reader = _reader_of_padding(node, fold)
        if reader is not None:
            raise PaddingIsRead(f"{reader.target} ({reader.name}) may read padded rows")
    return padding


def _reader_of_padding(node: fx.Node, fold: Fold) -> fx.Node | None:
    """Return an op that reads ``node`` in full form and depends on its padded rows, which are not computed; or None.

    Attention hides these rows, ops on pairs lead to attention, and views pass them on. An output may have them if it is
    scattered, since the scatter writes zeros there. Values from which masks are computed must come from the inputs:
    zeros in their padded rows might show these rows.
    """
    is_pair = all(value.is_pair for value in values_of(node))
    if node.op != "call_function" or not (is_pair or is_row(node)) or is_light(node, fold):
        return None
    for user in node.users:
        if user.op == "output":
            if is_pair or not _is_scattered(node, fold):
                return user
        elif Form.FULL in fold.wanted.runs.get(user, set()):
            values = values_of(user)
            hides_padding = any(v.attends is not None for v in values) or all(v.is_pair for v in values)
            passes_on = is_row(user) and is_view(user)
            if (not is_pair and _is_for_masks(node)) or not (hides_padding or passes_on):
                return user
    return None


def _is_for_masks(node: fx.Node) -> bool:
    return any(value.fact is not None and not isinstance(value.fact, Score) for value in values_of(node))


def _is_scattered(node: fx.Node, fold: Fold) -> bool:
    while Form.FULL in fold.wanted.runs[node]:
        source = thin_source(node)
        if source is None or fold.homes[node] is Form.FULL:
            return False
        node = source
    return True

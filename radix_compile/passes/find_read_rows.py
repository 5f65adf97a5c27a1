"""Find the rows whose results are read. Each call then computes only their nodes, and the ancestors of these.

Behind the last layer most rows are often not read: a pooled output has one row for each sequence, a loss ignores the
rows of prompts, a mean leaves padding out. Rows that are not computed are zero where they are scattered, and it is
proved here that no result depends on them: values are followed from each scatter to the results as row numbers
(``analysis.row_numbers``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.op_info import info_of
from radix_compile.analysis.row_numbers import ANY_ROWS, NumbersProgram, RowNumbers, hide_rows
from radix_compile.analysis.rules.row_numbers import elementwise
from radix_compile.ir.facts import FullyMasked, Score
from radix_compile.ir.graph import Form
from radix_compile.ir.value import is_row, locate, values_of
from radix_compile.passes.choose_cuts import is_light, is_view, thin_source
from radix_compile.passes.fold import Fold, ReadRows
from radix_compile.passes.prove_shift import hidden_padding

log = logging.getLogger(__name__)


class AllRowsAreRead(Exception):  # noqa: N818 - a verdict about a graph, not an error in it
    """A result may depend on every row. The message says at which op."""


def find_read_rows(fold: Fold) -> None:
    """Set ``fold.read_rows``.

    Needs ``choose_forms``. If every row may be read, ``fold.every_row`` says why, and nothing else changes.
    """
    reads_earlier, hidden = _ancestors(fold)
    is_skipped = fold.options.padding == "skip"
    if is_skipped and hidden is None:
        fold.notes.append('padding="skip" is off: there is no padding mask that every attention applies to its keys')
    try:
        walk = _Walk(fold, hidden if is_skipped else None)
        fold.read_rows = ReadRows(*walk.run(), reads_earlier, hidden, walk.program.picks_others_than(hidden))
    except AllRowsAreRead as error:
        fold.every_row = str(error)
        if is_skipped and hidden is not None:
            fold.notes.append(f'padding="skip" is off: {error}')
        log.info("every row is computed: %s", error)


@dataclass
class _Walk:
    """Follows the row numbers of values in full form.

    ``padding``  the rows that may be zero in results with an entry for each row (the option ``padding="skip"``).
    """

    fold: Fold
    padding: FullyMasked | None
    numbers: dict[fx.Node, RowNumbers] = field(default_factory=dict, init=False)

    def run(self) -> tuple[fx.GraphModule, tuple[int, ...]]:
        self.program = NumbersProgram(self.fold.captured)
        for node in self.fold.captured.graph.nodes:
            if node.op == "output":
                self._return(node)
            elif self._is_scattered(node):
                self.numbers[node] = self.program.all_rows(node) if len(values_of(node)) == 1 else ANY_ROWS
            elif Form.FULL in self.fold.wanted.runs.get(node, ()):
                self._follow(node)
        return self.program.finish()

    def _is_scattered(self, node: fx.Node) -> bool:
        wanted = self.fold.wanted
        return (
            Form.FULL in wanted.forms.get(node, ())
            and Form.COMPACT in wanted.runs.get(node, ())
            and (Form.FULL not in wanted.runs[node])
        )

    def _follow(self, node: fx.Node) -> None:
        """Set the numbers of an op's result in full form, or mark the rows that it reads."""
        sources = [arg for arg in node.all_input_nodes if arg in self.numbers]
        if not sources:
            return
        numbers = self._by_rule(node, sources)
        if numbers is not None and not numbers.is_whole:
            self.numbers[node] = numbers
        elif all(self.numbers[source].is_whole for source in sources) and _is_followed(node, numbers):
            single = is_row(node) and len(values_of(node)) == 1
            self.numbers[node] = self.program.all_rows(node) if single else ANY_ROWS
        elif numbers is not None:
            self.numbers[node] = numbers
        else:
            for source in sources:
                self._read(source, node)

    def _by_rule(self, node: fx.Node, sources: list[fx.Node]) -> RowNumbers | None:
        """Return what the op's rule says. Of several arguments, all must have the same rows."""
        rule = info_of(node.target).row_numbers
        numbers = {self.numbers[source].node for source in sources}
        if rule is None or not is_tensor(node) or len(numbers) != 1 or None in numbers:
            return None
        rows = sources[0]
        if len(sources) == 1:
            return rule(node, rows, self.numbers[rows], self.program)
        if not _is_elementwise(node):
            return None
        # The rows are the same, but one argument may be infinite where they are zero; and what hides one shows another.
        is_finite = all(self.numbers[source].is_finite for source in sources)
        return elementwise(node, rows, replace(self.numbers[rows], is_finite=is_finite), self.program)

    def _read(self, source: fx.Node, reader: fx.Node) -> None:
        numbers = self.numbers[source]
        if numbers.is_whole:
            raise AllRowsAreRead(
                locate(reader, "it may read every row") if reader.op != "output" else "all are returned"
            )
        if numbers.node is not None:
            self.program.read[numbers.node] = None

    def _return(self, output: fx.Node) -> None:
        for node in output.all_input_nodes:
            if node not in self.numbers:
                continue
            numbers = self.numbers[node]
            if self.padding is not None and numbers.is_whole and numbers.node is not None and self._is_zeroed(node):
                shown = self.program.given(self.padding.source)
                if shown is not None:
                    shown = self.program.call(torch.ops.aten.ne.Scalar, shown, 0)
                    if not self.padding.truth:
                        shown = self.program.call(torch.ops.aten.logical_not.default, shown)
                    self.program.read[self.program.call(hide_rows, numbers.node, shown)] = None
                    continue
            self._read(node, output)

    def _is_zeroed(self, node: fx.Node) -> bool:
        """Is a result scattered, so that rows that are not computed are zero in it?"""
        while Form.FULL in self.fold.wanted.runs[node]:
            source = thin_source(node)
            if source is None or self.fold.homes[node] is Form.FULL:
                return False
            node = source
        return True


def _is_followed(node: fx.Node, numbers: RowNumbers | None) -> bool:
    """Has the result an entry for each row again, for each pair of rows, or for each row in another order?

    Where rows are zero, other ops than attention may give something infinite, which no mask hides.
    """
    values = values_of(node)
    if all(value.is_pair or value.is_arranged for value in values):
        return True
    is_finite = is_view(node) or any(value.attends is not None for value in values)
    return is_row(node) and (is_finite or (numbers is not None and numbers.is_finite))


def _is_elementwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _ancestors(fold: Fold) -> tuple[bool, FullyMasked | None]:
    """Return whether rows depend on earlier ones, and the rows of which it is proved that no later one depends on them.

    Attention hides the latter, but not if a mask is computed from rows: where these are zero, it might show them.
    """
    reads_earlier, hidden = False, hidden_padding(fold.captured)
    for node in fold.wanted.forms:
        if node.op != "call_function" or is_light(node, fold):
            continue
        values = values_of(node)
        reads_earlier |= any(value.attends is not None or value.full_only for value in values)
        is_for_masks = any(value.fact is not None and not isinstance(value.fact, Score) for value in values)
        is_read_by_rows = any(Form.FULL in fold.wanted.runs.get(user, ()) for user in node.users)
        if is_row(node) and is_for_masks and is_read_by_rows:
            hidden = None
    return reads_earlier, hidden

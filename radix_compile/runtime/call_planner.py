"""How the plan of a call is made from the call's own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from radix_compile.analysis.arguments import is_tensor
from radix_compile.analysis.reach.column_reach import ReachCheck
from radix_compile.analysis.rules.flex import Blocks
from radix_compile.ir.axes import as_size
from radix_compile.ir.errors import CannotFold, RefusalCode, RunsPlain
from radix_compile.ir.facts import ordered_by
from radix_compile.ir.graph import graph_facts, tokens_of
from radix_compile.ir.plan_arrays import Group, plan_arrays
from radix_compile.ir.source import upstream
from radix_compile.ir.value import source_line, values_of
from radix_compile.passes.fold import Fold, Starts
from radix_compile.passes.fold_graph import (
    assumed_sequence_ids,
    groups_of_plan,
    relies_on_visible_keys,
    shown_keys,
    torch_windows,
    with_blocks,
)
from radix_compile.passes.prove_shift import attentions, hidden_padding
from radix_compile.plan.prefix_plan import PrefixPlan
from radix_compile.plan.torch_tiles import torch_tiles
from radix_compile.plan.triton_tiles import triton_tiles
from radix_compile.runtime.block_tables import BlockTables, agree_with_mask, listed_blocks
from radix_compile.runtime.call_inputs import CallInputs
from radix_compile.runtime.checks import TriangleCheck, rows_seen
from radix_compile.runtime.rotary_check import RotaryCheck, rotary_check
from radix_compile.runtime.row_contents import row_numbers
from radix_compile.runtime.row_programs import ReadProgram, RowProgram, RowPrograms
from radix_compile.torch_internals import size_hint, size_symbols, val

BoolArray = NDArray[np.bool_]


class NeedsFullAttention(RunsPlain):
    """In this call attention on the tree would be wrong; in full form it is not."""


@dataclass(frozen=True)
class BlockCheck:
    """Checks that tables of blocks show and hide the keys that a mask does: see ``agree_with_mask``."""

    tables: BlockTables
    window: int | None
    shown: tuple[tuple[RowProgram, bool], ...]
    sequence_ids: RowProgram | None

    def __call__(self, args: CallInputs, shape: tuple[int, int]) -> bool:
        shown = np.ones(shape, np.bool_)
        for program, truth in self.shown:
            shown &= (program(args, shape) != 0) == truth
        sequence_ids = None if self.sequence_ids is None else self.sequence_ids(args, shape)
        return agree_with_mask(self.tables, args, shown, self.window, sequence_ids)


@dataclass(frozen=True)
class PlanInputs:
    """How the plan of a call is made: what each field reads of the call's inputs.

    A program computes a ``[B, S]`` tensor; next to it stands the truth value of the rows that are meant.

    ``keys``          positions of the row-key inputs, each ``[B, S]``, or ``[B, S, ...]`` of which the contents count.
    ``fully_masked``  programs for the rows that see no key: source, window and truth of ``ir.facts.FullyMasked``.
    ``read``          program for the rows whose results are read, if not all are.
    ``tree``          if attention runs on the tree, programs for the keys that are shown.
    ``groups``        the arrays of a plan that the folded program takes.
    ``windows``       the windows of attentions on the tree that run in torch.
    ``left_padding``  program for the rows that are no padding, if padding in front of them is in no path.
    ``rotary``        the check that rows may be shifted though rotary embeddings are by column.
    ``masks``         positions of the caller's own masks, which have to be causal: see ``given_masks``.
    ``sequence_ids``  program for the ids of sequences that are packed in a row.
    ``assumed_ids``   program for such ids, if attention on the tree is right only where paths tell the sequences apart:
                      no id may come back, or, without ``sequence_ids``, change.
    ``keys_visible``  every row must see a key, because attention runs on the tree.
    ``undefined``     rows that see no key are not numbers: a softmax of minus infinity alone.
    ``scans``         if sizes are symbols, the check that scans are causal for those of the call.
    ``blocks``        positions of the tables of flex_attention's blocks.
    ``block_checks``  the checks that the tables of attention on the tree say what its mask does.
    ``orders``        programs for integers that masks order or count by, on which arithmetic must not wrap around.
    ``triangles``     the check that buffers still hold the masks that were read from them.
    ``on_host``       positions of the inputs that the plan reads on the host.
    ``filled_up``     arrays whose length varies are filled up to a power of two.
    """

    keys: tuple[int, ...]
    fully_masked: tuple[tuple[RowProgram, int | None, bool], ...] = ()
    read: ReadProgram | None = None
    tree: tuple[tuple[RowProgram, bool], ...] | None = None
    groups: frozenset[Group] = frozenset()
    windows: tuple[int | None, ...] = ()
    left_padding: tuple[RowProgram, bool] | None = None
    rotary: RotaryCheck | None = None
    masks: tuple[int, ...] = ()
    sequence_ids: RowProgram | None = None
    assumed_ids: RowProgram | None = None
    keys_visible: bool = False
    undefined: bool = False
    scans: ReachCheck | None = None
    blocks: tuple[BlockTables, ...] = ()
    block_checks: tuple[BlockCheck, ...] = ()
    orders: tuple[RowProgram, ...] = ()
    triangles: TriangleCheck | None = None
    on_host: tuple[int, ...] = ()
    filled_up: bool = False

    @property
    def may_leave_the_tree(self) -> bool:
        """May a call be ``NeedsFullAttention``? Numbers of sequences that are computed from no key never change."""
        ids_vary = self.assumed_ids is not None and bool(self.assumed_ids.inputs)
        return self.keys_visible or bool(self.block_checks) or ids_vary

    def plan(self, given: Sequence[Any], pad_multiple_of: int | None = None, share_nothing: bool = False) -> PrefixPlan:
        """The plan of a call with these inputs. Raises ``RunsPlain`` if they do not allow for one.

        With ``share_nothing``, it is as if each of them began with a token of its own. A multiple above the
        number of rows counts as that number.
        """
        args = CallInputs.of(given)
        args.on_host(self.on_host)  # all at once
        if self.scans is not None and not self.scans(args):
            raise RunsPlain("sequences of this length: a scan or convolution is not proved causal for them")
        shape = self._shape(args)
        if self.triangles is not None and not self.triangles(args, shape[1]):
            raise RunsPlain("a mask that is kept in a buffer has changed since this was compiled")
        if any(may_wrap(program(args, shape)) for program in self.orders):
            raise RunsPlain("positions so large that integers may wrap around")
        seen = [rows_seen(args[i]) for i in self.masks] + [listed_blocks(one, args, shape) for one in self.blocks]
        if not all(check(args, shape) for check in self.block_checks):
            raise NeedsFullAttention("flex_attention's table of blocks shows or hides others than its mask_mod")
        rows = [*_row_keys(args, self.keys), *(one for one in seen if one is not None)]
        if share_nothing:
            rows.append(np.broadcast_to(np.arange(shape[0])[:, None], shape))
        breaks = None
        if self.sequence_ids is not None:
            numbers = self.sequence_ids(args, shape)
            breaks, come_back = sequence_breaks(numbers)
            if breaks is not None and not self.may_shift(args):
                if self.assumed_ids is not None:
                    raise NeedsFullAttention("several sequences are packed in a row, and rows depend on their column")
                breaks = None
                rows.append(numbers)
            if come_back.any() and self.assumed_ids is not None:
                raise NeedsFullAttention("a sequence goes on behind another one that is packed in its row")
            if come_back.any():
                rows += numbers_in_paths(numbers, come_back)
        elif self.assumed_ids is not None and (np.diff(self.assumed_ids(args, shape), axis=1) != 0).any():
            raise NeedsFullAttention("several sequences are packed in a row, and rows depend on their column")
        read = None if self.read is None else self.read(args, shape)
        needed = None if self.read is None or read is None else self.read.with_earlier(read, args, shape, breaks)
        unique: BoolArray | None = None
        for program, window, truth in self.fully_masked:
            fully_masked = rows_without_a_key((program(args, shape) != 0) == truth, window)
            if not fully_masked.any():
                continue
            if self.undefined:  # and a weight of zero hides no such row, from whoever else is computed beside it
                raise RunsPlain("a row sees no key, and is not a number")
            if needed is None or (fully_masked & needed).any():
                needed = None  # such a row may attend to all
                if self.keys_visible:
                    raise NeedsFullAttention("a row sees no key, and attends to all of them or is a key itself")
            unique = fully_masked if unique is None else unique | fully_masked
        start: NDArray[Any] | None = None
        if self.left_padding is not None and breaks is None:
            program, truth = self.left_padding
            shown = (program(args, shape) != 0) == truth
            start = np.where(shown.any(1), shown.argmax(1), 0)
            if start.any() and not self.may_shift(args):
                start = None
        options = {"unique": unique, "needed": needed, "start": start, "breaks": breaks}
        if pad_multiple_of is not None:
            pad_multiple_of = min(pad_multiple_of, max(shape[0] * shape[1], 1))  # more would be more work than plain
        plan = PrefixPlan.from_rows(*rows, **options, pad_multiple_of=pad_multiple_of)
        return plan.with_head(read, pad_multiple_of) if read is not None and "head" in self.groups else plan

    def arrays(self, plan: PrefixPlan, given: Sequence[Any], device: torch.device) -> list[torch.Tensor]:
        """The arrays of the plan that the folded program takes, moved to its device in one copy."""
        made: dict[str, NDArray[Any]] = {"fold": plan.fold, "scatter": plan.scatter}
        if "columns" in self.groups:
            made["columns"] = plan.columns(self._shape(CallInputs.of(given))[1])
        if self.tree is not None:
            args = CallInputs.of(given)
            shape = self._shape(args)
            shown = [((program(args, shape) != 0) == truth).ravel() for program, truth in self.tree]
            made["begin"], made["end"] = plan.tree(np.logical_and.reduce(shown) if shown else None)
            if "torch" in self.groups:
                made |= torch_tiles(plan, made["begin"], made["end"], self.windows).by_name()
            if "triton" in self.groups:
                tiles = triton_tiles(plan, made["begin"], made["end"])
                made |= (tiles.filled_up() if self.filled_up else tiles).by_name()
        if "lists" in self.groups:
            made["rows"], made["starts"], made["pieces"] = plan.row_lists(self.filled_up)
        if plan.head is not None:
            made["head_nodes"], made["head_places"] = plan.head.nodes, plan.head.places
            made["head_fold"], made["head_scatter"] = plan.head.plan.fold, plan.head.plan.scatter
            if "head lists" in self.groups:
                lists = plan.head.plan.row_lists(self.filled_up)
                made["head_rows"], made["head_starts"], made["head_pieces"] = lists
        specs = plan_arrays(self.groups)
        arrays = [made[spec.name] for spec in specs]
        if device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        # Each starts at a multiple of 128 bytes, as an allocation of its own would, or it is copied before its use.
        *starts, size = accumulate((-(-array.nbytes // 128) * 128 for array in arrays), initial=0)
        host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        bytes_on_host = host.numpy()
        for array, start in zip(arrays, starts, strict=True):
            bytes_on_host[start : start + array.nbytes] = np.ascontiguousarray(array).ravel().view(np.uint8)
        moved = host.to(device, non_blocking=True)
        return [
            moved.narrow(0, start, array.nbytes).view(spec.dtype).view(array.shape)
            for spec, array, start in zip(specs, arrays, starts, strict=True)
        ]

    def may_shift(self, args: Sequence[Any]) -> bool:
        """May paths start at other columns than the first?"""
        ids = args[self.keys[0]]
        return self.rotary is None or self.rotary(args, ids.shape[1], ids.device)

    def _shape(self, args: CallInputs) -> tuple[int, int]:
        batch, seq = args[self.keys[0]].shape[:2]
        return batch, seq


def _row_keys(args: CallInputs, places: tuple[int, ...]) -> list[NDArray[Any]]:
    """What rows are told apart by: ids as they are, embedded rows by their contents."""
    embedded = [row_numbers(args[place]) for place in places if args[place].ndim > 2]
    ids = args.on_host([place for place in places if args[place].ndim == 2])
    return [*embedded, *(one.numpy(force=True) for one in ids)]


def may_wrap(numbers: NDArray[Any]) -> bool:
    """Are there integers so near the ends of their type that what is added to them (``LARGEST_OFFSET``) may wrap?"""
    if numbers.dtype not in (np.int32, np.int64) or not numbers.size:  # in others, nothing is known of sums
        return False
    limit = np.iinfo(numbers.dtype).max // 2
    return not -limit <= numbers.min() <= numbers.max() <= limit


def rows_without_a_key(visible: BoolArray, window: int | None) -> BoolArray:
    """The rows ``[B, S]`` for which none of the last ``window`` columns, their own included, is visible."""
    seen = np.cumsum(visible, axis=1)
    if window is not None and window < visible.shape[1]:
        seen[:, window:] = seen[:, window:] - seen[:, :-window]
    fully_masked: BoolArray = seen == 0
    return fully_masked


def sequence_breaks(numbers: NDArray[Any]) -> tuple[BoolArray | None, BoolArray]:
    """Where the next sequence of a row starts, from the numbers ``[B, S]`` of its sequences; None if nowhere.

    And in which rows does a number come back, ``[B]``? Where one comes back after another one, the rows between see
    none of it, but those behind do: such a row of the batch is one sequence.
    """
    breaks = np.zeros(numbers.shape, np.bool_)
    np.not_equal(numbers[:, 1:], numbers[:, :-1], out=breaks[:, 1:])
    come_back = np.zeros(len(numbers), np.bool_)
    for row in np.flatnonzero((numbers[:, 1:] < numbers[:, :-1]).any(1)):
        if len(np.unique(numbers[row])) <= breaks[row].sum():
            breaks[row], come_back[row] = False, True
    return breaks if breaks.any() else None, come_back


def numbers_in_paths(numbers: NDArray[Any], come_back: BoolArray) -> list[NDArray[Any]]:
    """Keys that say which rows of a sequence go together, in those in which numbers come back.

    Up to the first change such a sequence is like any other. Behind it count the number, and the one it began with.
    """
    counted = numbers.astype(np.int64) - numbers.min() + 1
    changed = come_back[:, None] & np.logical_or.accumulate(numbers != numbers[:, :1], axis=1)
    return [np.where(changed, counted, 0), np.where(changed, counted[:, :1], 0)]


def plan_inputs(fold: Fold) -> PlanInputs:
    """How the calls of a folded program are planned, read off its fold.

    Raises ``CannotFold`` if no call can share anything.
    """
    captured, wanted, starts = fold.captured, fold.wanted, fold.starts
    rows = RowPrograms(captured)
    tokens = tokens_of(captured)
    folded = [node for node in wanted.forms if wanted.is_compact(node)]
    fully_masked = dict.fromkeys(
        b for node in folded for value in values_of(node) for b in sorted(value.fully_masked, key=str)
    )
    needed = set(upstream(*folded, *(b.source for b in fully_masked)))
    placeholders = captured.graph.find_nodes(op="placeholder")
    programs = tuple((rows.of(b.source), b.window, b.truth) for b in fully_masked)
    left_padding = (rows.of(starts.padding.source), starts.padding.truth) if starts.padding else None
    sequence_ids = rows.of(starts.sequence_ids) if starts.sequence_ids else None
    ids_vary = sequence_ids is not None and any(is_tensor(placeholders[place]) for place in sequence_ids.inputs)
    if not ids_vary and tokens.layout.batch == 1:
        raise CannotFold("there is one sequence only", RefusalCode.NOTHING_TO_SHARE, expected=True)
    shown, assumed = shown_keys(fold), assumed_sequence_ids(fold)
    # Numbers that only tell sequences apart are no part of their rows.
    is_key = needed.intersection(tokens.keys) - {starts.sequence_ids}
    keys = tuple(i for i, node in enumerate(placeholders) if node in is_key)
    masks = tuple(i for i, node in enumerate(placeholders) if node in needed and node in tokens.masks)
    symbols = {symbol: (place, dim) for symbol, (place, dim, _) in size_symbols(captured.graph).items()}
    scans = ReachCheck(tokens.reaches, list(tokens.scans), symbols) if symbols and tokens.scans else None
    place = {node: i for i, node in enumerate(placeholders)}
    ordered = dict.fromkeys(source for seen in attentions(captured.graph) for source in ordered_by(seen.visible))
    block_checks = tuple(
        BlockCheck(
            _places(tables, place),
            visible.window,
            tuple((rows.of(source), truth) for source, truth in visible.shown),
            None if visible.sequence_ids is None else rows.of(visible.sequence_ids),
        )
        for tables, visible in with_blocks(fold)
    )
    read = rows.read_by(fold)
    tree = None if shown is None else tuple((rows.of(source), truth) for source, truth in shown)
    assumed_ids = None if assumed is None else rows.of(assumed)
    orders = tuple(rows.of(source) for source in ordered)
    ids = {i for i in keys if val(placeholders[i]).ndim == 2}
    on_host = ids.union(rows.inputs_on_host(), read.inputs if read is not None and read.on_host else ())
    return PlanInputs(
        keys,
        programs,
        read,
        tree=tree,
        groups=frozenset(groups_of_plan(fold)),
        windows=torch_windows(fold),
        left_padding=left_padding,
        rotary=rotary_check(fold) if starts != Starts() else None,
        masks=masks,
        sequence_ids=sequence_ids,
        assumed_ids=assumed_ids,
        keys_visible=relies_on_visible_keys(fold),
        undefined=any(seen.undefined for seen in attentions(captured.graph)),
        scans=scans,
        blocks=tuple(_places(one, place) for one in tokens.blocks),
        block_checks=block_checks,
        orders=orders,
        triangles=_triangle_check(captured, place),
        on_host=tuple(sorted(on_host)),
    )


def _triangle_check(captured: fx.GraphModule, place: dict[fx.Node, int]) -> TriangleCheck | None:
    known = graph_facts(captured)
    if not known.triangles:
        return None
    seq = tokens_of(captured).layout.seq
    whole = any(as_size(size) != seq for size in known.triangle_sizes)
    return TriangleCheck(tuple((place[node], triangle) for node, triangle in known.triangles.items()), whole)


def _places(blocks: Blocks, place: dict[fx.Node, int]) -> BlockTables:
    full = None if blocks.full is None else (place[blocks.full[0]], place[blocks.full[1]])
    return BlockTables((place[blocks.partial[0]], place[blocks.partial[1]]), full, blocks.query_size, blocks.key_size)


def advice_on_padding(fold: Fold, inputs: PlanInputs, args: Sequence[Any]) -> str | None:
    """Advice for a caller with left padding, as in ``args``, if rows depend on their column; None if there is none."""
    captured, column, rotary = fold.captured, fold.column, fold.rotary
    padding = hidden_padding(captured)
    if padding is None or (column is None and rotary is None):
        return None
    # A size that is a symbol would become a number, and the program right for that alone.
    args = [size_hint(arg) if isinstance(arg, torch.SymInt) else arg for arg in args]
    placeholders = captured.graph.find_nodes(op="placeholder")
    rows = args[placeholders.index(tokens_of(captured).keys[0])]  # of sizes, where the captured one has symbols
    shape = (rows.shape[0], rows.shape[1])
    shown = (RowPrograms(captured).of(padding.source)(CallInputs(args), shape) != 0) == padding.truth
    if shown[:, 0].all() or (column is None and inputs.may_shift(args)):
        return None
    if column is None:
        column = next(node for node in captured.graph.nodes if rotary is not None and node in rotary.nodes)
    return (
        "with left padding, prompts that start at different columns are not shared, because a row may depend on its"
        f" column ({column.target} at {source_line(column)}): pass position_ids computed from the mask, or pad on the"
        " right"
    )

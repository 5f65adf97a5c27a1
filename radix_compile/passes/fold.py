"""One folded form of a captured graph: the state that the folding passes hand on to each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from radix_compile.analysis.attention.bias import Bias
from radix_compile.analysis.attention.parts import TreeAttention
from radix_compile.analysis.attention.rows import Rows
from radix_compile.ir.errors import Declined
from radix_compile.ir.facts import FullyMasked
from radix_compile.ir.graph import Form
from radix_compile.options import Options


@dataclass(frozen=True, slots=True)
class FoldVariant:
    """Which attentions of a graph run on the prefix tree.

    ``on_tree``    those that can; else all of them run in full form.
    ``assumes``    also those that are right on the tree only in calls where sequences packed in a row have numbers that
                   never come back, where every row sees a key, or where flex_attention's tables of blocks say what its
                   ``mask_mod`` does. Each call is checked for that.
    """

    name: str
    on_tree: bool = True
    assumes: bool = True


FULL_FOLD = FoldVariant("full fold")
"""Every attention that can run on the tree does."""
FOLD_OFF_THE_TREE = FoldVariant("fold off the tree", assumes=False)
"""For the calls in which :data:`FULL_FOLD` would be wrong: only attentions that are right on the tree in every call."""
POSITION_WISE_FOLD = FoldVariant("position-wise fold", on_tree=False)
"""Every attention runs in full form."""


@dataclass
class Wanted:
    """The forms in which each node's value is wanted, and in which its op therefore runs."""

    forms: dict[fx.Node, set[Form]] = field(default_factory=dict)
    runs: dict[fx.Node, set[Form]] = field(default_factory=dict)

    def is_compact(self, node: fx.Node) -> bool:
        """Has its value a compact form in the folded graph? It may have one though it is only wanted in full form."""
        return Form.COMPACT in self.forms.get(node, ()) or Form.COMPACT in self.runs.get(node, ())


@dataclass(frozen=True, slots=True)
class Starts:
    """Where paths may start: behind ``padding``, and where the ids ``[B, S]`` of sequences packed in a row change."""

    padding: FullyMasked | None = None
    sequence_ids: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class ReadRows:
    """The rows whose results are read.

    ``program``        computes them, bool ``[B, S]``, from ``(batch, seq, device, *inputs)``.
    ``inputs``         the positions of the captured graph's inputs that it takes.
    ``reads_earlier``  these rows depend on the earlier rows of their sequence,
    ``hidden``         but for those.
    ``are_picked``     there may be others than these that are not read.
    """

    program: fx.GraphModule
    inputs: tuple[int, ...]
    reads_earlier: bool
    hidden: FullyMasked | None
    are_picked: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """The queries and keys of an attention. If ``grouped``, keys may have fewer heads (``enable_gqa``)."""

    query: Rows
    key: Rows
    grouped: bool


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary embeddings by column.

    ``nodes``     the values that depend on their column. In compact form they count columns from the start of the path.
    ``pairs``     the queries and keys made of them: products must depend on the distance of columns alone, in each call
                  in which paths start at other columns than the first.
    """

    nodes: frozenset[fx.Node]
    pairs: tuple[Pair, ...]


@dataclass
class Fold:
    """One folded form of a captured graph. The pass that states each of its fields is named.

    Several of them are made of one graph with its facts, ``captured``, which no folding pass writes to.

    ``attentions``  how each attention runs on the tree, or why it does not (``fold_attention``).
    ``homes``       the form in which each node runs (``choose_cuts``).
    ``light``       whether a node is computed from the inputs by cheap ops alone, as far as ``is_light`` was asked.
    ``wanted``      the forms in which each node's value is wanted (``choose_forms``).
    ``program``     the folded program; before ``fold_graph``, the captured one.
    ``starts``      where the paths of rows may start (``prove_shift``).
    ``rotary``      the rotary embeddings by column (``find_rotary``).
    ``column``      the first op after which a row may depend on its column, if there is one (``prove_shift``).
    ``read_rows``   the rows whose results are read; None if all may be (``find_read_rows``),
    ``every_row``   which is why.
    ``head``        the nodes whose compact values have entries for rows that are read alone (``choose_head``).
    ``notes``       sentences for the report.
    """

    captured: fx.GraphModule
    variant: FoldVariant
    options: Options
    program: fx.GraphModule
    attentions: dict[fx.Node, TreeAttention | Declined] = field(default_factory=dict)
    homes: dict[fx.Node, Form] = field(default_factory=dict)
    light: dict[fx.Node, bool] = field(default_factory=dict, repr=False)
    wanted: Wanted = field(default_factory=Wanted)
    starts: Starts = field(default_factory=Starts)
    rotary: Rotary | None = None
    column: fx.Node | None = None
    read_rows: ReadRows | None = None
    every_row: str = ""
    head: frozenset[fx.Node] = frozenset()
    notes: list[str] = field(default_factory=list)

    def tree_attention(self, node: fx.Node) -> TreeAttention | None:
        """The compact form of an attention; None if it has none, or is no attention."""
        found = self.attentions.get(node)
        return found if isinstance(found, TreeAttention) else None

    def biases(self, node: fx.Node) -> tuple[Bias, ...]:
        """The biases that an attention in compact form reads in full form."""
        found = self.tree_attention(node)
        return () if found is None else found.biases

    def attentions_on_tree(self) -> list[TreeAttention]:
        """The attentions that run on the tree. Needs ``choose_forms``."""
        found = [self.tree_attention(node) for node, runs in self.wanted.runs.items() if Form.COMPACT in runs]
        return [one for one in found if one is not None]

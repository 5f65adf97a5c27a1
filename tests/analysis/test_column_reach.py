"""The columns that entries read, against derivatives: none reads a later one than is said, and what is known is so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import radix_compile
from radix_compile.analysis.op_info import OP_INFO
from radix_compile.analysis.reach.column_reach import OutOfReach
from radix_compile.analysis.reach.pointwise import elementwise_reach
from radix_compile.analysis.reach.views import groups
from radix_compile.ir.axes import SEQ
from radix_compile.ir.graph import tokens_of
from radix_compile.ir.value import value_of
from radix_compile.passes.mark_token_axes import mark_token_axes
from tests.graphs import captured
from tests.models import VOCABULARY, shared_batch

B, S, D, C = 3, 8, 4, 4
"""Two chunks of as many columns as there are features."""

TABLE = torch.randn(VOCABULARY, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHT = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IDS = shared_batch(B, S, 5)
Program = Callable[[Tensor], Tensor]


def chunks(x: Tensor) -> Tensor:
    """``[B, S / C, C, D]``"""
    return x.reshape(B, -1, C, D)


def together(x: Tensor) -> Tensor:
    return x.reshape(B, -1, D)


def lower(size: int = C, diagonal: int = 0) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril(diagonal)


def decays(x: Tensor) -> Tensor:
    """``[B, S / C, C, C]``: how much is left of an earlier row, and zero for later ones."""
    total = -chunks(x).mean(-1).abs().cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(~lower(), -torch.inf).exp()


def within_chunks(x: Tensor) -> Tensor:
    parts = chunks(x)
    return together((parts @ parts.mT * decays(x)) @ parts)


def recurrence(x: Tensor) -> Tensor:
    """Chunk by chunk, with a state that is handed on."""
    parts, result = chunks(x), torch.zeros_like(chunks(x))
    state = x.new_zeros(B, D, D)
    for number in range(parts.shape[1]):
        part = parts[:, number]
        inner = (part @ part.mT) * decays(x)[:, number]
        result = torch.select_scatter(result, part @ state + inner @ part, 1, number)
        state = state + part.mT @ part
    return together(result)


def padded(x: Tensor) -> Tensor:
    """Chunks of three, the last of which is filled up."""
    parts = F.pad(x, (0, 0, 0, 1)).reshape(B, 3, 3, D)
    return together(parts.cumsum(2)).reshape(B, -1, D)[:, :S]


def delta_rule(x: Tensor) -> Tensor:
    parts = chunks(x)
    return together(torch.linalg.solve_triangular(parts @ parts.mT * decays(x), parts, upper=False, unitriangular=True))


def states(x: Tensor) -> Tensor:
    """What each chunk hands on to the next one, by an equation."""
    summed = torch.einsum("bcld,bcle->bcde", chunks(x), chunks(x))
    before = torch.cat([torch.zeros_like(summed[:, :1]), summed], 1)[:, :-1]
    return together(torch.einsum("bcld,bcde->bcle", chunks(x), before) + chunks(x))


def convolution(x: Tensor) -> Tensor:
    weight = torch.ones(D, 1, 3, dtype=x.dtype)
    return F.conv1d(x.mT, weight, None, padding=4, dilation=2, groups=D)[..., :S].mT


def forward_substitution(x: Tensor) -> Tensor:
    """The inverse of a triangle, row by row, as where there is no solver."""
    parts = chunks(x)
    system = -(parts @ parts.mT * decays(x)).tril(-1)
    for i in range(1, C):
        row, above = system[..., i, :i].clone(), system[..., :i, :i].clone()
        system[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    return together((system + torch.eye(C, dtype=x.dtype)) @ parts)


def products_summed(x: Tensor) -> Tensor:
    """Without a product of matrices: what is zero stays so when it is divided, summed and subtracted."""
    parts = chunks(x)
    scores = (parts[:, :, :, None] * parts[:, :, None]).sum(-1)
    weights = (scores[..., None] * decays(x)[..., None] / 2).sum(-1) - torch.zeros(C, C, dtype=x.dtype)
    return together((weights[..., None] * parts[:, :, None]).sum(3))


CAUSAL: dict[str, Program] = {
    "forward substitution": forward_substitution,
    "products, summed": products_summed,
    "within chunks": within_chunks,
    "a recurrence over chunks": recurrence,
    "padded": padded,
    "delta rule": delta_rule,
    "states": states,
    "convolution": convolution,
    "linear attention": lambda x: (x @ x.mT * lower(S)) @ x,
    "linear attention, a triangle of scores": lambda x: (x @ x.mT).tril() @ x,
    "linear attention, chosen": lambda x: torch.where(lower(S), x @ x.mT, 0.0) @ x,
    "linear attention, the other way round": lambda x: torch.where(~lower(S), 0.0, x @ x.mT) @ x,
    "weights that are constants": lambda x: F.linear(chunks(x), WEIGHT).reshape(B, S, D),
    "merged and cut": lambda x: chunks(x).permute(0, 2, 1, 3).permute(0, 2, 1, 3).clone().reshape(B, S, D),
    "cut into and stacked again": lambda x: torch.cat([part.squeeze(1) for part in chunks(x).split(1, 1)], 1),
    "one by one": lambda x: together(torch.cat([part.unsqueeze(1) for part in chunks(x).unbind(1)], 1)),
    "turned twice": lambda x: together(chunks(x).flip(1).flip(1)),
    "the last one, again and again": lambda x: together(chunks(x)[:, :1].repeat_interleave(2, 1) + chunks(x)),
    "the largest so far": lambda x: together(
        chunks(x) + F.pad(chunks(x).amax(2, keepdim=True), (0, 0, 0, 0, 1, 0))[:, :2]
    ),
    "shifted to the right": lambda x: F.pad(x, (0, 0, 1, 0))[:, :S],
    "a softmax of the chunk before": lambda x: together(
        chunks(x) + F.pad(chunks(x).softmax(2).sum(2, keepdim=True), (0, 0, 0, 0, 1, 0))[:, :2].expand(B, 2, C, D)
    ),
}
NOT: dict[str, Program] = {
    "the whole chunk": lambda x: together(chunks(x) + chunks(x).mean(2, keepdim=True)),
    "one column ahead within chunks": lambda x: together(
        (chunks(x) @ chunks(x).mT).masked_fill(~lower(C, 1), 0.0) @ chunks(x)
    ),
    "chunks swapped": lambda x: together(chunks(x).flip(1)),
    "a convolution in the middle": lambda x: F.conv1d(x.mT, torch.ones(D, D, 3, dtype=x.dtype), padding=1).mT,
    "a convolution from behind": lambda x: F.conv1d(x.mT, torch.ones(D, D, 3, dtype=x.dtype), padding=2)[..., 2:].mT,
    "the upper triangle": lambda x: (x @ x.mT).triu() @ x,
    "masked with something small": lambda x: (x @ x.mT).masked_fill(~lower(S), 1e-3) @ x,
    "decays the wrong way": lambda x: together(decays(x).mT @ chunks(x)),
    "backwards substitution": lambda x: together(
        torch.linalg.solve_triangular((chunks(x) @ chunks(x).mT).triu(), chunks(x), upper=True, unitriangular=True)
    ),
    "the state after the chunk": lambda x: together(chunks(x) @ (chunks(x).mT @ chunks(x))),
    "shifted to the left": lambda x: F.pad(x, (0, 0, 0, 1))[:, 1:],
    "rolled in chunks": lambda x: together(chunks(x).roll(1, 2)),
    "sequences as columns": lambda x: together(chunks(x) + torch.arange(B)[:, None, None, None]),
    "sequences in what is written over": lambda x: together(
        torch.select_scatter((torch.arange(B)[:, None, None, None] * torch.ones(B, 2, C, D)).double(), x[:, :C], 1, 0)
    ),
    "sequences written over": lambda x: together(
        torch.select_scatter(chunks(x), (torch.arange(B)[:, None, None] * torch.ones(B, C, D)).double(), 1, 1)
    ),
    "a product with sequences": lambda x: together(
        torch.einsum("bcld,bce->bcle", chunks(x), (torch.arange(B)[:, None, None] * torch.ones(B, 2, D)).double())
    ),
    "columns of another sequence": lambda x: together(torch.cat([chunks(x)[1:], chunks(x)[:1]])),
    "products with another sequence": lambda x: together(
        torch.einsum("bcld,acld->acld", chunks(x), chunks(x)) * decays(x)[..., :1]
    ),
}


def analysed(program: Program) -> tuple[fx.Node, fx.GraphModule]:
    def whole(ids: Tensor) -> tuple[Tensor, Tensor]:
        return F.embedding(ids, TABLE) @ WEIGHT, program(F.embedding(ids, TABLE))

    torch._dynamo.reset()
    gm = captured(whole, IDS)
    mark_token_axes(gm)
    return gm.graph.output_node().args[0][1], gm  # type: ignore[index, return-value]


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str) -> None:
    node, gm = analysed(CAUSAL[name])
    assert value_of(node).mixed is None
    assert (SEQ,) in value_of(node).axes
    assert tokens_of(gm).scans
    check_against_derivatives(CAUSAL[name])


@pytest.mark.parametrize("name", NOT)
def test_not_causal(name: str) -> None:
    node, gm = analysed(NOT[name])
    assert value_of(node).mixed is not None
    assert not tokens_of(gm).scans
    assert tokens_of(gm).refusals
    check_against_derivatives(NOT[name])


def check_against_derivatives(program: Program) -> None:
    """Of every node that has a reach."""
    _, gm = analysed(program)
    reaches = tokens_of(gm).reaches
    x = F.embedding(IDS, TABLE)
    looked_up = next(n for n in reversed(gm.graph.nodes) if n.target is torch.ops.aten.embedding.default)
    for node, found in list(reaches.by_node.items()):
        if found is None or isinstance(found, tuple) or not isinstance(node.meta["val"], Tensor):
            continue

        def value(x: Tensor, node: fx.Node = node) -> Tensor:
            return _From(gm, looked_up, x).until(node)

        entries = value(x)
        known = torch.tensor(found.known).expand(entries.shape)
        assert torch.equal(entries[~known.isnan()].double(), known[~known.isnan()])
        if not entries.is_floating_point():
            continue
        reads = torch.autograd.functional.jacobian(value, x)
        if found.batch is not None:  # and only its own sequence
            own = reads.movedim(found.batch, 0)
            for sequence in range(B):
                others = torch.arange(B) != sequence
                assert not own[sequence][..., others, :, :].any()
        columns = (reads != 0).any(-1).any(-2)
        last = torch.where(columns, torch.arange(S), -1).amax(-1)
        assert (last <= torch.tensor(found.last)).all(), node


class _From(fx.Interpreter):
    """Runs a graph from the embeddings on."""

    def __init__(self, gm: fx.GraphModule, looked_up: fx.Node, x: Tensor) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.looked_up, self.x = looked_up, x

    def until(self, node: fx.Node) -> Tensor:
        inputs = {"ids": IDS, "table": TABLE, "weight": WEIGHT}
        for placeholder in self.module.graph.find_nodes(op="placeholder"):  # type: ignore[union-attr]
            shape = tuple(placeholder.meta["val"].shape)
            self.env[placeholder] = next(t for t in inputs.values() if tuple(t.shape) == shape)
        for one in self.module.graph.nodes:  # type: ignore[union-attr]
            if one.op not in ("placeholder", "output"):
                self.env[one] = self.x if one.target is self.looked_up.target else self.run_node(one)
            if one is node:
                break
        result: Tensor = self.env[node]
        return result


def test_every_rule_is_used() -> None:
    """Each op with a rule of its own is on the way of one of the programs."""
    used: set[Any] = set()
    for program in (*CAUSAL.values(), *NOT.values()):
        _, gm = analysed(program)
        used |= {node.target for node, found in tokens_of(gm).reaches.by_node.items() if found is not None}
    aliases = {  # of one rule, and made by other ways of writing the same
        "alias", "detach", "contiguous", "type_as", "_to_copy", "view", "reshape", "t", "mT", "permute", "transpose",
        "split_with_sizes", "chunk", "constant_pad_nd", "mm", "bmm", "squeeze", "where", "amin", "mean",
    }  # fmt: skip
    own = [op for op, info in OP_INFO.items() if info.reach not in (None, elementwise_reach)]
    missing = {str(op) for op in own if op not in used and op.__name__.split(".")[0] not in aliases}
    assert not missing


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 8, 4), (2, 2, 4, 4), [([0], [2]), ([1], [2, 4]), ([2], [4])]),
        ((2, 2, 4, 4), (2, 8, 4), [([0], [2]), ([1, 2], [8]), ([3], [4])]),
        ((4, 6), (3, 8), [([0, 1], [3, 8])]),
        ((2, 1, 3), (2, 3), [([0], [2]), ([1, 2], [3])]),
        ((6,), (1, 6, 1), [([0], [1, 6]), ([], [1])]),
        ((), (1,), [([], [1])]),
    ],
)
def test_groups(before: tuple[int, ...], after: tuple[int, ...], expected: Any) -> None:
    assert groups(before, after) == expected


def test_what_reads_everything_takes_no_room() -> None:
    node, gm = analysed(lambda x: (x - x.mean(1, keepdim=True)).relu().reshape(B, 2, C, D).cumsum(2))
    assert tokens_of(gm).reaches.of(node).last.tolist() == [[[[S - 1]]]]


def test_what_is_too_large_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radix_compile.analysis.reach.column_reach.MAX_ENTRIES", 2 * C * C - 1)
    node, gm = analysed(within_chunks)
    assert value_of(node).mixed is not None
    with pytest.raises(OutOfReach):
        tokens_of(gm).reaches.of(node)


class Scan(torch.nn.Module):
    """A layer that scans in chunks of four, for any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, D)
        self.before, self.after = torch.nn.Linear(D, D), torch.nn.Linear(D, 4 * D)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.before(self.embedding(ids))
        length = x.shape[1]
        parts = F.pad(x, (0, 0, 0, -length % C)).reshape(x.shape[0], -1, C, D)
        scanned = parts.cumsum(2).reshape(x.shape[0], -1, D)
        return self.after(scanned[:, :length])


def test_other_lengths_are_proved_when_they_come() -> None:
    model = Scan().double()
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"}, dynamic=True)
    with torch.no_grad():
        for length in (8, 11, 16, 5, 8):
            ids = shared_batch(4, length, 3)
            torch.testing.assert_close(compiled(ids), model(ids))
    stats = radix_compile.stats()
    assert stats.folded_calls == 5
    assert stats.folded_compiles <= 3


def test_a_length_for_which_it_is_not_true_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call's sizes make of the graph is looked at, not what those of the first call did."""
    from radix_compile.analysis.reach import column_reach

    model = Scan().double()
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"}, dynamic=True)
    with torch.no_grad():
        compiled(shared_batch(4, 8, 3))
        assert radix_compile.stats().folded_calls == 1
        monkeypatch.setattr(column_reach.Reaches, "causal_axes", lambda self, node: None)
        ids = shared_batch(4, 16, 3)
        torch.testing.assert_close(compiled(ids), model(ids))
    stats = radix_compile.stats()
    assert stats.folded_calls == 1
    assert any("not proved causal" in reason for reason in stats.plain_calls)


class TellsSequencesApart(torch.nn.Module):
    """A table that becomes ``[B, S, D]`` by sizes that are symbols: its axes are not known."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = torch.nn.Embedding(VOCABULARY, D), torch.nn.Linear(D, 4 * D)
        self.table = torch.nn.Parameter(torch.randn(4 * 8, D))

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.embedding(ids)) + self.last(self.embedding(ids) + self.table.reshape(*ids.shape, D))


def test_a_table_of_unknown_axes_is_refused() -> None:
    model, ids = TellsSequencesApart().double(), shared_batch(4, 8, 3)
    options = {"inner_backend": "eager", "fold": "always", "strict": True}
    compiled = torch.compile(model, backend="radix", options=options, dynamic=True)
    torch.testing.assert_close(compiled(ids), model(ids))
    assert radix_compile.stats().folded_calls == 1

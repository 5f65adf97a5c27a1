"""Losses over the vocabulary read the logits of the nodes, where they mean what the full ones would."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graphs import calls, fold_of, folded, scattered
from tests.models import VOCABULARY, shared_batch

aten, radix = torch.ops.aten, torch.ops.radix
IDS = shared_batch(4, 12, 8)
LABELS = IDS.masked_fill(torch.arange(12) < 5, -100)
WEIGHT = torch.linspace(1, 2, VOCABULARY)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(ids))
        return logits


def entropy(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)  # type: ignore[arg-type]


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the next token, so that it is not the row alone that decides."""
    return logits.log_softmax(-1).gather(-1, following(labels).unsqueeze(-1)).squeeze(-1)


def following(labels: Tensor) -> Tensor:
    return F.pad(labels.clamp(min=0), (0, 1))[:, 1:]


READS_NODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": entropy,
    "sum": lambda x, y: entropy(x, y, reduction="sum"),
    "none": lambda x, y: entropy(x, y, reduction="none"),
    "another index is ignored": lambda x, y: entropy(x, y.clamp(min=0), ignore_index=7),
    "nothing is ignored": lambda x, y: entropy(x, y.clamp(min=0)),
    "in float32": lambda x, y: entropy(x.float(), y),
    "shifted, as for causal models": lambda x, y: entropy(x, F.pad(y, (0, 1), value=-100)[:, 1:]),
    "log-probabilities": log_probabilities,
    "log-probabilities of rows": lambda x, y: x.flatten(0, 1).log_softmax(-1).gather(1, following(y).reshape(-1, 1)),
}


def merged(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """A program that merges batch and sequence before the head."""
    logits = model.head(model.embedding(ids).flatten(0, 1) * 2)  # type: ignore[operator]
    return F.cross_entropy(logits, labels.flatten())


READS_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weighted classes": lambda x, y: entropy(x, y, weight=WEIGHT.to(x)),
    "label smoothing": lambda x, y: entropy(x, y, label_smoothing=0.1),
    "class probabilities": lambda x, y: F.cross_entropy(x.flatten(0, 1), x.flatten(0, 1).softmax(-1)),
    "classes in the middle": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "the same for each feature, not row": lambda x, y: entropy(x.transpose(0, 1).contiguous(), y.T),
    "two columns each": lambda x, y: x.log_softmax(-1).gather(-1, following(y)[..., None].expand(-1, -1, 2)),
    "some of the rows": lambda x, y: x.log_softmax(-1).gather(-1, following(y)[:, :3, None]),
    "softmax over parts": lambda x, y: (
        x[..., 1:].unflatten(-1, (2, 48)).log_softmax(-1).flatten(-2).gather(-1, following(y)[..., None].clamp(max=95))
    ),
    "along the sequence": lambda x, y: x.log_softmax(1).gather(-1, following(y)[..., None]),
}
BOTH = {**READS_NODES, **READS_ROWS}


def program(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, labels: loss(model(ids), labels)


@pytest.mark.parametrize("name", READS_NODES)
def test_reads_the_nodes(name: str) -> None:
    fold = fold_of(program(Model(), READS_NODES[name]), IDS, LABELS)
    gm = fold.program
    assert len(calls(gm, radix.token_nll.default)) == 1
    assert not scattered(gm)
    assert not calls(gm, aten.cross_entropy_loss.default)
    assert "softmax runs once per node" in fold.notes[0]


def test_reads_the_nodes_of_rows_that_were_merged_before() -> None:
    model = Model()
    gm = folded(lambda ids, labels: merged(model, ids, labels), IDS, LABELS)
    assert len(calls(gm, radix.token_nll.default)) == 1
    options = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
    compiled = torch.compile(merged, backend="radix", options=options)
    torch.testing.assert_close(compiled(model, IDS, LABELS), merged(model, IDS, LABELS))


@pytest.mark.parametrize("name", READS_ROWS)
def test_reads_the_rows(name: str) -> None:
    fold = fold_of(program(Model(), READS_ROWS[name]), IDS, LABELS)
    gm = fold.program
    assert not calls(gm, radix.token_nll.default)
    assert scattered(gm)
    assert not fold.notes


def test_logits_that_something_else_wants_are_scattered_for_it() -> None:
    model = Model()
    gm = folded(lambda ids, labels: (entropy(logits := model(ids), labels), logits), IDS, LABELS)
    assert len(calls(gm, radix.token_nll.default)) == 1
    assert len(scattered(gm)) == 1


CASES = [
    *itertools.product(BOTH, ["aot_eager"], [torch.float64, torch.bfloat16]),
    *itertools.product(["mean", "shifted, as for causal models", "log-probabilities"], ["inductor"], [torch.float64]),
]


@pytest.mark.parametrize(("name", "inner", "dtype"), CASES)
def test_the_loss_and_its_gradient_are_those_of_the_plain_program(name: str, inner: str, dtype: torch.dtype) -> None:
    model = Model(dtype)
    options = {"inner_backend": inner, "fold": "always", "strict": True}
    compiled = torch.compile(program(model, BOTH[name]), backend="radix", options=options)

    def with_gradients(call: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        result = call(IDS, LABELS)
        result.to(torch.float64).mul(torch.linspace(0.5, 1.5, result.numel()).view_as(result)).sum().backward()
        return [result.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    ours, plain = with_gradients(compiled), with_gradients(program(model, BOTH[name]))
    model.double()
    exact = with_gradients(program(model, BOTH[name]))
    for one, other, reference in zip(ours, plain, exact, strict=True):
        assert one.dtype == other.dtype
        if dtype == torch.float64:  # the plain program is the reference
            torch.testing.assert_close(one, other)
            continue
        # Where the plain program happens to be exact: one rounding of the largest entry.
        floor = torch.finfo(one.dtype).eps * reference.abs().max()
        allowed = (other.double() - reference).abs().max() + floor
        assert (one.double() - reference).abs().max() <= 2 * allowed


def test_a_label_out_of_range_is_an_error() -> None:
    """(In inductor's C++ it is one too, but that ends the process.)"""
    model = Model()
    options = {"inner_backend": "aot_eager", "strict": True}
    compiled = torch.compile(program(model, entropy), backend="radix", options=options)
    labels = LABELS.clone()
    labels[1, 7] = -1
    with pytest.raises(IndexError, match="out of bounds"):
        compiled(IDS, labels)

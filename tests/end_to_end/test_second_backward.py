"""Two backward passes after one forward pass (``retain_graph=True``) give the plain program's gradients each time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import radix_compile
from tests.models import VOCABULARY, build, shared_batch
from tests.tiers import slow_unless

Run = Callable[[Tensor], Tensor]
INNERS = ["aot_eager", "inductor"]


def loss_of(model: nn.Module) -> Run:
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(loss: Tensor, model: nn.Module, **options: bool) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), **options))


def assert_same(ours: list[Tensor], others: list[Tensor]) -> None:
    assert any(gradient.any() for gradient in ours)
    assert all(map(torch.equal, ours, others))


@pytest.mark.parametrize("inner", INNERS)
def test_a_graph_that_is_kept(inner: str) -> None:
    model = build("Qwen3", num_hidden_layers=1).train()
    ids = shared_batch(4, 12, 8)
    plain = gradients(loss_of(model)(ids), model)
    run = torch.compile(
        loss_of(model), backend="radix", options={"inner_backend": inner, "fold": "always", "strict": True}
    )

    loss = run(ids)
    first = gradients(loss, model, retain_graph=True)
    torch.testing.assert_close(first, plain, rtol=1e-4, atol=1e-6)
    assert_same(first, gradients(loss, model, retain_graph=True))
    assert_same(first, gradients(loss, model))  # the last backward pass overwrites its inputs
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, model)

    loss = run(ids)
    for count in (1, 2):  # gradients add up
        loss.backward(retain_graph=True)
        assert_same([weight.grad / count for weight in model.parameters()], first)
    run(ids)  # without a backward pass
    assert_same(gradients(run(ids), model), first)

    higher = gradients(run(ids), model, create_graph=True)
    assert_same([gradient.detach() for gradient in higher], first)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):  # as in plain inductor
        gradients(sum(gradient.sum() for gradient in higher), model)
    assert radix_compile.stats().folded_calls == 5


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        rows = checkpoint(self.layers, self.embedding(ids), use_reentrant=False)
        return F.cross_entropy(self.head(rows.sin()).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("inner", slow_unless(lambda inner: inner == "aot_eager", INNERS))
def test_another_batch_before_the_second_time(inner: str) -> None:
    """A second batch, of other sizes, leaves the graph of the first intact. The checkpoint recomputes every time."""
    model = Small()
    batches = shared_batch(4, 12, 8), shared_batch(4, 12, 3, seed=1)
    plain = [gradients(model(ids), model) for ids in batches]
    run = torch.compile(model, backend="radix", options={"inner_backend": inner, "fold": "always", "strict": True})
    losses = [run(ids) for ids in batches]
    ours = [[gradients(loss, model, retain_graph=keep) for loss in losses] for keep in (True, True, False)]
    for first, second, last, expected in zip(*ours, plain, strict=True):
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-6)
        assert_same(first, second)
        assert_same(first, last)
    assert radix_compile.stats().folded_compiles == 1

"""Listeners: what they are told, and which backends are equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import radix_compile
from radix_compile.passes.report import GraphReport
from radix_compile.runtime.dispatch import Choice
from tests.models import VOCABULARY, shared_batch


class Keeps:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[GraphReport] = []
        self.choices: list[tuple[GraphReport, Choice]] = []

    def on_report(self, report: GraphReport) -> None:
        self.reports.append(report)

    def on_choice(self, report: GraphReport, choice: Choice) -> None:
        self.choices.append((report, choice))


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


def model(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Embedding(VOCABULARY, 16), *between, nn.Linear(16, 16))


def backend(listener: radix_compile.Listener | None, **options: object) -> radix_compile.RadixBackend:
    return radix_compile.RadixBackend(listener=listener, **{"inner_backend": "eager", "fold": 0.9, **options})


def test_it_is_told_of_each_graph_and_each_choice() -> None:
    heard = Keeps()
    compiled = torch.compile(model(), backend=backend(heard))
    with torch.no_grad():
        compiled(shared_batch(4, 12, 8))
        compiled(torch.arange(48).view(4, 12))
    (report,) = heard.reports
    assert report.folded
    assert [choice.program for _, choice in heard.choices] == ["position-wise fold", "plain"]
    assert all(of is report for of, _ in heard.choices)
    plan = heard.choices[0][1].plan
    assert (plan.tokens, plan.compact_tokens) == (48, 24)


def test_it_is_told_of_what_does_not_fold() -> None:
    heard = Keeps()
    with pytest.warns(UserWarning, match="nothing folds"):
        torch.compile(model(Flip()), backend=backend(heard))(shared_batch(4, 12, 8))
    (report,) = heard.reports
    assert (report.folded, report.refusals[0].op) == (False, "aten.flip.default")
    assert heard.choices == []


def test_it_is_told_before_strict_raises() -> None:
    heard = Keeps()
    with pytest.raises(Exception, match="nothing folds"):
        torch.compile(model(Flip()), backend=backend(heard, strict=True))(shared_batch(4, 12, 8))
    assert [report.folded for report in heard.reports] == [False]


def test_it_is_told_of_options_given_to_torch_compile() -> None:
    heard = Keeps()
    torch.compile(model(), backend=backend(heard), options={"fold": "never"})(shared_batch(4, 12, 8))
    assert [report.folded for report in heard.reports] == [False]


def test_backends_with_different_listeners_differ() -> None:
    """If they were equal, Dynamo would run what was compiled for the one, and the other would hear nothing."""
    heard, another = Keeps(), Keeps()
    assert backend(heard) == backend(heard)
    assert hash(backend(heard)) == hash(backend(heard))
    assert backend(heard) != backend(another)
    assert backend(heard) != backend(None)
    program, ids = model(), shared_batch(4, 12, 8)
    for listener in (heard, another):
        torch.compile(program, backend=backend(listener))(ids)
    assert len(heard.reports) == len(another.reports) == 1

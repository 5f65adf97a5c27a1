"""Bounds hold for every entry, and those of position biases are small enough for a mask to count on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from radix_compile.analysis.bounds import Bounds, bounds_of
from radix_compile.passes.mark_token_axes import mark_token_axes
from tests.graphs import captured
from tests.models import shared_batch

S = 12
IDS = shared_batch(4, S, 7)
TABLE = torch.randn(97, S)


def of(expression: Callable[[Tensor], Tensor]) -> tuple[Bounds | None, Tensor]:
    """What is said of an expression of the ids, and its value."""

    def program(ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.embedding(ids, TABLE) @ torch.ones(S, S), expression(ids)

    graph = captured(program, IDS)
    mark_token_axes(graph)
    result: Any = graph.graph.output_node().args[0][1]  # type: ignore[index]
    assert isinstance(result, fx.Node)
    assert isinstance(result.meta["val"], FakeTensor)
    return bounds_of(result), expression(IDS)


KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], Bounds]] = {
    "counting": (lambda ids: torch.arange(S), (0, S - 1)),
    "counting from": (lambda ids: torch.arange(3, S) + 2, (5, S + 1)),
    "counting back": (lambda ids: 1 - torch.arange(1, 1 + S), (1 - S, 0)),
    "a product of both signs": (lambda ids: (torch.arange(S) - 4) * (3 - torch.arange(S))[:, None], (-56, 32)),
    "slopes": (lambda ids: torch.pow(torch.tensor(0.5), torch.arange(1, 5)), (0.5**4, 0.5)),
    "slopes of a number": (lambda ids: 2.0 ** -torch.arange(1, 5), (0.5**4, 0.5)),
    "joined": (lambda ids: torch.cat([torch.ones(2), torch.zeros(2)]), (0, 1)),
    "reciprocal": (lambda ids: 1 / torch.arange(2, 6), (0.2, 0.5)),
    "truth": (lambda ids: ids > 3, (0, 1)),
    "distances": (lambda ids: (torch.arange(S) - torch.arange(S)[:, None]) * 0.25, (-(S - 1) / 4, (S - 1) / 4)),
    "cut to whole numbers": (lambda ids: (torch.arange(1, 4) * 0.5).long(), (0, 2)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str) -> None:
    expression, (low, high) = KNOWN[name]
    found, value = of(expression)
    assert found is not None
    assert found == pytest.approx((low, high))
    assert found[0] - 1e-6 <= value.min() <= value.max() <= found[1] + 1e-6


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "a table": lambda ids: TABLE[:S],
    "a function": lambda ids: torch.exp(torch.arange(S)),
    "a quotient by what may be zero": lambda ids: 1 / torch.arange(S),
    "a quotient by a fraction cut to zero": lambda ids: 1 / (torch.arange(1, 4) * 0.5).long(),
    "more than the type holds": lambda ids: torch.arange(1, S).half() * 6e4,
    "a power of zero": lambda ids: torch.arange(S) ** -1.0,
    "complex": lambda ids: torch.arange(S) * 1j,
    "joined with a table": lambda ids: torch.cat([torch.ones(1, S), TABLE]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str) -> None:
    assert of(UNKNOWN[name])[0] is None


def test_whole_numbers_are_bounded_by_their_type() -> None:
    """Whatever they are: they wrap around."""
    assert of(lambda ids: ids * 3)[0] == (float(-(2**63)), float(2**63 - 1))
    assert of(lambda ids: ids.to(torch.int16) * 3)[0] == (float(-(2**15)), float(2**15 - 1))
    found, value = of(lambda ids: torch.arange(S, dtype=torch.int8) * 100)
    assert found == (-128, 127)
    assert value.min() < 0

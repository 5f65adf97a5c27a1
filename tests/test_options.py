"""Options: defaults, values that are refused, near misses, equality."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import radix_compile
from radix_compile import backend
from radix_compile.options import Options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"treshold": 0.5}, "unknown radix option 'treshold' .did you mean 'threshold'"),
        ({"threshold": 1.5}, "'threshold' must be a number from 0 to 1, or None, not 1.5"),
        ({"calibrate": 1}, "'calibrate' must be True or False"),
        ({"calibration": 3}, "'calibration' must be a path or None"),
        ({"threshold": "high"}, "'threshold' must be a number"),
        ({"threshold": True}, "'threshold' must be a number"),
        ({"min_tokens": -1}, "'min_tokens' must be an integer, zero or more"),
        ({"min_tokens": 1.5}, "'min_tokens' must be an integer"),
        ({"pad_multiple_of": 0}, "'pad_multiple_of' must be a positive integer or None"),
        ({"padding": "skp"}, "'padding' must be \"exact\" or \"skip\" .did you mean 'skip'"),
        ({"strict": 1}, "'strict' must be True or False"),
        ({"inner": 3}, "'inner' must be a backend name or a callable"),
        ({"inner_options": 3}, "'inner_options' must be a dict"),
    ],
)
def test_bad_options_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        radix_compile.RadixBackend(**given)


def test_bad_options_through_torch_compile() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="radix", options={"treshold": 0.5})
    with pytest.raises(Exception, match="did you mean 'threshold'"):
        compiled(torch.zeros(2, 2))


def test_defaults() -> None:
    options = Options()
    assert (options.inner, options.threshold, options.padding, options.strict) == ("inductor", None, "exact", False)


def test_backends_with_equal_options_are_equal() -> None:
    one, two = radix_compile.RadixBackend(threshold=0.5), radix_compile.RadixBackend(threshold=0.5)
    assert one == two
    assert hash(one) == hash(two)
    assert one != radix_compile.RadixBackend(threshold=0.6)
    assert one.__name__ == "radix"


def test_an_equal_backend_does_not_compile_again() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    ids = torch.zeros(3, 5, dtype=torch.long)
    for _ in range(2):
        torch.compile(model, backend=radix_compile.RadixBackend(inner="eager", threshold=1.0))(ids)
    assert radix_compile.stats().graphs == 1


def test_mode_and_inner_options_reach_the_inner_backend() -> None:
    seen: list[dict[str, Any]] = []

    def inner(gm: torch.fx.GraphModule, inputs: list[Any], **settings: Any) -> Any:
        seen.append(settings)
        return gm.forward

    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    ids = torch.zeros(3, 5, dtype=torch.long)
    torch.compile(model, backend=radix_compile.RadixBackend(inner=inner, threshold=1.0), mode="reduce-overhead")(ids)
    torch.compile(model, backend=radix_compile.RadixBackend(inner=inner, threshold=1.0, inner_options={"a": 1}))(ids)
    assert seen == [{"mode": "reduce-overhead"}] * 2 + [{"options": {"a": 1}}] * 2


def test_inductor_takes_a_mode() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    ids = torch.zeros(3, 5, dtype=torch.long)
    backend = radix_compile.RadixBackend(threshold=1.0)
    torch.testing.assert_close(torch.compile(model, backend=backend, mode="reduce-overhead")(ids), model(ids))
    assert radix_compile.stats().folded_calls == 1


def test_inductors_cpp_wrapper() -> None:
    """It takes what a graph's placeholders say of themselves for the inputs, not what they are given."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    ids = torch.zeros(3, 5, dtype=torch.long)
    backend = radix_compile.RadixBackend(threshold=1.0, inner_options={"cpp_wrapper": True})
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(ids), model(ids))
    assert radix_compile.stats().folded_calls == 1


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cuda", {"mode": "reduce-overhead"}, 256),
        ("cuda", {"mode": "reduce-overhead", "pad_multiple_of": 5}, 5),
        ("cuda", {}, None),
        ("cpu", {"mode": "reduce-overhead"}, None),
    ],
)
def test_cuda_graphs_are_recorded_for_few_sizes(device: str, given: dict[str, Any], expected: int | None) -> None:
    ids = SimpleNamespace(meta={"val": SimpleNamespace(device=torch.device(device), shape=(16, 1280))})
    captured: Any = SimpleNamespace(meta={"tokens": SimpleNamespace(keys=[ids])})
    assert backend._with_rounded_plan_sizes(Options(**given), captured).pad_multiple_of == expected

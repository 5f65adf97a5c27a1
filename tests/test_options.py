"""Options: defaults, values that are refused, near misses, equality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, get_type_hints
from unittest import mock

import pytest
import torch
from torch import nn

import radix_compile
from radix_compile import backend
from radix_compile.ir.graph import GraphFacts, set_graph_facts
from radix_compile.options import Options, RadixOptions


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fild": 0.5}, "unknown radix option 'fild' .did you mean 'fold'"),
        ({"fold": 1.5}, '\'fold\' must be "auto", "always", "never" or a number above 0 and at most 1, not 1.5'),
        ({"fold": 0}, "'fold' must be .* a number above 0"),
        ({"fold": float("nan")}, "'fold' must be .*, not nan"),
        ({"fold": None}, "'fold' must be .*, not None"),
        ({"fold": True}, "'fold' must be .*, not True"),
        ({"fold": "alway"}, "'fold' must be .* .did you mean 'always'.., not 'alway'"),
        ({"calibrate": 1}, "'calibrate' must be True or False"),
        ({"calibration": 3}, "'calibration' must be a path or None"),
        ({"min_tokens": -1}, "'min_tokens' must be an integer, zero or more"),
        ({"min_tokens": 1.5}, "'min_tokens' must be an integer"),
        ({"pad_multiple_of": 0}, "'pad_multiple_of' must be a positive integer or None"),
        ({"padding": "skp"}, "'padding' must be \"exact\" or \"skip\" .did you mean 'skip'"),
        ({"padding": ["skip"]}, "'padding' must be \"exact\" or \"skip\", not \\['skip'\\]"),
        ({"strict": 1}, "'strict' must be True or False"),
        ({"inner_backend": 3}, "'inner_backend' must be a backend name or a callable"),
        ({"inner_options": 3}, "'inner_options' must be a mapping with string keys"),
        ({"inner_options": {3: 4}}, "'inner_options' must be a mapping with string keys, not {3: 4}"),
    ],
)
def test_bad_options_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        radix_compile.RadixBackend(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"fild": 0.5}, "did you mean 'fold'"), ({"fold": "nevr"}, "'fold' must be .*did you mean 'never'")],
)
def test_bad_options_through_torch_compile(given: dict[str, Any], message: str) -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="radix", options=given)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as raised:
        compiled(torch.zeros(2, 2))
    assert isinstance(raised.value.inner_exception, ValueError)


def test_defaults() -> None:
    options = Options()
    assert (options.inner_backend, options.fold, options.padding) == ("inductor", "auto", "exact")
    assert (options.inner_options, options.strict) == ({}, False)


def test_the_typed_dict_has_the_options() -> None:
    assert list(get_type_hints(RadixOptions).items()) == list(get_type_hints(Options).items())
    assert RadixOptions.__required_keys__ == frozenset()


def test_backends_with_equal_options_are_equal() -> None:
    one, two = radix_compile.RadixBackend(fold=0.5), radix_compile.RadixBackend(fold=0.5)
    assert one == two
    assert hash(one) == hash(two)
    assert one != radix_compile.RadixBackend(fold=0.6)
    assert one.__name__ == "radix"


class Unhashable:
    """An inner backend that runs graphs as they are. All of them are equal."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unhashable)

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any], **settings: Any) -> Any:
        return gm.forward


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"inner_options": {"a": [1, 2]}},
        lambda: {"inner_options": {"a": {"b": {1}}, "c": None}},
        lambda: {"inner_options": MappingProxyType({"a": []})},
        lambda: {"inner_backend": Unhashable()},
        lambda: {"calibration": Path("file")},
    ],
)
def test_backends_have_hashes_whatever_their_options(make: Callable[[], RadixOptions]) -> None:
    one, two = radix_compile.RadixBackend(**make()), radix_compile.RadixBackend(**make())
    assert one == two
    assert hash(one) == hash(two)
    assert one != radix_compile.RadixBackend()


def test_the_order_of_inner_options_does_not_matter() -> None:
    one, two = Options(inner_options={"a": 1, "b": 2}), Options(inner_options={"b": 2, "a": 1})
    assert one == two
    assert hash(one) == hash(two)


def test_options_do_not_change_with_the_mapping_that_was_given() -> None:
    given = {"a": 1}
    options = Options(inner_options=given)
    given["a"] = 2
    assert options.inner_options == {"a": 1}


@pytest.mark.parametrize("by_name", [True, False])
def test_unhashable_options_through_torch_compile(by_name: bool) -> None:
    model, ids = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)), torch.zeros(3, 5, dtype=torch.long)
    for _ in range(2):
        given: RadixOptions = {"inner_backend": Unhashable(), "inner_options": {"a": [1, {}]}, "fold": "always"}
        how = {"backend": "radix", "options": given} if by_name else {"backend": radix_compile.RadixBackend(**given)}
        torch.testing.assert_close(torch.compile(model, **how)(ids), model(ids))
    counted = radix_compile.stats()
    assert (counted.graphs, counted.folded_calls) == (1, 2)


def test_an_equal_backend_does_not_compile_again() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    ids = torch.zeros(3, 5, dtype=torch.long)
    for _ in range(2):
        torch.compile(model, backend=radix_compile.RadixBackend(inner_backend="eager", fold="always"))(ids)
    assert radix_compile.stats().graphs == 1


def test_mode_and_inner_options_reach_the_inner_backend() -> None:
    seen: list[dict[str, Any]] = []

    def inner(gm: torch.fx.GraphModule, inputs: list[Any], **settings: Any) -> Any:
        seen.append(settings)
        return gm.forward

    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    ids = torch.zeros(3, 5, dtype=torch.long)
    torch.compile(
        model, backend=radix_compile.RadixBackend(inner_backend=inner, fold="always"), mode="reduce-overhead"
    )(ids)
    torch.compile(
        model, backend=radix_compile.RadixBackend(inner_backend=inner, fold="always", inner_options={"a": 1})
    )(ids)
    assert seen == [{"mode": "reduce-overhead"}] * 2 + [{"options": {"a": 1}}] * 2


def test_never_compiles_the_plain_program_alone(recwarn: pytest.WarningsRecorder) -> None:
    model, ids = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)), torch.zeros(3, 5, dtype=torch.long)
    programs: list[Any] = []

    def inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return gm.forward

    class Watched(radix_compile.RadixBackend):
        def compile(self, gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            program = super().compile(gm, *args, **kwargs)
            programs.append(program == gm.forward)
            return program

    with mock.patch.object(backend, "capture", side_effect=AssertionError("captured")):
        compiled = torch.compile(model, backend=Watched(inner_backend=inner, fold="never", strict=True))
        torch.testing.assert_close(compiled(ids), model(ids))
    assert programs == [True]  # the inner backend's own: calls are not planned, nor counted
    counted = radix_compile.stats()
    assert (counted.graphs, counted.plain_compiles, counted.folded_compiles, counted.calls) == (1, 1, 0, 0)
    assert not [warning for warning in recwarn if "radix" in str(warning.message)]


def test_never_is_the_reason_that_explain_gives() -> None:
    model, ids = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)), torch.zeros(3, 5, dtype=torch.long)
    explanation = radix_compile.explain(model, ids, options={"fold": "never"})
    assert [graph.reason for graph in explanation.graphs] == ['the option fold is "never"']


def test_inductor_takes_a_mode() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    ids = torch.zeros(3, 5, dtype=torch.long)
    backend = radix_compile.RadixBackend(fold="always")
    torch.testing.assert_close(torch.compile(model, backend=backend, mode="reduce-overhead")(ids), model(ids))
    assert radix_compile.stats().folded_calls == 1


def test_inductors_cpp_wrapper() -> None:
    """It takes what a graph's placeholders say of themselves for the inputs, not what they are given."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    ids = torch.zeros(3, 5, dtype=torch.long)
    backend = radix_compile.RadixBackend(fold="always", inner_options={"cpp_wrapper": True})
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
    captured: Any = SimpleNamespace(meta={})
    set_graph_facts(captured, GraphFacts(tokens=SimpleNamespace(keys=[ids])))  # type: ignore[arg-type]
    assert backend._with_rounded_plan_sizes(Options(**given), captured).pad_multiple_of == expected

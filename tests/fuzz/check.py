"""One example: a random program and batches for it, run as it is and folded, and the numbers compared."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import radix_compile
from radix_compile import backend
from radix_compile.capture import CaptureError, capture
from radix_compile.passes.fold_attention import fold_attention
from radix_compile.passes.lower_index_ops import lower_index_ops
from radix_compile.passes.mark_token_axes import CannotFold
from radix_compile.passes.skip_padding import PaddingIsRead, skip_padding
from radix_compile.pipeline import run_pass, run_pipeline
from radix_compile.plan_inputs import PlanInputs, plan_inputs
from radix_compile.report import report_on
from radix_compile.row_contents import RunsPlain
from tests.fuzz.batches import Given, draw_batch, draw_inputs
from tests.fuzz.draw import draw_sizes
from tests.fuzz.programs import Program, draw_program

Batch = dict[str, Tensor]

FAILURES = (
    *(AssertionError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(CaptureError, CannotFold),
)
"""What a wrong fold or a crash ends with."""

FALLBACKS = ("cannot compile the folded program", "lowering to ATen failed")
"""Warnings of the backend that it ran plain where it should not have had to."""

EAGERLY = "torch.compile runs it eagerly"
"""A warning that the inner backend cannot even compile the plain program."""


@dataclass(frozen=True)
class Example:
    """``route`` is "passes" (the pipeline, and the folded graph as it is), or an inner backend of ``torch.compile``."""

    seed: int
    program: Program
    batches: list[Batch]
    route: str
    gradients: bool
    dynamic: bool
    skip: bool

    def __str__(self) -> str:
        settings = f"seed {self.seed}: route={self.route} gradients={self.gradients} dynamic={self.dynamic}"
        batch = "\n".join(f"# {name} = {tensor.tolist()}" for name, tensor in self.batches[0].items())
        return f"# {settings} skip={self.skip}\n# the first batch:\n{batch}\n{self.program}"


@dataclass
class Outcome:
    """What came of the examples: how many, how many folded, met a refusal, could not be compared, and so on."""

    examples: int = 0
    folded: int = 0
    refused: int = 0
    discarded: int = 0
    skipped_padding: int = 0
    tokens: int = 0
    compact_tokens: int = 0
    routes: dict[str, int] = field(default_factory=dict)

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)


def draw_example(seed: int, compiled: float = 0.1) -> Example:
    """Everything about an example follows from its seed, and from the share that goes through ``torch.compile``."""
    random = Random(seed)
    sizes, inputs = draw_sizes(random), draw_inputs(random)
    packed = "positions" in inputs and random.random() < 0.5
    if packed:
        sizes = replace(sizes, B=random.choice([1, 1, 2]), S=random.randint(4, 14))
    program = draw_program(random, sizes, inputs, packed)
    gradients, dynamic, skip = (random.random() < 1 / 3 for _ in range(3))
    draw = random.random()
    route = "aot_eager" if draw < compiled / 5 else "eager" if draw < compiled else "passes"
    dynamic &= route != "passes"
    other = sizes
    if dynamic and not program.fixed:
        other = replace(sizes, B=random.randint(min(sizes.B, 2), sizes.B + 1), S=random.randint(2, sizes.S))
    mask = random.choice([torch.int64, torch.int32, torch.bool])
    given = Given(random.random() < 1 / 3, random.random() < 1 / 2)
    batches = [draw_batch(random, of, inputs, mask, given, packed) for of in (sizes, sizes, other)]
    return Example(seed, program, batches, route, gradients, dynamic, skip and route == "passes")


def check(example: Example, outcome: Outcome) -> None:
    """Raises one of :data:`FAILURES` if the folded program does not compute what the plain one does."""
    with _float64(), _kernels(example), torch.set_grad_enabled(example.gradients):
        outcome.add(examples=1)
        outcome.routes[example.route] = outcome.routes.get(example.route, 0) + 1
        plain = Module(example.program)
        expected = [plain(**batch) for batch in example.batches]
        if not all(result.isfinite().all() for results in expected for result in results):
            outcome.add(discarded=1)  # nothing is proved of infinity and its like
            return
        try:
            if example.route == "passes":
                _check_passes(example, plain, expected, outcome)
            else:
                _check_compiled(example, plain, expected, outcome)
        except AssertionError:
            if not _is_unstable(example, plain, expected):
                raise
            outcome.add(discarded=1)
        except RuntimeError:
            if example.route == "passes" or not _fails_by_itself(example, plain):
                raise
            outcome.add(discarded=1)


def fails(example: Example) -> bool:
    try:
        check(example, Outcome())
    except FAILURES:
        return True
    return False


def minimised(example: Example) -> Example:
    """A smaller example that fails too: with one batch and no block that can be left out."""
    candidates = [replace(example, batches=[batch]) for batch in example.batches]
    candidates += [replace(example, program=program) for program in example.program.smaller()]
    if len(example.batches) == 1:
        candidates = candidates[1:]
    found = next((candidate for candidate in candidates if fails(candidate)), None)
    return example if found is None else minimised(found)


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _kernels(example: Example) -> contextlib.AbstractContextManager[None]:
    """Torch's fused attention has a wrong gradient for rows that see no key, and is not always the one that runs."""
    return sdpa_kernel(SDPBackend.MATH) if example.gradients else contextlib.nullcontext()


class Module(nn.Module):
    """The program with its weights."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for name, weight in program.weights().items():
            self.register_parameter(name, weight)
        self.run = program.forward()

    def forward(self, **batch: Tensor) -> tuple[Tensor, ...]:
        return self.run(self, **batch)


# ---------------------------------------------------------------------------------------------- through the passes


def captured(module: Module, batch: Batch) -> fx.GraphModule:
    """The graph that the passes start from: as if Dynamo had found one op in the program, the program."""
    names = [name for name, _ in module.named_parameters()]

    def whole(*args: Any) -> tuple[Tensor, ...]:
        weights = SimpleNamespace(**dict(zip(names, args[len(batch) :], strict=True)))
        return module.run(weights, *args[: len(batch)])

    args = [*batch.values(), *module.parameters()]
    graph = fx.Graph()
    graph.output(graph.call_function(whole, tuple(graph.placeholder(f"input_{i}") for i in range(len(args)))))
    with tracing(TracingContext(FakeTensorMode(static_shapes=True))):
        return capture(fx.GraphModule({}, graph), args)


def _check_passes(example: Example, plain: Module, expected: list[tuple[Tensor, ...]], outcome: Outcome) -> None:
    source = captured(plain, example.batches[0])
    try:
        programs = [_folded(source, example, run_pipeline(source))]
    except CannotFold as verdict:
        if not verdict.expected:
            raise
        outcome.add(refused=1)
        return
    outcome.add(folded=report_on(source).folded, refused=bool(source.meta["tokens"].refusals))
    outcome.add(skipped_padding="padding" in source.meta)
    if not programs[0][1].keys:  # nothing runs compact
        return
    if programs[0][1].may_leave_the_tree:
        source.meta.update(sighted=False, apart=False, listed=False)
        programs.append(_folded(source, example, run_pipeline(source, first=fold_attention)))
    for batch, wanted in zip(example.batches, expected, strict=True):
        args = [*batch.values(), *plain.parameters()]
        for folded, inputs in programs:
            try:
                plan = inputs.plan(args)
            except RunsPlain:
                continue
            if plan.compact_tokens:
                outcome.add(tokens=plan.tokens, compact_tokens=plan.compact_tokens)
                kept = torch.from_numpy(plan.scatter >= 0).view(batch["ids"].shape)
                if len(kept) == len(kept.mT):  # results whose axes are swapped have the left out rows there, as zeros
                    kept = kept & kept.mT
                arrays = inputs.arrays(plan, args, torch.device("cpu"))
                _compare(folded(*args, *arrays), wanted, plain, kept)


def _folded(source: fx.GraphModule, example: Example, folded: fx.GraphModule) -> tuple[fx.GraphModule, PlanInputs]:
    """What the passes made of a program, finished, and how to plan its calls."""
    source.meta.pop("padding", None)
    plan_inputs(source)  # raises what the backend would raise before it looks at padding
    if example.skip:
        with contextlib.suppress(PaddingIsRead):
            skip_padding(folded)
    run_pass(lower_index_ops, folded)
    return folded, plan_inputs(source)  # what is skipped is part of it


# --------------------------------------------------------------------------------------------- through torch.compile


def _check_compiled(example: Example, plain: Module, expected: list[tuple[Tensor, ...]], outcome: Outcome) -> None:
    torch._dynamo.reset()
    before = radix_compile.stats()
    options = {"inner": example.route, "threshold": 1.0}
    compiled = torch.compile(plain, backend="radix", options=options, dynamic=example.dynamic or None)
    with warnings.catch_warnings(record=True) as caught, mock.patch.object(backend, "LEAST_SHARE", 0.0):
        warnings.simplefilter("always")
        for batch, wanted in zip(example.batches, expected, strict=True):
            _compare(compiled(**batch), wanted, plain, torch.ones_like(batch["ids"], dtype=torch.bool))
    messages = [str(warning.message) for warning in caught]
    if not any(EAGERLY in message for message in messages):
        assert not [message for message in messages if any(fallback in message for fallback in FALLBACKS)], messages
    after = radix_compile.stats()
    calls = after.folded_calls - before.folded_calls
    outcome.add(folded=calls > 0, refused=calls == 0)
    outcome.add(tokens=after.tokens - before.tokens, compact_tokens=after.compact_tokens - before.compact_tokens)


def _fails_by_itself(example: Example, plain: Module) -> bool:
    """Does the inner backend fail without us, on the program or its gradient?"""
    torch._dynamo.reset()
    try:
        for batch in example.batches:
            compiled = torch.compile(plain, backend=example.route, dynamic=example.dynamic or None)
            _gradients(compiled(**batch), list(plain.parameters()))
    except RuntimeError:
        return True
    return False


# ------------------------------------------------------------------------------------------------------- comparing


def _is_unstable(example: Example, plain: Module, expected: list[tuple[Tensor, ...]]) -> bool:
    """Do weights that are off by some roundings change the plain program's own results by as much as is allowed?

    A norm of two features that are nearly equal makes large numbers of roundings.
    """
    off = Module(example.program)
    with torch.no_grad():
        for weight in off.parameters():
            weight *= 1 + 8 * torch.finfo(weight.dtype).eps * torch.randn(weight.shape, generator=_generator())
    for batch, wanted in zip(example.batches, expected, strict=True):
        try:
            for one, other in zip(off(**batch), wanted, strict=True):
                _assert_close(one, other)
            found = _gradients(off(**batch), list(off.parameters()))
            for one, other in zip(found, _gradients(wanted, list(plain.parameters()), again=True), strict=True):
                _assert_close(one, other)
        except AssertionError:
            return True
    return False


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _compare(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...], plain: Module, kept: Tensor) -> None:
    """All results, or the kept rows of them, and the gradients of all weights if there are any."""
    if not kept.all():
        ours, wanted = tuple(one[kept] for one in ours), tuple(one[kept] for one in wanted)
    for one, other in zip(ours, wanted, strict=True):
        _assert_close(one, other)
    weights = list(plain.parameters())
    found, expected = _gradients(ours, weights), _gradients(wanted, weights, again=True)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        _assert_close(one, other)


def _assert_close(one: Tensor, other: Tensor) -> None:
    largest = other.detach().abs().max().item() if other.numel() else 0.0
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * max(1.0, largest))


def _gradients(results: tuple[Tensor, ...], weights: list[nn.Parameter], again: bool = False) -> list[Tensor]:
    """Of a sum of all entries, each with a factor of its own. ``again`` if they will be asked for once more."""
    terms = []
    for result in results:
        if result.requires_grad:
            factors = torch.randn(result.shape, generator=_generator())
            terms.append((result * factors).sum())
    if not terms:
        return []
    total = sum(terms)
    return list(torch.autograd.grad(total, weights, materialize_grads=True, allow_unused=True, retain_graph=again))

"""Compare folded programs with plain ones, and make failing examples smaller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from radix_compile.ir.errors import CannotFold
from radix_compile.passes.capture import CaptureError
from tests.fuzz.compare import assert_close, assert_same_gradients, generator, gradients, is_usable
from tests.fuzz.example import Call, Example, Module, Outcome, draw_example
from tests.fuzz.routes import check_compiled, check_passes, fails_by_itself

__all__ = ["FAILURES", "Outcome", "check", "draw_example", "minimised"]

FAILURES = (
    *(AssertionError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, NameError),
    *(CaptureError, CannotFold),
)
"""The errors of a wrong fold or a crash."""


def check(example: Example, outcome: Outcome) -> None:
    """Raise one of :data:`FAILURES` unless the folded program gives the results of the plain one."""
    with _float64(), _kernels(example), torch.set_grad_enabled(example.gradients):
        outcome.add(examples=1)
        outcome.routes[example.route] = outcome.routes.get(example.route, 0) + 1
        plain = Module(example.program)
        calls = [Call(batch, plain(**batch)) for batch in example.batches]
        calls = [call for call in calls if is_usable(call.expected)]
        if not calls:
            outcome.add(discarded=1)
            return
        route = check_passes if example.route == "passes" else check_compiled
        try:
            route(example, plain, calls, outcome)
        except (AssertionError, RuntimeError):
            if not _is_unstable(example, plain, calls) and not fails_by_itself(example, plain, calls):
                raise
            outcome.add(discarded=1)


def failure(example: Example) -> Exception | None:
    """The error of :func:`check`, if it raises one."""
    try:
        check(example, Outcome())
    except FAILURES as error:
        return error
    return None


def minimised(example: Example) -> Example:
    """A smaller example with the same type of error: it has one batch, and no block can be left out."""
    error = failure(example)
    smaller: Example | None = example if error is not None else None
    while smaller is not None:
        example = smaller
        smaller = next((part for part in _smaller(example) if type(failure(part)) is type(error)), None)
    return example


def _smaller(example: Example) -> Iterator[Example]:
    if len(example.batches) > 1:
        yield from (replace(example, batches=[batch]) for batch in example.batches)
    yield from (replace(example, program=program) for program in example.program.smaller())


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _kernels(example: Example) -> contextlib.AbstractContextManager[None]:
    """Run attention in plain torch ops: torch's fused kernels have a wrong gradient for fully masked rows."""
    return sdpa_kernel(SDPBackend.MATH) if example.gradients else contextlib.nullcontext()


def _is_unstable(example: Example, plain: Module, calls: list[Call]) -> bool:
    """Do weights with a few rounding errors change the plain program's own results by more than the tolerance?

    For example, a norm over two nearly equal features amplifies rounding errors.
    """
    perturbed = Module(example.program)
    with torch.no_grad():
        for weight in perturbed.parameters():
            weight *= 1 + 8 * torch.finfo(weight.dtype).eps * torch.randn(weight.shape, generator=generator())
    try:
        for call in calls:
            _assert_close_to_plain(perturbed, plain, call)
    except AssertionError:
        return True
    return False


def _assert_close_to_plain(perturbed: Module, plain: Module, call: Call) -> None:
    results: tuple[Tensor, ...] = perturbed(**call.batch)
    for result, expected in zip(results, call.expected, strict=True):
        assert_close(result, expected, plain.tolerance)
    perturbed_gradients = gradients(results, list(perturbed.parameters()), call.expected)
    plain_gradients = gradients(call.expected, list(plain.parameters()), call.expected, keep_graph=True)
    assert_same_gradients(perturbed_gradients, plain_gradients, plain.tolerance)

"""Whether what folds computes what the plain program does, and examples made smaller while it does not."""

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
"""What a wrong fold or a crash ends with."""


def check(example: Example, outcome: Outcome) -> None:
    """Raises one of :data:`FAILURES` if the folded program does not compute what the plain one does."""
    with _float64(), _kernels(example), torch.set_grad_enabled(example.gradients):
        outcome.add(examples=1)
        outcome.routes[example.route] = outcome.routes.get(example.route, 0) + 1
        plain = Module(example.program)
        calls = [Call(batch, plain(**batch)) for batch in example.batches]
        calls = [call for call in calls if is_usable(call.wanted)]
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
    try:
        check(example, Outcome())
    except FAILURES as error:
        return error
    return None


def minimised(example: Example) -> Example:
    """A smaller example that fails in the same way: with one batch and no block that can be left out."""
    error = failure(example)
    found: Example | None = example if error is not None else None
    while found is not None:
        example = found
        found = next((one for one in _smaller(example) if type(failure(one)) is type(error)), None)
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
    """Torch's fused attention has a wrong gradient for rows that see no key, and is not always the one that runs."""
    return sdpa_kernel(SDPBackend.MATH) if example.gradients else contextlib.nullcontext()


def _is_unstable(example: Example, plain: Module, calls: list[Call]) -> bool:
    """Do weights that are off by some roundings change the plain program's own results by as much as is allowed?

    A norm of two features that are nearly equal makes large numbers of roundings.
    """
    off = Module(example.program)
    with torch.no_grad():
        for weight in off.parameters():
            weight *= 1 + 8 * torch.finfo(weight.dtype).eps * torch.randn(weight.shape, generator=generator())
    try:
        for call in calls:
            _assert_close_to_plain(off, plain, call)
    except AssertionError:
        return True
    return False


def _assert_close_to_plain(off: Module, plain: Module, call: Call) -> None:
    results: tuple[Tensor, ...] = off(**call.batch)
    for one, other in zip(results, call.wanted, strict=True):
        assert_close(one, other, plain.error)
    found = gradients(results, list(off.parameters()), call.wanted)
    expected = gradients(call.wanted, list(plain.parameters()), call.wanted, again=True)
    assert_same_gradients(found, expected, plain.error)

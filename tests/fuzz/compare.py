"""Compare two runs of a program: numbers, gradients, strides, and which results share memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Results = tuple[Tensor, ...]
Gradients = list[Tensor | None]


class WrongGradients(AssertionError):  # noqa: N818 - the name says what is wrong
    """The gradient of a weight differs from the plain program's, or only one of the two exists."""


class WrongStrides(AssertionError):  # noqa: N818 - the name says what is wrong
    """The strides of a result differ from the plain program's, so that a caller's ``view`` may fail."""


class WrongWrites(AssertionError):  # noqa: N818 - the name says what is wrong
    """An in-place write to a result changes the other results in another way than in the plain program."""


def assert_same(
    ours: Results,
    plain: Results,
    weights: Sequence[nn.Parameter],
    kept: Sequence[Tensor | None] = (),
    twice: bool = False,
    tolerance: float = 1e-9,
) -> None:
    """Compare the results, or their entries where ``kept`` is true, if there is one, and the gradients of all weights.

    With ``twice``, the backward pass of ``ours`` runs twice. The graph of ``plain`` is kept for further comparisons.
    ``tolerance`` is relative to the largest entry.
    """
    assert len(ours) == len(plain), f"{len(ours)} results, not {len(plain)}"
    rows, plain_rows = ours, plain
    if kept:
        rows, plain_rows = (
            tuple(one if where is None else one * where for one, where in zip(results, kept, strict=True))
            for results in (ours, plain)
        )
    for result, expected in zip(rows, plain_rows, strict=True):
        assert_close(result, expected, tolerance)
    plain_gradients = gradients(plain_rows, weights, plain_rows, keep_graph=True)
    for keep_graph in (True, False)[not twice :]:
        assert_same_gradients(gradients(rows, weights, plain_rows, keep_graph), plain_gradients, tolerance)
    _assert_same_strides(ours, plain)


def assert_same_writes(ours: Results, plain: Results, callers: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Write to each result in turn, and compare how the other results change with the plain program.

    ``plain`` are results of the plain program that are not needed any more. Memory of ``callers`` is not written to.
    """
    protected = {tensor.untyped_storage().data_ptr() for tensor in callers}
    for number, (result, expected) in enumerate(zip(ours, plain, strict=True)):
        if not _can_be_written(expected, protected):
            continue
        if not _can_be_written(result, protected):
            raise WrongWrites(f"result {number} can be written to in the plain program only")
        _write(result)
        _write(expected)
        for other_number, (other, expected_other) in enumerate(zip(ours, plain, strict=True)):
            try:
                assert_close(other, expected_other, tolerance)
            except AssertionError as difference:
                raise WrongWrites(
                    f"after writing to result {number}, result {other_number}: {difference}"
                ) from difference


def _can_be_written(result: Tensor, protected: set[int]) -> bool:
    """Is each entry at an address of its own, outside of the caller's memory?"""
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(result.shape, result.stride(), strict=True))
    return result.numel() > 0 and not overlaps and result.untyped_storage().data_ptr() not in protected


def _write(result: Tensor) -> None:
    if result.is_floating_point():
        result.detach().add_(1)
    else:
        result.detach().zero_()


def assert_close(result: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Compare the entries that are not NaN in ``expected``."""
    result, expected = result.detach(), expected.detach()
    assert result.shape == expected.shape, f"{list(result.shape)}, not {list(expected.shape)}"
    is_number = ~expected.isnan()
    if not is_number.all():
        result, expected = result[is_number], expected[is_number]
    finite = expected[expected.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * max(1.0, largest))


def _assert_same_strides(ours: Results, plain: Results) -> None:
    for number, (result, expected) in enumerate(zip(ours, plain, strict=True)):
        if expected.numel() == 0 or result.shape != expected.shape:
            continue
        dims = [dim for dim, size in enumerate(expected.shape) if size > 1]
        if any(result.stride(dim) != expected.stride(dim) for dim in dims):
            raise WrongStrides(f"result {number}: strides {result.stride()}, not {expected.stride()}")


def assert_same_gradients(ours: Gradients, plain: Gradients, tolerance: float = 1e-9) -> None:
    """Compare the gradients of all weights, unless the plain ones have NaN entries (from rows that are NaN)."""
    has_nan = any(expected is not None and expected.isnan().any() for expected in plain)
    for number, (gradient, expected) in enumerate(zip(ours, plain, strict=True)):
        if expected is None:
            if gradient is not None and gradient.any() and not has_nan:
                raise WrongGradients(f"weight {number} has a gradient, and none in the plain program")
            continue
        if gradient is None:
            raise WrongGradients(f"weight {number} has no gradient, and one in the plain program")
        try:
            if not has_nan:
                assert_close(gradient, expected, tolerance)
        except AssertionError as difference:
            raise WrongGradients(f"weight {number}: {difference}") from difference


def gradients(results: Results, weights: Sequence[nn.Parameter], like: Results, keep_graph: bool = False) -> Gradients:
    """The gradients of a weighted sum of the entries that are finite in ``like``. The factors are always the same.

    With ``keep_graph``, the backward pass may run again.
    """
    with torch.enable_grad():
        terms = []
        for result, expected in zip(results, like, strict=True):
            if result.requires_grad:
                factors = torch.randn(result.shape, generator=generator())
                terms.append((torch.where(expected.isfinite(), result, 0) * factors).sum())
        if not terms:
            return [None] * len(weights)
        return list(torch.autograd.grad(sum(terms), weights, allow_unused=True, retain_graph=keep_graph))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def is_usable(results: Results) -> bool:
    """Is any entry finite? Without finite entries, a comparison proves nothing."""
    return any(result.isfinite().any() for result in results if result.is_floating_point())

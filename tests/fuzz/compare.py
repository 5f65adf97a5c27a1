"""What has to be the same of two runs of a program: numbers, gradients, strides, and who shares memory with whom."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Results = tuple[Tensor, ...]
Gradients = list[Tensor | None]


class WrongGradients(AssertionError):  # noqa: N818 - it says what
    """A weight has another gradient than in the plain program, or has one in one of them alone."""


class WrongStrides(AssertionError):  # noqa: N818 - it says what
    """A result lies otherwise in memory, so that a caller's ``view`` may fail."""


class WrongWrites(AssertionError):  # noqa: N818 - it says what
    """Writing to a result in place does not change the others as in the plain program."""


def assert_same(
    ours: Results,
    wanted: Results,
    weights: Sequence[nn.Parameter],
    kept: Tensor | None = None,
    twice: bool = False,
    error: float = 1e-9,
) -> None:
    """All results, or the kept rows of them, and the gradients of all weights; ``twice`` if one backward has two runs.

    ``wanted`` may be compared with again. ``error`` is what is allowed, relative to the largest entry.
    """
    assert len(ours) == len(wanted), f"{len(ours)} results, not {len(wanted)}"
    rows = ours, wanted
    if kept is not None and not kept.all():
        rows = tuple(one[kept] for one in ours), tuple(one[kept] for one in wanted)
    for one, other in zip(*rows, strict=True):
        assert_close(one, other, error)
    found, expected = rows
    right = gradients(expected, weights, expected, again=True)
    for again in (True, False)[not twice :]:
        assert_same_gradients(gradients(found, weights, expected, again), right, error)
    _assert_same_strides(ours, wanted)


def assert_same_writes(ours: Results, again: Results, own: Sequence[Tensor], error: float = 1e-9) -> None:
    """Writes to one result after the other: the others must change as those of the plain program do.

    ``again`` are results of the plain program that nobody needs any more, ``own`` what belongs to the caller.
    """
    owned = {one.untyped_storage().data_ptr() for one in own}
    for number, (one, other) in enumerate(zip(ours, again, strict=True)):
        if not _can_be_written(other, owned):
            continue
        if not _can_be_written(one, owned):
            raise WrongWrites(f"result {number} can be written to in the plain program alone")
        _write(one)
        _write(other)
        for place, (here, there) in enumerate(zip(ours, again, strict=True)):
            try:
                assert_close(here, there, error)
            except AssertionError as difference:
                raise WrongWrites(f"after writing to result {number}, result {place}: {difference}") from difference


def _can_be_written(result: Tensor, owned: set[int]) -> bool:
    """Not if entries are one in memory, nor if they are the caller's."""
    spread = any(size > 1 and stride == 0 for size, stride in zip(result.shape, result.stride(), strict=True))
    return result.numel() > 0 and not spread and result.untyped_storage().data_ptr() not in owned


def _write(result: Tensor) -> None:
    if result.is_floating_point():
        result.detach().add_(1)
    else:
        result.detach().zero_()


def assert_close(one: Tensor, other: Tensor, error: float = 1e-9) -> None:
    """Where the other one is not a number, nothing is asked for."""
    one, other = one.detach(), other.detach()
    assert one.shape == other.shape, f"{list(one.shape)}, not {list(other.shape)}"
    hold = ~other.isnan()
    if not hold.all():
        one, other = one[hold], other[hold]
    finite = other[other.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(one, other, rtol=error, atol=error * max(1.0, largest))


def _assert_same_strides(ours: Results, wanted: Results) -> None:
    for number, (one, other) in enumerate(zip(ours, wanted, strict=True)):
        where = [dim for dim, size in enumerate(other.shape) if size > 1]
        if other.numel() == 0 or one.shape != other.shape:
            continue
        found, expected = ([tensor.stride(dim) for dim in where] for tensor in (one, other))
        if found != expected:
            raise WrongStrides(f"result {number}: strides {one.stride()}, not {other.stride()}")


def assert_same_gradients(found: Gradients, expected: Gradients, error: float = 1e-9) -> None:
    """Where a row is not a number, so are gradients, of which weights nobody cares."""
    lost = any(other is not None and other.isnan().any() for other in expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if other is None:
            if one is not None and one.any() and not lost:
                raise WrongGradients(f"weight {number} has a gradient, and none in the plain program")
            continue
        if one is None:
            raise WrongGradients(f"weight {number} has no gradient, and one in the plain program")
        try:
            if not lost:
                assert_close(one, other, error)
        except AssertionError as difference:
            raise WrongGradients(f"weight {number}: {difference}") from difference


def gradients(results: Results, weights: Sequence[nn.Parameter], like: Results, again: bool = False) -> Gradients:
    """Of a sum of all entries, each with a factor of its own, that are finite in ``like``.

    ``again`` if they will be asked for once more.
    """
    with torch.enable_grad():
        terms = []
        for result, other in zip(results, like, strict=True):
            if result.requires_grad:
                factors = torch.randn(result.shape, generator=generator())
                terms.append((torch.where(other.isfinite(), result, 0) * factors).sum())
        if not terms:
            return [None] * len(weights)
        return list(torch.autograd.grad(sum(terms), weights, allow_unused=True, retain_graph=again))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def is_usable(results: Results) -> bool:
    """Is anything finite in it? Where nothing is, nothing is proved."""
    return any(result.isfinite().any() for result in results if result.is_floating_point())

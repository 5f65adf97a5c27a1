"""The comparisons of the fuzzer find each kind of difference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.fuzz.compare import WrongGradients, WrongStrides, WrongWrites, assert_same, assert_same_writes


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3))


def test_other_numbers(weight: nn.Parameter) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_same((weight * 2,), (weight * 2 + 1e-6,), [weight])


def test_what_is_no_number_may_be_anything(weight: nn.Parameter) -> None:
    mask = torch.tensor([[True, False, False], [False, False, False]])
    with_nan, with_number = (weight * 2).masked_fill(mask, torch.nan), (weight * 2).masked_fill(mask, 7.0)
    assert_same((with_number,), (with_nan,), [weight])
    with pytest.raises(AssertionError):
        assert_same((with_nan,), (with_number,), [weight])


@pytest.mark.parametrize("ours", [lambda w: w.detach() * 2, lambda w: w + w.detach()])
def test_lost_gradients(weight: nn.Parameter, ours: object) -> None:
    assert callable(ours)
    with pytest.raises(WrongGradients):
        assert_same((ours(weight),), (weight * 2,), [weight])


def test_gradients_where_plain_has_none(weight: nn.Parameter) -> None:
    with pytest.raises(WrongGradients):
        assert_same((weight * 2,), (weight.detach() * 2,), [weight])
    assert_same((weight.detach() * 2 + 0 * weight,), (weight.detach() * 2,), [weight])  # zeros may replace None


def test_gradients_asked_for_twice(weight: nn.Parameter) -> None:
    class Once(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
            Once.calls += 1
            return 2 * gradient if Once.calls == 1 else gradient

    with pytest.raises(WrongGradients):
        assert_same((Once.apply(weight),), (weight * 2,), [weight], twice=True)


def test_other_strides(weight: nn.Parameter) -> None:
    with pytest.raises(WrongStrides):
        assert_same(((weight * 2).T.contiguous().T,), (weight * 2,), [weight])


def test_results_that_are_one_tensor(weight: nn.Parameter) -> None:
    result = weight.detach() * 2
    with pytest.raises(WrongWrites):
        assert_same_writes((result, result), (result.clone(), result.clone()), [])
    with pytest.raises(WrongWrites):
        assert_same_writes((result.clone(), result.clone().view(6)), (result, result.view(6)), [])
    assert_same_writes((result.clone(), result.clone()), (result.clone(), result.clone()), [])

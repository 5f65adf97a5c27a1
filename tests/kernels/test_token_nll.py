"""The loss on nodes against cross-entropy on rows, with its gradient; its kernel against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from radix_compile.kernels import token_nll
from tests.kernels.plans import Plan, shared, tolerance, tree, values
from tests.models import DEVICE

radix = torch.ops.radix
PLANS = {
    "one row": shared(1, 1, 0, device=DEVICE),
    "all equal": shared(4, 6, 6, device=DEVICE),
    "a tree": tree(9, 11, device=DEVICE),
    "padded fold": tree(4, 5, pad=16, device=DEVICE),
    "long lists": shared(150, 3, 2, device=DEVICE),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def targets(plan: Plan, classes: int) -> Tensor:
    """Few classes, so that rows of one node often have the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, min(classes, 3), (plan.batch * plan.seq,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 7, 300])
@plans
def test_loss_and_gradient(plan: Plan, classes: int, dtype: torch.dtype) -> None:
    logits = values((plan.nodes, classes), dtype, DEVICE).requires_grad_()
    target = targets(plan, classes)
    nll, lse = radix.token_nll(logits, target, *plan.lists)
    assert nll.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)
    assert not lse.requires_grad
    weight = torch.linspace(-1, 2, len(nll), dtype=nll.dtype, device=DEVICE)
    (gradient,) = torch.autograd.grad(nll, logits, weight)

    wide = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(wide[plan.scatter], target, reduction="none")
    (exact,) = torch.autograd.grad(expected, wide, weight.double())
    torch.testing.assert_close(nll.double(), expected, **tolerance(classes, nll.dtype))
    # One rounding to the dtype of the logits, of numbers that were added up in float32.
    limits = tolerance(plan.batch, nll.dtype)
    limits["rtol"] += torch.finfo(dtype).eps
    limits["atol"] *= 4  # a difference of terms up to twice as large, each of them rounded
    torch.testing.assert_close(gradient.double(), exact, **limits)


def test_opcheck() -> None:
    plan = PLANS["a tree"]
    logits = values((plan.nodes, 5), torch.float64, DEVICE).requires_grad_()
    target = targets(plan, 5)
    torch.library.opcheck(radix.token_nll.default, (logits, target, *plan.lists))
    arguments = (values(tuple(target.shape), torch.float64, DEVICE), target, plan.scatter, plan.rows, plan.starts)
    torch.library.opcheck(radix.sum_same_target.default, arguments)


@pytest.mark.skipif(DEVICE == "cuda", reason="a failed assertion on a GPU ends the process")
@pytest.mark.parametrize("wrong", [-1, -100, 5])
def test_targets_out_of_range_are_errors(wrong: int) -> None:
    plan = PLANS["a tree"]
    target = targets(plan, 5)
    target[3] = wrong
    with pytest.raises(IndexError, match="out of bounds"):
        radix.token_nll(values((plan.nodes, 5), torch.float64), target, *plan.lists)


def test_the_gradient_reads_the_logits_once() -> None:
    """Only then can a compiler write it where they were, and no second tensor as wide is needed."""
    plan = PLANS["a tree"]
    backward: list[torch.fx.Graph] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        backward.append(gm.graph)
        return make_boxed_func(gm.forward)

    backend = aot_autograd(
        fw_compiler=lambda gm, _: make_boxed_func(gm.forward), bw_compiler=keep, decompositions=token_nll.DECOMPOSITIONS
    )
    weight = torch.randn(4, 300, device=DEVICE, requires_grad=True)
    hidden = values((plan.nodes, 4), torch.float32, DEVICE)
    target = targets(plan, 300)
    torch.compile(lambda: radix.token_nll(hidden @ weight, target, *plan.lists)[0].sum(), backend=backend)().backward()
    (graph,) = backward
    wide = [node for node in graph.find_nodes(op="placeholder") if node.meta["val"].shape == (plan.nodes, 300)]
    assert [len(node.users) for node in wide] == [1]


def test_gradient_without_row_lists() -> None:
    plan = PLANS["a tree"]
    logits = values((plan.nodes, 5), torch.float64, DEVICE).requires_grad_()
    nll, _ = radix.token_nll(logits, targets(plan, 5), plan.scatter, *[None] * 4)
    with pytest.raises(RuntimeError, match="pass `fold`, `rows`, `starts` and `pieces`"):
        nll.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@plans
def test_kernel_of_the_sums_over_equal_targets(plan: Plan, dtype: torch.dtype) -> None:
    triton_nll = pytest.importorskip("radix_compile.kernels.triton_nll", reason="needs Triton")
    target = targets(plan, 300)
    numbers = values((len(target),), dtype, DEVICE)
    arguments = (target, plan.scatter, plan.rows, plan.starts)
    ours = triton_nll.sum_same_target(numbers, *arguments)
    exact = torch.stack(
        [numbers.double()[(plan.scatter == plan.scatter[t]) & (target == target[t])].sum() for t in range(len(target))]
    )
    torch.testing.assert_close(ours, exact.to(dtype), **tolerance(plan.batch, dtype))
    reference = token_nll.sum_same_target(numbers, *arguments)
    torch.testing.assert_close(reference, exact.to(dtype), **tolerance(plan.batch, dtype))
    if len(target) > 1:
        assert not torch.equal(ours, numbers)  # some rows of a node do have the same target

"""Equal ops become one; what only looks equal does not."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from radix_compile.passes.merge_duplicates import merge_duplicates

aten = torch.ops.aten


def graph(*targets_and_arguments: tuple[object, tuple[object, ...]]) -> fx.GraphModule:
    """Each op takes the input and its arguments; all are returned."""
    traced = fx.Graph()
    x = traced.placeholder("x")
    traced.output(tuple(traced.call_function(op, (x, *arguments)) for op, arguments in targets_and_arguments))
    return fx.GraphModule({}, traced)


def remaining(*targets_and_arguments: tuple[object, tuple[object, ...]]) -> int:
    gm = graph(*targets_and_arguments)
    before: tuple[Tensor, ...] = gm(torch.ones(3, 4))
    merge_duplicates(gm)
    gm.graph.lint()
    gm.recompile()
    if len({str(op) for op, _ in targets_and_arguments}) == 1 and "rand" not in str(targets_and_arguments[0][0]):
        for one, other in zip(before, gm(torch.ones(3, 4)), strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
    return len(gm.graph.find_nodes(op="call_function", target=targets_and_arguments[0][0]))


def test_equal_ops_merge() -> None:
    assert remaining((aten.unsqueeze.default, (1,)), (aten.unsqueeze.default, (1,))) == 1
    assert remaining((aten.permute.default, ([1, 0],)), (aten.permute.default, ([1, 0],))) == 1


def test_different_arguments_stay() -> None:
    assert remaining((aten.unsqueeze.default, (1,)), (aten.unsqueeze.default, (0,))) == 2
    assert remaining((aten.mul.Tensor, (1,)), (aten.mul.Tensor, (1.0,)), (aten.mul.Tensor, (True,))) == 3
    assert remaining((aten.mul.Tensor, (0.0,)), (aten.mul.Tensor, (-0.0,))) == 2


def test_random_ops_stay() -> None:
    assert remaining((aten.rand_like.default, ()), (aten.rand_like.default, ())) == 2


def test_a_no_grad_region_is_a_border() -> None:
    traced = fx.Graph()
    x = traced.placeholder("x")
    outside = traced.call_function(aten.exp.default, (x,))
    traced.call_function(torch._C._set_grad_enabled, (False,))
    inside = traced.call_function(aten.exp.default, (x,))
    traced.call_function(torch._C._set_grad_enabled, (True,))
    traced.output((inside, outside))
    gm = fx.GraphModule({}, traced)
    merge_duplicates(gm)
    assert len(gm.graph.find_nodes(op="call_function", target=aten.exp.default)) == 2

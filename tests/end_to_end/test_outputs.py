"""Outputs have the memory layout of the plain program's: callers view them in other shapes, and write to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import radix_compile
from radix_compile import backend
from radix_compile.analysis.op_info import OP_INFO, OpInfo
from radix_compile.analysis.rules.custom import register_rule
from tests.models import build, shared_batch

B, S, D, H, E = 4, 12, 12, 3, 4
"""There are as many features as columns, so that no stride reveals the meaning of a dimension."""

Program = Callable[["Model", Tensor, Tensor], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def everything_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "LEAST_SHARE", 0.0)


class Model(nn.Module):
    """``program(model, x, ids)`` with ``x`` ``[B, S, D]``."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.last = nn.Embedding(97, D), nn.Linear(D, D), nn.Linear(D, 3 * D)
        self.program = program

    def forward(self, ids: Tensor) -> Sequence[Tensor]:
        return self.program(self, self.first(self.embedding(ids)), ids)


def heads(x: Tensor) -> Tensor:
    return x.view(B, -1, H, E).transpose(1, 2)


def chunks(x: Tensor) -> Tensor:
    """Overlapping chunks of eight columns, as in Longformer. ``x`` must be ``[B, H, S, E]`` in memory."""
    strides = x.stride()
    return x.as_strided((B, H, S // 4 - 1, 8, E), (strides[0], strides[1], 4 * strides[2], strides[2], strides[3]))


OUTPUTS: dict[str, Program] = {
    "rows": lambda m, x, ids: (m.last(x),),
    "rows and columns swapped": lambda m, x, ids: (m.last(x).transpose(1, 2),),
    "sequences and columns swapped": lambda m, x, ids: (m.last(x).transpose(0, 1),),
    "the same, made anew": lambda m, x, ids: (m.last(x).transpose(0, 1).contiguous() * 2,),
    "heads": lambda m, x, ids: (heads(m.first(x)),),
    "heads in a row": lambda m, x, ids: (heads(m.first(x)).contiguous(), heads(x).contiguous() * 2),
    "heads, joined": lambda m, x, ids: (torch.cat([torch.tensor([]), heads(m.first(x))], -2),),
    "features first": lambda m, x, ids: (m.last(x).permute(2, 0, 1).contiguous(),),
    "a part of wider rows": lambda m, x, ids: (m.last(x)[..., 4:9],),
    "thirds": lambda m, x, ids: m.last(x).chunk(3, -1),
    "thirds of heads": lambda m, x, ids: tuple(heads(part) for part in m.last(x).chunk(3, -1)),
    "repeated": lambda m, x, ids: (m.last(x)[:, :, None].expand(B, -1, 2, -1),),
    "merged": lambda m, x, ids: (m.last(x).view(-1, D), m.last(x).flatten()),
    "views of each other": lambda m, x, ids: (y := m.last(x), y.transpose(1, 2), y[..., :5], y.view(-1, D), y),
    "views of what is in another order": lambda m, x, ids: (y := heads(x).contiguous() * 2, y[:, 1], y.mT, y),
    "detached ones in another order": lambda m, x, ids: (y := x.mT.contiguous().mT * 2, y.detach(), y[1:].detach()),
    "equal ones": lambda m, x, ids: (m.last(x) * 2, m.last(x) * 2, m.last(x) * 2),
    "views of equal ones": lambda m, x, ids: ((m.last(x) * 2).transpose(1, 2), (m.last(x) * 2)[..., :3]),
    "equal ones that are read as well": lambda m, x, ids: (x * 2, x * 2, m.last(x * 2)),
    "one and its copy": lambda m, x, ids: (y := m.last(x), y.clone(), y.clone()),
    "an input": lambda m, x, ids: (ids, ids.view(-1), ids[:, :4], m.last(x)),
    "strided": lambda m, x, ids: (chunks(heads(m.first(x)).contiguous()), m.last(x)),
    "strided views of outputs": lambda m, x, ids: (y := heads(x).contiguous() * 2, chunks(y)),
    "other types": lambda m, x, ids: (m.first(x).view(torch.int32), heads(x).contiguous().view(torch.int32)),
    "complex": lambda m, x, ids: (torch.view_as_complex(heads(x).contiguous().view(B, H, -1, E // 2, 2)) * 1j,),
    "complex rows": lambda m, x, ids: (
        torch.view_as_complex(m.first(x).view(B, -1, 2, D // 2).mT.contiguous()),
        torch.view_as_real(torch.view_as_complex(x.view(B, -1, D // 2, 2)) * 1j).flatten(2) @ m.first.weight,
    ),
    "the last row, and all": lambda m, x, ids: (y := m.last(x), y[:, -1]),
    "with and without a gradient": lambda m, x, ids: (heads(m.first(x)), heads(x.detach() * 2), m.last(x)),
    "pooled": lambda m, x, ids: (m.last(x).mean(1), F.normalize(m.last(x)[:, 0], dim=-1)),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", OUTPUTS)
def test_in_memory_as_the_plain_ones(name: str, gradients: bool, inner: str) -> None:
    compare(OUTPUTS[name], inner, gradients)


INDUCTOR = (
    "with and without a gradient",
    "heads in a row",
    "views of each other",
    "equal ones",
    "strided",
    "thirds",
    "complex rows",
)


@pytest.mark.parametrize(
    "name", [*INDUCTOR[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in INDUCTOR[3:])]
)
def test_compiled_by_inductor(name: str) -> None:
    compare(OUTPUTS[name], "inductor", gradients=True)


def compare(program: Program, inner: str, gradients: bool, dynamic: bool | None = None) -> None:
    """Compare strides and numbers, and compare all tensors after the caller writes to each output in turn."""
    model, ids = Model(program), shared_batch(B, S, 7)
    options = {"inner_backend": inner, "fold": "always"}
    compiled = torch.compile(model, backend="radix", options=options, dynamic=dynamic)
    with torch.set_grad_enabled(gradients):
        count = len(model(ids))
        for written in range(count):
            given, expected_given = ids.clone(), ids.clone()
            ours, expected = compiled(given), model(expected_given)
            assert radix_compile.stats().folded_calls == written + 1
            for tensor, other in zip(ours, expected, strict=True):
                assert tensor.stride() == other.stride()
                assert tensor.requires_grad == other.requires_grad
                torch.testing.assert_close(tensor, other)
            for results in (ours, expected):
                if 0 not in results[written].stride():
                    results[written].data.fill_(1)
            for tensor, other in zip((*ours, given), (*expected, expected_given), strict=True):
                torch.testing.assert_close(tensor, other)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_caller_goes_on_in_place(inner: str) -> None:
    """A caller may write to outputs with gradients in place, as with the plain program."""
    model, ids = Model(lambda m, x, ids: (heads(m.first(x)), m.last(x) * 2)), shared_batch(B, S, 7)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": inner, "fold": "always"})
    gradients = []
    for run in (compiled, model):
        rows, wide = run(ids)
        rows.mul_(3)
        wide[:, 2:4].zero_()
        loss = rows.square().sum() + wide.cos().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert radix_compile.stats().folded_calls == 1
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["heads in a row", "views of each other", "equal ones", "thirds", "strided"])
def test_sizes_that_change(name: str) -> None:
    compare(OUTPUTS[name], "eager", gradients=False, dynamic=True)


def test_keys_and_values_of_a_cache() -> None:
    """Cached keys and values have the strides of the plain program: ``torch.cat`` puts heads first in memory."""
    model, ids = build("Qwen3"), shared_batch(4, 12, 7)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always"})
    with torch.no_grad():
        ours, expected = compiled(ids).past_key_values, model(ids).past_key_values
    assert radix_compile.stats().folded_calls == 1
    for layer, plain in zip(ours.layers, expected.layers, strict=True):
        assert (layer.keys.stride(), layer.values.stride()) == (plain.keys.stride(), plain.values.stride())
        torch.testing.assert_close(layer.keys, plain.keys)


@pytest.fixture
def by_memory() -> Iterator[Callable[[Tensor], Tensor]]:
    """An op of another package that requires a contiguous input."""

    @torch.library.custom_op("radix_tests::by_memory", mutates_args=())
    def op(x: Tensor) -> Tensor:
        assert x.is_contiguous(), "the op reads memory from the first entry to the last"
        return x * 2

    op.register_fake(torch.empty_like)
    torch.library.register_autograd("radix_tests::by_memory", lambda ctx, grad: grad * 2)
    register_rule(torch.ops.radix_tests.by_memory.default, "pointwise")
    yield torch.ops.radix_tests.by_memory.default
    del OP_INFO[torch.ops.radix_tests.by_memory.default]


@pytest.mark.parametrize("rule", [True, False])
def test_ops_of_other_packages_see_the_layout_that_they_saw(by_memory: Callable[[Tensor], Tensor], rule: bool) -> None:
    if not rule:
        OP_INFO.pop(torch.ops.radix_tests.by_memory.default)
    try:
        compare(lambda m, x, ids: (by_memory(heads(m.first(x)).contiguous()), m.last(x)), "eager", gradients=False)
    finally:
        OP_INFO.setdefault(torch.ops.radix_tests.by_memory.default, OpInfo())

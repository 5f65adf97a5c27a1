"""Programs with regions with and without gradients: gradients equal the plain program's, and so do missing ones.

A value computed under ``no_grad`` must not be reused outside, and a part without a gradient must not be replaced by a
part with one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import radix_compile
from radix_compile import backend
from tests.models import shared_batch
from tests.tiers import slow_unless

B, S, D, V = 4, 12, 8, 97

Program = Callable[["Model", Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def everything_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "LEAST_SHARE", 0.0)


class Model(nn.Module):
    """``program(model, x, ids)``, with ``x`` ``[B, S, D]``."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.last = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, D)
        self.head = nn.Linear(D, V)
        self.positions = nn.Parameter(torch.randn(S, D))
        self.slope, self.sinks = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(1))
        self.program = program

    def forward(self, ids: Tensor) -> Tensor:
        return self.program(self, self.first(self.embedding(ids)), ids)


def no_grad(function: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad():
        return function(*args)


def enable_grad(function: Callable[..., Any], *args: Any) -> Any:
    with torch.enable_grad():
        return function(*args)


def in_inference_mode(function: Callable[..., Any], *args: Any) -> Any:
    with torch.inference_mode():
        return function(*args)


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, ids: Tensor) -> list[Tensor | None]:
    result = run(ids)
    factors = torch.randn(result.shape, generator=torch.Generator().manual_seed(0), dtype=result.dtype)
    with torch.enable_grad():
        return list(torch.autograd.grad((result * factors).sum(), list(model.parameters()), allow_unused=True))


def compare(program: Program, inner: str = "aot_eager", mode: bool = True, folds: bool | None = True) -> None:
    """Compare results and gradients of calls in a grad mode."""
    model, ids = Model(program).double(), shared_batch(B, S, 7)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": inner, "fold": "always"})
    with torch.set_grad_enabled(mode):
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-9, atol=1e-9)
        if folds is not None:
            assert radix_compile.stats().folded_calls == folds
        expected = gradients(model, model, ids)
        assert any(gradient is not None for gradient in expected)
        names = [name for name, _ in model.named_parameters()]
        for name, gradient, plain in zip(names, gradients(compiled, model, ids), expected, strict=True):
            assert (gradient is None) == (plain is None), name
            if gradient is not None:
                torch.testing.assert_close(
                    gradient, plain, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
                )


def causal() -> Tensor:
    return torch.arange(S)[None] <= torch.arange(S)[:, None]


def weights(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(causal(), x @ y.mT, -torch.inf).softmax(-1)


def nll(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), ids.view(-1), reduction="none")


def log_probability(log_softmax: Tensor, ids: Tensor) -> Tensor:
    return log_softmax.gather(-1, ids[..., None]).squeeze(-1)


def biased(m: Model, x: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], torch.where(causal(), bias, -torch.inf))[
        :, 0
    ]


def with_sinks(m: Model, x: Tensor, sinks: Tensor) -> Tensor:
    scores = torch.where(causal(), x[:, None] @ x[:, None].mT, -torch.inf)
    scores = torch.cat([scores, sinks.view(1, 1, 1, 1).expand(B, 1, S, 1)], -1)
    return (scores.softmax(-1)[..., :S] @ x[:, None])[:, 0]


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]


def grouped(x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    heads = x.view(B, S, 2, D // 2).transpose(1, 2)
    keys = part(heads[:, :1].expand(B, 2, S, D // 2))
    return F.scaled_dot_product_attention(heads, keys, keys, is_causal=True).transpose(1, 2).reshape(B, S, D)


PROGRAMS: dict[str, Program] = {
    "a reference first": lambda m, x, ids: -no_grad(lambda: m.last(x + m.positions)) + m.last(x + m.positions),
    "a reference last": lambda m, x, ids: m.last(x + m.positions) - no_grad(lambda: m.last(x + m.positions)),
    "a reference between": lambda m, x, ids: (
        m.last(x * m.positions) + no_grad(lambda: m.last(x * m.positions)) + m.last(x * m.positions)
    ),
    "a table made without": lambda m, x, ids: x + no_grad(torch.sin, m.positions) + m.positions,
    "a uniform table": lambda m, x, ids: no_grad(torch.add, x, t := m.slope.expand(S, 1)) + torch.add(x, t),
    "a value of rows": lambda m, x, ids: m.last(no_grad(torch.sin, x)) + torch.sin(x),
    "equal ops in and out": lambda m, x, ids: no_grad(m.last, x) * m.last(x),
    "a slice of all": lambda m, x, ids: m.last(no_grad(lambda: x[:, :S, :D])) + m.positions,
    "joined with nothing": lambda m, x, ids: m.last(no_grad(torch.cat, [x.new_zeros(0), x])) + m.positions,
    "detached": lambda m, x, ids: m.last(x.detach()) + m.positions,
    "weights without": lambda m, x, ids: no_grad(weights, x, m.last(x)) @ m.last(x),
    "weights detached": lambda m, x, ids: weights(x, m.last(x)).detach() @ m.last(x),
    "scores detached": lambda m, x, ids: (
        torch.where(causal(), (x @ m.last(x).mT).detach(), -torch.inf).softmax(-1) @ m.last(x)
    ),
    "keys detached": lambda m, x, ids: fused_attention(x, m.last(x).detach(), m.last(x)),
    "keys without": lambda m, x, ids: fused_attention(x, no_grad(m.last, x), x + m.positions),
    "queries detached": lambda m, x, ids: weights(x.detach(), m.last(x)) @ x,
    "values detached": lambda m, x, ids: weights(x, m.last(x)) @ x.detach(),
    "keys of a group detached": lambda m, x, ids: grouped(x, torch.detach),
    "keys of a group": lambda m, x, ids: grouped(x, lambda keys: keys),
    "attention without": lambda m, x, ids: no_grad(fused_attention, x, x, x) * x,
    "the largest detached": lambda m, x, ids: (
        ((scores := torch.where(causal(), x @ x.mT, -torch.inf)) - scores.amax(-1, keepdim=True).detach()).softmax(-1)
        @ x
    ),
    "a bias in and out": lambda m, x, ids: (
        no_grad(biased, m, x, m.slope * torch.arange(S)) + biased(m, x, m.slope * torch.arange(S))
    ),
    "a bias without": lambda m, x, ids: biased(m, x, (m.slope * torch.arange(S)).detach()),
    "sinks": lambda m, x, ids: with_sinks(m, x, m.sinks),
    "sinks detached": lambda m, x, ids: with_sinks(m, x, m.sinks.detach()),
    "sinks without": lambda m, x, ids: with_sinks(m, x, no_grad(torch.sin, m.sinks)),
    "a loss": lambda m, x, ids: nll(m.head(x), ids),
    "a loss without": lambda m, x, ids: no_grad(nll, m.head(x), ids) * x.mean(-1).view(-1),
    "a view for the loss without": lambda m, x, ids: nll(no_grad(lambda: m.head(x).view(-1, V)), ids) + m.slope,
    "a view for the loss outside": lambda m, x, ids: (
        F.cross_entropy(no_grad(torch.Tensor.view, m.head(x), -1, V), ids.view(-1), reduction="none") + m.slope
    ),
    "a log-softmax": lambda m, x, ids: log_probability(m.head(x).log_softmax(-1), ids),
    "a log-softmax without": lambda m, x, ids: log_probability(no_grad(F.log_softmax, m.head(x), -1), ids) * m.slope,
    "a log-softmax detached": lambda m, x, ids: log_probability(m.head(x).log_softmax(-1).detach(), ids) * m.slope,
    "logits detached": lambda m, x, ids: log_probability(m.head(x).detach().log_softmax(-1), ids) * m.slope,
    "a look-up without": lambda m, x, ids: no_grad(log_probability, m.head(x).log_softmax(-1), ids) * m.slope,
    "a reference policy": lambda m, x, ids: (
        log_probability(m.head(x).log_softmax(-1), ids)
        - no_grad(lambda: log_probability(m.head(x).log_softmax(-1), ids))
    ).exp(),
    "inference mode": lambda m, x, ids: m.last(x) + in_inference_mode(m.last, x + m.positions).clone(),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_regions_without_gradients(name: str, inner: str) -> None:
    compare(PROGRAMS[name], inner)


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, factor = ctx.saved_tensors
        return grad * factor, (grad * x).sum()


RECORDED: dict[str, Program] = {
    "the trunk": lambda m, x, ids: enable_grad(lambda: m.last(m.first(x) + m.positions)),
    "a head": lambda m, x, ids: enable_grad(lambda: torch.sin(m.last(x)) * m.slope),
    "attention": lambda m, x, ids: enable_grad(lambda: weights(x, m.last(x)) @ m.last(x)),
    "a loss": lambda m, x, ids: enable_grad(lambda: nll(m.head(x), ids)),
    "a table in and out": lambda m, x, ids: enable_grad(torch.add, m.last(x + m.positions), m.positions),
    "recorded and not": lambda m, x, ids: enable_grad(lambda: m.last(x) + no_grad(m.last, x + m.positions)),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", RECORDED)
def test_gradients_switched_on_inside(name: str, inner: str) -> None:
    """A call without gradients enables them inside."""
    compare(RECORDED[name], inner, mode=False)


@pytest.mark.filterwarnings("ignore:radix. nothing folds")
@pytest.mark.parametrize("mode", [False, True])
def test_a_custom_function_where_gradients_are_switched_on(mode: bool) -> None:
    """Lowering a custom function loses its gradient, so such a graph folds only if no gradient is recorded."""
    compare(lambda m, x, ids: enable_grad(lambda: Times.apply(m.last(x), m.slope.sum())), mode=mode, folds=False)
    compare(lambda m, x, ids: x.sin() * m.slope + no_grad(Times.apply, m.last(x), m.slope.sum()), folds=None)


@pytest.mark.parametrize(
    "name",
    slow_unless(
        lambda name: name == "a reference first",
        ["a reference first", "a reference policy", "weights detached", "inference mode"],
    ),
)
def test_compiled_by_inductor(name: str) -> None:
    compare(PROGRAMS[name], "inductor")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, None])
def test_a_loss_in_another_dtype(dtype: torch.dtype | None) -> None:
    """The error against float64, from float32 logits, is at most twice the plain program's."""
    program: Program = lambda m, x, ids: log_probability(F.log_softmax(30 * m.head(x), -1, dtype=dtype), ids)  # noqa: E731
    model, ids = Model(program), shared_batch(B, S, 7)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"})
    with torch.no_grad():
        ours, plain = compiled(ids), model(ids)
        logits = 30 * model.head(model.first(model.embedding(ids))).to(dtype or torch.float32).double()
    assert radix_compile.stats().folded_calls == 1
    assert ours.dtype == plain.dtype
    exact = log_probability(logits.log_softmax(-1), ids)
    error = (plain.double() - exact).abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * error + 4 * torch.finfo(plain.dtype).eps

"""Causal masks in buffers, as in most hand-written models: they are read by value, and checked in every call."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import radix_compile
from radix_compile.ir.triangles import Triangle, read_triangle
from tests.models import VOCABULARY, assert_as_exact, in_float64, shared_batch
from tests.tiers import slow_unless

LONGEST = 32
ONES = torch.ones(LONGEST, LONGEST)
OPTIONS = {"inner_backend": "aot_eager", "fold": "always", "verify": True}

Hide = Callable[[Tensor, Tensor, int], Tensor]

FORMS: dict[str, tuple[Tensor, Hide]] = {
    "nanoGPT": (ONES.tril()[None, None], lambda a, m, t: a.masked_fill(m[:, :, :t, :t] == 0, -math.inf)),
    "a lecture": (ONES.tril(), lambda a, m, t: a.masked_fill(m[:t, :t] == 0, -math.inf)),
    "GPT-2 once": (
        ONES.tril().bool()[None, None],
        lambda a, m, t: torch.where(m[:, :, t - t : t, :t], a, torch.finfo(a.dtype).min),
    ),
    "a book": (ONES.triu(1), lambda a, m, t: a.masked_fill(m.bool()[:t, :t], -torch.inf)),
    "bytes": (ONES.tril().byte(), lambda a, m, t: a.masked_fill(~m[:t, :t].bool(), -torch.inf)),
    "added": (torch.full_like(ONES, -math.inf).triu(1), lambda a, m, t: a + m[:t, :t]),
    "added, in half precision": (
        torch.full_like(ONES, -math.inf, dtype=torch.bfloat16).triu(1),
        lambda a, m, t: a + m[:t, :t].to(a.dtype),
    ),
}


class Attention(nn.Module):
    def __init__(self, buffer: Tensor, hide: Hide) -> None:
        super().__init__()
        self.qkv, self.out, self.hide = nn.Linear(32, 96), nn.Linear(32, 32), hide
        self.register_buffer("mask", buffer.clone())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, 4, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = self.hide(q @ k.transpose(-2, -1) / math.sqrt(8), self.mask, length)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, 32))


class Model(nn.Module):
    def __init__(self, buffer: Tensor, hide: Hide) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.Sequential(*(Attention(buffer, hide) for _ in range(2)))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.layers(self.tokens(ids)))
        return hidden


def check(model: nn.Module, compiled: Callable[[Tensor], Tensor], ids: Tensor) -> None:
    with torch.no_grad():
        assert_as_exact(compiled(ids), model(ids), in_float64(model)(ids))


@pytest.mark.parametrize(
    ("form", "columns"),
    slow_unless(
        lambda form, columns: form in ("nanoGPT", "bytes", "added, in half precision", "a book"),
        [*((form, 20) for form in FORMS), ("nanoGPT", LONGEST)],
    ),
)
def test_attention_folds(form: str, columns: int) -> None:
    model, ids = Model(*FORMS[form]).eval(), shared_batch(6, columns, 12)
    with torch.no_grad():
        explanation = radix_compile.explain(model, ids)
    assert not explanation.refusals
    assert str(explanation).count("runs on the prefix tree") == 2
    check(model, torch.compile(model, backend="radix", options=OPTIONS), ids)
    assert radix_compile.stats().folded_calls == 1


def test_of_any_length() -> None:
    """The model compiles as often as with the plain backend."""
    model, counter = Model(*FORMS["nanoGPT"]).eval(), CompileCounterWithBackend("aot_eager")
    batches = [shared_batch(6, columns, 12) for columns in (20, LONGEST, 14)]
    plain = torch.compile(model, backend=counter, dynamic=True)
    with torch.no_grad():
        for ids in batches:
            plain(ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="radix", options=OPTIONS, dynamic=True)
    for ids in batches:
        check(model, compiled, ids)
    assert radix_compile.stats().folded_calls == 3
    assert radix_compile.stats().graphs == counter.frame_count


def test_gradients() -> None:
    model, ids = Model(*FORMS["a book"]), shared_batch(6, 20, 12)
    compiled = torch.compile(model, backend="radix", options=OPTIONS)
    gradients = []
    for program in (compiled, model, in_float64(model)):
        weights = list(program.parameters())
        gradients.append(torch.autograd.grad(program(ids).double().square().mean(), weights))
    for ours, plain, exact in zip(*gradients, strict=True):
        assert_as_exact(ours, plain, exact)
    assert radix_compile.stats().folded_calls == 1


@pytest.mark.slow
def test_of_any_length_with_a_cast_behind_the_cut() -> None:
    model = Model(*FORMS["bytes"]).eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="radix", options=OPTIONS, dynamic=True)
        check(model, compiled, shared_batch(6, 20, 12))
    assert radix_compile.stats().tree_pairs < radix_compile.stats().pairs


def causal(scores: Tensor, length: int) -> Tensor:
    return scores.masked_fill(torch.tril(torch.ones(length, length)) == 0, -math.inf)


def test_a_buffer_with_a_gradient_keeps_it() -> None:
    hide: Hide = lambda a, m, t: causal(a * m[:t, :t], t)  # noqa: E731
    model, ids, gradients = Model(ONES.tril(), hide), shared_batch(6, 20, 12), []
    mask = model.layers[1].mask.requires_grad_()
    for program in (torch.compile(model, backend="radix", options=OPTIONS), model):
        gradients += torch.autograd.grad(program(ids).square().mean(), [mask])
    torch.testing.assert_close(*gradients)
    assert radix_compile.stats().folded_calls == 1


def test_the_sign_of_zeros_is_kept() -> None:
    hide: Hide = lambda a, m, t: causal(torch.where((1 / m[:t, :t]).isneginf(), a, a * 0.5), t)  # noqa: E731
    model, ids = Model(-ONES.triu(1), hide).eval(), shared_batch(6, 20, 12)
    assert model.layers[0].mask.signbit().all()
    check(model, torch.compile(model, backend="radix", options=OPTIONS), ids)
    assert radix_compile.stats().folded_calls == 1


@pytest.mark.parametrize("form", ["nanoGPT", "a book", "added"])
def test_a_buffer_that_changes_is_seen(form: str) -> None:
    """No guard covers the values of a buffer: after compilation, one layer shows a token to the previous one."""
    model, ids = Model(*FORMS[form]).eval(), shared_batch(6, 20, 12)
    compiled = torch.compile(model, backend="radix", options=OPTIONS)
    check(model, compiled, ids)
    assert radix_compile.stats().folded_calls == 1
    mask = model.layers[1].mask
    mask.data[..., 3, 4] = mask[..., 4, 3]
    check(model, compiled, ids)
    stats = radix_compile.stats()
    assert stats.folded_calls == 1
    assert "a mask that is kept in a buffer has changed" in str(stats)
    mask.data[..., 3, 4] = mask[..., 0, 1]
    mask.data[..., 25, 27] = mask[..., 4, 3]  # sequences of this length do not read it
    check(model, compiled, ids)
    assert radix_compile.stats().folded_calls == 2


WRONG: dict[str, Tensor] = {
    "sees one later token": ONES.tril().index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1.0)),
    "misses one": ONES.tril().index_put((torch.tensor(5), torch.tensor(3)), torch.tensor(0.0)),
    "all": ONES,
    "a window": ONES.tril().triu(-3),
    "of two numbers": ONES.tril() + ONES.tril(-1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_other_buffers_are_not_read(wrong: str) -> None:
    model, ids = Model(WRONG[wrong], FORMS["a lecture"][1]).eval(), shared_batch(6, 20, 12)
    check(model, torch.compile(model, backend="radix", options=OPTIONS), ids)
    with torch.no_grad():
        assert "runs on the prefix tree" not in str(radix_compile.explain(model, ids))


@pytest.mark.parametrize("view", [lambda mask: mask, lambda mask: mask[None], lambda mask: mask[:20, :20].t()])
def test_a_buffer_that_is_returned_is_the_buffer(view: Callable[[Tensor], Tensor]) -> None:
    class Both(Model):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(ids), view(self.layers[0].mask)

    model, ids = Both(*FORMS["a lecture"]).eval(), shared_batch(6, 20, 12)
    compiled = torch.compile(model, backend="radix", options=OPTIONS)
    with torch.no_grad():
        logits, mask = compiled(ids)
        assert_as_exact(logits, model(ids)[0], in_float64(model)(ids)[0])
    assert mask.data_ptr() == model.layers[0].mask.data_ptr()
    assert mask.stride() == view(model.layers[0].mask).stride()


HARD: dict[str, Hide] = {
    "by strides": lambda a, m, t: a.masked_fill(m[:t, :t].as_strided((t, t), (LONGEST, 1)) == 0, -math.inf),
    "as other numbers": lambda a, m, t: a.masked_fill(m[:t, :t].float().view(torch.int32) == 0, -math.inf),
    "as numbers without tril": lambda a, m, t: a.masked_fill(m[:t, :t].to(torch.uint16) == 0, -math.inf),
}


@pytest.mark.parametrize("hard", HARD)
def test_what_depends_on_more_than_the_values(hard: str) -> None:
    model, ids = Model(ONES.tril(), HARD[hard]).eval(), shared_batch(6, 20, 12)
    check(model, torch.compile(model, backend="radix", options=OPTIONS), ids)


def test_a_buffer_that_lies_the_other_way_round() -> None:
    hide: Hide = lambda a, m, t: a.masked_fill(m.t().view(-1).view(LONGEST, LONGEST)[:t, :t] != 0, -math.inf)  # noqa: E731
    model, ids = Model(ONES, hide).eval(), shared_batch(6, 20, 12)
    for layer in model.layers:
        layer.mask = ONES.triu(1).t().contiguous().t()
    check(model, torch.compile(model, backend="radix", options=OPTIONS), ids)


def test_parts_that_are_not_in_front_are_left_alone() -> None:
    """The part from the second row and column on is a triangle too, but the check covers the part in front."""
    hide: Hide = lambda a, m, t: a.masked_fill(m[1 : t + 1, 1 : t + 1] == 0, -math.inf)  # noqa: E731
    model, ids = Model(ONES.tril(), hide).eval(), shared_batch(6, 20, 12)
    check(model, torch.compile(model, backend="radix", options=OPTIONS), ids)
    with torch.no_grad():
        assert "runs on the prefix tree" not in str(radix_compile.explain(model, ids))


def test_what_is_a_triangle() -> None:
    lower, upper = ONES.tril() * 3, torch.full((4, 4), -1e9).triu(1)
    assert read_triangle(lower) == Triangle(False, 3.0)
    assert read_triangle(upper[None, None]) == Triangle(True, -1e9)
    assert read_triangle(torch.tensor([[True, False], [True, True]])) == Triangle(False, True)
    others = [ONES, 0 * ONES, lower.fliplr(), lower.T, lower.expand(2, -1, -1), lower[1:], lower[0], lower.to("meta")]
    others += [lower.clone().requires_grad_(), -ONES.triu(1)]
    others += [lower.to(torch.complex64), lower.to(torch.float8_e4m3fn), lower.to_sparse(), lower * math.nan]
    assert [read_triangle(other) for other in others] == [None] * len(others)


@pytest.mark.parametrize("number", [-1e300, 0.1, -math.inf, 7, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
def test_casts(number: float, dtype: torch.dtype) -> None:
    source = torch.float64 if isinstance(number, float) else torch.int64
    triangle, shape = Triangle(True, number), (3, 3)
    ours = triangle.cast(dtype).of(shape, dtype, torch.device("cpu"))
    assert torch.equal(ours, triangle.of(shape, source, torch.device("cpu")).to(dtype))


def test_a_model_without_values_runs() -> None:
    with torch.device("meta"):
        model = Model(ONES.tril().to("meta"), FORMS["a lecture"][1]).eval()
    with torch.no_grad():
        logits = torch.compile(model, backend="radix", options=OPTIONS)(shared_batch(6, 20, 12).to("meta"))
    assert logits.shape == (6, 20, VOCABULARY)

"""What must not fold: the outputs of the plain model, nothing folded past the op, and a reason that names it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import BertConfig, BertModel

import radix_compile
from radix_compile.passes.capture import CaptureError
from tests.models import VOCABULARY, build, compare, shared_batch


def explained(model: nn.Module, *args: Any, **kwargs: Any) -> radix_compile.Explanation:
    with torch.no_grad():
        return radix_compile.explain(model, *args, **kwargs)


def assert_refused(model: nn.Module, reason: str, op: str, *args: Any, **kwargs: Any) -> None:
    """The outputs are right under the backend, and the report says which op, why (a pattern) and where."""
    with pytest.warns(UserWarning, match="radix: nothing folds"):
        explanation = explained(model, *args, **kwargs)
    assert not explanation.folded
    refusal = explanation.refusals[0]
    assert re.search(reason, refusal.reason)
    assert op in refusal.op
    assert ".py:" in refusal.source
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="radix: nothing folds"):
        compare(
            model,
            torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"}),
            *args,
            **kwargs,
        )
    assert radix_compile.stats().folded_calls == 0


def test_bidirectional_attention() -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertModel(config).eval()
    # Without a mask, or by one that hides nothing, as transformers 5.17 makes it.
    assert_refused(
        model, "bidirectional|lets a token see later ones", "scaled_dot_product_attention", shared_batch(4, 12, 8)
    )


class Block(nn.Module):
    """Embedding, two MLP layers with something between them, and a head."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.before = nn.Linear(16, 16)
        self.between = between
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.between(self.before(self.embedding(ids))))


class Apply(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_position_wise_block_folds() -> None:
    """The control: with nothing in between the same block folds, so the refusals below are about what is in between."""
    model = Block(nn.Identity()).eval()
    explanation = explained(model, shared_batch(4, 12, 8))
    assert explanation.folded
    assert not explanation.refusals


MIXING = {
    "future": (lambda x: x.roll(-1, dims=1), "no rule", "roll"),
    "flip": (lambda x: x.flip(1), "reverses", "flip"),
    "mean over the sequence": (lambda x: x - x.mean(1, keepdim=True), "reduces over the sequence", "mean"),
    "mean over the batch": (lambda x: x - x.mean(0, keepdim=True), "reduces over the batch", "mean"),
    "softmax over the sequence": (lambda x: x.softmax(1), "normalises over the sequence", "softmax"),
    "sort over the sequence": (lambda x: x.sort(1).values, "sorts along the sequence", "sort"),
    "shift": (lambda x: torch.cat([x[:, 1:], x[:, :1]], 1), "slices the sequence", "slice"),
    "reshape across rows": (lambda x: x.reshape(4, 6, 32).softmax(-1).reshape(4, 12, 16), "cuts through", "view"),
    "bidirectional pairs": (lambda x: (x @ x.mT).softmax(-1) @ x, "without a mask", "softmax"),
    "reversed cumulative sum": (lambda x: x.flip(1).cumsum(1).flip(1), "reverses", "flip"),
    "other sequences": (lambda x: x + x[[1, 0, 3, 2]], "not known to leave them in place", "index"),
    "random": (lambda x: x + torch.rand_like(x), "no rule", "rand"),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_op(name: str) -> None:
    function, reason, op = MIXING[name]
    model = Block(Apply(function)).eval()
    if name == "random":
        with pytest.warns(UserWarning, match="nothing folds"):
            explanation = explained(model, shared_batch(4, 12, 8))
        assert any("rand" in refusal.op for refusal in explanation.refusals)
        assert not explanation.folded
        return
    assert_refused(model, reason, op, shared_batch(4, 12, 8))


class BatchNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def test_batch_norm() -> None:
    assert_refused(Block(BatchNormed()).eval(), "no rule", "batch_norm", shared_batch(4, 12, 8))


def test_dropout_in_training() -> None:
    model = build("GPT2").train()
    with pytest.warns(UserWarning, match="dropout is on"):
        explanation = explained(model, shared_batch(4, 12, 8))
    assert not explanation.folded
    assert "dropout" in explanation.refusals[0].op


def test_decoding_with_a_filled_cache() -> None:
    model = build("Qwen3")
    ids = shared_batch(4, 12, 8)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always"})
    with torch.no_grad():
        ours, plain = compiled(ids), model(ids)
        assert radix_compile.stats().folded_calls == 1
        following = shared_batch(4, 3, 2, seed=1)
        with pytest.warns(UserWarning, match="appends rows to an input, as to a cache that is filled"):
            ours = compiled(following, past_key_values=ours.past_key_values)
        plain = model(following, past_key_values=plain.past_key_values)
    torch.testing.assert_close(ours.logits, plain.logits)
    assert radix_compile.stats().folded_calls == 1


def test_strict_raises_with_the_reasons() -> None:
    model = Block(Apply(lambda x: x.flip(1))).eval()
    with pytest.raises(BackendCompilerFailed, match=r"nothing folds: .*flip.*reverses the sequence axis") as raised:
        torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always", "strict": True})(
            shared_batch(4, 12, 8)
        )
    refusal = raised.value.inner_exception
    assert isinstance(refusal, radix_compile.CannotFold)
    assert re.search(r"^radix: nothing folds: .*flip.*\n  .*flip.*\.py:", str(refusal))
    with pytest.raises(BackendCompilerFailed, match="CannotFold: radix: nothing folds"):
        explained(model, shared_batch(4, 12, 8), options={"strict": True})


def test_strict_says_what_went_wrong_first() -> None:
    def program(ids: Tensor, table: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: row * 2)(table[ids])

    compiled = torch.compile(program, backend="radix", options={"inner_backend": "eager", "strict": True})
    with pytest.raises(BackendCompilerFailed, match=r"nothing folds: .*torch\.func") as raised:
        compiled(shared_batch(4, 8, 4), torch.randn(VOCABULARY, 16))
    assert isinstance(raised.value.inner_exception, radix_compile.CannotFold)
    assert isinstance(raised.value.inner_exception.__cause__, CaptureError)


def test_strict_lets_pass_what_says_nothing_about_the_model() -> None:
    model, one = Block(nn.Identity()).eval(), shared_batch(2, 12, 8)[:1]
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "strict": True})
    compare(model, compiled, one)
    assert (radix_compile.stats().graphs, radix_compile.stats().folded_compiles) == (1, 0)

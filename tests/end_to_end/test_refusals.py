"""Programs that must not fold: equal outputs, nothing folded after the op, and a refusal that names the op."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import BertConfig, BertModel

import radix_compile
from radix_compile.analysis.op_info import OP_INFO
from radix_compile.inspection.advice import ADVICE, advice_on
from radix_compile.ir.axes import Mixes
from radix_compile.ir.errors import RefusalCode
from radix_compile.passes import pipeline
from radix_compile.passes.capture import CaptureError
from tests.models import VOCABULARY, build, compare, shared_batch


def explained(model: nn.Module, *args: Any, **kwargs: Any) -> radix_compile.Explanation:
    with torch.no_grad():
        return radix_compile.explain(model, *args, **kwargs)


def assert_refused(
    model: nn.Module, reason: str, op: str, *args: Any, code: RefusalCode | None = None, **kwargs: Any
) -> None:
    """Check that the outputs are right, and that the report has the op, the reason (a pattern) and the source line."""
    with pytest.warns(UserWarning, match="radix: nothing folds"):
        explanation = explained(model, *args, **kwargs)
    assert not explanation.folded
    refusal = explanation.refusals[0]
    assert re.search(reason, refusal.reason)
    assert code in (None, refusal.code)
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
    # There is no mask, or (transformers 5.17) one that hides nothing.
    assert_refused(
        model, "bidirectional|lets a token see later ones", "scaled_dot_product_attention", shared_batch(4, 12, 8)
    )


class Block(nn.Module):
    """An embedding, a linear layer, the module ``between``, and an MLP."""

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
    """The same block folds with an identity in between, so the refusals below come from the op in between."""
    model = Block(nn.Identity()).eval()
    explanation = explained(model, shared_batch(4, 12, 8))
    assert explanation.folded
    assert not explanation.refusals


MIXING = {
    "future": (lambda x: x.roll(-1, dims=1), "no rule", "roll", RefusalCode.NO_RULE),
    "flip": (lambda x: x.flip(1), "reverses", "flip", RefusalCode.MIXES_TOKENS),
    "mean over the sequence": (
        lambda x: x - x.mean(1, keepdim=True),
        "reduces over the sequence",
        "mean",
        RefusalCode.MIXES_TOKENS,
    ),
    "mean over the batch": (
        lambda x: x - x.mean(0, keepdim=True),
        "reduces over the batch",
        "mean",
        RefusalCode.MIXES_SEQUENCES,
    ),
    "softmax over the sequence": (
        lambda x: x.softmax(1),
        "normalises over the sequence",
        "softmax",
        RefusalCode.MIXES_TOKENS,
    ),
    "sort over the sequence": (
        lambda x: x.sort(1).values,
        "sorts along the sequence",
        "sort",
        RefusalCode.MIXES_TOKENS,
    ),
    "shift": (lambda x: torch.cat([x[:, 1:], x[:, :1]], 1), "slices the sequence", "slice", RefusalCode.MIXES_TOKENS),
    "reshape across rows": (
        lambda x: x.reshape(4, 6, 32).softmax(-1).reshape(4, 12, 16),
        "cuts through",
        "view",
        RefusalCode.MIXES_TOKENS,
    ),
    "bidirectional pairs": (
        lambda x: (x @ x.mT).softmax(-1) @ x,
        "without a mask",
        "softmax",
        RefusalCode.MASK_NOT_UNDERSTOOD,
    ),
    "reversed cumulative sum": (lambda x: x.flip(1).cumsum(1).flip(1), "reverses", "flip", RefusalCode.MIXES_TOKENS),
    "other sequences": (
        lambda x: x + x[[1, 0, 3, 2]],
        "not known to leave them in place",
        "index",
        RefusalCode.INDEXES_ROWS,
    ),
    "random": (lambda x: x + torch.rand_like(x), "no rule", "rand", RefusalCode.NO_RULE),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_op(name: str) -> None:
    function, reason, op, code = MIXING[name]
    model = Block(Apply(function)).eval()
    if name == "random":
        with pytest.warns(UserWarning, match="nothing folds"):
            explanation = explained(model, shared_batch(4, 12, 8))
        assert any("rand" in refusal.op and refusal.code is code for refusal in explanation.refusals)
        assert not explanation.folded
        return
    assert_refused(model, reason, op, shared_batch(4, 12, 8), code=code)


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
    model, sequence = Block(nn.Identity()).eval(), shared_batch(2, 12, 8)[:1]
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", "strict": True})
    compare(model, compiled, sequence)
    assert (radix_compile.stats().graphs, radix_compile.stats().folded_compiles) == (1, 0)


# --------------------------------------------------------------------------------------------------------------- codes


def between(function: Callable[[Tensor], Tensor]) -> radix_compile.Explanation:
    """The explanation of a block with this function between its layers."""
    return explained(Block(Apply(function)).eval(), shared_batch(4, 12, 8))


def tokens(function: Callable[[Tensor], Tensor]) -> radix_compile.Explanation:
    """The explanation of a function of token ids."""
    return explained(function, shared_batch(4, 12, 8))


def is_causal(size: int = 12, diagonal: int = 0) -> Tensor:
    return torch.arange(size)[:, None] + diagonal >= torch.arange(size)


class SeesNothing(nn.Module):
    """A running sum over the results of attention with fully masked rows (left padding)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.after = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 512)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)[:, None]
        mask = is_causal() & (ids != 0)[:, None, None, :]
        return self.after(F.scaled_dot_product_attention(x, x, x, mask)[:, 0].cumsum(1))


def flex(x: Tensor) -> Tensor:
    """Flex attention with a block table that the same graph computes."""
    heads = x[:, None]
    listed = torch.ones(1, 1, 1, dtype=torch.int32, device=x.device)
    sizes: Any = {"BLOCK_SIZE": 128, "seq_lengths": (12, 12), "compute_q_blocks": False}
    blocks = BlockMask.from_kv_blocks(listed, listed[..., None] - 1, mask_mod=lambda b, h, q, k: q >= k, **sizes)
    return flex_attention(heads, heads, heads, block_mask=blocks)[:, 0]  # type: ignore[index]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def custom_rule() -> radix_compile.Explanation:
    def refuses(node: Any, layout: Any) -> Any:
        raise Mixes("asks all rows")

    radix_compile.register_rule(torch.ops.aten.renorm.default, refuses)
    try:
        return between(lambda x: torch.renorm(x, 2, -1, 1.0))
    finally:
        del OP_INFO[torch.ops.aten.renorm.default]


def unbacked() -> radix_compile.Explanation:
    ids = shared_batch(4, 12, 8)
    mark_unbacked(ids, 0)
    return explained(Block(nn.Identity()), ids)


def does_not_compile() -> radix_compile.Explanation:
    def inner(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        if any(node.name == "radix_fold" for node in gm.graph.nodes):
            raise RuntimeError("out of registers")
        return gm.forward

    return explained(Block(nn.Identity()), shared_batch(4, 12, 8), options={"inner_backend": inner})


def mistake() -> radix_compile.Explanation:
    def broken(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        raise KeyError("missing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "ANALYSES", (broken,))
        patch.setattr(pipeline, "RAISE_MISTAKES", False)
        return explained(Block(nn.Identity()), shared_batch(4, 12, 8))


PAST = torch.randn(4, 12, 16)

PROGRAMS: dict[RefusalCode, Callable[[], radix_compile.Explanation]] = {
    RefusalCode.CUSTOM_RULE: custom_rule,
    RefusalCode.ORDER_OF_ROWS: lambda: between(lambda x: x + x.sum(-1).flatten().argsort().reshape(4, 12, 1)),
    RefusalCode.DIFFERS_BY_ROW: lambda: between(lambda x: F.linear(x, x.reshape(-1, 16))[..., :16]),
    RefusalCode.UNCLEAR_DIMENSIONS: lambda: between(lambda x: x.repeat_interleave(2).reshape(4, 12, 32)[..., ::2]),
    RefusalCode.UNSUPPORTED_ARGUMENTS: lambda: between(lambda x: torch.einsum("...d,ed->...e", x, torch.eye(16))),
    RefusalCode.DROPOUT: lambda: explained(Block(nn.Dropout()).train(), shared_batch(4, 12, 8)),
    RefusalCode.BIDIRECTIONAL: lambda: between(lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3)[:, 0]),
    RefusalCode.MASK_NOT_CAUSAL: lambda: between(
        lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3, is_causal(diagonal=1))[:, 0]
    ),
    RefusalCode.ATTENTION_NOT_UNDERSTOOD: lambda: between(
        lambda x: F.scaled_dot_product_attention(x[:, None], PAST[:1, None], x[:, None], is_causal=True)[:, 0]
    ),
    RefusalCode.ROWS_WITHOUT_KEYS: lambda: explained(SeesNothing(), shared_batch(4, 12, 8)),
    RefusalCode.FUSED_LAYER: lambda: explained(
        Block(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)).eval(), shared_batch(4, 12, 8)
    ),
    RefusalCode.BLOCK_MASK_IN_GRAPH: lambda: between(flex),
    RefusalCode.FILLED_CACHE: lambda: explained(
        Block(Apply(lambda x: torch.cat([PAST, x], 1)[:, 12:])), shared_batch(4, 12, 8)
    ),
    RefusalCode.SWITCHED_OFF: lambda: explained(
        Block(nn.Identity()), shared_batch(4, 12, 8), options={"fold": "never"}
    ),
    RefusalCode.NOTHING_TO_SHARE: lambda: explained(Block(nn.Identity()), shared_batch(1, 12, 0)),
    RefusalCode.NO_ARITHMETIC: lambda: explained(nn.Embedding(VOCABULARY, 16), shared_batch(4, 12, 8)),
    RefusalCode.NO_TOKEN_IDS: lambda: explained(nn.Linear(16, 16), torch.randn(4, 16)),
    RefusalCode.EMBEDDINGS_WITH_GRADIENT: lambda: radix_compile.explain(
        nn.Linear(16, 16), torch.randn(4, 12, 16, requires_grad=True)
    ),
    RefusalCode.IN_PLACE: lambda: explained(Block(nn.BatchNorm1d(12)).train(), shared_batch(4, 12, 8)),
    RefusalCode.SYMBOLIC_SIZE: unbacked,
    RefusalCode.TORCH_FUNC: lambda: between(torch.func.vmap(lambda row: 2 * row)),
    RefusalCode.UNSUPPORTED_GRADIENT: lambda: radix_compile.explain(
        Block(Apply(Doubled.apply)), shared_batch(4, 12, 8)
    ),
    RefusalCode.LOWERING_FAILED: lambda: between(
        lambda x: torch.nested.nested_tensor_from_jagged(x.reshape(-1, 16), torch.tensor([0, 10, 48])).values()
    ),
    RefusalCode.INNER_BACKEND: does_not_compile,
    RefusalCode.INTERNAL_ERROR: mistake,
}
"""A program for each code that no case of ``MIXING`` has."""


@pytest.mark.filterwarnings("ignore:radix. nothing folds:UserWarning")
@pytest.mark.parametrize("code", PROGRAMS)
def test_every_code_has_a_program(code: RefusalCode) -> None:
    explanation = PROGRAMS[code]()
    codes = [refusal.code for refusal in explanation.refusals]
    assert code in (codes[0] if codes else None, *(graph.code for graph in explanation.graphs))
    assert not explanation.folded
    assert f'"{code}"' in explanation.to_json()


def test_no_code_is_left_out() -> None:
    assert {code for *_, code in MIXING.values()} | set(PROGRAMS) == set(RefusalCode)


def raised() -> list[tuple[str, ast.Call]]:
    """The places where the package refuses, with the calls that construct the exceptions."""
    root = Path(radix_compile.__file__).parent
    return [
        (f"{file.relative_to(root)}:{call.lineno}", call)
        for file in root.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        if call.func.id in ("Mixes", "CannotFold", "CaptureError")
    ]


def test_every_refusal_names_its_code_and_every_code_is_named() -> None:
    """Only rules of users may leave the code out."""
    assert len(raised()) > 60
    assert [place for place, call in raised() if len(call.args) < 2] == []
    files = [file for file in Path(radix_compile.__file__).parent.rglob("*.py") if file.name != "advice.py"]
    named = {name for file in files for name in re.findall(r"RefusalCode\.([A-Z_]+)", file.read_text())}
    assert named == {code.name for code in RefusalCode}


ADVISED = {
    RefusalCode.NO_RULE: "register a rule for it",
    RefusalCode.CUSTOM_RULE: "correct the rule",
    RefusalCode.MIXES_TOKENS: "Move it behind the model",
    RefusalCode.MIXES_SEQUENCES: "the same for all sequences",
    RefusalCode.DIFFERS_BY_ROW: "the same weights for every row",
    RefusalCode.DROPOUT: "model.eval()",
    RefusalCode.BIDIRECTIONAL: "If it is meant to be causal",
    RefusalCode.MASK_NOT_CAUSAL: "implies k <= q",
    RefusalCode.MASK_NOT_UNDERSTOOD: "Mask with minus infinity",
    RefusalCode.FUSED_LAYER: "set_fastpath_enabled(False)",
    RefusalCode.BLOCK_MASK_IN_GRAPH: "outside the compiled function",
    RefusalCode.FILLED_CACHE: "Send whole prompts in one call",
    RefusalCode.SWITCHED_OFF: 'fold="auto"',
    RefusalCode.NOTHING_TO_SHARE: "several sequences",
    RefusalCode.NO_TOKEN_IDS: "Compile the whole model",
    RefusalCode.EMBEDDINGS_WITH_GRADIENT: "Pass input_ids",
    RefusalCode.SYMBOLIC_SIZE: "without dynamic=True",
    RefusalCode.TORCH_FUNC: "outside the compiled function",
    RefusalCode.UNSUPPORTED_GRADIENT: "torch.no_grad()",
    RefusalCode.INTERNAL_ERROR: "a bug in radix_compile",
}
"""Words of the advice for each code. There is no advice for the other codes."""


def test_advice_is_looked_up_by_code() -> None:
    assert set(ADVICE) == set(ADVISED)
    for code in RefusalCode:
        assert ADVISED.get(code, "please report it") in advice_on(code)

"""Training: the losses, all gradients and the updated weights are those of the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import radix_compile
from tests.models import assert_as_exact, build, in_float64, paths, shared_batch
from tests.tiers import slow_unless

BATCH, SEQ = 4, 12
FOLD = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
Loss = Callable[..., Tensor]


def loss_of(model: nn.Module) -> Loss:
    """The loss of the model, computed inside the graph from ``labels``."""
    return lambda **batch: model(**batch, use_cache=False).loss


def gradients(loss: Loss, model: nn.Module, **batch: Tensor) -> list[Tensor]:
    """The loss, followed by the gradient of every parameter (an empty tensor if there is none)."""
    model.zero_grad()
    value = loss(**batch)
    value.backward()
    missing = torch.empty(0)
    return [value.detach(), *(missing if p.grad is None else p.grad.clone() for p in model.parameters())]


def assert_equal(ours: list[Tensor], plain: list[Tensor]) -> None:
    """Compare up to rounding in float32, the dtype of RMS norms of transformers even in a float64 model.

    A rounding error in a norm affects every gradient before it, so the tolerance is relative to the largest gradient.
    """
    assert len(ours) == len(plain) > 1
    assert any(gradient.any() for gradient in plain[1:])
    largest = max(gradient.abs().max().item() for gradient in plain if gradient.numel())
    rounding = 4 * torch.finfo(torch.float32).eps * largest
    for gradient, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=rounding)


def labelled(ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    mask = torch.ones_like(ids) if mask is None else mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tree_of_three_levels() -> Tensor:
    ids = shared_batch(BATCH, SEQ, 4)
    ids[1, :8] = ids[0, :8]
    ids[3, :9] = ids[2, :9]
    return ids


def padded(left: bool) -> dict[str, Tensor]:
    ids, mask = shared_batch(BATCH, SEQ, 8), torch.ones(BATCH, SEQ, dtype=torch.long)
    ids[1] = ids[0]
    for row, length in enumerate((9, 9, 11, 12)):
        mask[row, slice(None, SEQ - length) if left else slice(length, None)] = 0
    return labelled(ids.masked_fill(mask == 0, 0), mask)


BATCHES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "identical sequences": lambda: labelled(shared_batch(BATCH, SEQ, SEQ)),
    "a shared prefix": lambda: labelled(shared_batch(BATCH, SEQ, 8)),
    "nothing shared": lambda: labelled(torch.arange(3, 3 + BATCH * SEQ).view(BATCH, SEQ)),
    "three levels": lambda: labelled(tree_of_three_levels()),
    "mixed lengths": lambda: padded(left=False),
    "left padding": lambda: padded(left=True),
}


@pytest.mark.parametrize("kind", slow_unless(lambda kind: kind == "GPT2", ["Qwen3", "Llama", "GPT2"]))
def test_steps_are_those_of_the_plain_model(kind: str) -> None:
    """Compare the loss and the gradients of each batch, before and after an update."""
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if kind == "GPT2" else {}
    start = build(kind, **dropout).double().train()
    model = copy.deepcopy(start)
    compiled = torch.compile(loss_of(model), backend="radix", options=FOLD)
    for name, batch in BATCHES.items():
        model.load_state_dict(start.state_dict())
        plain = copy.deepcopy(start)
        radix_compile.reset_stats()
        for _ in range(2):
            assert_equal(gradients(compiled, model, **batch()), gradients(loss_of(plain), plain, **batch()))
            for updated in (model, plain):
                torch.optim.SGD(updated.parameters(), lr=0.1).step()
        stats = radix_compile.stats()
        assert stats.folded_calls == 2, name
        keys = batch()["input_ids"], batch()["attention_mask"]
        fully_masked = keys[1].cumsum(1) == 0
        assert stats.compact_tokens == 2 * paths(*keys, unique=fully_masked), name


def test_a_single_sequence_runs_plain() -> None:
    model = build("Qwen3", num_hidden_layers=1).double().train()
    plain = copy.deepcopy(model)
    batch = labelled(shared_batch(1, SEQ, 0))
    compiled = torch.compile(loss_of(model), backend="radix", options=FOLD)
    assert_equal(gradients(compiled, model, **batch), gradients(loss_of(plain), plain, **batch))
    assert radix_compile.stats().folded_calls == 0


def masked_attention_compiles_in_float64() -> bool:
    """Can inductor compile the gradient? On a CPU in torch 2.11 it fails: "expected scalar type Double"."""
    q, k, v = (torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    try:
        torch.compile(F.scaled_dot_product_attention)(q, k, v, torch.ones(8, 8, dtype=torch.bool)).sum().backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.slow  # it compiles three programs, forward and backward
def test_through_inductor() -> None:
    """Train through inductor, with the loss inside and outside of the graph. Two backward passes give the same bits."""
    attention = "sdpa" if masked_attention_compiles_in_float64() else "eager"
    model = build("Qwen3", attention=attention, num_hidden_layers=1).double().train()
    plain = copy.deepcopy(model)
    batch = BATCHES["three levels"]()
    labels = batch.pop("labels")

    def outside(run: Callable[..., Any]) -> Loss:
        return lambda **inputs: F.cross_entropy(
            run(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )

    options = {"fold": "always", "strict": True}
    compiled = torch.compile(model, backend="radix", options=options)
    ours = gradients(outside(compiled), model, **batch)
    assert_equal(ours, gradients(outside(plain), plain, **batch))
    for first, second in zip(ours, gradients(outside(compiled), model, **batch), strict=True):
        assert torch.equal(first, second)
    inside = torch.compile(loss_of(model), backend="radix", options=options)
    batch["labels"] = labels
    ours = gradients(inside, model, **batch)
    assert_equal(ours, gradients(loss_of(plain), plain, **batch))
    for first, second in zip(ours, gradients(inside, model, **batch), strict=True):
        assert torch.equal(first, second)
    assert radix_compile.stats().folded_calls == 4


@pytest.mark.parametrize("inner", slow_unless(lambda inner: inner == "aot_eager", ["eager", "aot_eager"]))
@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
def test_bfloat16_errs_no_more_than_the_plain_model(autocast: bool, inner: str) -> None:
    """The error of every gradient, against float64, is at most twice the error of the plain model."""
    model = build("Qwen3").train()
    exact_model = in_float64(model)
    if not autocast:
        model = model.bfloat16()
        exact_model = in_float64(model)
    plain = copy.deepcopy(model)
    batch = BATCHES["three levels"]()
    compiled = torch.compile(loss_of(model), backend="radix", options={**FOLD, "inner_backend": inner})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = gradients(compiled, model, **batch), gradients(loss_of(plain), plain, **batch)
    exact = gradients(loss_of(exact_model), exact_model, **batch)
    assert radix_compile.stats().folded_calls == 1
    for gradient, expected, reference in zip(ours, theirs, exact, strict=True):
        assert_as_exact(gradient, expected, reference.double(), factor=2.0)


def test_accumulated_gradients() -> None:
    model = build("Qwen3", num_hidden_layers=1).double().train()
    plain = copy.deepcopy(model)
    compiled = torch.compile(loss_of(model), backend="radix", options=FOLD)
    for run in (compiled, loss_of(plain)):
        for name in ("a shared prefix", "three levels"):
            run(**BATCHES[name]()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert radix_compile.stats().folded_calls == 2


def saved_bytes(loss: Loss, **batch: Tensor) -> int:
    """The bytes that autograd saves for the backward pass. Parameters do not count, and each storage counts once."""
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss(**batch).backward()
    return sum(saved.values())


@pytest.mark.slow  # test_checkpointed_layers_fold_and_save_less measures the same, with checkpoints
def test_saved_activations_shrink_with_compression() -> None:
    """All saved tensors shrink except those of attention in full form (Q, K, V and the result), here a fifth."""
    model = build("Qwen3", intermediate_size=256, vocab_size=1000).train()
    plain = torch.compile(loss_of(model), backend="aot_eager")
    folded = torch.compile(loss_of(model), backend="radix", options=FOLD)
    sizes = {}
    for shared in (0, 16, 31):
        ids = shared_batch(8, 32, shared)
        before, after = saved_bytes(plain, **labelled(ids)), saved_bytes(folded, **labelled(ids))
        compression = len(radix_compile.plan.prefix_plan.PrefixPlan.from_rows(ids).fold) / ids.numel()
        sizes[shared] = after / before
        assert sizes[shared] <= 0.2 + compression
    assert sizes[31] < sizes[16] < sizes[0]
    assert sizes[31] < 0.35


def test_checkpointed_layers_fold_and_save_less() -> None:
    model = build("Qwen3").double().train()
    plain = copy.deepcopy(model)
    saves_all = torch.compile(loss_of(model), backend="radix", options=FOLD)
    batch = BATCHES["a shared prefix"]()
    without_checkpoints = saved_bytes(saves_all, **batch)
    model.gradient_checkpointing_enable()
    plain.gradient_checkpointing_enable()
    torch._dynamo.reset()
    radix_compile.reset_stats()
    compiled = torch.compile(loss_of(model), backend="radix", options=FOLD)
    assert_equal(gradients(compiled, model, **batch), gradients(loss_of(plain), plain, **batch))
    assert radix_compile.stats().folded_calls == 1
    assert saved_bytes(compiled, **batch) < 0.7 * without_checkpoints


def test_frozen_parameters() -> None:
    model = build("Qwen3").double().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1." in name
    plain = copy.deepcopy(model)
    batch = BATCHES["three levels"]()
    compiled = torch.compile(loss_of(model), backend="radix", options=FOLD)
    ours = gradients(compiled, model, **batch)
    assert_equal(ours, gradients(loss_of(plain), plain, **batch))
    assert 0 < sum(gradient.numel() == 0 for gradient in ours) < len(ours)
    assert radix_compile.stats().folded_calls == 1


def test_tied_embeddings() -> None:
    model = build("Qwen3", num_hidden_layers=1, tie_word_embeddings=True).double().train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = copy.deepcopy(model)
    batch = BATCHES["three levels"]()
    compiled = torch.compile(loss_of(model), backend="radix", options=FOLD)
    assert_equal(gradients(compiled, model, **batch), gradients(loss_of(plain), plain, **batch))
    assert radix_compile.stats().folded_calls == 1


def test_learned_positions_get_their_gradient() -> None:
    """A table by column gets a gradient from every node of the column."""
    model = build("GPT2", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0).double().train()
    plain = copy.deepcopy(model)
    batch = BATCHES["three levels"]()
    compiled = torch.compile(loss_of(model), backend="radix", options=FOLD)
    assert_equal(gradients(compiled, model, **batch), gradients(loss_of(plain), plain, **batch))
    assert plain.transformer.wpe.weight.grad[:SEQ].abs().sum() > 0


def test_lora_adapters_on_attention_and_mlp() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        lora_dropout=0.0,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(build("Qwen3").double(), config).double().train()
    plain = copy.deepcopy(model)
    batch = BATCHES["three levels"]()
    compiled = torch.compile(loss_of(model), backend="radix", options=FOLD)
    ours = gradients(compiled, model, **batch)
    assert_equal(ours, gradients(loss_of(plain), plain, **batch))
    trained = [name for (name, _), gradient in zip(model.named_parameters(), ours[1:], strict=True) if gradient.numel()]
    assert len(trained) == 2 * 4 * 2
    assert all("lora_" in name for name in trained)
    assert radix_compile.stats().folded_calls == 1


def test_dropout_folds_what_stays_right_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Ops before the first dropout fold. Dropout masks differ between rows of equal prefix, so ops after it do not."""
    embedding, first, second = nn.Embedding(97, 32), nn.Linear(32, 256), nn.Linear(256, 32)

    def program(ids: Tensor) -> Tensor:
        return second(F.dropout(first(embedding(ids)).relu(), 0.5)).sum()

    explanation = radix_compile.explain(program, shared_batch(BATCH, SEQ, 8))
    assert explanation.folded
    assert "dropout is on" in explanation.refusals[0].reason
    assert "dropout is on" in capsys.readouterr().out
    assert 0 < explanation.graphs[0].flops_compact == explanation.graphs[0].flops_full


def test_the_report_says_that_the_loss_reads_the_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("Qwen3", num_hidden_layers=1).train()
    explanation = radix_compile.explain(loss_of(model), **BATCHES["a shared prefix"]())
    assert explanation.folded
    assert "its softmax runs once per node" in capsys.readouterr().out


@pytest.mark.parametrize("left", slow_unless(lambda left: left, [False, True]))
def test_rows_that_padding_leaves_out_have_no_gradient(left: bool) -> None:
    model = build("Qwen3", head="Model").double().train()
    plain = copy.deepcopy(model)
    batch = padded(left)
    del batch["labels"]

    def loss(run: Callable[..., Any]) -> Loss:
        def of_real_rows(**inputs: Tensor) -> Tensor:
            hidden = run(**inputs, use_cache=False).last_hidden_state
            return (hidden * inputs["attention_mask"].unsqueeze(-1)).square().sum()

        return of_real_rows

    compiled = torch.compile(model, backend="radix", options={**FOLD, "padding": "skip"})
    assert_equal(gradients(loss(compiled), model, **batch), gradients(loss(plain), plain, **batch))
    stats = radix_compile.stats()
    assert stats.folded_calls == 1
    assert stats.read_tokens == batch["attention_mask"].sum()

"""A small DPO training loop, which runs with any `torch.compile` backend.

Run as `python -m examples.dpo --backend radix`. A batch has the chosen and the rejected completion of each prompt. The
radix backend computes the prompt once for both, in the policy and in the frozen reference model. The loop has no code
for it except the name of the backend.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import radix_compile

PAD, FIRST = 0, 1  # the padding token, and the first ordinary token
VOCABULARY = 96
PAIRS = 4
PROMPT_LENGTHS, COMPLETION_LENGTHS = (40, 64), (8, 16)  # minimum and maximum
LENGTH = PROMPT_LENGTHS[1] + COMPLETION_LENGTHS[1]
BETA = 0.1
LEARNING_RATE = 1e-3

Pair = tuple[Tensor, Tensor, Tensor]
"""Token ids of a prompt, of the chosen and of the rejected completion."""


def small_qwen3(seed: int = 0) -> Any:
    """Return an unmodified Qwen3 with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=PAD,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)


def toy_pairs(generator: torch.Generator) -> list[Pair]:
    """Return random pairs. Chosen completions are from the lower half of the vocabulary, rejected from the upper."""

    def tokens(lengths: tuple[int, int], first: int, end: int) -> Tensor:
        length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
        return torch.randint(first, end, (length,), generator=generator)

    middle = VOCABULARY // 2
    return [
        (
            tokens(PROMPT_LENGTHS, FIRST, VOCABULARY),
            tokens(COMPLETION_LENGTHS, FIRST, middle),
            tokens(COMPLETION_LENGTHS, middle, VOCABULARY),
        )
        for _ in range(PAIRS)
    ]


def collate(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, attention mask and completion mask, each [2 * pairs, LENGTH]: all chosen, then all rejected.

    All batches are padded to the same length, so that the model is compiled once. They are padded on the right, so that
    both copies of a prompt start at the same position.
    """
    sequences = [(prompt, chosen) for prompt, chosen, _ in pairs]
    sequences += [(prompt, rejected) for prompt, _, rejected in pairs]
    ids = torch.full((len(sequences), LENGTH), PAD)
    mask, is_completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.cat([prompt, completion])
        mask[row, :end] = 1
        is_completion[row, len(prompt) : end] = 1
    return ids, mask, is_completion


def sequence_log_probs(logits: Tensor, ids: Tensor, is_completion: Tensor) -> Tensor:
    """Return the log-probability [B] of each completion. The logits of a column predict the next column."""
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (log_probs * is_completion[:, 1:]).sum(1)


def dpo_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """Return the sigmoid DPO loss of log-probabilities [2 * pairs]: all chosen, then all rejected."""
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def train(steps: int, backend: str | Callable[..., Any] | None, model: Any = None, seed: int = 0) -> list[float]:
    """Train `model` (by default a small Qwen3) and return the loss of each step, which is printed too.

    `backend` is the backend of `torch.compile`; None: do not compile. The first loss is log 2, because training starts
    at the reference model.
    """
    model = small_qwen3(seed) if model is None else model
    reference = copy.deepcopy(model).requires_grad_(False)
    compiled, compiled_reference = (
        module if backend is None else torch.compile(module, backend=backend) for module in (model, reference)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(1, steps + 1):
        ids, mask, is_completion = (tensor.to(model.device) for tensor in collate(toy_pairs(generator)))
        with torch.no_grad():
            logits = compiled_reference(input_ids=ids, attention_mask=mask).logits
            reference_log_probs = sequence_log_probs(logits, ids, is_completion)
        logits = compiled(input_ids=ids, attention_mask=mask).logits
        loss = dpo_loss(sequence_log_probs(logits, ids, is_completion), reference_log_probs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step:>3}  loss {losses[-1]:.6f}", flush=True)
    return losses


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the options of the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="dpo", description="Train a small random Qwen3 with DPO.")
    parser.add_argument("--backend", choices=("radix", "inductor", "eager", "none"), default="radix")
    parser.add_argument("--steps", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args(argv)
    train(options.steps, None if options.backend == "none" else options.backend)
    if options.backend == "radix":
        stats = radix_compile.stats()
        print(f"tokens {stats.tokens:,} -> {stats.compact_tokens:,} compact")
    return 0


if __name__ == "__main__":
    sys.exit(main())

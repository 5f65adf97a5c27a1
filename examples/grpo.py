"""A small GRPO training loop, which runs with any `torch.compile` backend.

Run as `python -m examples.grpo --backend radix`. The completions of a group share their prompt, so that most tokens of
a training batch are repeated. The radix backend computes them once, forward and backward. The loop has no code for it
except the name of the backend.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import radix_compile

PAD, END, FIRST = 0, 1, 2  # the padding token, the end token, and the first ordinary token
VOCABULARY = 96
PROMPTS, GROUP = 2, 8
PROMPT_LENGTH, COMPLETION_LENGTH = 64, 16
UPDATES = 2  # in the first update after sampling all ratios are 1, and nothing is clipped
CLIP = 0.2
LEARNING_RATE = 1e-3


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
        eos_token_id=END,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def sample(model: Any, prompts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `GROUP` completions of each prompt [N, P].

    Returns ids and mask [N * GROUP, P + C], padded on the right where a completion ended early, and the
    log-probabilities [N * GROUP, C] of the sampled tokens.
    """
    ids = prompts.repeat_interleave(GROUP, dim=0)
    mask = torch.ones_like(ids)
    token_log_probs = []
    # Simple, not fast: without a cache, each token runs the whole sequence again. Real training samples with
    # `model.generate` or an inference server.
    for _ in range(COMPLETION_LENGTH):
        log_probs = model(input_ids=ids, attention_mask=mask).logits[:, -1].log_softmax(-1)
        token = torch.multinomial(log_probs.exp(), 1, generator=generator)
        token_log_probs.append(log_probs.gather(-1, token))
        is_running = mask[:, -1:] * (ids[:, -1:] != END)
        ids = torch.cat([ids, torch.where(is_running.bool(), token, PAD)], dim=1)
        mask = torch.cat([mask, is_running], dim=1)
    return ids, mask, torch.cat(token_log_probs, dim=1)


def rewards(completions: Tensor, mask: Tensor) -> Tensor:
    """Return the toy reward: the share of a completion's tokens that are in the lower half of the vocabulary."""
    return ((completions < VOCABULARY // 2) * mask).sum(1) / mask.sum(1)


def group_advantages(reward: Tensor) -> Tensor:
    """Return each completion's reward minus its group's mean, in standard deviations of the group."""
    groups = reward.view(-1, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return the clipped policy-gradient loss: the mean over a completion's tokens, then over completions."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    return -((gain * mask).sum(1) / mask.sum(1)).mean()


def train(steps: int, backend: str | Callable[..., Any] | None, model: Any = None, seed: int = 0) -> list[float]:
    """Train `model` (by default a small Qwen3), print loss and mean reward of each step, and return the losses.

    A step samples once and updates `UPDATES` times. `backend` is the backend of `torch.compile`; None: do not compile.
    A step's loss is that of its last update: in the first, all ratios are 1, and the advantages cancel.
    """
    model = small_qwen3(seed) if model is None else model
    compiled = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator(model.device).manual_seed(seed)
    losses = []
    for step in range(1, steps + 1):
        prompts = torch.randint(
            FIRST, VOCABULARY, (PROMPTS, PROMPT_LENGTH), generator=generator, device=generator.device
        )
        ids, mask, old_log_probs = sample(model, prompts, generator)
        completions, completion_mask = ids[:, PROMPT_LENGTH:], mask[:, PROMPT_LENGTH:]
        reward = rewards(completions, completion_mask)
        advantages = group_advantages(reward)
        for _ in range(UPDATES):
            logits = compiled(input_ids=ids, attention_mask=mask).logits
            # The logits of a column predict the next column.
            log_probs = logits[:, PROMPT_LENGTH - 1 : -1].log_softmax(-1).gather(-1, completions[..., None]).squeeze(-1)
            loss = policy_loss(log_probs, old_log_probs, advantages, completion_mask)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step:>3}  loss {losses[-1]:+.6f}  reward {reward.mean():.3f}", flush=True)
    return losses


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the options of the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="grpo", description="Train a small random Qwen3 with GRPO.")
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

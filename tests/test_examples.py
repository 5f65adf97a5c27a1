"""The examples train to the same losses with the radix backend as without compilation, and say what they did."""

from __future__ import annotations

import math
import re
from types import ModuleType
from typing import Any

import pytest

import radix_compile
from examples import dpo, grpo
from radix_compile import backend
from tests import models

STEPS = 3
TOLERANCE = 1e-9
"""How far losses may be apart, all of them means of terms around one, in float64.

AdamW divides a gradient by its own size plus eps, so that a rounding error e of the gradient moves a weight by at most
lr / eps * e. Here that is 1e5 * 1e-16, and the loss moves by at most the sum of its gradient's entries, about 100,
times these 1e-11. (Only a weight whose gradient is nothing but rounding errors is moved that far: as measured, losses
are 1e-15 apart.) A gradient that is plainly wrong moves weights by about lr, which is eight digits more.
"""

INNERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def exact_model() -> Any:
    """GPT-2 in float64: a Qwen3 in float64 still computes its norms in float32. In eval mode nothing drops out."""
    return models.build("GPT2", use_cache=False).double()


def folding(inner: str) -> radix_compile.RadixBackend:
    """The radix backend, which folds every call or raises."""
    return radix_compile.RadixBackend(inner_backend=inner, fold="always", strict=True)


@pytest.mark.parametrize("inner", INNERS)
def test_grpo_trains_to_the_same_losses(inner: str) -> None:
    plain = grpo.train(STEPS, None, exact_model())
    assert all(abs(loss) > 1e-3 for loss in plain)  # the advantages did not just cancel
    assert grpo.train(STEPS, folding(inner), exact_model()) == pytest.approx(plain, rel=0, abs=TOLERANCE)
    rows = grpo.PROMPTS * grpo.GROUP * (grpo.PROMPT_LENGTH + grpo.COMPLETION_LENGTH)
    # At most: completions of a group that start with the same tokens share these too.
    nodes = grpo.PROMPTS * (grpo.PROMPT_LENGTH + grpo.GROUP * grpo.COMPLETION_LENGTH)
    check_folded(calls=STEPS * grpo.UPDATES, rows=rows, nodes=nodes)


def test_dpo_trains_to_the_same_losses() -> None:
    plain = dpo.train(STEPS, None, exact_model())
    assert plain[0] == pytest.approx(math.log(2), rel=0, abs=TOLERANCE)
    assert plain[-1] < plain[0] - 1e-3
    assert dpo.train(STEPS, folding("aot_eager"), exact_model()) == pytest.approx(plain, rel=0, abs=TOLERANCE)
    rows = 2 * dpo.PAIRS * dpo.LENGTH
    check_folded(calls=2 * STEPS, rows=rows, nodes=rows - dpo.PAIRS * dpo.PROMPT_LENGTHS[0])


def check_folded(calls: int, rows: int, nodes: int) -> None:
    """All of so many calls, each of so many rows, were folded to at most so many nodes."""
    stats = radix_compile.stats()
    assert stats.calls == stats.folded_calls == calls
    assert stats.tokens == calls * rows
    assert stats.compact_tokens <= calls * nodes < stats.tokens


@pytest.mark.slow  # whole runs
@pytest.mark.parametrize("example", [grpo, dpo], ids=["grpo", "dpo"])
def test_what_the_scripts_print(
    example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert example.main(["--backend", "none", "--steps", "2"]) == 0
    plain = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(backend.radix, "options", radix_compile.Options(inner_backend="aot_eager", fold="always"))
    assert example.main(["--backend", "radix", "--steps", "2"]) == 0
    *steps, tokens = capsys.readouterr().out.splitlines()
    assert len(steps) == len(plain) == 2
    for number, (line, expected) in enumerate(zip(steps, plain, strict=True), start=1):
        assert line.startswith(f"step   {number}  loss ")
        assert numbers(line) == pytest.approx(numbers(expected), abs=1e-5)  # float32, printed with six decimals
    stats = radix_compile.stats()
    assert 0 < stats.compact_tokens < stats.tokens
    assert tokens == f"tokens {stats.tokens:,} -> {stats.compact_tokens:,} compact"


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", line)]

"""Random programs on random prefix trees: folded programs give the results and gradients of the plain ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from radix_compile.analysis.op_info import OP_INFO
from radix_compile.ir.value import Value, value_of
from tests.fuzz.check import FAILURES, Outcome, check, draw_example

SEEDS = [*range(0, 200, 20), *(pytest.param(first, marks=pytest.mark.slow) for first in range(200, 480, 20))]


@pytest.mark.parametrize("first", SEEDS)
def test_examples(first: int) -> None:
    outcome = Outcome()
    for seed in range(first, first + 20):
        check(draw_example(seed), outcome)
    assert outcome.examples == 20
    assert outcome.folded > 8, outcome
    assert outcome.refused > 3, outcome
    assert outcome.compact_tokens < 0.9 * outcome.tokens, outcome


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that calls a flip along the sequence position-wise."""

    def position_wise(node: object, layout: object) -> Value:
        return Value(value_of(node.args[0]).axes)  # type: ignore[attr-defined]

    flip = torch.ops.aten.flip.default
    monkeypatch.setitem(OP_INFO, flip, replace(OP_INFO[flip], rule=position_wise))
    examples = (draw_example(seed, compiled=0) for seed in range(2000))
    for example in (example for example in examples if "flip(" in str(example.program)):
        try:
            check(example, Outcome())
        except FAILURES:
            return
    pytest.fail("the fuzzer did not notice")

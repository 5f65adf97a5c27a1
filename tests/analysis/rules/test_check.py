"""Every row of the rule table is executed against its op: wrong rules and rows without a sample are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import fx
from torch._ops import OpOverload

from radix_compile import testing
from radix_compile.analysis.op_info import OP_INFO, OpInfo, info_of
from radix_compile.analysis.rules.elementwise import elementwise
from radix_compile.ir.value import Value, value_of
from tests.analysis.rules import sweep
from tests.analysis.rules.samples import NO_RULE, POINTWISE, SAMPLES
from tests.analysis.rules.sweep import main

aten = torch.ops.aten


@pytest.mark.parametrize("case", list(sweep.cases()), ids=str)
def test_verdict_and_numbers(case: sweep.Case) -> None:
    testing.check_rule(case.op, case.sample)


def test_every_row_has_samples() -> None:
    assert not sweep.gaps()


def test_the_ops_that_models_use_have_rules() -> None:
    used = sweep.used_ops()
    assert len(used) > 80
    assert all(isinstance(sweep.named(name), OpOverload) for name in used if name.startswith("aten."))
    unknown = sweep.used_without_rule()
    assert not [op for op, reason in unknown.items() if not reason], "nobody has looked at these"
    assert set(unknown) == set(NO_RULE)


def test_a_wrong_rule_and_a_missing_one_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def by_row(node: fx.Node, layout: object) -> Value:
        return Value(value_of(node.args[0]).axes)  # type: ignore[arg-type]

    assert main(["aten.flip", "aten.roll.default"]) == 0
    assert "0 wrong, 0 missing" in capsys.readouterr().out
    monkeypatch.setitem(OP_INFO, aten.flip.default, replace(OP_INFO[aten.flip.default], rule=by_row))
    assert main(["aten.flip", "aten.roll.default"]) == 1
    printed = capsys.readouterr().out
    assert "wrong    aten.flip.default-" in printed
    assert "is claimed to be determined by the paths of rows, but is not" in printed
    assert "wrong    aten.roll" not in printed

    monkeypatch.setattr(sweep, "cases", lambda: iter(()))
    monkeypatch.setitem(OP_INFO, aten.bernoulli.default, OpInfo(rule=by_row))
    monkeypatch.delitem(SAMPLES, aten.flip.default)
    assert sweep.gaps() == ["aten.flip.default: no sample", "aten.bernoulli.default: no sample"]


def test_a_causal_rule_that_reads_ahead_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded and plain agree, since the op runs in full form: claims show it, and exchanging later rows."""

    def causal(node: fx.Node, layout: object) -> Value:
        return Value(value_of(node.args[0]).axes, full_only=True)  # type: ignore[arg-type]

    monkeypatch.setitem(OP_INFO, aten.roll.default, OpInfo(rule=causal))
    sample = testing.full(lambda t, op: t(op, t.x, [-1], [1]))
    with pytest.raises(AssertionError, match="claimed to be determined"):
        testing.check_rule(aten.roll.default, sample)
    monkeypatch.setattr(testing, "check_claims", lambda *args: None)
    with pytest.raises(AssertionError, match="not close"):
        testing.check_rule(aten.roll.default, sample)


def test_no_such_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["aten.nothing"]) == 2
    assert "no row is called aten.nothing" in capsys.readouterr().err


def overloads() -> Iterator[OpOverload]:
    for name in dir(aten):
        packet = getattr(aten, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            yield from (getattr(packet, overload) for overload in packet.overloads())


def test_the_default_is_for_pure_elementwise_ops_only() -> None:
    by_default = {op for op in overloads() if not {op, op.name()} & set(OP_INFO) and info_of(op).rule is not None}
    assert len(by_default) > 100
    assert set(POINTWISE) <= by_default
    for op in by_default:
        assert info_of(op).rule is elementwise
        assert torch.Tag.pointwise in op.tags
        assert torch.Tag.nondeterministic_seeded not in op.tags, op
        assert not op._schema.is_mutable, op


def test_random_and_writing_ops_exist_that_torch_tags_pointwise() -> None:
    """So that the test above is about something."""
    pointwise = [op for op in overloads() if torch.Tag.pointwise in op.tags]
    assert any(torch.Tag.nondeterministic_seeded in op.tags for op in pointwise)
    assert any(op._schema.is_mutable for op in pointwise)


@pytest.mark.parametrize("op", [aten.relu_.default, aten.add.out, aten.bernoulli.default, aten.rand_like.default])
def test_no_rule(op: OpOverload) -> None:
    assert info_of(op).rule is None


def arguments(op: OpOverload, tensor: torch.Tensor) -> tuple[list[object], dict[str, object]]:
    """The same tensor for every tensor of a pointwise op, and numbers for what else has no default."""
    args: list[object] = []
    named: dict[str, object] = {}
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.has_default_value() and not kind.startswith("Tensor"):
            continue
        value: object = tensor.clone() if kind.startswith("Tensor") else 1
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            args.append(value)
    return args, named


def test_ops_that_torch_tags_pointwise_are() -> None:
    """They have no rows, and so no samples: rows of their inputs, left out and repeated, are rows of results."""
    rows = torch.tensor([2, 0, 2])
    floats = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 + 0.1
    seen = 0
    for op in [op for op in overloads() if info_of(op).rule is elementwise]:
        for tensor in (floats, (10 * floats).long(), floats > 0.5):
            args, named = arguments(op, tensor)
            chosen = [one[rows] if isinstance(one, torch.Tensor) else one for one in args]
            chosen_named = {name: one[rows] if isinstance(one, torch.Tensor) else one for name, one in named.items()}
            try:
                results, of_rows = op(*args, **named), op(*chosen, **chosen_named)
            except (RuntimeError, TypeError):  # not for this dtype
                continue
            seen += 1
            several = isinstance(results, tuple | list)
            for one, other in zip(*((results, of_rows) if several else ((results,), (of_rows,))), strict=True):
                if isinstance(one, torch.Tensor):
                    torch.testing.assert_close(one[rows], other, rtol=0, atol=0, equal_nan=True, msg=str(op))
            break
    assert seen > 200

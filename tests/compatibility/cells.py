"""One cell of the compatibility page: a family, an attention implementation and a way to call the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import radix_compile
from radix_compile.passes.report import GraphReport
from radix_compile.runtime.dispatch import Choice
from tests.compatibility.families import build_family
from tests.compatibility.forms import FORMS, without_gradients
from tests.models import assert_as_exact, in_float64

ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError)
"""The errors of a model that does not support a form of call."""


@dataclass(frozen=True)
class Cell:
    """``result`` is folded, partly, declined, unsupported (the plain model fails), wrong or crash, for ``reason``.

    ``on_tree`` if all attention runs on the prefix tree; otherwise ``full_form`` says why a causal attention does not.
    """

    family: str
    attention: str
    form: str
    result: str
    reason: str = ""
    tokens: int = 0
    compact_tokens: int = 0
    on_tree: bool = False
    full_form: str = ""

    @property
    def fails(self) -> bool:
        return self.result in ("wrong", "crash")

    def __str__(self) -> str:
        counts = f" {self.tokens} -> {self.compact_tokens}" if self.tokens else ""
        return (
            f"{self.family}, {self.attention}, {self.form}: {self.result}{counts}{self.reason and ': ' + self.reason}"
        )


def run_cell(family: str, attention: str, form: str, inner: str = "aot_eager", device: str = "cpu") -> Cell:
    model = build_family(family, attention).to(device)

    def call(model: nn.Module, run: Callable[..., Any]) -> Any:
        return FORMS[form](
            model, lambda **inputs: run(**{name: _moved(value, device) for name, value in inputs.items()})
        )

    with warnings.catch_warnings(), without_gradients(form):
        warnings.simplefilter("ignore")
        try:
            plain = logits(call(model, model))
        except ERRORS as error:
            return Cell(family, attention, form, "unsupported", first_line(error))
        if not all(tensor.isfinite().all() for tensor in plain):
            return Cell(family, attention, form, "unsupported", "the plain model's results are not finite")
        exact_model = in_float64(model)
        try:
            exact = logits(call(exact_model, exact_model))
        except ERRORS:  # XGLM cannot run in float64
            exact = None
        torch._dynamo.reset()
        radix_compile.reset_stats()
        reports = Reports()
        backend = radix_compile.RadixBackend(listener=reports, inner_backend=inner, fold="always")
        try:
            ours = logits(call(model, torch.compile(model, backend=backend)))
        except Exception as error:
            return Cell(family, attention, form, "crash", " ".join(f"{type(error).__name__}: {error}".split())[:200])
    result, reason = verdict(reports.kept)
    try:
        compare(ours, plain, exact)
    except AssertionError as error:
        result, reason = "wrong", first_line(error)
    stats = radix_compile.stats()
    if result in ("folded", "partly") and not stats.folded_calls:
        result, reason = "declined", next(iter(stats.plain_calls), "")
    return Cell(
        family, attention, form, result, reason, stats.tokens, stats.compact_tokens, *attention_forms(reports.kept)
    )


def _moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def compare(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor] | None) -> None:
    """Compare with float64, or without it with the plain model, within a thousand roundings of the largest entry."""
    for number, (result, expected) in enumerate(zip(ours, plain, strict=True)):
        if exact is not None:
            assert_as_exact(result, expected, exact[number].double())
        else:
            limit = 1e3 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
            torch.testing.assert_close(result, expected, rtol=0, atol=limit)


class Reports:
    """A listener that keeps the report of each graph."""

    def __init__(self) -> None:
        self.kept: list[GraphReport] = []

    def on_report(self, report: GraphReport) -> None:
        self.kept.append(report)

    def on_choice(self, report: GraphReport, choice: Choice) -> None:
        pass


def logits(output: Any) -> list[Tensor]:
    """The loss if there is one, and the logits, or the hidden state of a model without a head."""
    results = [getattr(output, name, None) for name in ("loss", "logits", "last_hidden_state")]
    return [tensor.detach() for tensor in results if tensor is not None]


def verdict(reports: list[GraphReport]) -> tuple[str, str]:
    """``result`` and ``reason`` of a cell."""
    folded = [report for report in reports if report.folded]
    refusals = [str(refusal.reason) for report in folded for refusal in report.refusals]
    if not folded:
        return "declined", next((report.reason for report in reports if report.reason), "nothing was compiled")
    return ("partly", refusals[0]) if refusals else ("folded", "")


def attention_forms(reports: list[GraphReport]) -> tuple[bool, str]:
    """``on_tree`` and ``full_form`` of a cell."""
    attentions = [attention for report in reports if report.folded for attention in report.attentions]
    full_form = next((attention.full_form for attention in attentions if attention.full_form), "")
    return bool(attentions) and all(attention.causal for attention in attentions) and not full_form, full_form


def first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"\w+\.main\.cpp:\d+", "generated code", line)[:200]  # its name is another one in every run

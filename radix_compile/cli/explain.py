"""Say what folds in a model, layer by layer, what does not and why, and what would have to change."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from radix_compile.cli.inputs import add_batch, add_model, arguments_of, load_batch, load_model
from radix_compile.explanation import Explanation, look_at
from radix_compile.inspection.advice import advice_on, advice_on_graph
from radix_compile.inspection.diff import GraphPair
from radix_compile.inspection.lines import Block, Kind
from radix_compile.inspection.text import short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_batch(parser)
    parser.add_argument("--measure", action="store_true", help="compile, and time the call plain and as it is")


def run(options: argparse.Namespace, console: Console) -> int:
    """0 if something folds, 1 if nothing does."""
    explanation = explained(options, measure=options.measure)
    if options.json:
        print(json.dumps({**explanation.to_dict(), "advice": _advice(explanation)}, indent=2))
    else:
        _show(explanation, console)
    return 0 if any(graph.folded for graph in explanation.graphs) else 1


def explained(options: argparse.Namespace, measure: bool = False) -> Explanation:
    """The explanation of the model and the batch that the command line names."""
    model = load_model(options)
    args, kwargs = arguments_of(model, load_batch(options, model))
    with torch.no_grad():
        return look_at(model, args, kwargs, measure=measure)


def _advice(explanation: Explanation) -> dict[str, str]:
    return {refusal.node: advice_on(refusal.code) for refusal in explanation.refusals}


def _show(explanation: Explanation, console: Console) -> None:
    if explanation.folded:
        share = explanation.tokens / explanation.compact_tokens
        console.print(
            f"[bold green]folds[/]: {explanation.tokens:,} rows -> {explanation.compact_tokens:,} ({share:.2f}x), "
            f"{explanation.flops_before:.3g} -> {explanation.flops_after:.3g} FLOPs "
            f"({explanation.flops_before / max(explanation.flops_after, 1):.2f}x)"
        )
    for name, seconds in (("predicted", explanation.predicted), ("measured", explanation.measured)):
        if seconds:
            console.print(f"{name}: " + ", ".join(f"{way} {1e3 * took:.3g} ms" for way, took in seconds.items()))
    for reason, count in explanation.graph_breaks.items():
        console.print(f"[yellow]graph break[/]: {escape(reason)}" + (f" ({count} times)" if count > 1 else ""))
    if explanation.graph_breaks:
        console.print("[dim]  each piece is a graph of its own, and what is between them runs as it did[/]")
    for number, pair in enumerate(explanation.diff.pairs):
        _show_graph(number, pair, console)


def _show_graph(number: int, pair: GraphPair, console: Console) -> None:
    report = pair.report
    if not report.folded:
        console.print(f"[bold red]graph {number} does not fold[/]: {escape(short(report.reason))}")
        if advice := advice_on_graph(report):
            console.print(f"  [dim]{escape(advice)}[/]")
    else:
        table = Table("layers", "once per node", "once per row", "added", "gone", "attention", box=None, pad_edge=False)
        for block in pair.blocks():
            table.add_row(*map(escape, _row(block, pair)))
        console.print(f"graph {number}:")
        console.print(table)
    for refusal in report.refusals:
        console.print(f"[yellow]refused[/]: {escape(refusal.reason)}")
        console.print(f"  {escape(refusal.op)}{f' in {escape(refusal.module)}' if refusal.module else ''}")
        console.print(f"  {escape(short(refusal.source))}" if refusal.source else "  (no source line)")
        console.print(f"  [dim]{escape(advice_on(refusal.code))}[/]")
    for note in report.notes:
        console.print(f"[dim]note: {escape(note)}[/]")


def _row(block: Block, pair: GraphPair) -> tuple[str, ...]:
    counts: dict[Kind, int] = dict.fromkeys(Kind, 0)
    for line in block.lines:
        counts[line.kind] += line.node.is_computed
    modules = {line.module for line in block.lines}
    said: Any = dict.fromkeys(one.status for one in pair.report.attentions if one.module in modules)
    numbers = (counts[kind] for kind in (Kind.COMPACT, Kind.SAME, Kind.ADDED, Kind.REMOVED))
    return (block.title or "outside of layers", *map(str, numbers), "; ".join(said))

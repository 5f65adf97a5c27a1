"""Show which parts of a model fold, layer by layer, why the others do not, and how to change that."""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from radix_compile.cli.inputs import add_batch, add_model, arguments_of, load_batch, load_model
from radix_compile.explanation import Explanation, explanation_of
from radix_compile.inspection.advice import advice_on, advice_on_graph
from radix_compile.inspection.diff import GraphPair
from radix_compile.inspection.lines import Block, Kind
from radix_compile.inspection.text import OUTSIDE_LAYERS, short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_batch(parser)
    parser.add_argument("--measure", action="store_true", help="compile and time the call with and without radix")


def run(options: argparse.Namespace, console: Console) -> int:
    """Return 0 if a graph folds, else 1."""
    explanation = explain_model(options, measure=options.measure)
    if options.json:
        print(json.dumps({**explanation.to_dict(), "advice": _advice(explanation)}, indent=2))
    else:
        _print(explanation, console)
    return 0 if any(graph.folded for graph in explanation.graphs) else 1


def explain_model(options: argparse.Namespace, measure: bool = False) -> Explanation:
    """Return the explanation of the model and the batch that the command line names."""
    model = load_model(options)
    args, kwargs = arguments_of(model, load_batch(options, model))
    with torch.no_grad():
        return explanation_of(model, args, kwargs, measure=measure)


def _advice(explanation: Explanation) -> dict[str, str]:
    return {refusal.node: advice_on(refusal.code) for refusal in explanation.refusals}


def _print(explanation: Explanation, console: Console) -> None:
    if explanation.folded:
        ratio = explanation.tokens / explanation.compact_tokens
        console.print(
            f"[bold green]folds[/]: {explanation.tokens:,} rows -> {explanation.compact_tokens:,} ({ratio:.2f}x), "
            f"{explanation.flops_before:.3g} -> {explanation.flops_after:.3g} FLOPs "
            f"({explanation.flops_before / max(explanation.flops_after, 1):.2f}x)"
        )
    for label, times in (("predicted", explanation.predicted), ("measured", explanation.measured)):
        if times:
            console.print(f"{label}: " + ", ".join(f"{name} {1e3 * took:.3g} ms" for name, took in times.items()))
    for reason, count in explanation.graph_breaks.items():
        console.print(f"[yellow]graph break[/]: {escape(reason)}" + (f" ({count} times)" if count > 1 else ""))
    if explanation.graph_breaks:
        console.print("[dim]  each piece between graph breaks is a separate graph; other code runs unchanged[/]")
    for number, pair in enumerate(explanation.diff.pairs):
        _print_graph(number, pair, console)


def _print_graph(number: int, pair: GraphPair, console: Console) -> None:
    report = pair.report
    if not report.folded:
        console.print(f"[bold red]graph {number} does not fold[/]: {escape(short(report.reason))}")
        if advice := advice_on_graph(report):
            console.print(f"  [dim]{escape(advice)}[/]")
    else:
        table = Table(
            "layers", "once per node", "once per row", "added", "removed", "attention", box=None, pad_edge=False
        )
        for block in pair.blocks():
            table.add_row(*map(escape, _table_row(block, pair)))
        console.print(f"graph {number}:")
        console.print(table)
    for refusal in report.refusals:
        console.print(f"[yellow]refused[/]: {escape(refusal.reason)}")
        console.print(f"  {escape(refusal.op)}{f' in {escape(refusal.module)}' if refusal.module else ''}")
        console.print(f"  {escape(short(refusal.source))}" if refusal.source else "  (no source line)")
        console.print(f"  [dim]{escape(advice_on(refusal.code))}[/]")
    for note in report.remarks:
        console.print(f"[dim]note: {escape(note)}[/]")


def _table_row(block: Block, pair: GraphPair) -> tuple[str, ...]:
    counts: dict[Kind, int] = dict.fromkeys(Kind, 0)
    for line in block.lines:
        counts[line.kind] += line.node.is_computed
    modules = {line.module for line in block.lines}
    attentions = (attention for attention in pair.report.attentions if attention.module in modules)
    statuses = dict.fromkeys(attention.status for attention in attentions)
    columns = (str(counts[kind]) for kind in (Kind.COMPACT, Kind.SAME, Kind.ADDED, Kind.REMOVED))
    return (block.title or OUTSIDE_LAYERS, *columns, "; ".join(statuses))

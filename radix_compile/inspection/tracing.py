"""Hand graphs and reports to torch's tools: TORCH_LOGS, depyf, tlparse, TORCH_COMPILE_DEBUG."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.passes.report import GraphReport

log = logging.getLogger(__name__)


def trace_rewrite(captured: fx.GraphModule, folded: fx.GraphModule, report: GraphReport) -> None:
    """Hand a graph before and after, and its report, to torch's tools.

    With ``TORCH_LOGS="+radix_compile"`` the graphs are in the log, from which depyf takes them. ``TORCH_TRACE`` has
    them as artifacts for tlparse. ``TORCH_COMPILE_DEBUG=1`` writes them to a folder beside inductor's.
    """
    for name, gm in (("radix before", captured), ("radix after", folded)):
        log.debug("%s", internals.graph_code(name, gm))
        internals.keep_artifact(name.replace(" ", "_"), "string", lambda gm=gm: internals.readable(gm))  # type: ignore[misc]
    trace_report(report)
    folder = internals.debug_folder()
    if folder is not None:
        _write(folder / "radix", captured, folded, report)


def trace_report(report: GraphReport) -> None:
    """Hand the report of a graph, folded or not, to torch's tools."""
    internals.keep_artifact("radix_report", "json", lambda: json.dumps(asdict(report)))


def _write(folder: Path, captured: fx.GraphModule, folded: fx.GraphModule, report: GraphReport) -> None:
    from radix_compile.inspection.diff import GraphDiff, GraphPair
    from radix_compile.inspection.graph_view import view_of

    number = len(list(folder.glob("graph_*"))) if folder.is_dir() else 0
    graph_folder = folder / f"graph_{number}"
    graph_folder.mkdir(parents=True)
    (graph_folder / "before.py").write_text(internals.readable(captured))
    (graph_folder / "after.py").write_text(internals.readable(folded))
    (graph_folder / "report.json").write_text(json.dumps(asdict(report), indent=2))
    before, after = view_of(captured, "capture"), view_of(folded, "lower_index_ops")
    GraphDiff((GraphPair(report, (before, after), before, after),), f"graph {number}").html(graph_folder / "diff.html")
    log.info("wrote the graphs before and after to %s", graph_folder)

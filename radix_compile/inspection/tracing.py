"""Hand a rewrite on to torch's own tools: TORCH_LOGS, depyf, tlparse, TORCH_COMPILE_DEBUG, the profiler."""

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
    """Hand on a graph before and after, and its report.

    With ``TORCH_LOGS="+radix_compile"`` they are in the log, and depyf, which watches for that, keeps their code. What
    ``TORCH_TRACE`` collects for tlparse has them as artifacts of the compilation, and with ``TORCH_COMPILE_DEBUG=1``
    they are in a folder beside inductor's.
    """
    for name, gm in (("radix before", captured), ("radix after", folded)):
        log.debug("%s", internals.graph_code(name, gm))
        internals.keep_artifact(name.replace(" ", "_"), "string", lambda gm=gm: internals.readable(gm))  # type: ignore[misc]
    trace_report(report)
    folder = internals.debug_folder()
    if folder is not None:
        _write(folder / "radix", captured, folded, report)


def trace_report(report: GraphReport) -> None:
    """Hand on what is said of a graph, folded or not."""
    internals.keep_artifact("radix_report", "json", lambda: json.dumps(asdict(report)))


def _write(folder: Path, captured: fx.GraphModule, folded: fx.GraphModule, report: GraphReport) -> None:
    from radix_compile.inspection.diff import GraphDiff, GraphPair
    from radix_compile.inspection.graph_view import view_of

    number = len(list(folder.glob("graph_*"))) if folder.is_dir() else 0
    place = folder / f"graph_{number}"
    place.mkdir(parents=True)
    (place / "before.py").write_text(internals.readable(captured))
    (place / "after.py").write_text(internals.readable(folded))
    (place / "report.json").write_text(json.dumps(asdict(report), indent=2))
    before, after = view_of(captured, "capture"), view_of(folded, "lower_index_ops")
    GraphDiff((GraphPair(report, (before, after), before, after),), f"graph {number}").html(place / "diff.html")
    log.info("graphs before and after are in %s", place)

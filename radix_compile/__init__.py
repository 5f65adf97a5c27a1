"""Run token-wise work once per distinct prefix of a batch: ``torch.compile(model, backend="radix")``.

The public names are loaded when they are first used: importing the package pulls in neither Triton nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radix_compile.backend import RadixBackend
    from radix_compile.counters import Stats, reset_stats, stats
    from radix_compile.inspection.diff import GraphDiff
    from radix_compile.inspection.explanation import Explanation, explain, graph_diff
    from radix_compile.op_rules.custom import register_rule
    from radix_compile.options import Options
    from radix_compile.prefix_plan import PrefixPlan, compute_fold_and_scatter, compute_fold_and_scatter_torch
    from radix_compile.verify_calls import WrongFold

__version__ = "0.1.0"

_HOMES = {
    "RadixBackend": "backend",
    "Explanation": "inspection.explanation",
    "GraphDiff": "inspection.diff",
    "explain": "inspection.explanation",
    "graph_diff": "inspection.explanation",
    "register_rule": "op_rules.custom",
    "Options": "options",
    "PrefixPlan": "prefix_plan",
    "compute_fold_and_scatter": "prefix_plan",
    "compute_fold_and_scatter_torch": "prefix_plan",
    "Stats": "counters",
    "WrongFold": "verify_calls",
    "reset_stats": "counters",
    "stats": "counters",
}

__all__ = [
    "Explanation",
    "GraphDiff",
    "Options",
    "PrefixPlan",
    "RadixBackend",
    "Stats",
    "WrongFold",
    "__version__",
    "compute_fold_and_scatter",
    "compute_fold_and_scatter_torch",
    "explain",
    "graph_diff",
    "register_rule",
    "reset_stats",
    "stats",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

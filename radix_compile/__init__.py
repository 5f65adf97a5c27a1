"""Run token-wise work once per distinct prefix of a batch: ``torch.compile(model, backend="radix")``.

The public names are loaded when they are first used: importing the package pulls in neither Triton nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radix_compile.analysis.rules.custom import register_rule
    from radix_compile.backend import Listener, RadixBackend
    from radix_compile.explanation import Explanation, explain, graph_diff
    from radix_compile.inspection.diff import GraphDiff
    from radix_compile.ir.errors import CannotFold, RefusalCode
    from radix_compile.options import Options, RadixOptions
    from radix_compile.plan.batching import SharedPrefixBatchSampler, order_for_sharing, sharing
    from radix_compile.plan.prefix_plan import PrefixPlan, compute_fold_and_scatter, compute_fold_and_scatter_torch
    from radix_compile.runtime.counters import Stats, reset_stats, stats
    from radix_compile.runtime.verify_calls import WrongFold

__version__ = "0.1.0"

_HOMES = {
    "Listener": "backend",
    "RadixBackend": "backend",
    "Explanation": "explanation",
    "GraphDiff": "inspection.diff",
    "explain": "explanation",
    "graph_diff": "explanation",
    "register_rule": "analysis.rules.custom",
    "CannotFold": "ir.errors",
    "RefusalCode": "ir.errors",
    "Options": "options",
    "RadixOptions": "options",
    "PrefixPlan": "plan.prefix_plan",
    "compute_fold_and_scatter": "plan.prefix_plan",
    "compute_fold_and_scatter_torch": "plan.prefix_plan",
    "SharedPrefixBatchSampler": "plan.batching",
    "order_for_sharing": "plan.batching",
    "sharing": "plan.batching",
    "Stats": "runtime.counters",
    "WrongFold": "runtime.verify_calls",
    "reset_stats": "runtime.counters",
    "stats": "runtime.counters",
}

__all__ = [
    "CannotFold",
    "Explanation",
    "GraphDiff",
    "Listener",
    "Options",
    "PrefixPlan",
    "RadixBackend",
    "RadixOptions",
    "RefusalCode",
    "SharedPrefixBatchSampler",
    "Stats",
    "WrongFold",
    "__version__",
    "compute_fold_and_scatter",
    "compute_fold_and_scatter_torch",
    "explain",
    "graph_diff",
    "order_for_sharing",
    "register_rule",
    "reset_stats",
    "sharing",
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

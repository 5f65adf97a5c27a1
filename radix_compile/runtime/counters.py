"""Counts over the calls of a process: of everything, and by model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TENTHS = 10


@dataclass
class Stats:
    """Counts since the start of the process or :func:`reset_stats`.

    ``calls``, ``folded_calls``    calls of graphs that can fold, and those that did.
    ``tokens``, ``read_tokens``, ``compact_tokens``  rows, those that results depend on, and the distinct ones of these
                                   (nodes), summed over folded calls.
    ``head_tokens``                nodes for which ops behind the last attention run, summed likewise.
    ``pairs``, ``tree_pairs``      pairs of a query and a key of its sequence, and of a node and an ancestor or itself,
                                   summed over folded calls with attention on the tree.
    ``plain_calls``                calls by the reason that they ran plain.
    ``graphs``                     graphs handed to the backend.
    ``plain_compiles``, ``folded_compiles``  programs handed to the inner backend.
    ``plan_seconds``               time spent making plans, and timing programs.
    ``timed_calls``                calls on whose inputs programs were timed.
    ``moved_bytes``                read and written between rows and nodes in the forward passes of folded calls.
    ``flops_saved``                those of the plain program less those of the folded one, forward, over folded calls.
    ``histogram``                  folded calls by nodes per row: up to 0.1, up to 0.2, ..., up to 1.
    ``ratio_sum``                  nodes per row, summed over folded calls.
    ``models``                     the same of each compiled model, by the name of its class.
    """

    calls: int = 0
    folded_calls: int = 0
    tokens: int = 0
    read_tokens: int = 0
    compact_tokens: int = 0
    head_tokens: int = 0
    pairs: int = 0
    tree_pairs: int = 0
    plain_calls: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    plain_compiles: int = 0
    folded_compiles: int = 0
    plan_seconds: float = 0.0
    timed_calls: int = 0
    moved_bytes: int = 0
    flops_saved: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * TENTHS)
    ratio_sum: float = 0.0
    models: dict[str, Stats] = field(default_factory=dict)

    @property
    def compression(self) -> float:
        """Compact tokens / tokens over folded calls; 1.0 if there were none."""
        return self.compact_tokens / self.tokens if self.tokens else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return asdict(self)

    def to_prometheus(self) -> str:
        """In Prometheus' text format, one series for each model: to be written where its exporter reads files."""
        return "\n".join(_prometheus(self.models)) + "\n"

    def __str__(self) -> str:
        lines = [f"{self.graphs} graphs, {self.plain_compiles + self.folded_compiles} programs compiled"]
        for name, model in self.models.items():
            lines.append(f"{name}: {model.calls} calls, {model.folded_calls} folded")
            lines += [f"  ran plain: {count} x {reason}" for reason, count in model.plain_calls.items()]
            if model.folded_calls:
                shares = ", ".join(f"{count} at {low / TENTHS:.1f} to {(low + 1) / TENTHS:.1f}"
                                   for low, count in enumerate(model.histogram) if count)  # fmt: skip
                rows = f"{model.tokens:,} rows, {model.read_tokens:,} read, {model.compact_tokens:,} distinct"
                lines.append(f"  {rows} ({1 / model.compression:.2f}x)")
                lines.append(f"  nodes per row, by calls: {shares}")
                lines.append(f"  {model.flops_saved:.3g} FLOPs saved, {model.moved_bytes:,} bytes moved between forms")
            lines.append(f"  {1e3 * model.plan_seconds / max(model.calls, 1):.2f} ms of planning per call")
        return "\n".join(lines)


_SERIES = (
    ("calls", "counter", "Calls of graphs that can fold."),
    ("folded_calls", "counter", "Calls that ran a folded program."),
    ("tokens", "counter", "Rows of folded calls."),
    ("read_tokens", "counter", "Rows of folded calls that results depend on."),
    ("compact_tokens", "counter", "Nodes of folded calls."),
    ("plan_seconds", "counter", "Seconds spent planning calls and timing programs."),
    ("moved_bytes", "counter", "Bytes read and written between rows and nodes in folded calls, forward."),
    ("flops_saved", "counter", "Floating-point operations saved by folded calls, forward."),
)


def _prometheus(models: Mapping[str, Stats]) -> Iterator[str]:
    def series(name: str, kind: str, about: str) -> Iterator[str]:
        yield f"# HELP radix_{name} {about}"
        yield f"# TYPE radix_{name} {kind}"

    for name, kind, about in _SERIES:
        yield from series(f"{name}_total", kind, about)
        for label, model in models.items():
            yield f'radix_{name}_total{{model="{_escaped(label)}"}} {getattr(model, name)}'
    yield from series("plain_calls_total", "counter", "Calls that ran the plain program, by reason.")
    for label, model in models.items():
        for reason, count in model.plain_calls.items():
            yield f'radix_plain_calls_total{{model="{_escaped(label)}",reason="{_escaped(reason)}"}} {count}'
    yield from series("compression", "histogram", "Nodes per row of folded calls.")
    for label, model in models.items():
        total = 0
        for tenth, count in enumerate(model.histogram, start=1):
            total += count
            yield f'radix_compression_bucket{{model="{_escaped(label)}",le="{tenth / TENTHS}"}} {total}'
        yield f'radix_compression_bucket{{model="{_escaped(label)}",le="+Inf"}} {total}'
        yield f'radix_compression_sum{{model="{_escaped(label)}"}} {model.ratio_sum}'
        yield f'radix_compression_count{{model="{_escaped(label)}"}} {total}'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Counters:
    """The process-wide statistics: the backend's programs may be called from several threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stats = Stats()

    def _each(self, model: str | None) -> Iterator[Stats]:
        yield self.stats
        if model is not None:
            yield self.stats.models.setdefault(model, Stats())

    def add(self, model: str | None = None, **counts: float) -> None:
        with self.lock:
            for stats in self._each(model):
                for name, count in counts.items():
                    setattr(stats, name, getattr(stats, name) + count)

    def ran_plain(self, model: str, reason: str) -> None:
        with self.lock:
            for stats in self._each(model):
                stats.calls += 1
                stats.plain_calls[reason] = stats.plain_calls.get(reason, 0) + 1

    def folded(self, model: str, tokens: int, compact_tokens: int, **counts: float) -> None:
        """One folded call."""
        self.add(model, calls=1, folded_calls=1, tokens=tokens, compact_tokens=compact_tokens, **counts)
        tenth = min(-(-TENTHS * compact_tokens // tokens), TENTHS) - 1
        with self.lock:
            for stats in self._each(model):
                stats.histogram[tenth] += 1
                stats.ratio_sum += compact_tokens / tokens


COUNTERS = _Counters()


def stats() -> Stats:
    """A copy of the counts since :func:`reset_stats`. ``print`` it, read it, or export it (``to_prometheus``)."""
    with COUNTERS.lock:
        return _copied(COUNTERS.stats)


def _copied(counts: Stats) -> Stats:
    values = {**vars(counts), "plain_calls": dict(counts.plain_calls), "histogram": list(counts.histogram)}
    return Stats(**{**values, "models": {name: _copied(model) for name, model in counts.models.items()}})


def reset_stats() -> None:
    """Set every count to zero."""
    with COUNTERS.lock:
        COUNTERS.stats = Stats()


def restore_stats(saved: Stats) -> None:
    """Put back counts that :func:`stats` returned."""
    with COUNTERS.lock:
        COUNTERS.stats = saved

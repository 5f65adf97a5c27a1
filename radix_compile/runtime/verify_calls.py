"""Compare folded calls to plain ones as they come, gradients too, and if one is wrong find the op that made it so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from radix_compile import torch_internals as internals
from radix_compile.analysis.arguments import argument
from radix_compile.ir.axes import BATCH, SEQ, Token
from radix_compile.ir.graph import Form, facts, graph_facts, tokens_of
from radix_compile.ir.value import Value, locate, values_of
from radix_compile.passes.fold_graph import split_tokens
from radix_compile.torch_internals import val

REPORT = "Please report it. With options={'fold': 'never'} everything runs plain."


class WrongFold(RuntimeError):  # noqa: N818 - what is wrong is the fold
    """A folded call did not return what the plain program does. The message names the op that went wrong first."""


@dataclass
class CallVerifier:
    """Compares the first, second, fourth, eighth, ... folded call of a graph to the plain program.

    Results and gradients agree if at most half of the digits of the least precise number type in the graph differ:
    rounding does not take so many, and a row that stands for a wrong one differs in the first. Only results in floating
    point are compared, and of them only entries that the plain program gives a finite value; with ``padding="skip"``,
    not the rows that were left out. Gradients are those of a sum of all results, each entry with a factor of its own:
    both programs run once more for them. Where the graph draws random numbers nothing of that can be compared.

    What a caller sees who writes to a result is compared by memory: which results share it with each other and with the
    inputs, and their strides.
    """

    captured: fx.GraphModule
    folded: fx.GraphModule
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        nodes = self.captured.graph.nodes
        floats = {t.dtype for t in (val(n) for n in nodes) if _is_float(t)}
        self.rounding = math.sqrt(max(torch.finfo(dtype).eps for dtype in floats))
        self.draws = any(_draws(node) for node in nodes)
        placeholders = self.captured.graph.find_nodes(op="placeholder")
        self.ids = placeholders.index(tokens_of(self.captured).keys[0])

    def __call__(
        self,
        results: Any,
        args: Sequence[Any],
        plan: Sequence[Tensor],
        wrapped: Sequence[Any],
        folded: Callable[..., Any],
        plain: Callable[..., Any],
    ) -> None:
        """Raise :class:`WrongFold` if ``results`` for ``args`` are not those that the plain program gives.

        They came from ``folded(*args, *plan)``; ``plain(*wrapped)`` takes the same inputs as they were before tensors
        that wrap others were taken apart.
        """
        self.calls += 1
        if self.calls & (self.calls - 1):
            return
        with torch.no_grad():
            expected = plain(*wrapped)
        self._expect_same_memory(results, expected, args, wrapped)
        if self.draws:
            return
        with torch.no_grad():
            node = plan[1].view(args[self.ids].shape[:2])
            error = self._largest_error(results, expected, node)
            if error > self.rounding:
                raise WrongFold(
                    f"radix: the folded program is wrong: its results differ from the plain program's by {error:.2g} of"
                    f" the largest entry, and rounding accounts for {self.rounding:.2g}.\n"
                    f"{self._culprit(args, plan, node)}\n"
                    f"{REPORT}"
                )

        del expected
        known = graph_facts(self.captured)
        if known.is_differentiable and not known.has_wrapped_inputs:
            self._expect_same_gradients(args, node, lambda *given: folded(*given, *plan), plain)

    def _expect_same_memory(
        self, results: Sequence[Any], expected: Sequence[Any], args: Sequence[Any], wrapped: Sequence[Any]
    ) -> None:
        names = [*(f"result {i}" for i in range(len(results))), *map(internals.source_name, self._inputs())]
        inputs = (args, wrapped) if len(args) == len(wrapped) else ((), ())
        for i, (one, other) in enumerate(zip(results, expected, strict=True)):
            if not isinstance(one, Tensor) or not one.numel():
                continue
            steps = zip(one.shape, one.stride(), other.stride(), strict=True)
            if any(size != 1 and a != b for size, a, b in steps):
                found = f"result {i} has the strides {one.stride()}, in plain {other.stride()}"
                raise WrongFold(f"radix: the folded program is wrong: {found}. {REPORT}")
            for name, a, b in zip(names, (*results, *inputs[0]), (*expected, *inputs[1]), strict=False):
                if _share(one, a) != _share(other, b):
                    found = f"{name} and result {i} {'' if _share(one, a) else 'do not '}share memory"
                    raise WrongFold(f"radix: the folded program is wrong: {found}, unlike in plain. {REPORT}")

    def _expect_same_gradients(
        self, args: Sequence[Any], node: Tensor, folded: Callable[..., Any], plain: Callable[..., Any]
    ) -> None:
        leaves = [
            one.detach().requires_grad_() if isinstance(one, Tensor) and one.requires_grad else one for one in args
        ]
        ours, expected = (self._gradients(run, leaves, node) for run in (folded, plain))
        names = map(internals.source_name, self._inputs())
        for name, one, other in zip(names, ours, expected, strict=True):
            if one is None and other is None:
                continue
            found = "has none" if one is None else "has one, and in plain there is none" if other is None else ""
            if not found:
                assert one is not None
                assert other is not None
                error = _difference(one, other)
                found = f"differs by {error:.2g} of its largest entry" if error > self.rounding else ""
            if found:
                raise WrongFold(f"radix: the folded program is wrong: the gradient of {name} {found}. {REPORT}")

    def _gradients(self, run: Callable[..., Any], leaves: Sequence[Any], node: Tensor) -> list[Tensor | None]:
        """For each input; None for those that have no gradient. Rows that were left out are not asked for."""
        (output,) = self.captured.graph.find_nodes(op="output")
        wanted = [one for one in leaves if isinstance(one, Tensor) and one.requires_grad]
        terms = []
        results = run(*leaves)
        with torch.enable_grad():
            for of, one in zip(output.args[0], results, strict=True):
                if _is_float(one) and one.requires_grad:
                    weighted, value = one * _factors(one), values_of(of)[0]
                    kept = _by_row(weighted, value, *node.shape)[node >= 0] if value.is_row else weighted
                    terms.append(kept.sum(dtype=torch.float64))
            found = (
                torch.autograd.grad(torch.stack(terms).sum(), wanted, allow_unused=True)
                if terms
                else [None] * len(wanted)
            )
        by_leaf: Iterator[Tensor | None] = iter(found)
        return [next(by_leaf) if isinstance(one, Tensor) and one.requires_grad else None for one in leaves]

    def _inputs(self) -> Sequence[fx.Node]:
        return list(self.captured.graph.find_nodes(op="placeholder"))

    def _largest_error(self, results: Any, expected: Any, node: Tensor) -> float:
        (output,) = self.captured.graph.find_nodes(op="output")
        both = zip(output.args[0], results, expected, strict=True)
        return max((_error(values_of(of)[0], one, other, node) for of, one, other in both if _is_float(one)), default=0)

    def _culprit(self, args: Sequence[Any], plan: Sequence[Tensor], node: Tensor) -> str:
        """The first op, one at a time, whose result is not that of the captured op."""
        captured = fx.Interpreter(self.captured, garbage_collect_values=False)
        expected = captured.run(*args)
        try:
            results = _Compared(self, captured.env, node).run(*args, *plan)
        except _Found as found:
            return f"The first wrong result, in {found.form.value} form: {locate(found.origin, 'is not what it was')}"
        if self._largest_error(results, expected, node) > self.rounding:
            return "It is in what replaces the loss: every op before that is right."
        return "Op by op the folded graph is right: what the inner backend compiled from it is not."


class _Found(Exception):  # noqa: N818 - the end of a search
    def __init__(self, origin: fx.Node, form: Form) -> None:
        self.origin, self.form = origin, form


class _Compared(fx.Interpreter):
    """Runs the folded graph, and stops at the first node that has not the value of its origin."""

    def __init__(self, verifier: CallVerifier, expected: dict[fx.Node, Any], node: Tensor) -> None:
        super().__init__(verifier.folded)
        self.rounding = verifier.rounding
        self.expected = expected
        self.node = node

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        origin, form = facts(n).origin, facts(n).form
        if origin is None or form is None or not _is_float(result):
            return result
        value, expected = values_of(origin)[0], self.expected[origin]
        if value.is_row:
            compact = form is Form.COMPACT
            error = _error(value, result, expected, self.node, compact)
        elif form is Form.COMPACT or (self.node < 0).any():  # in an order of its own, or it may be about padding
            return result
        else:
            error = _error(value, result, expected, self.node)
        if error > self.rounding:
            raise _Found(origin, form)
        return result


def _draws(node: fx.Node) -> bool:
    """Does it take random numbers, and not just might have?"""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [parameter.name for parameter in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dropout_p" in names:  # attention
        return bool(argument(node, "dropout_p"))
    if "train" in names:  # dropout
        return argument(node, "train") is not False and argument(node, "p") != 0
    return True


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _error(value: Value, one: Tensor, other: Tensor, node: Tensor, compact: bool = False) -> float:
    """The largest difference as a share of the largest entry; of rows, those that have a node ``[B, S]``."""
    if value.is_row:
        kept = node >= 0
        one = _by_row(one, value, 1, -1)[0, node[kept]] if compact else _by_row(one, value, *node.shape)[kept]
        other = _by_row(other, value, *node.shape)[kept]
    return _difference(one, other) if one.shape == other.shape else math.inf


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest as a share of the largest entry, where the other is finite."""
    matters = other.isfinite()
    if not matters.any():
        return 0.0
    one, other = one[matters].double(), other[matters].double()
    error = ((one - other).abs().max() / other.abs().max().clamp(min=torch.finfo(torch.float64).tiny)).item()
    return math.inf if math.isnan(error) else error


def _share(one: Any, other: Any) -> bool:
    """Memory, with numbers in it."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or not one.numel() or not other.numel():
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _factors(like: Tensor) -> Tensor:
    """Another number for each entry, the same ones every time."""
    return torch.arange(like.numel(), device=like.device).view(like.shape).mul(0.7).cos().to(like.dtype)


def _by_row(tensor: Tensor, value: Value, batch: int, seq: int) -> Tensor:
    """``[B, S, ...]``, or ``[1, T', ...]``."""
    axes = split_tokens(value.axes)
    sizes = []
    for axis in axes:
        sizes.append(1)
        for atom in axis:
            sizes[-1] *= (batch if atom is BATCH else seq) if isinstance(atom, Token) else int(atom.size)
    return tensor.reshape(sizes).movedim((axes.index((BATCH,)), axes.index((SEQ,))), (0, 1))

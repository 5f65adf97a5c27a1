"""Fake tensors: Dynamo's fake mode, fake inputs and results, and tensor subclasses around plain tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from radix_compile.torch_internals.inductor_patches import LIKELY_NODES


def fake_mode() -> FakeTensorMode:
    """Return the fake mode Dynamo is compiling in. (The placeholders' metadata belongs to an earlier fake mode.)"""
    mode = TracingContext.get().fake_mode
    assert mode is not None, "a backend runs with Dynamo's fake mode"
    return mode


def fake_inputs(example_inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs with each tensor replaced by the fake tensor that Dynamo's guards are about."""
    context, mode = TracingContext.get(), fake_mode()

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        symbols = context.tensor_to_context.get(value)
        source = getattr(symbols, "tensor_source", None)
        return mode.from_tensor(value, symbolic_context=symbols, source=source, trace=False)

    return [fake(value) for value in example_inputs]


def flatten_subclasses(inputs: Iterable[Any]) -> list[Any]:
    """Return the inputs with each wrapper subclass (a quantised weight) replaced by the tensors inside."""
    flat: list[Any] = []
    for value in inputs:
        flat += flatten_subclasses(_inner(value).values()) if is_traceable_wrapper_subclass(value) else [value]
    return flat


def unflatten_subclasses(like: Sequence[Any], flat: Iterator[Any]) -> list[Any]:
    """Wrap the flat values as the tensors of ``like`` are wrapped: the inverse of :func:`flatten_subclasses`."""
    result: list[Any] = []
    for value in like:
        if not is_traceable_wrapper_subclass(value):
            result.append(next(flat))
            continue
        inner, (_, context) = _inner(value), value.__tensor_flatten__()
        parts = dict(zip(inner, unflatten_subclasses(list(inner.values()), flat), strict=True))
        result.append(type(value).__tensor_unflatten__(parts, context, value.shape, value.stride()))
    return result


def _inner(value: Any) -> dict[str, Any]:
    """Return the tensors inside a wrapper subclass by attribute name."""
    names, _ = value.__tensor_flatten__()
    return {name: getattr(value, name) for name in names}


def has_values(tensor: torch.Tensor) -> bool:
    """Is it a tensor with data, neither fake nor on the meta device?"""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


def unbacked_plan_inputs(
    specs: Sequence[tuple[tuple[str | int, ...], torch.dtype]],
    rows: int | torch.SymInt,
    max_nodes: int,
    device: torch.device,
) -> list[torch.Tensor]:
    """Return fake arrays of these shapes and dtypes (see ``ir.plan_arrays``).

    ``nodes`` (T') is an unbacked size: no guard can be made about it. All known of it is T' <= ``max_nodes``, which
    lets inductor use 32-bit offsets where the bound allows. Its likely value (a hint that guards nothing and changes
    no result) is there because inductor does not fuse ops that share only tensors of unbacked sizes without a hint.
    The same holds for ``head``. ``rows`` is given and ``nodes + 1`` follows from ``nodes``; any other name gets a
    symbol of its own, because inductor wants each symbol to be the size of some input.
    """
    mode = fake_mode()
    shape_env = mode.shape_env
    assert shape_env is not None, "Dynamo's fake mode has symbolic shapes"
    with mode:
        sizes: dict[str, int | torch.SymInt] = {"rows": rows}
        taken = {size for shape, _ in specs for size in shape}
        for name in ("nodes", "head"):
            if name not in taken:
                continue
            nodes = shape_env.create_unbacked_symint()
            torch._check(nodes >= 2)  # torch asks whether a size is 1, and so broadcasts
            torch._check(nodes <= max_nodes)
            shape_env.var_to_hint_override[nodes.node.expr] = min(LIKELY_NODES, max_nodes)
            sizes |= {name: nodes, f"{name} + 1": nodes + 1}

        def as_size(size: str | int) -> int | torch.SymInt:
            if isinstance(size, int):
                return size
            if size not in sizes:
                sizes[size] = shape_env.create_unbacked_symint()
                torch._check(sizes[size] >= 0)
            return sizes[size]

        arrays = [torch.empty([*map(as_size, shape)], dtype=dtype, device=device) for shape, dtype in specs]
    shape_env.pending_fresh_unbacked_symbols.clear()
    return arrays


class _FakeRun(fx.Interpreter):
    """Run a graph with fake tensors, and keep the symbols of the capture for numbers and sizes that depend on data."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.captured if self.captured is not None else super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        captured = n.meta.get("val")
        is_symbolic = n.meta.get("unbacked_bindings") or isinstance(captured, torch.types.py_sym_types)
        self.captured = captured if is_symbolic else None
        return super().run_node(n)


def fake_results(gm: fx.GraphModule, plan_shapes: Mapping[str, Sequence[Any]]) -> dict[fx.Node, Any]:
    """Return the fake result of each node, without adding guards.

    The last placeholders are the plan's arrays, of the shapes ``plan_shapes``. All others have their captured ``val``.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = [node.meta["val"] for node in placeholders[: len(placeholders) - len(plan_shapes)]]
    example = next(value for value in examples if isinstance(value, FakeTensor))
    mode = example.fake_mode
    no_guards = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with no_guards, mode, enable_python_dispatcher():  # ops without a C++ kernel for symbols need the dispatcher
        plan = [torch.empty(shape, dtype=torch.int64, device=example.device) for shape in plan_shapes.values()]
        interpreter = _FakeRun(gm, garbage_collect_values=False)
        interpreter.run(*examples, *plan)
    return dict(interpreter.env)


def evaluate(node: fx.Node) -> None:
    """Set ``node.meta["val"]`` to the result of the op on fake tensors, in Dynamo's fake mode."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: arg.meta["val"])
    with fake_mode(), enable_python_dispatcher():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

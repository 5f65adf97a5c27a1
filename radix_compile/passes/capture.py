"""From the graph that Dynamo captured to a functional graph of whole ATen ops, with autograd still to come.

``aot_export_module(pre_dispatch=True)`` functionalises (``make_fx`` does not) and keeps ``linear``, attention and norms
whole. It runs in the tracing context and fake mode that Dynamo is compiling in, so that guards and symbols stay valid.
What it cannot carry over is refused here, before anything has been changed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from radix_compile import torch_internals as internals
from radix_compile.ir.errors import RefusalCode
from radix_compile.ir.grad_modes import grad_modes
from radix_compile.ir.graph import GraphFacts, NodeFacts, set_facts, set_graph_facts
from radix_compile.ir.triangles import read_triangle
from radix_compile.torch_internals import val

aten = torch.ops.aten


class CaptureError(Exception):
    """The graph cannot be captured as functional ATen; the plain program is unaffected.

    The message is the reason, and ``code`` its kind.
    """

    def __init__(self, reason: str, code: RefusalCode) -> None:
        super().__init__(reason)
        self.code = code


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Lower a Dynamo graph to functional pre-dispatch ATen.

    ``example_inputs`` are what Dynamo passed to the backend: tensors and symbolic sizes, one for each placeholder.
    The result takes the same inputs in the same order, with the tensors inside in place of those that wrap others. Its
    nodes carry ``val``, ``stack_trace`` and ``nn_module_stack``, and the facts of the graph and of its inputs are
    stated. Raises :class:`CaptureError`; ``gm`` is left as it was.
    """
    _refuse_what_would_go_wrong(gm)
    _refuse_unknown_sizes(gm, example_inputs)
    trains = _records_gradients(gm) and any(map(_has_gradient, example_inputs))
    if trains and any(
        _has_gradient(one) and internals.flatten_subclasses([one])[0] is not one for one in example_inputs
    ):
        raise CaptureError(
            "a weight with a gradient is made of several tensors: it folds under torch.no_grad()",
            RefusalCode.UNSUPPORTED_GRADIENT,
        )
    checkpointed = _tag_checkpointed_regions(gm)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # a failure may leave a region of the program open
            captured, mutated = internals.export_functional(_Replay(gm), example_inputs)
    except internals.CAPTURE_ERRORS as error:
        if internals.must_propagate(error):
            raise
        raise CaptureError(f"lowering to ATen failed: {first_line(error)}", RefusalCode.LOWERING_FAILED) from error
    if mutated:
        raise CaptureError(_writes(gm, captured, mutated), RefusalCode.IN_PLACE)
    parts = [internals.flatten_subclasses([example]) for example in example_inputs]
    known = GraphFacts(
        model=_model_of(captured.graph),
        is_differentiable=trains,
        records_gradients=torch.is_grad_enabled(),
        has_checkpoints=checkpointed,
        has_wrapped_inputs=any(part[0] is not one for part, one in zip(parts, example_inputs, strict=True)),
    )
    set_graph_facts(captured, known)
    _state_facts_of_inputs(captured, example_inputs, parts, trains)
    internals.keep_dynamo_annotations(gm, captured, inputs=not known.has_wrapped_inputs)
    _tidy(captured)
    return captured


def _model_of(graph: fx.Graph) -> str:
    """The class of the module that was compiled, or else of the outermost one that the function calls."""
    stacks = (internals.module_stack(node).values() for node in graph.nodes)
    owners = (owner for stack in stacks for path, owner in stack if path)
    owner = internals.compiled_module() or next(owners, "function")
    return str(owner if isinstance(owner, str) else owner.__qualname__).rpartition(".")[2]


def _writes(gm: fx.GraphModule, captured: fx.GraphModule, mutated: Sequence[str]) -> str:
    before, after = gm.graph.find_nodes(op="placeholder"), captured.graph.find_nodes(op="placeholder")
    names = [internals.source_name(old) for old, new in zip(before, after, strict=True) if new.name in mutated]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    cache = any("past_key_values" in name or "cache" in name.lower() for name in names)
    advice = ": a static cache; with use_cache=False or a DynamicCache it can fold" if cache else ""
    return f"the program writes to its inputs ({names[0]}{more}){advice}"


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"


# ----------------------------------------------------------------------------------- what must not be lowered


def _refuse_what_would_go_wrong(gm: fx.GraphModule) -> None:
    inside = _records_gradients(gm)  # of a graph inside of this one it is not known where it is called
    for module in _graphs_of(gm):
        modes = grad_modes(module.graph, torch.is_grad_enabled() if module is gm else inside)
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            if internals.is_custom_autograd_function(node.target) and modes[node]:
                raise CaptureError(
                    "a custom autograd.Function would lose its gradient: where none is recorded it can fold",
                    RefusalCode.UNSUPPORTED_GRADIENT,
                )
            if internals.is_functorch_transform(node.target):
                # Lowering fails half way through these and leaves functorch's interpreter stack unbalanced.
                raise CaptureError(
                    "the program uses torch.func transforms (vmap), as flex_attention's block masks do",
                    RefusalCode.TORCH_FUNC,
                )


def _graphs_of(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (module for module in gm.modules() if isinstance(module, fx.GraphModule))


def _records_gradients(gm: fx.GraphModule) -> bool:
    """Are gradients recorded anywhere in it? A program that is called without may switch them on."""
    return any(any(grad_modes(one.graph, torch.is_grad_enabled()).values()) for one in _graphs_of(gm))


def _refuse_unknown_sizes(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    fakes = internals.fake_inputs(example_inputs)
    for node, fake in zip(gm.graph.find_nodes(op="placeholder"), fakes, strict=True):
        dim = internals.unknown_dim(fake)
        if dim is not None:
            which = f"dimension {dim} of {internals.source_name(node)}"
            raise CaptureError(
                f"{which} is an unbacked symbol (mark_unbacked), of which nothing is known when compiling",
                RefusalCode.SYMBOLIC_SIZE,
            )


# -------------------------------------------------------------------------------------- regions with a meaning


def _tag_checkpointed_regions(gm: fx.GraphModule) -> bool:
    """Mark what activation checkpointing asked to recompute; the marks survive inlining, the regions do not."""
    regions = [node for node in gm.graph.nodes if internals.is_checkpoint_region(node.target)]
    for number, region in enumerate(regions):
        body = getattr(gm, region.args[0].target)
        for node in body.graph.nodes:
            internals.tag_for_recompute(node, number)
    return bool(regions)


class _Replay(fx.Interpreter):
    """Runs the Dynamo graph with the regions it only names made real: autocast entered, checkpointing inlined.

    Of ``torch.inference_mode()`` what is kept is that no gradients are recorded in it, as by ``torch.no_grad()``.
    Entered, an autocast region is recorded and gives its ops their dtypes. The casts are not recorded, neither its own
    nor those of a region around the call: whoever compiles the captured graph applies them, once.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.open_regions = contextlib.ExitStack()
        self.autocasts: list[contextlib.ExitStack] = []

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        try:
            return super().run(*args)
        finally:
            while self.autocasts:
                self.autocasts.pop().close()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if internals.enters_autocast(target):
            region = contextlib.ExitStack()
            region.enter_context(torch.amp.autocast(*args, **kwargs))
            self.autocasts.append(region)
            return region
        if internals.exits_autocast(target):
            self.autocasts.pop().close()
            return None
        if internals.enters_inference_mode(target):
            before = torch.is_grad_enabled()
            internals.SET_GRAD_ENABLED(not args[0])
            return before
        if internals.exits_inference_mode(target):
            internals.SET_GRAD_ENABLED(args[0])
            return None
        if internals.is_checkpoint_region(target):
            body, *inputs = args
            return _Replay(body).run(*inputs)
        return super().call_function(target, args, kwargs)


# --------------------------------------------------------------------------------------------------- afterwards


def _state_facts_of_inputs(
    captured: fx.GraphModule, example_inputs: Sequence[Any], parts: Sequence[Sequence[Any]], trains: bool
) -> None:
    """``parts`` are the tensors of each example input: several, if it wraps others."""
    inputs = iter(captured.graph.find_nodes(op="placeholder"))
    for example, tensors in zip(example_inputs, parts, strict=True):
        is_static = internals.is_parameter_or_buffer(example)
        is_buffer = is_static and not isinstance(example, torch.nn.Parameter)
        for node, tensor in zip(itertools.islice(inputs, len(tensors)), tensors, strict=True):
            known = NodeFacts(
                is_static=is_static,
                needs_gradient=trains and _has_gradient(example),
                triangle=read_triangle(tensor) if is_buffer else None,
            )
            set_facts(node, known)


def _has_gradient(example: Any) -> bool:
    return isinstance(example, torch.Tensor) and example.requires_grad


def _tidy(gm: fx.GraphModule) -> None:
    """Drop assertions about metadata, which is known here, and give ``copy`` a form that has a derivative."""
    graph = gm.graph
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.copy.default:
            _replace_copy(graph, node)
    graph.eliminate_dead_code(_is_needed)
    gm.recompile()


def _is_needed(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or (node.is_impure() and not isinstance(val(node), torch.Tensor))


def _replace_copy(graph: fx.Graph, node: fx.Node) -> None:
    """``copy(into, from)`` is ``from`` in the dtype and shape of ``into``."""
    like, source = node.args[0], node.args[1]
    assert isinstance(like, fx.Node)
    assert isinstance(source, fx.Node)
    into, came = val(like), val(source)
    with graph.inserting_before(node):
        if came.dtype != into.dtype:
            source = graph.call_function(aten._to_copy.default, (source,), {"dtype": into.dtype})
        elif came.shape == into.shape:
            source = graph.call_function(aten.clone.default, (source,))
        if came.shape != into.shape:
            source = graph.call_function(aten.expand_as.default, (source, like))
    source.meta = dict(node.meta)
    node.replace_all_uses_with(source)
    graph.erase_node(node)

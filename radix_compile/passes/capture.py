"""Lower a Dynamo graph to functional pre-dispatch ATen, before autograd.

``aot_export_module(pre_dispatch=True)`` functionalises (``make_fx`` does not) and does not decompose ``linear``,
attention and norms. It runs in Dynamo's own tracing context and fake mode, so that guards and symbols stay valid.
Programs that it would lower wrongly are refused before anything is changed.
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
    """The graph cannot be lowered to functional ATen. The plain program is not affected.

    The message is the reason, and ``code`` its kind.
    """

    def __init__(self, reason: str, code: RefusalCode) -> None:
        super().__init__(reason)
        self.code = code


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Return a Dynamo graph lowered to functional pre-dispatch ATen, with the facts of the graph and its inputs.

    ``example_inputs`` are the arguments of the backend: tensors and symbolic sizes, one for each placeholder. The
    result takes the same inputs in the same order, with tensor subclasses replaced by their inner tensors. Its nodes
    have ``val``, ``stack_trace`` and ``nn_module_stack``. ``gm`` is not changed. Raises :class:`CaptureError`.
    """
    _refuse_unsupported_ops(gm)
    _refuse_unbacked_sizes(gm, example_inputs)
    trains = _records_gradients(gm) and any(map(_has_gradient, example_inputs))
    if trains and any(
        _has_gradient(example) and internals.flatten_subclasses([example])[0] is not example
        for example in example_inputs
    ):
        raise CaptureError(
            "a weight with a gradient is a tensor subclass: it can fold under torch.no_grad()",
            RefusalCode.UNSUPPORTED_GRADIENT,
        )
    has_checkpoints = _tag_checkpointed_regions(gm)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # restores the mode if lowering fails inside a region
            captured, mutated = internals.export_functional(_Replay(gm), example_inputs)
    except internals.CAPTURE_ERRORS as error:
        if internals.must_propagate(error):
            raise
        raise CaptureError(f"lowering to ATen failed: {first_line(error)}", RefusalCode.LOWERING_FAILED) from error
    if mutated:
        raise CaptureError(_describe_mutations(gm, captured, mutated), RefusalCode.IN_PLACE)
    inner_tensors = [internals.flatten_subclasses([example]) for example in example_inputs]
    graph_facts = GraphFacts(
        model=_model_class(captured.graph),
        is_differentiable=trains,
        records_gradients=torch.is_grad_enabled(),
        has_checkpoints=has_checkpoints,
        has_wrapped_inputs=any(
            tensors[0] is not example for tensors, example in zip(inner_tensors, example_inputs, strict=True)
        ),
    )
    set_graph_facts(captured, graph_facts)
    _state_facts_of_inputs(captured, example_inputs, inner_tensors, trains)
    internals.keep_dynamo_annotations(gm, captured, inputs=not graph_facts.has_wrapped_inputs)
    _tidy(captured)
    return captured


def _model_class(graph: fx.Graph) -> str:
    """Return the class name of the compiled module, or of the outermost module that a compiled function calls."""
    stacks = (internals.module_stack(node).values() for node in graph.nodes)
    owners = (owner for stack in stacks for path, owner in stack if path)
    owner = internals.compiled_module() or next(owners, "function")
    return str(owner if isinstance(owner, str) else owner.__qualname__).rpartition(".")[2]


def _describe_mutations(gm: fx.GraphModule, captured: fx.GraphModule, mutated: Sequence[str]) -> str:
    before, after = gm.graph.find_nodes(op="placeholder"), captured.graph.find_nodes(op="placeholder")
    names = [internals.source_name(old) for old, new in zip(before, after, strict=True) if new.name in mutated]
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    is_cache = any("past_key_values" in name or "cache" in name.lower() for name in names)
    advice = ": a static cache; with use_cache=False or a DynamicCache it can fold" if is_cache else ""
    return f"the program writes to its inputs ({names[0]}{others}){advice}"


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"


# ----------------------------------------------------------------------------------- refusals before lowering


def _refuse_unsupported_ops(gm: fx.GraphModule) -> None:
    may_record = _records_gradients(gm)  # the gradient mode in which a nested graph is called is not known
    for module in _graphs_in(gm):
        modes = grad_modes(module.graph, torch.is_grad_enabled() if module is gm else may_record)
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            if internals.is_custom_autograd_function(node.target) and modes[node]:
                raise CaptureError(
                    "a custom autograd.Function would lose its gradient: it can fold under torch.no_grad()",
                    RefusalCode.UNSUPPORTED_GRADIENT,
                )
            if internals.is_functorch_transform(node.target):
                # Lowering these fails half way and leaves functorch's interpreter stack unbalanced.
                raise CaptureError(
                    "the program uses torch.func transforms (vmap), as the creation of a block mask does",
                    RefusalCode.TORCH_FUNC,
                )


def _graphs_in(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (module for module in gm.modules() if isinstance(module, fx.GraphModule))


def _records_gradients(gm: fx.GraphModule) -> bool:
    """Whether gradients are recorded anywhere in the program, which may switch the gradient mode itself."""
    return any(any(grad_modes(module.graph, torch.is_grad_enabled()).values()) for module in _graphs_in(gm))


def _refuse_unbacked_sizes(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    fakes = internals.fake_inputs(example_inputs)
    for node, fake in zip(gm.graph.find_nodes(op="placeholder"), fakes, strict=True):
        dim = internals.unknown_dim(fake)
        if dim is not None:
            raise CaptureError(
                f"dimension {dim} of {internals.source_name(node)} is an unbacked symbol (mark_unbacked)",
                RefusalCode.SYMBOLIC_SIZE,
            )


# --------------------------------------------------------------------------- autocast, gradient modes, checkpoints


def _tag_checkpointed_regions(gm: fx.GraphModule) -> bool:
    """Tag the nodes in activation checkpointing regions, which are inlined. Return whether there are any."""
    regions = [node for node in gm.graph.nodes if internals.is_checkpoint_region(node.target)]
    for number, region in enumerate(regions):
        body = getattr(gm, region.args[0].target)
        for node in body.graph.nodes:
            internals.tag_for_recompute(node, number)
    return bool(regions)


class _Replay(fx.Interpreter):
    """Runs the Dynamo graph: enters its autocast regions and inlines its checkpointing regions.

    ``torch.inference_mode()`` is replaced by ``torch.no_grad()``. An autocast region is recorded and sets the dtypes of
    its ops. Its casts, and those of an autocast around the call, are not recorded: the backend that compiles the
    captured graph adds them.
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
            was_enabled = torch.is_grad_enabled()
            internals.SET_GRAD_ENABLED(not args[0])
            return was_enabled
        if internals.exits_inference_mode(target):
            internals.SET_GRAD_ENABLED(args[0])
            return None
        if internals.is_checkpoint_region(target):
            body, *inputs = args
            return _Replay(body).run(*inputs)
        return super().call_function(target, args, kwargs)


# ----------------------------------------------------------------------------------------------- after lowering


def _state_facts_of_inputs(
    captured: fx.GraphModule, example_inputs: Sequence[Any], inner_tensors: Sequence[Sequence[Any]], trains: bool
) -> None:
    """Set the facts of the placeholders. ``inner_tensors`` has the tensors of each example input (see ``capture``)."""
    inputs = iter(captured.graph.find_nodes(op="placeholder"))
    for example, tensors in zip(example_inputs, inner_tensors, strict=True):
        is_static = internals.is_parameter_or_buffer(example)
        is_buffer = is_static and not isinstance(example, torch.nn.Parameter)
        for node, tensor in zip(itertools.islice(inputs, len(tensors)), tensors, strict=True):
            node_facts = NodeFacts(
                is_static=is_static,
                needs_gradient=trains and _has_gradient(example),
                triangle=read_triangle(tensor) if is_buffer else None,
            )
            set_facts(node, node_facts)


def _has_gradient(example: Any) -> bool:
    return isinstance(example, torch.Tensor) and example.requires_grad


def _tidy(gm: fx.GraphModule) -> None:
    """Remove metadata assertions, dead code, and ``copy``, which has no derivative."""
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
    """Replace ``copy(destination, source)`` by ``source`` in the dtype and shape of ``destination``."""
    destination, source = node.args[0], node.args[1]
    assert isinstance(destination, fx.Node)
    assert isinstance(source, fx.Node)
    new, old = val(destination), val(source)
    with graph.inserting_before(node):
        if old.dtype != new.dtype:
            source = graph.call_function(aten._to_copy.default, (source,), {"dtype": new.dtype})
        elif old.shape == new.shape:
            source = graph.call_function(aten.clone.default, (source,))
        if old.shape != new.shape:
            source = graph.call_function(aten.expand_as.default, (source, destination))
    source.meta = dict(node.meta)
    node.replace_all_uses_with(source)
    graph.erase_node(node)

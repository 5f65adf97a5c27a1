"""The one place that touches what torch does not promise to keep; ``tests/test_torch_internals.py`` says why.

No version is asked for: a feature is looked up, and where two spellings exist both are tried.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters, get_debug_dir
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import FlexibleLayout, StorageBox, TensorBox, get_stride_order
from torch._inductor.sizevars import SizeVarAllocator
from torch._logging._internal import trace_structured
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx._utils import lazy_format_graph_code
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.fx.traceback import NodeSource, NodeSourceAction
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["FakeTensor", "FakeTensorMode", "HigherOrderOperator", "OpOverload"]
"""Types of torch that other modules ask for, next to the functions here."""

CAPTURE_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""The errors that lowering a legal program may end with: unsupported ops, data-dependent shapes, functionalisation.

Torch asserts much of what it does not support (``Tensor.set_``), and the plain program may run all the same.
"""

RUNS_EAGERLY = (DynamicOutputShapeException, DataDependentOutputException)
"""Raised inside a backend, these make Dynamo run the frame eagerly without a word."""

UNBACKED_SIZES: dict[str, Any] = {}
"""Settings for sizes that inductor knows nothing about, as T' is."""
if hasattr(SizeVarAllocator, "size_hint") and hasattr(torch._inductor.config.triton, "mix_order_reduction_split_size"):
    # Left to itself it asks for a number of rows to split reductions by (seen in the gradient of a norm), and fails.
    UNBACKED_SIZES["triton.mix_order_reduction_split_size"] = 32
if hasattr(torch._inductor.config.triton, "prefer_nd_tiling"):
    # Flattened, the row of an entry is a division, of 64-bit numbers where there may be more than 2**31 entries. In
    # two dimensions the gradient of 13,312 x 151,936 logits takes 1.9 ms on an H200, not 4.8.
    UNBACKED_SIZES["triton.prefer_nd_tiling"] = True

LIKELY_NODES = 8192
"""The number of nodes that inductor weighs fusions by: always the same, so that no program depends on a batch."""


def _weigh_hinted_sizes() -> None:
    """Has inductor ask how large a hinted tensor is; torch 2.11 takes any that is not known for empty.

    Two ops that share only empty tensors are not fused, which leaves a third more kernels in a layer of Qwen3.
    """
    if hasattr(SizeVarAllocator, "all_unbacked_explicitly_hinted"):
        return
    size_of = GraphLowering.get_dep_size_hint

    def size_if_hinted(graph: GraphLowering, dep: Any, count_bytes: bool = True) -> int:
        size = size_of(graph, dep, count_bytes)
        if size == 0 and graph.try_get_buffer(dep.name) is not None:
            symbols = free_unbacked_symbols(dep.get_numel())
            if symbols and symbols <= graph.sizevars.var_to_hint_override.keys():
                size = dep.numbytes_hint() if count_bytes else dep.numel_hint()
                graph.dep_size_hint_cache[dep, count_bytes] = size
        return size

    GraphLowering.get_dep_size_hint = size_if_hinted  # type: ignore[assignment,method-assign]


_weigh_hinted_sizes()


def _lay_out_unbacked_sizes() -> None:
    """Has inductor lay a tensor of sizes like T' out contiguously where it would ask for the order of its strides.

    It does where a tensor of four dimensions may lie in memory as images do, the channels last, and raises for sizes
    that no guard can be made about. Contiguous is what the backward pass, too, takes such a tensor for.
    """
    ordered = FlexibleLayout.same_ordered

    def contiguous_if_unbacked(sizes: Sequence[Any], stride: Sequence[Any]) -> Sequence[Any]:
        return FlexibleLayout.contiguous_strides(sizes) if free_unbacked_symbols(stride) else ordered(sizes, stride)

    FlexibleLayout.same_ordered = staticmethod(contiguous_if_unbacked)  # type: ignore[method-assign]


_lay_out_unbacked_sizes()


def _keep_strides_for_backward() -> None:
    """Has inductor lay out what a forward pass saves in the order that the backward pass was traced with.

    It does so, or tells AOTAutograd what it did instead, unless strides depend on sizes like T'. Left to itself it may
    choose another order, or make of a tensor a part of a larger one (as ``cat`` does), and the backward pass raises.
    """
    call_function = GraphLowering.call_function

    def in_order(graph: GraphLowering, target: Any, args: Any, kwargs: Any) -> Any:
        result = call_function(graph, target, args, kwargs)
        node, value = graph.current_node, graph.current_node.meta.get("val")
        if not isinstance(result, TensorBox) or not isinstance(value, torch.Tensor):
            return result
        if isinstance(result.data, StorageBox) and free_unbacked_symbols(value.stride()) and _leaves(node):
            result.realize()
            if isinstance(result.get_layout(), FlexibleLayout):
                strides = [sympy.sympify(one) for one in value.stride()]
                result.freeze_layout_with_stride_order(get_stride_order(strides, graph.sizevars.shape_env))
        return result

    GraphLowering.call_function = in_order  # type: ignore[assignment,method-assign]


def _leaves(node: fx.Node) -> bool:
    """Is it, or a view of it, a result of its graph?"""

    def is_view(user: fx.Node) -> bool:
        return isinstance(user.target, OpOverload) and any(one.alias_info for one in user.target._schema.returns)

    return any(user.op == "output" or (is_view(user) and _leaves(user)) for user in node.users)


_keep_strides_for_backward()


def must_propagate(error: BaseException) -> bool:
    """Dynamo's own control flow (start the analysis again with other specialisations) is not ours to stop."""
    return isinstance(error, RestartAnalysis)


def fake_mode() -> FakeTensorMode:
    """The fake mode Dynamo is compiling in. (The one in the placeholders' metadata is an earlier one.)"""
    mode = TracingContext.get().fake_mode
    assert mode is not None, "a backend runs with Dynamo's fake mode"
    return mode


def fake_inputs(example_inputs: Sequence[Any]) -> list[Any]:
    """The fake tensors that Dynamo's guards are about, one for each tensor; sizes pass through."""
    context, mode = TracingContext.get(), fake_mode()

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        symbols = context.tensor_to_context.get(value)
        source = getattr(symbols, "tensor_source", None)
        return mode.from_tensor(value, symbolic_context=symbols, source=source, trace=False)

    return [fake(value) for value in example_inputs]


def flatten_subclasses(inputs: Iterable[Any]) -> list[Any]:
    """The inputs, with the tensors inside in place of each that wraps others (a quantised weight)."""
    flat: list[Any] = []
    for value in inputs:
        flat += flatten_subclasses(_inner(value).values()) if is_traceable_wrapper_subclass(value) else [value]
    return flat


def unflatten_subclasses(like: Sequence[Any], flat: Iterator[Any]) -> list[Any]:
    """The inverse of :func:`flatten_subclasses`, for values of tensors that are wrapped as those of ``like`` are."""
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
    names, _ = value.__tensor_flatten__()
    return {name: getattr(value, name) for name in names}


class _Module(torch.nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


def export_functional(interpreter: fx.Interpreter, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[str]]:
    """Trace the interpreter's run to functional pre-dispatch ATen. Returns the graph and the mutated inputs' names.

    The graph's inputs are those that :func:`flatten_subclasses` gives.
    """
    fakes = fake_inputs(example_inputs)

    def run(*flat: Any) -> Any:
        return interpreter.run(*unflatten_subclasses(fakes, iter(flat)))

    with fake_mode(), torch.fx.traceback.preserve_node_meta():
        graph, signature = aot_export_module(
            _Module(run),
            flatten_subclasses(fakes),
            trace_joint=False,
            pre_dispatch=True,
            decompositions={},
        )
    assert isinstance(graph, fx.GraphModule)
    mutated = [*signature.user_inputs_to_mutate.values(), *signature.buffers_to_mutate.values()]
    return graph, mutated


def unbacked_plan_inputs(
    specs: Sequence[tuple[tuple[str | int, ...], torch.dtype]],
    rows: int | torch.SymInt,
    most: int,
    device: torch.device,
) -> list[torch.Tensor]:
    """Fake arrays of these shapes and dtypes (see ``ir.plan_arrays``). ``nodes``, T', is a size without guards.

    All that is known of it is that it is at most ``most``: inductor computes with 32-bit offsets where that is enough
    of a reason to. It has a likely value as well, which no guard is made about and no result depends on: what shares
    nothing but tensors of sizes that have none, inductor does not fuse. The other sizes that have a name are ``rows``,
    ``nodes + 1``, and any: each is a symbol by itself, as inductor wants each symbol to be the size of some input.
    """
    mode = fake_mode()
    shape_env = mode.shape_env
    assert shape_env is not None, "Dynamo's fake mode has symbolic shapes"
    with mode:
        nodes = shape_env.create_unbacked_symint()
        torch._check(nodes >= 2)  # is it one, and so a dimension that broadcasts? is asked in places
        torch._check(nodes <= most)
        shape_env.var_to_hint_override[nodes.node.expr] = min(LIKELY_NODES, most)

        sizes: dict[str, int | torch.SymInt] = {"nodes": nodes, "rows": rows, "nodes + 1": nodes + 1}

        def sized(size: str | int) -> int | torch.SymInt:
            if isinstance(size, int):
                return size
            if size not in sizes:
                sizes[size] = shape_env.create_unbacked_symint()
                torch._check(sizes[size] >= 0)
            return sizes[size]

        arrays = [torch.empty([*map(sized, shape)], dtype=dtype, device=device) for shape, dtype in specs]
    shape_env.pending_fresh_unbacked_symbols.clear()
    return arrays


class _FakeRun(fx.Interpreter):
    """A run with fake tensors, in which numbers and sizes that depend on the data stay the symbols of the capture."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.known if self.known is not None else super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        captured = n.meta.get("val")
        binds = n.meta.get("unbacked_bindings") or isinstance(captured, torch.types.py_sym_types)
        self.known = captured if binds else None
        return super().run_node(n)


def fake_results(gm: fx.GraphModule, plan_shapes: Mapping[str, Sequence[Any]]) -> dict[fx.Node, Any]:
    """The fake result of each node; the last placeholders are the plan's, of which only the shapes are given.

    Placeholders before those have their ``val`` of the capture. No guard comes of it.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = [node.meta["val"] for node in placeholders[: len(placeholders) - len(plan_shapes)]]
    example = next(value for value in examples if isinstance(value, FakeTensor))
    mode = example.fake_mode
    quiet = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with quiet, mode, enable_python_dispatcher():  # without it ops take no symbols that have no C++ kernel for them
        plan = [torch.empty(shape, dtype=torch.int64, device=example.device) for shape in plan_shapes.values()]
        interpreter = _FakeRun(gm, garbage_collect_values=False)
        interpreter.run(*examples, *plan)
    return dict(interpreter.env)


def evaluate(node: fx.Node) -> None:
    """Write to ``node.meta["val"]`` what the op returns, in the fake mode of its inputs or of the compilation."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: arg.meta["val"])
    with fake_mode(), enable_python_dispatcher():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block of a kernel may have on a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def synchronize(device: torch.device) -> None:
    """Wait for a device to finish what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def size_hint(size: int | torch.SymInt) -> int:
    """The size in the call that is compiled for; 1 if it depends on the data, so that nothing is known of it."""
    if isinstance(size, int):
        return size
    return 1 if size.node.hint is None else int(size.node.hint)


def unknown_dim(value: Any) -> int | None:
    """The first dimension of a tensor whose size is a symbol without a hint (``mark_unbacked``), if there is one."""
    sizes: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else ()
    return next((dim for dim, size in enumerate(sizes) if not isinstance(size, int) and size.node.hint is None), None)


def upper_bound(size: int | torch.SymInt) -> int:
    """The size itself; of a symbol a number well above it, with a guard that it stays below that in every call."""
    if isinstance(size, int):
        return size
    bound: int = max(2**16, 1 << (2 * int(size.node.hint)).bit_length())
    assert bool(size <= bound)
    return bound


def same_size(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Are two sizes equal in this call? If they are symbols, it becomes a guard that they are in every call.

    Sizes that depend on the data are if that is known without a guard.
    """
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    hints = [size if isinstance(size, int) else size.node.hint for size in (one, other)]
    if None in hints:
        return statically_known_true(one == other)
    return hints[0] == hints[1] and bool(one == other)


def size_symbols(graph: fx.Graph) -> dict[sympy.Symbol, tuple[int, int, int]]:
    """The sizes of inputs that are symbols: which input, which dimension, and the number in this call."""
    found: dict[sympy.Symbol, tuple[int, int, int]] = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        sizes: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else ()
        for dim, size in enumerate(sizes):
            symbol = getattr(getattr(size, "node", None), "expr", None)
            if isinstance(symbol, sympy.Symbol):
                found.setdefault(symbol, (position, dim, int(size.node.hint)))
    return found


def hints_of(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """The sizes of inputs that are symbols, in this call."""
    return {symbol: hint for symbol, (*_, hint) in size_symbols(graph).items()}


def source_name(placeholder: fx.Node) -> str:
    """The user's name for an input of the graph that Dynamo captured: ``L['ids']``, ``L['cache'].layers[0].keys``."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return placeholder.name
    name = source.name
    return str(name() if callable(name) else name)


def is_parameter_or_buffer(example: Any) -> bool:
    """Dynamo marks the tensors a module owns; they do not change from call to call."""
    return isinstance(example, torch.nn.Parameter) or (
        isinstance(example, torch.Tensor) and getattr(example, "_dynamo_static_input_type", None) is not None
    )


def has_values(tensor: torch.Tensor) -> bool:
    """Not a tensor that stands for one."""
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


def is_custom_autograd_function(target: Any) -> bool:
    return target is torch.ops.higher_order.autograd_function_apply


def is_checkpoint_region(target: Any) -> bool:
    return target is torch.ops.higher_order.tag_activation_checkpoint


def is_functorch_transform(target: Any) -> bool:
    module = getattr(target, "__module__", None) or ""
    return module.startswith(("torch._functorch", "torch._C._functorch")) or module == "torch._functorch.predispatch"


def enters_autocast(target: Any) -> bool:
    return target is torch.amp.autocast_mode._enter_autocast


def exits_autocast(target: Any) -> bool:
    return target is torch.amp.autocast_mode._exit_autocast


def enters_inference_mode(target: Any) -> bool:
    return target is torch.autograd.grad_mode._enter_inference_mode


def exits_inference_mode(target: Any) -> bool:
    return target is torch.autograd.grad_mode._exit_inference_mode


SET_GRAD_ENABLED = torch._C._set_grad_enabled
"""The call in a graph at which a region with or without gradients begins; the tracer records no other."""


def val(node: fx.Node) -> Any:
    """The fake result of a node, which has its shape, strides and dtype, or the symbol of a size. None if unknown."""
    return node.meta.get("val")


def set_val(node: fx.Node, result: Any) -> None:
    node.meta["val"] = result


def module_stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """The modules that a node was made in, the outermost first: their paths, and their classes or names."""
    return node.meta.get("nn_module_stack") or {}


def stack_trace(node: fx.Node) -> str:
    """The lines of the user's program that a node comes from, as Python prints a traceback."""
    return node.meta.get("stack_trace") or ""


def copy_place(node: fx.Node, origin: fx.Node) -> None:
    """Give a node that was made of another one its place in the user's program, unless it has one."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in origin.meta:
            node.meta.setdefault(key, origin.meta[key])


def set_made_from(node: fx.Node, origin: fx.Node, by: str) -> None:
    """Say which node this one was made of, and by which pass, where torch and its tools look for that."""
    kept = node.op == origin.op and node.target == origin.target
    action = NodeSourceAction.REPLACE if kept else NodeSourceAction.CREATE
    node.meta["from_node"] = [NodeSource(origin, by, action)]


def made_from(node: fx.Node) -> tuple[str, str] | None:
    """The name of the node that this one was made of last, and the pass that did it; torch says so of its own too."""
    sources = node.meta.get("from_node")
    return (sources[-1].name, sources[-1].pass_name) if sources else None


def tag_for_recompute(node: fx.Node, region: int) -> None:
    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    node.meta["ac_graph_id"] = region


def keep_recompute_tag(made: fx.Node, origin: fx.Node) -> None:
    """Recompute in the backward pass what was made of a node that is: see :func:`tag_for_recompute`."""
    for key in ("recompute", "ac_graph_id"):
        if key in origin.meta:
            made.meta.setdefault(key, origin.meta[key])


def checkpoint_region(node: fx.Node) -> int | None:
    """The number of the region of activation checkpointing that a node is in."""
    region: int | None = node.meta.get("ac_graph_id")
    return region


def forget_value(node: fx.Node) -> None:
    """Drop the fake result of a node that now computes another form of it."""
    node.meta.pop("val", None)


def keep_dynamo_annotations(dynamos: fx.GraphModule, captured: fx.GraphModule, inputs: bool) -> None:
    """Copy to a graph lowered from Dynamo's what compilers look up there: else parameters count as changing inputs.

    With ``inputs``, both have the same ones; else what is said of single inputs is left out.
    """
    for key in ("dynamo_compile_id", "dynamo_flat_name_to_original_fqn"):
        if key in dynamos.meta:
            captured.meta[key] = dynamos.meta[key]
    if not inputs:
        return
    if hasattr(dynamos, "_param_name_to_source"):
        captured._param_name_to_source = dynamos._param_name_to_source
    before, after = (one.graph.find_nodes(op="placeholder") for one in (dynamos, captured))
    for old, new in zip(before, after, strict=True):
        if "tensor_dict" in old.meta:
            new.meta["tensor_dict"] = old.meta["tensor_dict"]
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source


def present_as_dynamos(gm: fx.GraphModule, like: fx.GraphModule) -> None:
    """Give a graph that was made from ``like``, with more inputs behind, what AOTAutograd looks up on Dynamo's own.

    Without it, parameters count as inputs that may lie elsewhere in the next call: their alignment is checked in each,
    and CUDA graphs copy them. Placeholders lose their ``val``, which Dynamo's do not have and inductor's C++ wrapper
    takes for the inputs. The source of what Dynamo does not know is None, or a constant.
    """
    before = like.graph.find_nodes(op="placeholder")
    for node, old in itertools.zip_longest(gm.graph.find_nodes(op="placeholder"), before):
        node.meta.pop("val", None)
        node._dynamo_source = getattr(old, "_dynamo_source", None)
    if hasattr(like, "_param_name_to_source"):
        known: Any = like._param_name_to_source
        constants = [name for name, _ in itertools.chain(gm.named_parameters(), gm.named_buffers())]
        gm._param_name_to_source = {name: ConstantSource(name) for name in constants} | known


def compile_with(
    inner: str | Callable[..., Any],
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: dict[str, Any],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Compile with another Dynamo backend, in the tracing context we are in.

    ``decompositions`` of our own ops are for inductor, which fuses what they become; others run the ops as they are.

    One of :data:`RUNS_EAGERLY` may be raised.
    """
    compiler = lookup_backend(inner) if isinstance(inner, str) else inner
    settings: dict[str, Any] = {}
    if inner == "inductor":
        patches = _inductor_settings(mode, options)
        if decompositions:
            patches = UNBACKED_SIZES | patches
        if patches:
            settings["config_patches"] = patches
        if decompositions:
            settings["decompositions"] = {**select_decomp_table(), **decompositions}
        compiler = compile_fx
    else:
        settings.update({"mode": mode} if mode else {}, **({"options": options} if options else {}))
    with _cache_key(decompositions):
        compiled: Callable[..., Any] = compiler(gm, list(example_inputs), **settings)
    return compiled


def _inductor_settings(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    return {**(torch._inductor.list_mode_options(mode) if mode else {}), **options}


def records_cuda_graphs(inner: str | Callable[..., Any], mode: str | None, options: Mapping[str, Any]) -> bool:
    """Would it, on a GPU? One for each tuple of sizes."""
    settings = _inductor_settings(mode, options) if inner == "inductor" else {}
    recorded: bool = settings.get("triton.cudagraphs", inner == "inductor" and inductor_config.triton.cudagraphs)
    return recorded


@functools.cache
def _source_hash() -> str:
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _cache_key(decompositions: Mapping[Any, Any] | None) -> contextlib.AbstractContextManager[Any]:
    """Torch's compile caches look at the graph, not at what our ops decompose into or have for a gradient.

    Nor does inductor's look at whether a backward pass may write to what was saved for it.
    """
    if not decompositions:
        return contextlib.nullcontext()
    names = ",".join(sorted(map(str, decompositions)))
    donates = torch._functorch.config.donated_buffer
    tag = f"{torch.compiler.config.cache_key_tag}radix_compile {_source_hash()} {donates} {names}"
    patch: contextlib.AbstractContextManager[Any] = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    return patch


def cache_unless(tagged: bool) -> contextlib.AbstractContextManager[Any]:
    """AOTAutograd's cache does not look at recompute tags and would serve the artefact without them."""
    if tagged:
        patch: contextlib.AbstractContextManager[Any] = torch._functorch.config.patch(enable_autograd_cache=False)
        return patch
    return contextlib.nullcontext()


def backward_compiled_ahead() -> contextlib.AbstractContextManager[Any]:
    """Compile backward passes here, so that errors are raised here: AOTAutograd by itself does it when they run."""
    patch: contextlib.AbstractContextManager[Any] = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    return patch


@contextlib.contextmanager
def backward_may_run_again() -> Iterator[None]:
    """Let programs that are compiled here be asked for gradients twice (``retain_graph=True``), as plain ones may be.

    AOTAutograd lets a backward pass write to what was saved for it, which spares a copy of the logits. It does without
    if it compiles the pass when that first runs, and the graph is kept. A pass with symbols for sizes, as T', is
    compiled ahead and raises. Here it is given copies instead if the graph is kept.
    """
    before = set(torch.autograd.Function.__subclasses__())
    yield
    for function in set(torch.autograd.Function.__subclasses__()) - before:
        if getattr(function, "compiled_bw", None) is not None:
            _copy_what_is_kept(function)


def _copy_what_is_kept(function: Any) -> None:
    donated = list(function.metadata.bw_donated_idxs or ())
    if not donated:
        return
    run = function._backward_impl

    def backward(ctx: Any, args: list[Any]) -> Any:
        if torch._C._autograd._get_current_graph_task_keep_graph():
            for i in donated:
                args[i] = _copied(args[i])
        return run(ctx, args)

    function._backward_impl = staticmethod(backward)
    function.metadata.bw_donated_idxs.clear()  # or it raises


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """With the same strides, whatever they are, which the compiled code was made for."""
    if tensor.numel() == 0:
        return tensor
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((last + 1,), (1,)).clone()
    return flat.as_strided(tensor.shape, tensor.stride(), 0)


def graph_breaks() -> dict[str, int]:
    """How often Dynamo broke a graph since it was started afresh, by its first line about why."""
    found: dict[str, int] = {}
    for reason, count in counters["graph_break"].items():
        line = (str(reason).strip().splitlines() or ["unknown"])[0]
        found[line] = found.get(line, 0) + count
    return found


def forget_graph_breaks() -> None:
    counters["graph_break"].clear()


def compiled_module() -> str | None:
    """The class of the module whose ``forward`` Dynamo is compiling; None if it is a function, or nothing is."""
    try:
        root = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:  # outside of a compilation
        return None
    owner = root.f_locals.get("self")
    return type(owner).__name__ if isinstance(owner, torch.nn.Module) else None


def graph_code(name: str, gm: fx.GraphModule) -> Any:
    """The code of a graph, made only if it is printed. Tools that watch compilation take hold of this call."""
    return lazy_format_graph_code(name, gm)


def readable(gm: fx.GraphModule) -> str:
    """The code of a graph with shapes, dtypes and where its lines come from."""
    return str(gm.print_readable(print_output=False, include_stride=False, include_device=True))


def keep_artifact(name: str, encoding: str, content: Callable[[], str]) -> None:
    """Add a file to the trace of the compilation that is under way, if one is kept (``TORCH_TRACE``)."""
    trace_structured("artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=content)


def debug_folder() -> Path | None:
    """Where this process keeps what ``TORCH_COMPILE_DEBUG=1`` asks for; None without."""
    return Path(get_debug_dir()) if inductor_config.trace.enabled else None

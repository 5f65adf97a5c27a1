"""Dynamo: tracing to ATen, its annotations of graphs and inputs, markers of regions, graph breaks and traces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters, get_debug_dir
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor import config as inductor_config
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx._utils import lazy_format_graph_code

from radix_compile.torch_internals.fake_tensors import fake_inputs, fake_mode, flatten_subclasses, unflatten_subclasses

CAPTURE_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""The errors that lowering a legal program may raise: unsupported ops, data-dependent shapes, functionalisation.

Torch raises AssertionError for much that it does not support (``Tensor.set_``), though the plain program may run.
"""

RUNS_EAGERLY = (DynamicOutputShapeException, DataDependentOutputException)
"""The exceptions that, raised inside a backend, make Dynamo run the frame eagerly without a warning."""


def must_propagate(error: BaseException) -> bool:
    """Is this Dynamo's own control flow (restart the analysis with other specialisations), not to be caught?"""
    return isinstance(error, RestartAnalysis)


class _Module(torch.nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


def export_functional(interpreter: fx.Interpreter, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[str]]:
    """Trace the interpreter's run to functional pre-dispatch ATen. Returns the graph and the mutated inputs' names.

    The graph's inputs are flattened by :func:`flatten_subclasses`.
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


def source_name(placeholder: fx.Node) -> str:
    """Return the user's name for an input of Dynamo's graph: ``L['ids']``, ``L['cache'].layers[0].keys``."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return placeholder.name
    name = source.name
    return str(name() if callable(name) else name)


def is_parameter_or_buffer(example: Any) -> bool:
    """Is it a tensor that a module owns? Dynamo marks these, and they do not change from call to call."""
    return isinstance(example, torch.nn.Parameter) or (
        isinstance(example, torch.Tensor) and getattr(example, "_dynamo_static_input_type", None) is not None
    )


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
"""The only call by which the tracer records that a region with or without gradients begins."""


def keep_dynamo_annotations(dynamo_graph: fx.GraphModule, captured: fx.GraphModule, inputs: bool) -> None:
    """Copy the annotations that compilers look up, from Dynamo's graph to the graph lowered from it.

    Without them parameters count as changing inputs. The annotations of single inputs are copied if ``inputs``, which
    needs both graphs to have the same inputs.
    """
    for key in ("dynamo_compile_id", "dynamo_flat_name_to_original_fqn"):
        if key in dynamo_graph.meta:
            captured.meta[key] = dynamo_graph.meta[key]
    if not inputs:
        return
    if hasattr(dynamo_graph, "_param_name_to_source"):
        captured._param_name_to_source = dynamo_graph._param_name_to_source
    before, after = (gm.graph.find_nodes(op="placeholder") for gm in (dynamo_graph, captured))
    for old, new in zip(before, after, strict=True):
        if "tensor_dict" in old.meta:
            new.meta["tensor_dict"] = old.meta["tensor_dict"]
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source


def present_as_dynamos(gm: fx.GraphModule, like: fx.GraphModule) -> None:
    """Annotate a graph made from ``like``, with further inputs at the end, as AOTAutograd expects of Dynamo's graphs.

    Without it, parameters count as inputs that may move between calls: every call checks their alignment, and CUDA
    graphs copy them. Placeholders lose their ``val``: Dynamo's have none, and inductor's C++ wrapper would take it for
    the input. Inputs and constants that Dynamo does not know have the source None or a ``ConstantSource``.
    """
    before = like.graph.find_nodes(op="placeholder")
    for node, old in itertools.zip_longest(gm.graph.find_nodes(op="placeholder"), before):
        node.meta.pop("val", None)
        node._dynamo_source = getattr(old, "_dynamo_source", None)
    if hasattr(like, "_param_name_to_source"):
        sources: Any = like._param_name_to_source
        constants = [name for name, _ in itertools.chain(gm.named_parameters(), gm.named_buffers())]
        gm._param_name_to_source = {name: ConstantSource(name) for name in constants} | sources


def graph_breaks() -> dict[str, int]:
    """Map the first line of each reason why Dynamo broke a graph to the number of breaks since the last reset."""
    breaks: dict[str, int] = {}
    for reason, count in counters["graph_break"].items():
        line = (str(reason).strip().splitlines() or ["unknown"])[0]
        breaks[line] = breaks.get(line, 0) + count
    return breaks


def forget_graph_breaks() -> None:
    counters["graph_break"].clear()


def compiled_module() -> str | None:
    """Return the class of the module whose ``forward`` Dynamo is compiling; None for a function or no compilation."""
    try:
        root = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:  # outside of a compilation
        return None
    owner = root.f_locals.get("self")
    return type(owner).__name__ if isinstance(owner, torch.nn.Module) else None


def graph_code(name: str, gm: fx.GraphModule) -> Any:
    """Return the code of a graph, which is made only when printed. Tools that watch compilation patch this call."""
    return lazy_format_graph_code(name, gm)


def readable(gm: fx.GraphModule) -> str:
    """Return the code of a graph with shapes, dtypes and source lines."""
    return str(gm.print_readable(print_output=False, include_stride=False, include_device=True))


def keep_artifact(name: str, encoding: str, content: Callable[[], str]) -> None:
    """Add a file to the trace of the current compilation, if torch writes one (``TORCH_TRACE``)."""
    trace_structured("artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=content)


def debug_folder() -> Path | None:
    """Return the folder of this process for ``TORCH_COMPILE_DEBUG=1``, or None if that is not set."""
    return Path(get_debug_dir()) if inductor_config.trace.enabled else None

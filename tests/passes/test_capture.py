"""Capturing: functional graphs with metadata, in every mode, and each known trap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import radix_compile
from radix_compile.ir.graph import facts, graph_facts
from radix_compile.passes.capture import CaptureError, capture
from tests.models import VOCABULARY, build, shared_batch

aten = torch.ops.aten


def captured(program: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> tuple[fx.GraphModule, Any]:
    """The captured graph of a program, and what the program run through that graph returns."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(capture(gm, inputs))
        return gm.forward

    result = torch.compile(program, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return graphs[0], result


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


class Tiny(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.between = between

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(self.between(torch.relu(self.first(self.embedding(ids)))))


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_whole_ops_with_metadata(mode: str, dynamic: bool) -> None:
    model = Tiny()
    with MODES[mode]():
        gm, _ = captured(model, shared_batch(4, 8, 4), dynamic=dynamic)
        again = gm(*_arguments(gm, model, shared_batch(4, 8, 4)))
        torch.testing.assert_close(again[0], model(shared_batch(4, 8, 4)))
    linear = next(node for node in gm.graph.nodes if node.target is aten.linear.default)
    assert linear.meta["val"].shape[-1] == 32
    assert "self.first" in linear.meta["stack_trace"]
    assert any("first" in path for path, _ in linear.meta["nn_module_stack"].values())
    static = [facts(node).is_static for node in gm.graph.find_nodes(op="placeholder")]
    assert sum(static) == 5
    assert aten._assert_tensor_metadata.default not in targets(gm)


def _arguments(gm: fx.GraphModule, model: nn.Module, ids: Tensor) -> list[Any]:
    """Values for the placeholders: parameters in the order of use, sizes, and the ids."""
    parameters = iter(
        [model.embedding.weight, model.first.weight, model.first.bias, model.second.weight, model.second.bias]
    )
    values: list[Any] = []
    sizes = iter(ids.shape)
    for node in gm.graph.find_nodes(op="placeholder"):
        if facts(node).is_static:
            values.append(next(parameters))
        else:
            values.append(ids if isinstance(node.meta["val"], Tensor) else next(sizes))
    return values


def test_in_place_ops_are_functionalised() -> None:
    def program(ids: Tensor, table: Tensor) -> Tensor:
        x = table[ids]
        x.add_(1).mul_(2)
        x[:, 0] = 0
        return x

    gm, _ = captured(program, shared_batch(4, 8, 4), torch.randn(VOCABULARY, 16))
    assert not any(node.target._schema.is_mutable for node in gm.graph.nodes if hasattr(node.target, "_schema"))
    assert aten.add.Tensor in targets(gm)


# -------------------------------------------------------------------------------------------------------- traps


def test_autocast_inside_the_graph() -> None:
    model = Tiny()

    def program(ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            inside = model(ids)
        return inside, model.first(model.embedding(ids))

    with torch.no_grad():
        gm, plain = captured(program, shared_batch(4, 8, 4))
    inside, outside = gm.graph.output_node().args[0]
    assert inside.meta["val"].dtype == plain[0].dtype == torch.bfloat16
    assert outside.meta["val"].dtype == plain[1].dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.inner.embedding(ids)
        return checkpoint(lambda x: self.inner.second(self.inner.first(x).relu()), hidden, use_reentrant=False).sum()


def test_activation_checkpointing_is_inlined_and_tagged() -> None:
    gm, _ = captured(Checkpointed(), shared_batch(4, 8, 4))
    assert graph_facts(gm).has_checkpoints
    linears = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert len(linears) == 2
    assert all(node.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE for node in linears)
    embedding = gm.graph.find_nodes(op="call_function", target=aten.embedding.default)[0]
    assert "recompute" not in embedding.meta


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 5 * grad  # not the derivative, so that a lost formula shows


def test_a_custom_autograd_function_keeps_its_gradient() -> None:
    model = Tiny(lambda x: Doubled.apply(x))
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always"})
    with pytest.warns(UserWarning, match="would lose its gradient"):
        compiled(shared_batch(4, 8, 8)).sum().backward()
    ours = model.first.weight.grad.clone()
    model.zero_grad()
    model(shared_batch(4, 8, 8)).sum().backward()
    torch.testing.assert_close(ours, model.first.weight.grad)


def test_vmap_is_refused_before_anything_is_touched() -> None:
    def program(ids: Tensor, table: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: row.cumsum(0))(table[ids])

    with pytest.raises(Exception, match=r"torch\.func transforms"):
        captured(program, shared_batch(4, 8, 4), torch.randn(VOCABULARY, 16))
    assert torch._C._functorch.peek_interpreter_stack() is None
    table = torch.randn(VOCABULARY, 16)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="torch.func transforms"):
        ours = torch.compile(program, backend="radix", options={"inner_backend": "eager", "fold": "always"})(
            shared_batch(4, 8, 4), table
        )
    torch.testing.assert_close(ours, program(shared_batch(4, 8, 4), table))


def test_copy_becomes_something_with_a_derivative() -> None:
    def program(ids: Tensor, table: Tensor) -> Tensor:
        x = table[ids]
        into = torch.zeros(x.shape, dtype=torch.float64)
        into.copy_(x)
        return into * 2

    table = torch.randn(VOCABULARY, 16, requires_grad=True)
    gm, _ = captured(program, shared_batch(4, 8, 4), table)
    assert aten.copy.default not in targets(gm)
    (result,) = gm(
        *[
            table if node.meta["val"].is_floating_point() else shared_batch(4, 8, 4)
            for node in gm.graph.find_nodes(op="placeholder")
        ]
    )
    assert result.dtype == torch.float64
    result.sum().backward()
    assert table.grad is not None


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(ids)


def test_a_program_that_writes_to_its_inputs_runs_plain() -> None:
    model = Counting()
    with torch.no_grad(), pytest.warns(UserWarning, match="writes to its inputs"):
        torch.compile(model, backend="radix", options={"inner_backend": "eager", "fold": "always"})(
            shared_batch(4, 8, 4)
        )
    assert model.calls == 1
    assert radix_compile.stats().folded_compiles == 0


def test_a_no_grad_region_stays_one() -> None:
    model = Tiny()

    def program(ids: Tensor) -> Tensor:
        with torch.no_grad():
            gate = model.first(model.embedding(ids)).sigmoid()
        return model.second(gate * model.first(model.embedding(ids))).sum()

    compiled = torch.compile(
        program, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    compiled(shared_batch(4, 8, 6)).backward()
    assert radix_compile.stats().folded_calls == 1
    ours = model.first.weight.grad.clone()
    model.zero_grad()
    program(shared_batch(4, 8, 6)).backward()
    torch.testing.assert_close(ours, model.first.weight.grad)


def test_data_dependent_failures_of_the_inner_backend_are_heard() -> None:
    """Raised as they are, these make Dynamo run the frame eagerly, as it does without us, and without a word."""

    def inner(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise DynamicOutputShapeException(aten.nonzero.default)

    model, ids = Tiny(), shared_batch(4, 8, 4)
    with pytest.warns(UserWarning, match="radix: ") as caught:
        ours = torch.compile(model, backend=radix_compile.RadixBackend(inner_backend=inner, fold="always"))(ids)
    torch.testing.assert_close(ours, model(ids))
    messages = " ".join(str(warning.message) for warning in caught)
    assert "cannot compile the folded program: DynamicOutputShapeException: aten.nonzero.default" in messages
    assert "the inner backend stops at aten.nonzero.default, and torch.compile runs it eagerly" in messages


def test_the_program_returned_is_not_itself_compiled() -> None:
    """Dynamo would unwrap a compiled callable and run it eagerly: the folded program would never run."""
    returned: list[Any] = []

    class Watched(radix_compile.RadixBackend):
        def compile(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
            returned.append(super().compile(*args, **kwargs))
            return returned[-1]

    with torch.no_grad():
        torch.compile(Tiny(), backend=Watched(inner_backend="eager", fold="always"))(shared_batch(4, 8, 4))
    assert not hasattr(returned[0], "_torchdynamo_orig_callable")
    assert radix_compile.stats().folded_calls == 1


def test_what_cannot_be_captured_is_reported_and_runs() -> None:
    def program(ids: Tensor, table: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: row * 2)(table[ids])

    with pytest.warns(UserWarning, match="nothing folds"):
        explanation = radix_compile.explain(program, shared_batch(4, 8, 4), torch.randn(VOCABULARY, 16))
    assert "torch.func" in explanation.graphs[0].reason
    assert not explanation.folded


def test_capture_error_leaves_the_graph_as_it_was() -> None:
    seen: list[tuple[str, str]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = gm.print_readable(print_output=False)
        with pytest.raises(CaptureError):
            capture(gm, inputs)
        seen.append((before, gm.print_readable(print_output=False)))
        return gm.forward

    with torch.no_grad():
        torch.compile(Counting(), backend=backend)(shared_batch(4, 8, 4))
    assert seen[0][0] == seen[0][1]


def test_a_model_with_gradients_on_matches() -> None:
    model = build("Qwen3", num_hidden_layers=1)
    compiled = torch.compile(
        model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    ids = shared_batch(4, 12, 8)
    compiled(ids, use_cache=False).logits.square().mean().backward()
    assert radix_compile.stats().folded_calls == 1
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(ids, use_cache=False).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, msg=name)


def test_what_torch_asserts_when_lowering_runs_plain() -> None:
    """It raises an AssertionError of ``set_``, which plain programs may call."""
    embedding, head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)

    def program(ids: Tensor) -> Tensor:
        x = embedding(ids)
        with torch.no_grad():
            same = torch.ones_like(x).set_(x.detach())
        return head(x) + same

    ids = shared_batch(4, 12, 8)
    compiled = torch.compile(program, backend="radix", options={"inner_backend": "aot_eager"})
    with pytest.warns(UserWarning, match="lowering to ATen failed: AssertionError"):
        torch.testing.assert_close(compiled(ids), program(ids))

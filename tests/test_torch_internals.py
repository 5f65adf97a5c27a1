"""What breaks if a private torch API moves: each is used here on its own, with what it is needed for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._guards import TracingContext
from torch._inductor.graph import GraphLowering
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.testing._internal.two_tensor import TwoTensor

import radix_compile
from radix_compile import torch_internals as internals
from radix_compile.ir.plan_arrays import BY_NAME, PLAN_ARRAYS, plan_arrays
from radix_compile.torch_internals import compilers
from tests.models import shared_batch


def in_a_backend(check: Callable[[fx.GraphModule, list[Any]], None], *, dynamic: bool = False) -> None:
    """Run ``check`` where a Dynamo backend runs."""
    ran: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        check(gm, inputs)
        ran.append(True)
        return gm.forward

    model = nn.Sequential(nn.Embedding(99, 8), nn.BatchNorm1d(6), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(shared_batch(4, 6, 2))
    assert ran


def test_parameters_and_buffers_are_told_from_inputs() -> None:
    def check(gm: fx.GraphModule, inputs: list[Any]) -> None:
        marks = [internals.is_parameter_or_buffer(value) for value in inputs]
        assert sum(marks) == len(marks) - 1
        (ids,) = [value for value, mark in zip(inputs, marks, strict=True) if not mark]
        assert ids.dtype == torch.int64

    in_a_backend(check)


def test_fake_inputs_are_those_of_the_guards() -> None:
    def check(gm: fx.GraphModule, inputs: list[Any]) -> None:
        fakes = internals.fake_inputs(inputs)
        assert fakes[0].fake_mode is internals.fake_mode()
        ids = next(fake for fake in fakes if isinstance(fake, torch.Tensor) and fake.dtype == torch.int64 and fake.ndim)
        assert isinstance(ids.shape[0], torch.SymInt)

    in_a_backend(check, dynamic=True)


def test_the_number_of_nodes_is_unbacked() -> None:
    def check(gm: fx.GraphModule, inputs: list[Any]) -> None:
        cpu = torch.device("cpu")
        always = [(array.shape, array.dtype) for array in plan_arrays(())]
        fold, scatter = internals.unbacked_plan_inputs(always, 24, 32, cpu)
        assert fold.shape[0].node.hint is None or not fold.shape[0].node.has_hint()
        # Its likely value is none that inductor takes for a bound of offsets, which 32 bits would then be enough for.
        shape_env = internals.fake_mode().shape_env
        known = getattr(shape_env, "has_guarding_hint", None) or shape_env.has_hint
        assert not known(fold.shape[0].node.expr)
        assert scatter.shape == (24,)
        assert statically_known_true(fold.shape[0] <= 32)
        assert not statically_known_true(fold.shape[0] <= 31)
        specs = [(array.shape, array.dtype) for array in PLAN_ARRAYS]
        plan = dict(zip(BY_NAME, internals.unbacked_plan_inputs(specs, 24, 32, cpu), strict=True))
        fold, scatter, begin, end = (plan[name] for name in ("fold", "scatter", "begin", "end"))
        rows, starts, pieces = (plan[name] for name in ("rows", "starts", "pieces"))
        assert plan["stretches"].shape[1] == 3
        assert plan["tile_masks"].dtype == torch.float32
        assert pieces.shape[0].node.hint is None or not pieces.shape[0].node.has_hint()
        assert scatter.shape == rows.shape == (24,)
        assert str(starts.shape[0] - 1) == str(fold.shape[0]) == str(begin.shape[0]) == str(end.shape[0])
        assert str(plan["head_starts"].shape[0] - 1) == str(plan["head_fold"].shape[0]) != str(fold.shape[0])
        assert not internals.fake_mode().shape_env.pending_fresh_unbacked_symbols

    in_a_backend(check)


def test_the_bound_of_a_symbol_is_a_guard() -> None:
    bounds: list[int] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        (x,) = [fake for fake in internals.fake_inputs(inputs) if isinstance(fake, torch.Tensor)]
        bounds.append(internals.upper_bound(x.shape[0]))
        assert internals.upper_bound(1000) == 1000
        return gm.forward

    function = torch.compile(lambda x: x.sum(), backend=backend, dynamic=True)
    for size in (4, 2**16, 2**16 + 1, 2**17):
        function(torch.ones(size))
    assert bounds == [2**16, 2**18]


def test_equal_sizes_of_two_symbols_become_a_guard() -> None:
    compiled: list[int] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        fakes = [fake for fake in internals.fake_inputs(inputs) if isinstance(fake, torch.Tensor)]
        assert internals.same_size(fakes[0].shape[0], fakes[1].shape[0])
        compiled.append(1)
        return gm.forward

    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum() + y.sum()

    function = torch.compile(program, backend=backend, dynamic=True)
    function(torch.ones(4), torch.ones(4))
    function(torch.ones(5), torch.ones(5))
    assert len(compiled) == 1


def test_sizes_without_a_hint() -> None:
    """A program with one among its inputs is refused, so it has to be told; inside it counts as 1, without a guard."""
    seen: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        fakes = [fake for fake in internals.fake_inputs(inputs) if isinstance(fake, torch.Tensor)]
        (unknown,) = [fake for fake in fakes if internals.unknown_dim(fake) is not None]
        (known,) = [fake for fake in fakes if internals.unknown_dim(fake) is None]
        assert internals.unknown_dim(unknown) == 1
        assert internals.size_hint(unknown.shape[1]) == internals.size_hint(2 * unknown.shape[1]) == 1
        assert internals.size_hint(known.shape[0]) == 6
        assert internals.same_size(unknown.shape[1], unknown.shape[1])
        assert not internals.same_size(unknown.shape[1], known.shape[0])
        seen.append(True)
        return gm.forward

    marked = torch.ones(4, 6)
    mark_unbacked(marked, 1)
    torch.compile(lambda x, y: x.sum() + y.sum(), backend=backend, dynamic=True)(marked, torch.ones(6))
    assert seen


def test_dynamos_own_control_flow_is_not_stopped() -> None:
    assert internals.must_propagate(TensorifyScalarRestartAnalysis())
    assert not internals.must_propagate(RuntimeError())


class Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([0.5, 2.0])


def test_parameters_of_rewritten_graphs_are_static() -> None:
    """As those of Dynamo's own are: the others may lie elsewhere in the next call, and CUDA graphs copy them."""
    static: list[list[str]] = []

    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None
        found = [inputs[i] for i in metadata.static_input_indices]
        static.append(sorted(str(list(one.shape)) for one in found))
        return gm.forward

    model = nn.Sequential(nn.Embedding(99, 8), nn.Linear(8, 16), nn.Linear(16, 2), Constant())
    weights = sorted(str(list(parameter.shape)) for parameter in model.parameters())
    options = {"inner_backend": aot_autograd(fw_compiler=compiler), "fold": "always", "strict": True}
    with torch.no_grad():
        torch.compile(model, backend="radix", options=options)(shared_batch(4, 6, 2))
    folded, plain = static
    assert plain == weights
    assert folded == sorted([*weights, "[2]"])  # constants of the graph are static too


def test_inner_backends_are_found_by_name() -> None:
    def check(gm: fx.GraphModule, inputs: list[Any]) -> None:
        for name in ("eager", "aot_eager"):
            assert callable(internals.compile_with(name, gm, inputs, None, {}))

    in_a_backend(check)


def test_markers_of_regions() -> None:
    assert internals.is_checkpoint_region(torch.ops.higher_order.tag_activation_checkpoint)
    assert internals.is_custom_autograd_function(torch.ops.higher_order.autograd_function_apply)
    assert internals.enters_autocast(torch.amp.autocast_mode._enter_autocast)
    assert internals.exits_autocast(torch.amp.autocast_mode._exit_autocast)
    assert not internals.is_functorch_transform(torch.relu)


@pytest.mark.parametrize("tagged", [True, False])
def test_the_cache_is_off_for_tagged_graphs(tagged: bool) -> None:
    with internals.cache_unless(tagged):
        assert torch._functorch.config.enable_autograd_cache is (not tagged)


def test_caches_tell_decompositions_apart() -> None:
    """Torch's own keys do not: without ours a program would be served that was compiled with other decompositions."""
    keys: list[str] = []

    def inner(gm: fx.GraphModule, inputs: list[Any], **settings: Any) -> Callable[..., Any]:
        keys.append(torch.compiler.config.cache_key_tag)
        return gm.forward

    one, other = {torch.ops.aten.relu.default: torch.relu}, {torch.ops.aten.silu.default: torch.relu}
    gm = fx.symbolic_trace(nn.ReLU())
    for decompositions in (None, one, other, one):
        internals.compile_with(inner, gm, [torch.ones(2)], None, {}, decompositions)
    with torch._functorch.config.patch(donated_buffer=False):  # inductor's key does not tell that apart, either
        internals.compile_with(inner, gm, [torch.ones(2)], None, {}, one)
    before = torch.compiler.config.cache_key_tag
    assert keys[0] == before
    assert keys[1] == keys[3] != keys[2]
    assert keys[4] not in keys[:4]
    assert before not in keys[1:]
    assert "radix_compile" in keys[1]


def test_what_is_kept_is_copied_with_its_strides() -> None:
    stored = torch.arange(24.0).view(2, 3, 4)
    for one in (stored, stored.mT, stored[1, :, 1:3], stored[:1, :, :1].expand(5, 3, 4), stored[0, 0, 3], stored[:0]):
        copied = compilers._copy_with_strides(one)
        assert torch.equal(copied, one)
        assert copied.stride() == one.stride()
        assert one.numel() == 0 or copied.untyped_storage().data_ptr() != one.untyped_storage().data_ptr()


@pytest.mark.parametrize("donates", [True, False])
def test_a_backward_pass_that_writes_to_what_it_reads(donates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads copies if it is to run again. Without them the user is told not to keep the graph."""
    copied, original = [], compilers._copy_with_strides
    monkeypatch.setattr(compilers, "_copy_with_strides", lambda tensor: copied.append(tensor) or original(tensor))
    model = nn.Sequential(nn.Embedding(99, 8), nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
    weights = list(model.parameters())
    run = torch.compile(
        model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always", "strict": True}
    )
    with torch._functorch.config.patch(donated_buffer=donates):
        loss = run(shared_batch(4, 6, 2)).sin().sum()
        first, second, last = (torch.autograd.grad(loss, weights, retain_graph=keep) for keep in (True, True, False))
    assert bool(copied) is donates
    assert len(copied) == 2 * len({one.data_ptr() for one in copied})  # twice each, and not the last time
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, last))


def test_sizes_nothing_is_known_about_do_not_stop_inductor() -> None:
    """The settings for that exist in this torch, or none is needed."""
    for name in internals.UNBACKED_SIZE_SETTINGS:
        owner, setting = name.split(".")
        assert hasattr(getattr(torch._inductor.config, owner), setting)


class WithSink(nn.Module):
    """Attention with a score that has no key, whose gradient ``[T', 2, 1, 1]`` lies in memory as an image may."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        x = self.embedding(ids)
        q = self.query(x).reshape(batch, length, 2, 2).transpose(1, 2)
        k, v = (f(x).reshape(batch, length, 1, 2).transpose(1, 2) for f in (self.key, self.value))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.where(torch.ones(length, length, dtype=torch.bool).tril(), q @ k.mT, -torch.inf)
        scores = torch.cat([scores, x.mean(-1)[:, None, :, None].expand(batch, 2, length, 1)], -1)
        scores = scores - scores.amax(-1, keepdim=True)
        return self.out((scores.softmax(-1)[..., :length] @ v).transpose(1, 2).reshape(batch, length, 4))


def test_inductor_lays_out_what_may_be_an_image() -> None:
    run = torch.compile(WithSink(), backend="radix", options={"fold": "always", "strict": True})
    run(shared_batch(4, 6, 4).remainder(9)).sum().backward()
    assert radix_compile.stats().folded_calls == 1


class Joined(nn.Module):
    """``cat`` makes its operands parts of its result, of which one is saved for the backward pass; so is ``amin``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(99, 8), nn.Linear(16, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        heads = x.reshape(*ids.shape, 2, 4).permute(2, 0, 1, 3)
        heads = heads * torch.sigmoid(heads - heads.amin(3, keepdim=True))
        y = F.layer_norm(x + heads.permute(1, 2, 0, 3).reshape(x.shape), (8,))
        return self.last(torch.cat([y, x.sin()], -1))


def test_what_is_saved_lies_as_the_backward_pass_expects() -> None:
    model, ids = Joined().double(), shared_batch(4, 6, 4)
    run = torch.compile(model, backend="radix", options={"fold": "always", "strict": True})
    weights = list(model.parameters())
    ours, plain = (torch.autograd.grad(call(ids).sin().sum(), weights) for call in (run, model))
    torch.testing.assert_close(ours, plain)
    assert radix_compile.stats().folded_calls == 1


def test_a_backward_pass_that_cannot_be_compiled_loses_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled when it first runs, it would raise there, where nothing can be done about it."""
    model, ids = nn.Sequential(nn.Embedding(99, 8), nn.Linear(8, 16), nn.SiLU()), shared_batch(4, 6, 2)
    forwards: list[fx.GraphModule] = []

    def compile_forward(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        forwards.append(gm)
        return make_boxed_func(gm.forward)

    def fail(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if len(forwards) == 1:
            raise RuntimeError("no kernel for it")
        return make_boxed_func(gm.forward)

    inner = aot_autograd(fw_compiler=compile_forward, bw_compiler=fail)
    run = torch.compile(model, backend="radix", options={"inner_backend": inner, "fold": "always"})
    with pytest.warns(UserWarning, match="cannot compile the folded program: RuntimeError: no kernel"):
        loss = run(ids).sum()
    loss.backward()
    assert len(forwards) == 2  # the second is the plain program's
    assert radix_compile.stats().folded_calls == 0


def test_inductor_weighs_fusions_on_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what two ops share: if that weighs nothing they stay apart, and the mean in a norm is a kernel of its own."""
    weighed: list[int] = []
    size_of = GraphLowering.get_dep_size_hint

    def recorded(graph: GraphLowering, dep: Any, count_bytes: bool = True) -> int:
        size = size_of(graph, dep, count_bytes)
        if dep.has_unbacked_symbols() and count_bytes:
            weighed.append(size)
        return size

    monkeypatch.setattr(GraphLowering, "get_dep_size_hint", recorded)
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.RMSNorm(32), nn.Linear(32, 64), nn.SiLU())
    ids = torch.randint(0, 50, (4, 32))
    ids[:, :24] = ids[0, :24]
    compiled = torch.compile(model, backend="radix", options={"fold": "always"})
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled(ids)
    # Of a bound of 128: less than the 8192 that are likely otherwise.
    assert 128 * 32 * 4 in weighed
    assert min(weighed) > 0


def test_wrapped_tensors_are_taken_apart_and_put_together() -> None:
    inner = TwoTensor(torch.arange(3.0), torch.ones(3))
    nested = TwoTensor(inner, TwoTensor(torch.zeros(3), torch.full((3,), 2.0)))
    inputs = [torch.eye(2), nested, 7, inner]
    flat = internals.flatten_subclasses(inputs)
    assert [type(value) for value in flat] == [torch.Tensor] * 5 + [int] + [torch.Tensor] * 2
    again = internals.unflatten_subclasses(inputs, iter(flat))
    assert again[0] is inputs[0]
    assert again[2] == 7
    assert type(again[1]) is type(again[1].a) is type(again[3]) is TwoTensor
    assert again[1].a.b is inner.b


def test_graph_breaks_are_counted_by_reason() -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch._dynamo.reset()
    internals.forget_graph_breaks()
    torch.compile(breaks, backend="eager")(torch.ones(2))
    assert list(internals.graph_breaks().values()) == [1]
    internals.forget_graph_breaks()
    assert internals.graph_breaks() == {}


def test_a_trace_is_kept_only_where_one_is_asked_for() -> None:
    asked: list[int] = []
    internals.keep_artifact("name", "string", lambda: str(asked.append(1)))
    assert asked == []
    assert internals.debug_folder() is None


def test_the_class_of_what_is_compiled() -> None:
    """Of a module that was compiled itself nothing in the graph says it."""
    seen: list[str | None] = []

    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
        seen.append(internals.compiled_module())
        return gm

    class Mine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    mine = Mine()
    torch.compile(mine, backend=backend)(torch.ones(2))
    torch.compile(lambda x: mine(x) * 2, backend=backend)(torch.ones(2))
    assert seen == ["Mine", None]
    assert internals.compiled_module() is None


def test_cuda_graphs_are_a_setting_of_inductors() -> None:
    assert internals.records_cuda_graphs("inductor", "reduce-overhead", {})
    assert not internals.records_cuda_graphs("inductor", "reduce-overhead", {"triton.cudagraphs": False})
    assert not internals.records_cuda_graphs("inductor", None, {})
    assert not internals.records_cuda_graphs("aot_eager", "reduce-overhead", {})
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert internals.records_cuda_graphs("inductor", None, {})
        assert not internals.records_cuda_graphs("inductor", None, {"triton.cudagraphs": False})


def test_inductor_keeps_added_dependencies() -> None:
    """Torch 2.11 drops them: sums into the gradient of a table then came in front of its zeros, and it was all zero."""

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(6, 8), nn.Linear(8, 8, bias=False)
            self.table = nn.Parameter(torch.randn(8))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids) * 1.5
            best, at = x.topk(6, -1)
            y = x + best.sum(-1, keepdim=True) + self.table[at].mean(-1, keepdim=True)
            return self.layer(x).tanh() + x + y

    torch.manual_seed(0)
    model, ids = (
        Looks().double(),
        torch.tensor([[3, 5, 1, 1, 0, 0], [3, 5, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0], [3, 1, 0, 0, 0, 0]]),
    )
    compiled = torch.compile(model, backend="radix", options={"fold": "always", "strict": True})
    factor, weights = torch.randn(4, 6, 8, dtype=torch.float64), list(model.parameters())
    ours, plain = (torch.autograd.grad((run(ids) * factor).sum(), weights) for run in (compiled, model))
    for gradient, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    assert radix_compile.stats().folded_calls == 1


def test_a_result_times_one_is_not_overwritten_by_the_backward_pass() -> None:
    """Inductor returned the operand, of which AOTAutograd no longer knew that the backward pass may not write to it."""
    layer = nn.Linear(8, 8).double()

    def first_sequence(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x + layer(x), (8,))[:1] * torch.ones(6, 8, dtype=x.dtype)

    x = torch.randn(2, 6, 8, dtype=torch.float64)
    result = torch.compile(first_sequence, dynamic=False)(x)
    result.sum().backward()
    torch.testing.assert_close(result, first_sequence(x), rtol=1e-9, atol=1e-9)

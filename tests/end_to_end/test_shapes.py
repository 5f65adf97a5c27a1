"""Equal sizes change nothing, ids may have any integer dtype and layout, and new lengths do not recompile."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.utils import counters

import radix_compile
from tests.models import VOCABULARY, build, compare, paths, shared_batch
from tests.tiers import slow_unless

EAGER = {"inner_backend": "aot_eager", "fold": "always", "strict": True}
COLLISIONS = {
    "seq == hidden": (4, 32, {}),
    "seq == head_dim": (3, 8, {}),
    "seq == heads": (3, 4, {}),
    "seq == half the width": (3, 16, {}),
    "batch == heads": (4, 12, {}),
    "batch == kv heads": (2, 12, {}),
    "batch == seq": (12, 12, {}),
    "batch == seq == heads": (4, 4, {}),
    "batch == layers == kv heads": (2, 12, {}),
    "batch == head_dim": (8, 12, {}),
    "seq == vocabulary": (3, VOCABULARY, {}),
    "seq == intermediate": (3, 48, {}),
    "all four": (4, 4, {"head_dim": 4, "hidden_size": 16, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize(
    "name", slow_unless(lambda name: name in ("batch == seq == heads", "batch == head_dim", "all four"), COLLISIONS)
)
@pytest.mark.parametrize("kind", ["Qwen3", pytest.param("GPT2", marks=pytest.mark.slow)])
def test_a_size_that_equals_another(kind: str, name: str) -> None:
    batch, seq, sizes = COLLISIONS[name]
    model = build(kind, attention="eager", **({"num_hidden_layers": 1, **sizes} if kind == "Qwen3" else {"n_layer": 1}))
    ids = shared_batch(batch, seq, shared=seq - 2)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    compare(model, torch.compile(model, backend="radix", options=EAGER), ids, attention_mask=mask, use_cache=False)
    assert radix_compile.stats().compact_tokens == paths(ids, mask) < ids.numel()


@pytest.mark.parametrize("dtype", slow_unless(lambda dtype: dtype == torch.int32, [torch.int32, torch.int64]))
def test_token_ids_of_any_integer_type_and_layout(dtype: torch.dtype) -> None:
    model = build("Qwen3", num_hidden_layers=1)
    compiled = torch.compile(model, backend="radix", options=EAGER)
    ids = shared_batch(4, 12, 8).to(dtype)
    strided = ids.t().contiguous().t()
    assert not strided.is_contiguous()
    compare(model, compiled, ids)
    compare(model, compiled, strided)
    stats = radix_compile.stats()
    assert stats.folded_calls == 2
    assert stats.compact_tokens == 2 * paths(ids)


def test_identical_sequences_and_nothing_shared() -> None:
    model = build("Qwen3", num_hidden_layers=1)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "aot_eager", "fold": 0.95})
    compare(model, compiled, shared_batch(4, 12, 12))
    stats = radix_compile.stats()
    assert (stats.tokens, stats.compact_tokens) == (48, 12)
    radix_compile.reset_stats()
    ids = shared_batch(4, 12, 0)
    ids[:, 0] = torch.arange(3, 7)
    compare(model, compiled, ids)
    stats = radix_compile.stats()
    assert (stats.calls, stats.folded_calls) == (1, 0)
    assert stats.plain_calls == {"too little is shared": 1}


def test_a_batch_of_one_goes_straight_to_the_inner_backend(recwarn: pytest.WarningsRecorder) -> None:
    model = build("Qwen3", num_hidden_layers=1)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "aot_eager", "strict": True})
    compare(model, compiled, shared_batch(1, 12, 12))
    stats = radix_compile.stats()
    assert (stats.graphs, stats.plain_compiles, stats.folded_compiles, stats.calls) == (1, 1, 0, 0)
    assert not [warning for warning in recwarn if "radix" in str(warning.message)]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embedding(ids))


@pytest.mark.parametrize("options", [{"fold": 0.5}, {"min_tokens": 1000}, {"fold": 0.7}])
def test_the_options_that_choose_between_the_programs(options: dict[str, float]) -> None:
    model = MLP()
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "eager", **options})
    with torch.no_grad():
        compiled(shared_batch(4, 12, 6))  # 6 + 4 * 6 of 48 rows: 0.625
    stats = radix_compile.stats()
    expected = {"fold": "too little is shared", "min_tokens": "fewer rows than min_tokens"}
    folds = options.get("fold", 0) > 0.625
    assert stats.plain_calls == ({} if folds else {expected[name]: 1 for name in options})
    assert stats.folded_calls == folds


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("multiple", "padded"), [(16, 32), (40, 40), (10**12, 48)])
def test_pad_multiple_of(multiple: int, padded: int, dynamic: bool) -> None:
    """The batch has 48 rows, and padding stops there."""
    model = MLP()
    sizes: list[int] = []

    def inner(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        def run(*args: torch.Tensor) -> object:
            sizes.append(len(args[-2]))
            return gm(*args)

        return run

    backend = radix_compile.RadixBackend(inner_backend=inner, fold="always", pad_multiple_of=multiple)
    compare(model, torch.compile(model, backend=backend, dynamic=dynamic), shared_batch(4, 12, 6))
    assert sizes == [padded]
    assert radix_compile.stats().compact_tokens == 30


@pytest.mark.parametrize("dims", [[0], [1], [0, 1]])
def test_sizes_that_are_marked_unbacked(dims: list[int]) -> None:
    """A graph with unbacked sizes runs plain, with one warning."""
    model = MLP()
    ids = shared_batch(4, 12, 6)
    mark_unbacked(ids, dims)
    compiled = torch.compile(model, backend="radix", options={"inner_backend": "aot_eager", "fold": "always"})
    with pytest.warns(UserWarning, match=rf"nothing folds: dimension {dims[0]} of L\['ids'\] is an unbacked symbol"):
        compare(model, compiled, ids)
    assert radix_compile.stats().folded_calls == 0


class Picks(nn.Module):
    """Token-wise layers, then a selection of rows that depends on the data."""

    def __init__(self, by_number: bool) -> None:
        super().__init__()
        self.rows, self.head, self.by_number = MLP(), nn.Linear(32, 8), by_number

    def forward(self, ids: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        if not self.by_number:
            return self.head(self.rows(ids)[shown.nonzero(as_tuple=True)])
        count = shown[:, 0].sum().item()
        torch._check(count >= 1)
        torch._check(count <= 4)
        return self.head(self.rows(ids)[:count])


@pytest.mark.parametrize("by_number", [True, False])
def test_sizes_that_depend_on_the_data(by_number: bool) -> None:
    model = Picks(by_number)
    ids, shown = shared_batch(4, 12, 6), torch.arange(48).view(4, 12) < 30
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        compare(model, torch.compile(model, backend="radix", options=EAGER, fullgraph=True), ids, shown)
    assert radix_compile.stats().folded_calls == 1


@pytest.mark.slow  # it compiles with inductor
def test_twenty_batches_compile_nothing_new() -> None:
    """Once the shapes are symbols, neither Dynamo nor inductor compiles again."""
    model = build("Qwen3", num_hidden_layers=1)
    compiled = torch.compile(model, backend="radix", options={"fold": "always"}, dynamic=True)
    compare(model, compiled, shared_batch(4, 12, 8))
    compare(model, compiled, shared_batch(5, 20, 8))
    before = (dict(counters["stats"]), dict(counters["inductor"]), dict(counters["aot_autograd"]))
    radix_compile.reset_stats()
    for seed in range(20):
        batch, seq = 2 + seed % 7, 10 + 3 * seed
        compare(model, compiled, shared_batch(batch, seq, shared=seed % seq, seed=seed))
    assert (dict(counters["stats"]), dict(counters["inductor"]), dict(counters["aot_autograd"])) == before
    stats = radix_compile.stats()
    assert (stats.graphs, stats.folded_calls) == (0, 20)


def test_plain_program_through_inductor_when_nothing_is_shared() -> None:
    model = MLP()
    compiled = torch.compile(model, backend="radix", options={"fold": 0.95})
    for _ in range(2):
        compare(model, compiled, torch.arange(3, 51).view(4, 12))
    assert radix_compile.stats().folded_calls == 0
    compare(model, compiled, shared_batch(4, 12, 12))
    assert radix_compile.stats().folded_calls == 1
    assert radix_compile.stats().graphs == 1


def test_by_name_without_an_import() -> None:
    program = (
        "import sys, torch; "
        "m = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8)); "
        "torch.compile(m, backend='radix', options={'inner_backend': 'eager'})(torch.zeros(3, 5, dtype=torch.long)); "
        "print(sys.modules['radix_compile'].__name__, 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["radix_compile", "False"]


def test_importing_the_package_is_cheap() -> None:
    program = "import sys, radix_compile; print(sorted({'torch', 'triton', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_folded_program_that_does_not_compile_leaves_the_plain_one() -> None:
    def inner(gm: torch.fx.GraphModule, inputs: list[object]) -> object:
        if any(node.name == "radix_fold" for node in gm.graph.nodes):
            raise RuntimeError("out of registers")
        return gm.forward

    model = MLP()
    with pytest.warns(UserWarning, match="cannot compile the folded program: RuntimeError: out of registers"):
        compare(
            model,
            torch.compile(model, backend=radix_compile.RadixBackend(inner_backend=inner, fold="always")),
            shared_batch(4, 12, 8),
        )
    assert radix_compile.stats().folded_calls == 0
    torch._dynamo.reset()
    with pytest.raises(Exception, match="out of registers"), torch.no_grad():
        torch.compile(model, backend=radix_compile.RadixBackend(inner_backend=inner, strict=True))(
            shared_batch(4, 12, 8)
        )

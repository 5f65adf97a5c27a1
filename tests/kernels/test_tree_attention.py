"""Attention on the prefix tree: the lowerings against the reference, and the reference against attention on rows."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radix_compile.ir.plan_arrays import Code, plan_arrays
from radix_compile.kernels import attention_reference, torch_attention, tree_attention
from radix_compile.kernels.tree_arguments import ScoreOptions, TreeArrays
from radix_compile.plan import triton_tiles as triton_tiles_module
from radix_compile.plan.prefix_plan import PrefixPlan
from radix_compile.plan.torch_tiles import torch_tiles
from radix_compile.plan.triton_tiles import ROWS, triton_tiles
from tests.models import DEVICE, features_apart
from tests.tiers import slow_unless

radix = torch.ops.radix
OPCHECKS = ("test_schema", "test_faketensor")
"""Of an op that has no gradient of its own."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prefixes(batch: int, seq: int, *shared: tuple[int, int]) -> Tensor:
    """Ids ``[batch, seq]``: for each ``(columns, every)``, runs of ``every`` sequences have those columns in common."""
    ids = torch.arange(batch * seq).view(batch, seq)
    for columns, every in shared:
        for first in range(0, batch, every):
            ids[first : first + every, :columns] = ids[first, :columns]
    return ids


def chain(batch: int, seq: int) -> Tensor:
    """Each sequence goes on where half of the one before has ended: deep, with branches all along."""
    ids = torch.zeros(batch, seq, dtype=torch.long)
    for b in range(1, batch):
        ids[b] = ids[b - 1]
        ids[b, b * seq // batch :] = b
    return ids


def few(batch: int, seq: int) -> Tensor:
    return torch.randint(0, 3, (batch, seq), generator=generator())


BATCHES = {
    "one sequence": prefixes(1, 70),
    "nothing shared": prefixes(3, 40),
    "all equal": prefixes(4, 20, (20, 4)),
    "a prefix": prefixes(5, 100, (75, 5)),
    "levels": prefixes(12, 90, (30, 12), (60, 4), (80, 2)),
    "one-row suffixes": prefixes(150, 30, (29, 150)),
    "short": few(90, 4),
    "a tree": few(30, 17),
    "a chain": chain(20, 120),
    "long": prefixes(4, 400, (150, 4)),
    "a long prefix": prefixes(3, 300, (210, 3)),
}


def tree_of(ids: Tensor, shown: Tensor | None = None, filled_up: bool = False, **options: Any) -> TreeArrays:
    """The tree of a batch; keys that are not ``shown`` ``[B, S]`` are hidden."""
    plan = PrefixPlan.from_rows(*((ids,) if shown is None else (ids, shown)), **options)
    begin, end = plan.tree(None if shown is None else shown.flatten().numpy() != 0)
    tiles = triton_tiles(plan, begin, end)
    lists = torch_tiles(plan, begin, end, WINDOWS).by_name() | (tiles.filled_up() if filled_up else tiles).by_name()
    arrays = {"fold": plan.fold, "scatter": plan.scatter, "begin": begin, "end": end, **lists}
    return TreeArrays(**{name: torch.from_numpy(array).to(DEVICE) for name, array in arrays.items()})


def for_code(code: Code, tree: TreeArrays) -> TreeArrays:
    """The tree with the tiles for that code alone, as the op takes it."""
    names = {array.name for array in plan_arrays({"tree", code})}
    return TreeArrays(**{name: array for name, array in tree._asdict().items() if name in names})


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    bias: Tensor | None


def inputs(
    tree: TreeArrays,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (16, 16),
    sinks: bool = False,
    ids: Tensor | None = None,
    **options: Any,
) -> Inputs:
    """Random, in memory ``[1, T', H, E]``. A ``bias`` is written like "B1SS", and hides keys if it ``shows`` some."""
    source, nodes = generator(1), len(tree.fold)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(DEVICE, options.get("dtype", torch.float32))

    q, k, v = (
        random(1, nodes, h, e).transpose(1, 2)
        for h, e in ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]))
    )
    bias = None
    if "bias" in options:
        assert ids is not None
        sizes_of = {"B": ids.shape[0], "S": ids.shape[1], "H": heads[0], "1": 1}
        bias = random(*(sizes_of[size] for size in options["bias"]))
        if options.get("shows"):
            bias = (bias > 0.5) | torch.eye(ids.shape[1], dtype=torch.bool, device=DEVICE)
    return Inputs(q, k, v, random(heads[0]) if sinks else None, bias)


CARRIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head for each key": {"heads": (3, 3)},
    "a window": {"window": 7},
    "soft-capped": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "other value sizes": {"sizes": (24, 8)},
    "a bias": {"bias": "BHSS"},
    "a bias by head and key": {"bias": "1H1S"},
    "a mask": {"bias": "B1SS", "shows": True},
    "a negative scale": {"scale": -0.3},
    "no scale": {"scale": 0.0},
    "all of it": {"sinks": True, "softcap": 3.0, "window": 9, "sizes": (24, 8), "bias": "1HSS"},
}


WINDOWS = (None, 1, 3, 7, 9)
"""All windows of the tests here."""


def run(code: Any, tree: TreeArrays, given: Inputs, scale: float = 0.3, **score_options: Any) -> Any:
    return code(*given[:3], tree, ScoreOptions(given.sinks, given.bias, scale, **score_options))


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is about the tensors, and what is about the op."""
    ours = {name: value for name, value in options.items() if name in ("window", "softcap", "scale")}
    return {name: value for name, value in options.items() if name not in ours}, ours


def assert_near(ours: Tensor, exact: Tensor, plain: Tensor) -> None:
    """As near to the float64 result as the reference in the same dtype is, or nearly."""
    bound = 4 * (plain.double() - exact).abs().max() + 4 * torch.finfo(plain.dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= bound


def doubled(given: Inputs) -> Inputs:
    return Inputs(*(one.double() if one is not None and one.is_floating_point() else one for one in given))


# ------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("bias", [None, "1HSS", "11SS", "1H1S"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("ids", BATCHES.values(), ids=BATCHES.keys())
def test_the_reference_is_attention_on_rows(ids: Tensor, window: int | None, bias: str | None) -> None:
    """Folded from the rows and scattered to them, it is torch's attention."""
    tree, (batch, seq) = tree_of(ids), ids.shape
    given = doubled(inputs(tree, ids=ids, **({} if bias is None else {"bias": bias})))
    compact, _ = run(attention_reference.tree_attention, tree, given, window=window)
    full = [one[0][:, tree.scatter].view(-1, batch, seq, 16).transpose(0, 1) for one in given[:3]]
    column = torch.arange(seq, device=DEVICE)
    behind = column[:, None] - column
    mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    mask = torch.zeros(mask.shape, dtype=torch.float64, device=DEVICE).masked_fill(~mask, float("-inf"))
    mask = mask if given.bias is None else mask + given.bias
    expected = F.scaled_dot_product_attention(*full, attn_mask=mask, scale=0.3, enable_gqa=True)
    ours = compact[0][:, tree.scatter].view(-1, batch, seq, 16).transpose(0, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_bias_is_read_in_the_row_of_the_query() -> None:
    """Where paths start at different columns, and a node's ancestors are in another row at other columns."""
    start = torch.tensor([3, 0, 5])
    ids = torch.tensor([[7] * s + [1, 2, 3, 4, 5, 6, 8, 9, 10, 11][: 10 - s] for s in start.tolist()])
    tree = tree_of(ids, start=start.numpy())
    assert len(tree.fold) == 10 + 8  # nothing of the padding is shared
    given = doubled(inputs(tree))
    distance = torch.arange(10)[:, None] - torch.arange(10)
    bias = -0.3 * distance.to(given.query).expand(1, 4, 10, 10)
    ours, _ = run(attention_reference.tree_attention, tree, given._replace(bias=bias))
    depth = tree.fold - tree.begin
    scores = given.query[0] @ given.key[0].repeat_interleave(2, 0).mT * 0.3 - 0.3 * (depth[:, None] - depth)
    visible = attention_reference.visible_pairs(tree)
    expected = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ given.value[0].repeat_interleave(2, 0)
    seen = visible.any(1)
    torch.testing.assert_close(ours[0][:, seen], expected[:, seen])


def test_hidden_keys_are_seen_by_nobody_and_blind_nodes_are_zero() -> None:
    ids = prefixes(3, 6, (4, 3))
    shown = torch.ones(3, 6, dtype=torch.long)
    shown[:, :2] = 0
    fully_masked = shown.cumsum(1) == 0
    tree = tree_of(ids, shown, unique=fully_masked)
    given = doubled(inputs(tree))
    result, total = run(attention_reference.tree_attention, tree, given)
    rows = result[0][:, tree.scatter].view(-1, 3, 6, 16)
    assert (rows[:, :, :2] == 0).all()
    assert (rows[:, :, 2:] != 0).all()
    assert (total[:, tree.scatter.view(3, 6)[:, :2]] == float("inf")).all()
    first = rows[:, :, 2]  # it sees itself alone
    own = given.value[0][:, tree.scatter.view(3, 6)[:, 2]].repeat_interleave(2, 0)
    torch.testing.assert_close(first, own)


# ---------------------------------------------------------------------------------------------------- the lowerings


triton_attention = pytest.importorskip("radix_compile.kernels.triton_attention", reason="needs Triton")
triton_attention_backward = pytest.importorskip("radix_compile.kernels.triton_attention_backward")
triton_tree = pytest.importorskip("radix_compile.kernels.triton_tree")
FORWARD = {"tiles": torch_attention.tree_attention, "triton": triton_attention.tree_attention}
BACKWARD = {
    "tiles": torch_attention.tree_attention_backward,
    "triton": triton_attention_backward.tree_attention_backward,
}


@pytest.fixture(autouse=True)
def long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each step, however many keys are in it."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_tree, "FINE", {"N": 64})


CASES = [
    (batch, name)
    for batch in BATCHES
    for name in CARRIED
    if name == "plain" or batch in ("levels", "a tree", "a long prefix")
]


@pytest.mark.parametrize(("batch", "name"), CASES)
@pytest.mark.parametrize("code", FORWARD)
def test_forward(code: str, batch: str, name: str) -> None:
    ids = BATCHES[batch]
    tree, (about, score_options) = tree_of(ids), split(CARRIED[name])
    given = inputs(tree, ids=ids, **about)
    expected = run(attention_reference.tree_attention, tree, doubled(given), **score_options)
    plain = run(attention_reference.tree_attention, tree, given, **score_options)
    for ours, exact, ordinary in zip(run(FORWARD[code], tree, given, **score_options), expected, plain, strict=True):
        assert_near(ours, exact, ordinary)


def few_blocks(batch: str, name: str) -> bool:
    """The interpreter takes seconds for many; each path through the kernels is taken with few, too."""
    return batch not in ("long", "a chain") and (batch == "levels" or name in ("plain", "all of it"))


@pytest.mark.parametrize(("batch", "name"), slow_unless(few_blocks, CASES))
@pytest.mark.parametrize("code", FORWARD)
def test_gradients(code: str, batch: str, name: str) -> None:
    ids = BATCHES[batch]
    tree, (options, score_options) = tree_of(ids), split(CARRIED[name])
    given = inputs(tree, ids=ids, **options)
    grad = inputs(tree, options.get("heads", (4, 4)), options.get("sizes", (16, 16))).value

    def by_autograd(given: Inputs) -> tuple[Tensor, ...]:
        leaves = [one.detach().requires_grad_() for one in given[:3]]
        result, _ = run(attention_reference.tree_attention, tree, Inputs(*leaves, *given[3:]), **score_options)
        return torch.autograd.grad(result, leaves, grad.to(result.dtype))

    exact, plain = by_autograd(doubled(given)), by_autograd(given)
    result, total = run(FORWARD[code], tree, given, **score_options)
    ours = BACKWARD[code](
        grad, *given[:3], result, total, tree, ScoreOptions(given.sinks, given.bias, **{"scale": 0.3, **score_options})
    )
    for one, expected, ordinary in zip(ours, exact, plain, strict=False):
        assert_near(one, expected, ordinary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["plain", "soft-capped", "sinks", "other value sizes", "a bias"])
def test_gradients_of_large_scores_that_are_equal(name: str, dtype: torch.dtype) -> None:
    """Log-sum-exp has no digits left for the logarithm of the number of keys that share a row's weight."""
    ids = BATCHES["a tree"]
    tree, (options, score_options) = tree_of(ids), split(CARRIED[name])
    given = inputs(tree, ids=ids, dtype=dtype, **options)
    size = 1e9 if dtype == torch.float32 else 1e17
    values = given.value.detach().requires_grad_()
    given = given._replace(query=torch.full_like(given.query, size), key=torch.ones_like(given.key), value=values)
    grad = inputs(tree, (4, 4), options.get("sizes", (16, 16)), dtype=dtype).value
    expected, _ = run(attention_reference.tree_attention, tree, given, **score_options)
    (by_value,) = torch.autograd.grad(expected, values, grad)
    with torch.no_grad():
        result, total = run(torch_attention.tree_attention, tree, given, **score_options)
        torch.testing.assert_close(result, expected.detach())
        about = ScoreOptions(given.sinks, given.bias, **{"scale": 0.3, **score_options})
        ours = torch_attention.tree_attention_backward(grad, *given[:3], result, total, tree, about)[2]
    torch.testing.assert_close(ours, by_value)


@pytest.mark.parametrize("step", slow_unless(lambda step: step == 16, [16, 32]))
@pytest.mark.parametrize("name", slow_unless(lambda name: name == "all of it", ["plain", "all of it"]))
def test_steps_of_other_sizes(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    monkeypatch.setattr(triton_tree, "FINE", {**triton_tree.FINE, "N": step})
    for batch in ("a prefix", "short"):
        test_gradients("triton", batch, name)


@pytest.mark.parametrize(
    "name", slow_unless(lambda name: name == "all of it", ["plain", "all of it", "one head for each key"])
)
def test_descendants_in_parts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The gradients of a tile's keys are sums over the parts of its descendants."""
    monkeypatch.setattr(triton_tiles_module, "MIN_PART_KEYS", 64)
    for batch in ("levels", "one-row suffixes"):
        divided = tree_of(BATCHES[batch]).divided
        assert divided is not None
        assert len(divided)
        test_gradients("triton", batch, name)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "all of it", ["plain", "all of it"]))
@pytest.mark.parametrize("batch", slow_unless(lambda batch: batch == "levels", ["levels", "a long prefix"]))
def test_lists_that_are_filled_up_change_nothing(monkeypatch: pytest.MonkeyPatch, batch: str, name: str) -> None:
    monkeypatch.setattr(triton_tiles_module, "MIN_PART_KEYS", 64)
    ids, (options, score_options) = BATCHES[batch], split(CARRIED[name])
    tree, longer = tree_of(ids), tree_of(ids, filled_up=True)
    sizes = [(len(one), len(other)) for one, other in zip(tree, longer, strict=True) if one is not None is not other]
    assert any(few < more for few, more in sizes)
    given = inputs(tree, ids=ids, **options)
    grad = inputs(tree, options.get("heads", (4, 4)), options.get("sizes", (16, 16))).value
    found = []
    for each in (tree, longer):
        result, total = run(FORWARD["triton"], each, given, **score_options)
        about = ScoreOptions(given.sinks, given.bias, **{"scale": 0.3, **score_options})
        found.append([result, total, *BACKWARD["triton"](grad, *given[:3], result, total, each, about)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", ["plain", "all of it"])
def test_schema_shapes_and_gradient_of_the_op(name: str) -> None:
    tree, (about, score_options) = tree_of(few(3, 4)), split(CARRIED[name])
    *given, bias = inputs(tree, ids=few(3, 4), **about)
    given = [None if one is None else one.requires_grad_() for one in given]
    tree = for_code("torch", tree)
    arguments = *given[:3], *tree, given[3], bias, 0.3, score_options.get("window"), score_options.get("softcap")
    torch.library.opcheck(radix.tree_attention.default, arguments)
    result, total = (one.detach() for one in radix.tree_attention(*arguments))
    plain = [one.detach() if isinstance(one, Tensor) else one for one in arguments]
    torch.library.opcheck(
        radix.tree_attention_backward.default, (result, *plain[:3], result, total, *plain[3:]), test_utils=OPCHECKS
    )


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts them on the current one, whichever that is."""
    made_current: list[torch.device] = []

    def device_of(tensor: Tensor) -> contextlib.nullcontext[None]:
        made_current.append(tensor.device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    tree = for_code("triton", tree_of(few(3, 4)))
    query, key, value, *_ = inputs(tree)
    score_options = None, None, 0.3, None, None
    result, total = radix.tree_attention(query, key, value, *tree, *score_options)
    radix.tree_attention_backward(result, query, key, value, result, total, *tree, *score_options)
    assert made_current == [query.device] * 2


def test_the_gradient_of_sinks() -> None:
    tree, (about, score_options) = for_code("torch", tree_of(few(3, 4))), split(CARRIED["all of it"])
    given = doubled(inputs(tree, ids=few(3, 4), **about))
    assert given.sinks is not None

    def attended(sinks: Tensor) -> Tensor:
        about = sinks, given.bias, 0.3, score_options["window"], score_options["softcap"]
        result: Tensor = radix.tree_attention(*given[:3], *tree, *about)[0]
        return result

    torch.autograd.gradcheck(attended, given.sinks.requires_grad_())


LARGE = {
    "one sequence": prefixes(1, 4096),
    "nothing shared": prefixes(32, 256),
    "one prefix of many": prefixes(4096, 64, (63, 4096)),
    "levels": prefixes(256, 300, (100, 256), (200, 8), (280, 2)),
    "a chain": chain(64, 512),
    "a tree": few(2048, 32),
}


@pytest.mark.parametrize("ids", LARGE.values(), ids=LARGE.keys())
def test_work_grows_with_the_pairs_of_nodes_and_ancestors(ids: Tensor) -> None:
    """And not with the square of the nodes: at most by a factor, for what tiles hide of what they compute."""
    plan = PrefixPlan.from_rows(ids)
    begin, end = plan.tree()
    arrays = tree_of(ids)
    computed = 0.0
    for tile in torch_attention.tiles(arrays, None, True):
        rows = tile.stop - tile.start
        computed += rows * ((rows + 1) / 2 if tile.mask is None else len(tile.nodes))
    assert plan.pairs <= computed <= 3 * plan.pairs
    lists = triton_tiles(plan, begin, end)
    listed = sum(stop - start for start, stop, _ in lists.stretches.tolist()) + len(lists.keys)
    in_tiles = len(plan.fold) * ROWS
    assert listed * ROWS <= 3.5 * plan.pairs + in_tiles


@pytest.mark.parametrize("code", FORWARD)
def test_inputs_of_any_strides(code: str) -> None:
    tree = tree_of(few(30, 17))
    given = inputs(tree, sinks=True)
    assert given.sinks is not None
    strided = Inputs(*map(features_apart, given[:3]), torch.stack([given.sinks, -given.sinks], 1)[:, 0], None)
    assert {one.stride(-1) for one in strided if one is not None} == {len(tree.fold), 2}
    result, total = run(FORWARD[code], tree, given)
    assert all(map(torch.equal, run(FORWARD[code], tree, strided), (result, total)))
    for grad, like in (
        (given.query, features_apart(given.query)),
        (torch.ones_like(result), result.new_ones(()).expand(result.shape)),
    ):
        expected = BACKWARD[code](grad, *given[:3], result, total, tree, ScoreOptions(given.sinks, None, 0.3))
        score_options = ScoreOptions(strided.sinks, None, 0.3)
        ours = BACKWARD[code](like, *strided[:3], features_apart(result), total, tree, score_options)
        assert all(map(torch.equal, ours, expected))


def test_launches_after_others() -> None:
    """What was compiled for tensors that start at a multiple of 16 bytes must not be used for others."""
    tree = tree_of(few(30, 17))
    given = inputs(tree)

    def moved(tensor: Tensor) -> Tensor:
        place = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
        assert place.data_ptr() % 16
        return place

    def all_of(given: Inputs) -> tuple[Tensor, ...]:
        result, total = run(FORWARD["triton"], tree, given)
        return (
            result,
            total,
            *BACKWARD["triton"](result, *given[:3], result, total, tree, ScoreOptions(None, None, 0.3)),
        )

    expected = all_of(given)
    for again in (given, Inputs(*map(moved, given[:3]), None, None), given):
        assert all(map(torch.equal, all_of(again), expected))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("code", FORWARD)
def test_tiles_in_which_no_node_sees_a_key(code: str, window: int | None) -> None:
    """Rows of padding on the left, which are outside of the tree, fill whole tiles."""
    shown = torch.ones(3, 300, dtype=torch.long)
    shown[:, :280] = 0
    tree = tree_of(prefixes(3, 300, (290, 3)), shown, unique=shown.cumsum(1) == 0)
    given = inputs(tree)
    outside = tree.begin == tree.fold
    assert outside[-512:].all()
    result, total = run(FORWARD[code], tree, given, window=window)
    expected, sums = run(attention_reference.tree_attention, tree, given, window=window)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, sums, rtol=1e-4, atol=1e-5)
    gradients = BACKWARD[code](result, *given[:3], result, total, tree, ScoreOptions(None, None, 0.3, window))
    assert all(one.isfinite().all() for one in gradients)
    assert (gradients[0][:, :, -512:] == 0).all()


def test_a_bias_has_no_gradient() -> None:
    tree = tree_of(few(3, 4))
    given = inputs(tree, ids=few(3, 4), bias="1HSS")
    assert given.bias is not None
    result, _ = radix.tree_attention(*given[:3], *tree, None, given.bias.requires_grad_(), 0.3, None, None)
    with pytest.raises(RuntimeError, match="no gradient for its bias"):
        result.sum().backward()


@pytest.mark.parametrize("code", FORWARD)
def test_a_bias_may_hide_all_keys(code: str) -> None:
    tree, shown = tree_of(few(30, 17)), torch.arange(17) % 3 > 0
    given = inputs(tree)._replace(bias=shown[:, None].expand(1, 4, 17, 17).to(DEVICE))
    result, total = run(FORWARD[code], tree, given)
    fully_masked = ~shown[tree.fold.cpu() % 17]
    assert fully_masked.any()
    assert (result[0].cpu()[:, fully_masked] == 0).all()
    assert (total.cpu()[:, fully_masked] == float("inf")).all()
    plain, _ = run(FORWARD[code], tree, inputs(tree))
    torch.testing.assert_close(result[0].cpu()[:, ~fully_masked], plain[0].cpu()[:, ~fully_masked])
    grads = BACKWARD[code](result, *given[:3], result, total, tree, ScoreOptions(None, given.bias, 0.3))
    assert (grads[0][0].cpu()[:, fully_masked] == 0).all()
    assert all(one.isfinite().all() for one in grads)


def test_tiles_are_those_of_the_plan_that_is_given() -> None:
    """Of several plans in turn, one of them with keys hidden."""
    shown = (torch.arange(90) % 7 > 0).long().expand(12, 90)
    trees = [tree_of(BATCHES["levels"]), tree_of(BATCHES["levels"], shown), tree_of(BATCHES["a prefix"])]
    for tree in [*trees, *trees]:
        given = doubled(inputs(tree))
        ours, expected = (run(code.tree_attention, tree, given) for code in (torch_attention, attention_reference))
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


class _OnGPU(NamedTuple):
    """What ``code_for`` looks at, of a tensor on a GPU that need not be there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device = torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "size", "memory", "code"),
    [
        (torch.bfloat16, 128, 227, "triton"),
        (torch.bfloat16, 128, 163, "triton"),  # an A100
        (torch.bfloat16, 128, 99, "triton"),  # an L40S
        (torch.bfloat16, 192, 163, "triton"),
        (torch.bfloat16, 192, 99, "torch"),
        (torch.bfloat16, 128, 48, "torch"),
        (torch.float32, 128, 227, "triton"),
        (torch.float32, 256, 227, "torch"),
        (torch.float64, 64, 227, "torch"),
    ],
)
def test_which_code_runs(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, memory: int, code: str
) -> None:
    monkeypatch.setattr(tree_attention.internals, "shared_memory", lambda device: memory * 1024)
    one = _OnGPU(dtype, (1, 4, 10, size))
    assert tree_attention.code_for(one, one) == code  # type: ignore[arg-type]
    on_host = torch.empty(1, 4, 10, size, dtype=dtype)
    assert tree_attention.code_for(on_host, on_host) == "torch"


@pytest.mark.parametrize(("setting", "precision"), [("none", "ieee"), ("ieee", "ieee"), ("tf32", "tf32")])
def test_float32_is_multiplied_as_torch_is_told_to(setting: str, precision: str) -> None:
    heads, matmul = torch.zeros(1, 2, 3, 16), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = setting  # after which reading the setting of old, `allow_tf32`, may raise
        assert triton_tree.shape_of(heads, heads, heads, ScoreOptions(None, None, 1.0))["PRECISION"] == precision
    finally:
        matmul.fp32_precision = before

"""The benchmarks still run: what they measure is for whoever reads their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import bench_attention, bench_cuts, bench_index_kernels, bench_models, bench_stream
from benchmarks.bench_index_kernels import WIDTHS, Case
from benchmarks.prefix_batches import PrefixBatch, one_prefix, rerank, rerank_stream
from tests.models import build

CPU = torch.device("cpu")


@pytest.mark.slow
def test_index_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_index_kernels.main(["--device", "cpu", "--rows", "256", "--runs", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    # A machine, a header, four ops of each width and two of Q, K, V, for three batches.
    assert len(printed) == 2 + 3 * (4 * len(WIDTHS) + 2)
    assert sum("Q, K, V" in line for line in printed) == 6


def test_cuts() -> None:
    cuts = bench_cuts.cuts(Case(2, 6, 4), CPU, torch.float32, 32, (4, 2))
    assert len(cuts) == 5
    for _, program, inputs in cuts:
        results = program(*inputs)
        for result in results if isinstance(results, list) else [results]:
            assert result.isfinite().all()


def test_attention_is_the_same_every_way() -> None:
    for case in (one_prefix(3, 20, 5), rerank(2, 2, 5, 3)):
        given = bench_attention.Tensors(case, (4, 2, 16), CPU, torch.float32)
        calls = {name: call for name, _, call in bench_attention.ways(given)}
        kept = given.tree.scatter >= 0
        full = calls["full"]().transpose(1, 2).flatten(0, 1)[kept]
        assert case.is_padded == (len(full) < case.ids.numel())
        tree = calls["tree"]()[0].transpose(0, 1)[given.tree.scatter[kept]]
        torch.testing.assert_close(tree, full, rtol=1e-4, atol=1e-5)


def test_bounds_of_models() -> None:
    """Four tokens, of which three are distinct: six pairs of a query and a key, and five on the tree."""
    sizes = {"hidden": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "intermediate": 16}
    by_token, by_arithmetic = bench_models.bounds(one_prefix(2, 1, 1), sizes)
    weights = 8 * (16 + 8 + 48)
    assert by_token == 4 / 3
    assert by_arithmetic == (4 * weights + 2 * 6 * 8) / (3 * weights + 2 * 5 * 8)


@pytest.mark.parametrize("case", [one_prefix(4, 12, 5), rerank(2, 3, instruction=5, query=4)], ids=["prefix", "rerank"])
def test_reuse_by_hand_is_the_same_model(case: PrefixBatch) -> None:
    model = build("Qwen3", head="Model", vocab_size=30_000)
    with torch.no_grad():
        full = model(input_ids=case.ids, attention_mask=case.mask).last_hidden_state[:, case.prefix :]
        mask = case.mask if case.is_padded else None
        ours = bench_models.reuse(model, case.ids, mask, case.groups, case.prefix)
    kept = case.mask[:, case.prefix :] > 0
    torch.testing.assert_close(ours[kept], full[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [one_prefix(4, 12, 5), rerank(2, 3, instruction=5, query=4)], ids=["prefix", "rerank"])
def test_errors_of_models(case: PrefixBatch) -> None:
    """Of rounding, whichever rows a way computes, and not of rows behind the tokens; of a row that is wrong, more."""
    model = build("Qwen3", head="Model", vocab_size=30_000)
    ways = bench_models.Ways(model, case, CPU)
    wanted = bench_models.reference(model, case, CPU, backward=False)
    assert wanted[0].dtype == torch.float64
    with torch.no_grad():
        full = model(**ways.inputs).last_hidden_state
    kept = case.mask > 0
    full[~kept] = 5.0
    forms = {"radix": full, "reuse": full[:, case.prefix :], "packed": full[kept][None]}
    for name, states in forms.items():
        assert 0 < bench_models.distance(ways, name, [states], wanted, backward=False) < 1e-5
        wrong = states.clone()
        wrong[0, 0] += 1
        assert bench_models.distance(ways, name, [wrong], wanted, backward=False) > 0.01


def test_errors_of_gradients() -> None:
    model, case = build("Qwen3", head="Model", vocab_size=30_000), one_prefix(4, 12, 5)
    ways = bench_models.Ways(model, case, CPU)
    wanted = bench_models.reference(model, case, CPU, backward=True)
    parameters = list(model.parameters())
    for _ in range(2):  # nothing is left of the first time
        bench_models.step_without_gradients(parameters, lambda: model(**ways.inputs).last_hidden_state, backward=True)
    found = [one.grad for one in parameters]
    assert 0 < bench_models.distance(ways, "plain", found, wanted, backward=True) < 1e-5
    found[-1] = 2 * found[-1]
    assert bench_models.distance(ways, "plain", found, wanted, backward=True) > 1e-3


def test_all_ways_are_compiled_in_the_mode_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str | None] = []

    def record(call: object, mode: str | None = None, options: dict[str, Any] | None = None, **_: Any) -> object:
        modes.append(mode or (options or {})["mode"])
        return call

    monkeypatch.setattr(torch, "compile", record)
    ways = bench_models.Ways(build("Qwen3", head="Model"), rerank(2, 2, 5, 3), CPU, "reduce-overhead")
    for name in bench_models.NAMES:
        ways.make(name)
    assert modes == ["reduce-overhead"] * 7


@pytest.mark.parametrize("off", [0.0, 1e-4])
def test_a_wrong_model_fails_the_check(
    off: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(ways: bench_models.Ways, name: str) -> bench_models.Call:
        return lambda: ways.model(**ways.inputs).last_hidden_state + (off if name == "radix" else 0)

    monkeypatch.setattr(bench_models.Ways, "make", make)
    given = ["--device", "cpu", "--layers", "1", "--cases", "1", "--runs", "1", "--check"]
    assert bench_models.main([*given, "--ways", "plain", "radix"]) == (off > 0)
    captured = capsys.readouterr()
    assert captured.out.count("error") == 2
    assert ("more than twice" in captured.err) == (off > 0)
    with pytest.raises(SystemExit):
        bench_models.main([*given, "--ways", "radix"])


@pytest.mark.parametrize("left", [False, True])
def test_the_stream_of_reranking_batches(left: bool) -> None:
    for ids, mask in rerank_stream(3, queries=2, passages=3, left=left):
        batch = bench_stream.Batch(ids, mask, left)
        rows = torch.arange(6)
        closing = torch.stack([ids[row, batch.last[row] - 8 : batch.last[row] + 1] for row in rows])
        assert (closing == closing[0]).all()
        assert (mask[:, 0 if left else -1] == 1).any()
        packed, positions, starts, last = batch.packed()
        assert packed.shape == positions.shape == (1, int(mask.sum()))
        assert torch.equal(packed[0, last], ids[rows, batch.last])
        assert torch.equal(positions[0, starts[:-1].long()], torch.zeros(6, dtype=torch.long))
        lengths = mask.sum(1)
        assert torch.equal(positions[0, last], lengths - 1)
        # The instruction is there once, and each query too.
        assert lengths.max() < batch.distinct() <= int(lengths.sum()) - 5 * 60 - 4 * 6
        assert lengths.max() <= bench_stream.LONGEST

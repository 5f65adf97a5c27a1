"""The benchmarks still run: what they measure is for whoever reads their results."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_cuts, bench_index_kernels
from benchmarks.bench_index_kernels import WIDTHS, Case

CPU = torch.device("cpu")


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

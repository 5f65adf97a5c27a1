"""What is predicted from a few timed runs, and when another is needed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from radix_compile.passes.report import GraphReport
from radix_compile.plan.prefix_plan import PrefixPlan
from radix_compile.runtime.cost_model import PLAIN, CostModel, Counts, Timed, Work, fastest, predict
from tests.models import shared_batch

WORK = Work(by_node=90.0, by_head_node=10.0, by_tree_pair=2.0, by_pair=1.0)
CALL = Counts(rows=1000, nodes=200, head=200, pairs=10_000, tree_pairs=1000)
NAMES = ["full fold"]


def timed(plain: float, shared: float, unshared: float, rows: int = 1000) -> Timed:
    """Seconds of a call like ``CALL``."""
    whole = WORK.flops(CALL.unshared)
    points = {PLAIN: ((whole, plain),), "full fold": ((WORK.flops(CALL), shared), (whole, unshared))}
    return Timed(rows, points)


def test_counts_of_a_plan() -> None:
    counts = Counts.of(PrefixPlan.from_rows(shared_batch(4, 10, 6)), 4, 10)
    assert counts == Counts(40, 6 + 4 * 4, 6 + 4 * 4, 400, 21 + 4 * (7 + 8 + 9 + 10))
    assert counts.unshared == Counts(40, 40, 40, 400, 400)


def test_work_of_a_report() -> None:
    report = GraphReport(True, flops_compact=4000, flops_head=400, flops_tree=800, flops_full=400)
    work = Work.of(report, 4, 10)
    assert work == Work(90.0, 10.0, 2.0, 1.0)
    assert work.flops(CALL) == 200 * 100 + 1000 * 2 + 10_000
    assert work.flops(replace(CALL, head=50)) == 200 * 90 + 50 * 10 + 1000 * 2 + 10_000


def test_nodes_of_rows_that_are_read() -> None:
    read = torch.zeros(4, 10, dtype=torch.bool)
    read[:, -2:] = True
    plan = PrefixPlan.from_rows(shared_batch(4, 10, 6)).with_head(read.numpy())
    assert Counts.of(plan, 4, 10) == Counts(40, 6 + 4 * 4, 4 * 2, 400, 21 + 4 * (7 + 8 + 9 + 10))


def test_what_was_timed_is_predicted() -> None:
    found = predict(timed(1.0, 0.3, 1.1), {"full fold": WORK}, CALL)
    assert found == pytest.approx({PLAIN: 1.0, "full fold": 0.3})


def test_between_two_points_time_is_linear_in_work() -> None:
    middle = Counts(1000, 600, 600, 10_000, 5500)
    work = WORK.flops(middle)
    own, whole = WORK.flops(CALL), WORK.flops(CALL.unshared)
    found = predict(timed(1.0, 0.3, 1.1), {"full fold": WORK}, middle)
    assert found["full fold"] == pytest.approx(0.3 + 0.8 * (work - own) / (whole - own))
    assert found[PLAIN] == pytest.approx(1.0)


def test_twice_the_rows_take_twice_as_long() -> None:
    double = Counts(2000, 400, 400, 20_000, 2000)
    found = predict(timed(1.0, 0.3, 1.1), {"full fold": WORK}, double)
    assert found == pytest.approx({PLAIN: 2.0, "full fold": 0.6})


@pytest.mark.parametrize("unshared", [0.2, math.inf])
def test_a_second_point_that_makes_no_sense_is_left_out(unshared: float) -> None:
    """Noise, or no memory for a plan that shares nothing: time is never less for more work, nor more than linear."""
    more = Counts(1000, 400, 400, 10_000, 2000)
    found = predict(timed(1.0, 0.3, unshared), {"full fold": WORK}, more)["full fold"]
    assert 0.3 <= found <= 0.3 * WORK.flops(more) / WORK.flops(CALL) + 1e-12


@pytest.mark.parametrize(
    ("seconds", "name"),
    [
        ({PLAIN: 1.0, "full fold": 0.5}, "full fold"),
        ({PLAIN: 1.0, "full fold": 0.5, "position-wise fold": 0.4}, "position-wise fold"),
        ({PLAIN: 1.0, "full fold": 1.2}, PLAIN),
        ({PLAIN: 1.0, "full fold": 0.99}, PLAIN),  # predictions err
        ({PLAIN: math.inf, "full fold": 3.0}, "full fold"),
        ({PLAIN: 1.0, "full fold": math.inf}, PLAIN),
    ],
)
def test_the_fastest(seconds: dict[str, float], name: str) -> None:
    assert fastest(seconds) == name


def scaled(rows: int, nodes: int) -> Counts:
    return Counts(rows, nodes, nodes, rows * 10, nodes * 5)


@pytest.mark.parametrize(
    ("known", "counts", "needed"),
    [
        ([], CALL, True),
        ([], scaled(1000, 960), False),  # nothing to gain
        ([], Counts(1000, 1000, 200, 10_000, 5000), True),  # but behind the last attention
        ([], Counts(1000, 1000, 600, 10_000, 100), False),
        ([timed(1.0, 0.3, 1.1)], CALL, False),
        ([timed(1.0, 0.3, 1.1)], scaled(1500, 1300), False),  # near
        ([timed(1.0, 0.3, 1.1)], scaled(4000, 800), False),  # not near, and no doubt
        ([timed(1.0, 0.3, 1.1)], scaled(4000, 3400), True),
        ([timed(1.0, 0.3, 1.1)], scaled(9000, 1800), True),  # out of reach
        ([timed(1.0, 0.3, 1.1), timed(5.0, 2.0, 5.0, rows=5000)], scaled(4000, 3400), False),
    ],
)
def test_when_a_call_is_timed(known: list[Timed], counts: Counts, needed: bool) -> None:
    assert CostModel({"full fold": WORK}, known).needs_timing(counts, NAMES) == needed


def test_what_was_timed_of_other_programs_says_nothing() -> None:
    model = CostModel({"full fold": WORK, "fold off the tree": WORK}, [timed(1.0, 0.3, 1.1)])
    assert model.predict(CALL, ["fold off the tree"]) is None
    assert model.predict(CALL, NAMES) is not None

"""What every test starts from: a fresh Dynamo and zeroed counts, and Triton's interpreter where there is no GPU.

Tests marked ``slow`` run with ``--everything`` (``make test-all``), which also checks graphs after every pass in all
of them. Any other test fails if it takes more than ``LONGEST`` seconds of CPU time.
"""

from __future__ import annotations

import gc
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is imported, which the next line may do

import radix_compile
from radix_compile.passes import pipeline

gc.set_threshold(50_000, 20, 100)  # compilers make objects by the million: looking for garbage took a tenth of the time
pipeline.ALWAYS_VERIFY = True
pipeline.RAISE_MISTAKES = True
LONGEST = 90.0 if not torch.cuda.is_available() else float("inf")
"""On the slowest machine so far, with compilers started and caches empty. Compiling for a GPU takes all cores."""
CHECKED = ("fuzz", "test_verify.py")
"""Folders and files whose tests check graphs after every pass by default. With ``--everything`` all do."""
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))  # or they spend their time waiting for each other


@pytest.fixture(autouse=True, scope="session")
def own_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RADIX_COMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    radix_compile.reset_stats()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def verified_passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks take as long again as most of what is tested."""
    if not request.config.getoption("everything") and not {request.path.name, request.path.parent.name} & {*CHECKED}:
        monkeypatch.setattr(pipeline, "ALWAYS_VERIFY", False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--everything", action="store_true", help="run the tests marked slow, and check every pass in all")
    parser.addoption("--record-durations", metavar="FILE", help="write the seconds that each test took to this file")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--record-durations")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(Path(file)))


class Durations:
    """Keeps the seconds of tests that take one at least, setting up and tearing down left out."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.duration >= 1:
            self.seconds[report.nodeid] = round(report.duration, 1)

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.seconds, indent=0, sort_keys=True) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("everything"):
        return
    named = [arg for arg in config.invocation_params.args if "::" in str(arg)]  # whoever names a test wants it to run
    slow = [] if named else [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in set(slow)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = _cpu_seconds()
    result = yield
    spent = _cpu_seconds() - before
    if spent > LONGEST and item.get_closest_marker("slow") is None:
        pytest.fail(f"takes {spent:.0f} s of CPU time: make it smaller, or mark it slow and say why")
    return result


def _cpu_seconds() -> float:
    """Of this process and of those that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)

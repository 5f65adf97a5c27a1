"""Every test starts with a fresh Dynamo and zeroed counts, and with Triton's interpreter if there is no GPU.

Tests marked ``slow`` run only with ``--everything`` (``make test-all``). With this option, all tests check graphs after
every pass. Any other test fails if it takes more than ``MAX_SECONDS`` of CPU time.
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
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which the next line may do

import radix_compile
from radix_compile.passes import pipeline

gc.set_threshold(50_000, 20, 100)  # compilers make millions of objects: garbage collection took a tenth of the time
torch._dynamo.config.run_gc_after_compile = False
pipeline.ALWAYS_VERIFY = True
pipeline.RAISE_MISTAKES = True
MAX_SECONDS = 90.0 if not torch.cuda.is_available() else float("inf")
"""Including the start of compilers, with empty caches, on the slowest machine so far. All cores compile for a GPU."""
VERIFIED = ("fuzz", "test_verify.py")
"""The folders and files whose tests always check graphs after every pass."""
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))  # more threads would wait for each other


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
    """Check graphs after every pass only in some tests: the checks take as long as most tests."""
    if not request.config.getoption("everything") and not {request.path.name, request.path.parent.name} & {*VERIFIED}:
        monkeypatch.setattr(pipeline, "ALWAYS_VERIFY", False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--everything", action="store_true", help="run slow tests, and check graphs after every pass")
    parser.addoption("--record-durations", metavar="FILE", help="write the seconds of each test to this file")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--record-durations")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(Path(file)))


class Durations:
    """Records the tests that take at least a second. Set-up and tear-down do not count."""

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
    # A test that is named runs even if it is slow.
    named_tests = [arg for arg in config.invocation_params.args if "::" in str(arg)]
    slow = [] if named_tests else [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in set(slow)]


def pytest_collection_finish() -> None:
    gc.freeze()  # garbage collections then skip all that was imported


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = _cpu_seconds()
    result = yield
    spent = _cpu_seconds() - before
    if spent > MAX_SECONDS and item.get_closest_marker("slow") is None:
        pytest.fail(f"takes {spent:.0f} s of CPU time: make it smaller, or mark it slow and say why")
    return result


def _cpu_seconds() -> float:
    """The CPU time of this process and of the child processes that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)

"""What every test starts from: a fresh Dynamo and zeroed counts, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is imported, which the next line may do

import radix_compile
from radix_compile.passes import pipeline

pipeline.ALWAYS_VERIFY = True
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

"""What every test starts from: a fresh Dynamo and zeroed counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import radix_compile


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    radix_compile.reset_stats()
    yield
    torch._dynamo.reset()

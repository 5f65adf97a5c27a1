"""What Triton would compile anew is asked of Triton anew, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from radix_compile.kernels import triton_launch
from radix_compile.kernels.triton_launch import Kernel


class Triton:
    """A kernel as ``triton.jit`` makes it, that tells of its launches; `backend` is None for the interpreter's."""

    arg_names = ("source", "target", "count", "scale", "SIZE", "ROWS")

    def __init__(self, backend: str | None = "cuda") -> None:
        self.backend = backend
        self.looked: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled | None]:
        def launch(*args: Any, **constants: Any) -> Compiled | None:
            self.looked.append((grid, args, constants))
            return None if self.backend is None else Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Triton) -> None:
        self.kernel = kernel
        self.metadata = SimpleNamespace(target=SimpleNamespace(backend=kernel.backend))

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args: self.kernel.launched.append((grid, args))


def start(kernel: Kernel, grid: tuple[int, int] = (3, 2), **changed: Any) -> None:
    given = {"source": torch.zeros(8), "target": None, "count": 5, "scale": 0.5, "SIZE": 8, "ROWS": 4, "num_warps": 2}
    source, target, count, scale, *constants = {**given, **changed}.values()
    kernel(grid, (source, target), (count, scale), **dict(zip(("SIZE", "ROWS", "num_warps"), constants, strict=True)))


def test_a_launch_like_one_before_it_is_of_what_was_compiled_for_that() -> None:
    triton = Triton()
    kernel, other = Kernel(triton), torch.ones(8)
    start(kernel)
    assert len(triton.looked) == 1
    start(kernel, grid=(7, 1), source=other)
    assert len(triton.looked) == 1
    [(grid, args)] = triton.launched
    assert grid == (7, 1, 1)
    assert args == (other, None, 5, 0.5, 8, 4)  # all that the kernel takes, but no options


def off_by_one() -> Tensor:
    return torch.zeros(9)[1:]


@pytest.mark.parametrize(
    "changed",
    [
        {"source": torch.zeros(8, dtype=torch.float64)},
        {"source": off_by_one()},
        {"source": torch.zeros(8, device="meta")},
        {"source": torch.zeros(8), "target": torch.zeros(8)},
        {"count": 16},
        {"count": 1},
        {"count": 2**40},
        {"SIZE": 16},
        {"ROWS": 8},
        {"num_warps": 4},
    ],
)
def test_others_are_looked_at(changed: dict[str, Any]) -> None:
    triton = Triton()
    kernel = Kernel(triton)
    for _ in range(2):
        start(kernel)
        start(kernel, **changed)
    assert len(triton.looked) == len(triton.launched) == 2


@pytest.mark.parametrize("backend", [None, "hip"])
def test_the_interpreter_and_other_compilers_are_asked_every_time(backend: str | None) -> None:
    triton = Triton(backend)
    kernel = Kernel(triton)
    start(kernel)
    start(kernel)
    assert len(triton.looked) == 2
    assert triton.launched == []


def test_what_is_remembered_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "MAX_COMPILED", 3)
    triton = Triton()
    kernel = Kernel(triton)
    for count in range(10):
        start(kernel, count=count)
        assert len(kernel._compiled) <= 3
    start(kernel, count=9)
    assert len(triton.looked) == 10

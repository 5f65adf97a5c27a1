"""Starts Triton kernels that have many arguments, again and again with the same numbers, in less of the host's time.

For each launch Triton looks at every argument for what it compiles for: an integer that is 1, a multiple of 16, wider
than 32 bits; a pointer that is a multiple of 16 bytes; the type of each. Attention has some fifty arguments and is
started in every layer, and where a GPU is faster than its host is at that, it waits.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

MAX_COMPILED = 4096
"""Numbers of nodes and strides that are remembered; then from the beginning."""


class Kernel:
    """A Triton kernel whose arguments are tensors (or None) first, then numbers, then what is compiled for by name.

    What Triton compiled for a launch is kept under the numbers themselves, whatever it makes of them, and under what
    it sees of tensors where GPUs are NVIDIA's; on others it sees more (how large their memory is), and is asked every
    time. Launching a compiled kernel, with what it was compiled for among the arguments, is as in Triton's tutorial on
    softmax.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}

    def __call__(
        self, grid: tuple[int, int], tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...], **constants: Any
    ) -> None:
        """Start it on the device of the first tensor, which is the current one. ``constants``: in the same order
        every time, and Triton's own options among them.
        """
        seen = [None if one is None else (one.dtype, one.data_ptr() % 16) for one in tensors]
        key = (tensors[0].device, numbers, *seen, *constants.values())  # type: ignore[union-attr]
        known = self._compiled.get(key)
        if known is None:
            compiled = self.function[grid](*tensors, *numbers, **constants)
            if compiled is not None and compiled.metadata.target.backend == "cuda":  # None: from the interpreter
                names = self.function.arg_names[len(tensors) + len(numbers) :]
                if len(self._compiled) >= MAX_COMPILED:
                    self._compiled.clear()
                self._compiled[key] = compiled, [constants[name] for name in names]
        else:
            compiled, fixed = known
            compiled[*grid, 1](*tensors, *numbers, *fixed)


def kernel(function: Any) -> Kernel:
    """``triton.jit``, for a kernel that is started by its tensors, numbers and constants."""
    return Kernel(triton.jit(function))

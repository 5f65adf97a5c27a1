"""Arrays that come from outside: their types, and the checks of arguments that several functions have."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Int64: TypeAlias = NDArray[np.int64]
Float32: TypeAlias = NDArray[np.float32]
UInt32: TypeAlias = NDArray[np.uint32]


def describe(value: object) -> str:
    return f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else type(value).__name__


def as_array(name: str, value: Array | torch.Tensor, kinds: str) -> Array:
    """`value` as an array on the host; TypeError unless its dtype is of one of the NumPy `kinds`."""
    if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex() or value.is_quantized):
        value = value.numpy(force=True)  # the others have no NumPy form, or one that is refused below
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
        wanted = {"biu": "integers or bools", "iu": "integers", "b": "bools"}[kinds]
        raise TypeError(f"{name} must be an array or tensor of {wanted}, got {describe(value)}")
    return value


def as_multiple(pad_multiple_of: SupportsIndex | None) -> int:
    """`pad_multiple_of` as an int, 1 for None."""
    if pad_multiple_of is None:
        return 1
    try:
        multiple = operator.index(pad_multiple_of)
    except TypeError:
        raise TypeError(f"pad_multiple_of must be an integer, got {describe(pad_multiple_of)}") from None
    if multiple < 1:
        raise ValueError(f"pad_multiple_of must be at least 1, got {multiple}")
    return multiple


def short_of_power_of_two(count: int) -> int:
    """How many more make it a power of two; none are missing of nothing."""
    return (1 << (count - 1).bit_length()) - count if count else 0

"""The user's options. They are validated when they are set."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

FoldRule = Literal["auto", "always", "never"]
Padding = Literal["exact", "skip"]


class RadixOptions(TypedDict, total=False):
    """The options as keywords or as a ``dict``, for type checkers. :class:`Options` describes each option."""

    fold: FoldRule | float
    inner_backend: str | Callable[..., Any]
    inner_options: Mapping[str, Any]
    mode: str | None
    calibrate: bool
    calibration: str | Path | None
    min_tokens: int
    pad_multiple_of: int | None
    padding: Padding
    fold_attention: bool
    shift_rotary: bool
    verify: bool
    strict: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the ``radix`` backend. A wrong value raises ``ValueError`` on construction.

    ``fold``             "auto": fold a call if the folded program is predicted to be faster. "always": fold every call
                         that can fold. "never": compile and run the plain program only. A number above 0 and at most
                         1: fold a call if compact tokens / tokens is at most this number.
    ``inner_backend``    the backend that compiles the plain and the folded programs: a name or a callable.
    ``inner_options``    the ``options`` of the inner backend. They are copied into a new ``dict``.
    ``mode``             the ``mode`` of the inner backend (inductor's ``reduce-overhead``, ``max-autotune``, ...).
    ``calibrate``        True: time the programs of a graph on the inputs of a call where a prediction needs it, and
                         save the measurements to disk. False: predict from saved measurements; where there are none,
                         fold a call if compact tokens / tokens is at most 0.95.
    ``calibration``      the file of measurements. None: a file in the user's cache directory.
    ``min_tokens``       run calls with fewer rows (sequences times columns) than this plain.
    ``pad_multiple_of``  pad the number of compact rows to a multiple of this (or of the number of rows, if that is
                         less), and lists of varying length to powers of two. None: pad only where CUDA graphs are
                         recorded, so that their sizes are reused.
    ``padding``          "exact": every row of the output equals the plain model's. "skip": rows that the attention mask
                         hides are not computed and are returned as zeros, if it is proved that no other row reads them.
    ``fold_attention``   True: run attention on the prefix tree where possible. False: run it on all rows, as RadixMLP
                         does.
    ``shift_rotary``     True: sequences that start at different columns (left padding, packed sequences) share prefixes
                         though rotary embeddings are by column, if it is proved in the call that scores depend on
                         distances alone. Angles are then those of other columns, which changes results by rounding
                         alone. False: such sequences share nothing, unless positions are given.
    ``verify``           check every graph after every pass, and compare the first, second, fourth, ... folded call to
                         the plain program: results, strides, which results share memory, and gradients (for these,
                         both programs run once more). A difference raises ``WrongFold``, which names the op where it
                         begins, or the gradient.
    ``strict``           raise ``CannotFold``, with the reasons, when a graph cannot be folded at all.
    """

    fold: FoldRule | float = "auto"
    inner_backend: str | Callable[..., Any] = field(default="inductor", hash=False)  # may be unhashable
    inner_options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # a dict is unhashable
    mode: str | None = None
    calibrate: bool = True
    calibration: str | Path | None = None
    min_tokens: int = 0
    pad_multiple_of: int | None = None
    padding: Padding = "exact"
    fold_attention: bool = True
    shift_rotary: bool = True
    verify: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        rules, paddings = get_args(FoldRule), get_args(Padding)
        is_rule = self.fold in rules if isinstance(self.fold, str) else _is_share(self.fold)
        expected = f'"auto", "always", "never" or a number above 0 and at most 1{_did_you_mean(self.fold, rules)}'
        _expect("fold", self.fold, is_rule, expected)
        inner = self.inner_backend
        _expect("inner_backend", inner, isinstance(inner, str) or callable(inner), "a backend name or a callable")
        has_string_keys = _has_string_keys(self.inner_options)
        _expect("inner_options", self.inner_options, has_string_keys, "a mapping with string keys")
        object.__setattr__(self, "inner_options", dict(self.inner_options))  # the caller may change their mapping
        _expect("mode", self.mode, self.mode is None or isinstance(self.mode, str), "a string or None")
        _expect("calibrate", self.calibrate, isinstance(self.calibrate, bool), "True or False")
        path = self.calibration
        _expect("calibration", path, isinstance(path, str | Path | None), "a path or None")
        _expect("calibration", path, "\0" not in str(path), "a path without NUL characters, or None")
        _expect("min_tokens", self.min_tokens, _is_count(self.min_tokens, 0), "an integer, zero or more")
        multiple = self.pad_multiple_of
        _expect("pad_multiple_of", multiple, multiple is None or _is_count(multiple, 1), "a positive integer or None")
        is_padding = isinstance(self.padding, str) and self.padding in paddings
        _expect("padding", self.padding, is_padding, f'"exact" or "skip"{_did_you_mean(self.padding, paddings)}')
        _expect("fold_attention", self.fold_attention, isinstance(self.fold_attention, bool), "True or False")
        _expect("shift_rotary", self.shift_rotary, isinstance(self.shift_rotary, bool), "True or False")
        _expect("verify", self.verify, isinstance(self.verify, bool), "True or False")
        _expect("strict", self.strict, isinstance(self.strict, bool), "True or False")

    def updated(self, given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Return these options with those in ``given`` replaced, and ``mode`` if it is not None.

        An unknown name raises ``ValueError`` with the nearest option name.
        """
        names = [field.name for field in fields(self)]
        for name in given or {}:
            if name not in names:
                raise ValueError(
                    f"unknown radix option {name!r}{_did_you_mean(name, names)}; the options are {', '.join(names)}"
                )
        changes: dict[str, Any] = dict(given or {})
        if mode is not None:
            changes["mode"] = mode
        return replace(self, **changes) if changes else self


def _expect(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"radix option {name!r} must be {expected}, not {value!r}")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _has_string_keys(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _did_you_mean(name: object, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    return f" (did you mean {matches[0]!r}?)" if matches else ""

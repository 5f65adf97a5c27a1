"""``python -m tests.compatibility.ops FILE``: the ops in the graphs of all families, for the check of the rules."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from radix_compile.passes.capture import CaptureError, capture
from tests.compatibility.cells import ERRORS
from tests.compatibility.families import FAMILIES, attentions, build_family
from tests.compatibility.forms import FORMS, without_gradients


def ops_of(family: str, attention: str, form: str) -> set[str]:
    found: set[str] = set()

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        try:
            captured = capture(gm, inputs)
        except CaptureError:
            return gm.forward
        found.update(str(node.target) for node in captured.graph.nodes if isinstance(node.target, OpOverload))
        return gm.forward

    torch._dynamo.reset()
    model = build_family(family, attention)
    with contextlib.suppress(*ERRORS), without_gradients(form):  # it cannot be called in that way
        FORMS[form](model, torch.compile(model, backend=backend))
    return found


def main(path: str) -> None:
    found: set[str] = set()
    for family in FAMILIES:
        first, *others = attentions(family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found |= ops_of(family, first, "labels")
            for attention in (first, *others):
                found |= ops_of(family, attention, "right padding")
        print(family, len(found), flush=True)
    Path(path).write_text("\n".join(sorted(found)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

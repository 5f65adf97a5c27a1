"""Write the ops in the graphs of all families, for the sweep: ``python -m tests.compatibility.ops FILE``."""

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
    ops: set[str] = set()

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        try:
            captured = capture(gm, inputs)
        except CaptureError:
            return gm.forward
        ops.update(str(node.target) for node in captured.graph.nodes if isinstance(node.target, OpOverload))
        return gm.forward

    torch._dynamo.reset()
    model = build_family(family, attention)
    with contextlib.suppress(*ERRORS), without_gradients(form):  # the model does not support this form
        FORMS[form](model, torch.compile(model, backend=backend))
    return ops


def main(path: str) -> None:
    ops: set[str] = set()
    for family in FAMILIES:
        first, *others = attentions(family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ops |= ops_of(family, first, "labels")
            for attention in (first, *others):
                ops |= ops_of(family, attention, "right padding")
        print(family, len(ops), flush=True)
    Path(path).write_text("\n".join(sorted(ops)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""Check what is installed, and fold something small to see that it works."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

import radix_compile
from radix_compile.passes.pipeline import BUGS
from radix_compile.plan import fold_and_scatter
from radix_compile.runtime.calibration import calibration_file

NATIVE = "radix-compile-native"


@dataclass(frozen=True)
class Check:
    """A look at one thing: its name, the finding, and whether that is right (``None`` if that is no question)."""

    name: str
    found: str
    good: bool | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")


def run(options: argparse.Namespace, console: Console) -> int:
    """0 if all that is needed is there and works, else 1."""
    checks = list(_checks(options.device))
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = {None: " ", True: "[green]ok[/]", False: "[bold red]no[/]"}[check.good]
            console.print(f"{mark:<2} {check.name}: {escape(check.found)}")
    return 1 if any(check.good is False for check in checks) else 0


def _checks(device: str) -> Iterator[Check]:
    yield Check("python", platform.python_version())
    for package in ("radix-compile", NATIVE, "torch", "triton", "transformers", "rich", "matplotlib"):
        yield Check(package, _version(package))
    yield _device(device)
    yield _triton(device)
    yield _fold_and_scatter()
    yield Check("measurements", str(calibration_file() or "not kept: no home directory"))
    found = "radix" in torch.compiler.list_backends(exclude_tags=())
    yield Check('backend="radix"', "found" if found else "not found: install the package (pip install -e .)", found)
    yield from _known_bad(device)
    if not _device(device).good:
        return
    for inner in ("eager", "inductor"):
        yield _fold(device, inner)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device(device: str) -> Check:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return Check("device", f"{device} is not there: {str(error).splitlines()[0]}", False)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    return Check("device", f"{device}, {name}", True)


def _triton(device: str) -> Check:
    there = importlib.util.find_spec("triton") is not None
    if not device.startswith("cuda"):
        return Check("kernels", "in torch, as on any CPU")
    return Check("kernels", "by Triton" if there else "Triton is missing: attention on the tree runs in torch", there)


def _fold_and_scatter() -> Check:
    name = "compute_fold_and_scatter"
    if fold_and_scatter.extension is not None:
        return Check(name, f"in C, by {NATIVE}")
    if _version(NATIVE) == "not installed":
        return Check(name, f"in NumPy; {NATIVE} does the same in C")
    return Check(name, f"in NumPy: {NATIVE} is installed and cannot be imported", False)


def _known_bad(device: str) -> Iterator[Check]:
    """The combinations that are known not to work, if they are installed."""
    transformers = _version("transformers")
    if transformers != "not installed" and int(transformers.partition(".")[0]) < 5:
        yield Check("transformers", f"{transformers}: masks are made in other ways before 5, and are not tested", False)
    if device == "cpu" and importlib.util.find_spec("torch.nn.attention.flex_attention") is not None:
        about = "on a CPU, inductor's flex_attention is wrong for heads of 8 and 16 features, with radix or without"
        yield Check("flex_attention", about)


class _Small(nn.Module):
    """A causal model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.out = nn.Embedding(50, 32), nn.Linear(32, 96), nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(self.table(ids)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return hidden


def _fold(device: str, inner: str) -> Check:
    """Does something small fold, with the outputs that it has without?"""
    name = f"a fold by {inner}"
    before = radix_compile.stats()
    try:
        model = _Small().to(device)
        ids = torch.arange(40, device=device).view(4, 10) % 50
        ids[:, :6] = ids[0, :6]
        torch.compiler.reset()
        options: dict[str, Any] = {"inner_backend": inner, "fold": "always", "strict": True}
        with torch.no_grad():
            ours = torch.compile(model, backend="radix", options=options)(ids)
            error = float((ours - model(ids)).abs().max())
    except (ImportError, OSError, *BUGS) as failure:  # what a broken installation ends in is what this is to show
        return Check(name, f"failed: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}", False)
    counted = radix_compile.stats()
    folded = counted.folded_calls > before.folded_calls
    nodes = counted.compact_tokens - before.compact_tokens
    found = f"40 rows -> {nodes}, largest difference {error:.1e}" if folded else "did not fold"
    return Check(name, found, folded and nodes == 22 and error < 1e-4)

"""Check the installation, and fold a small model to see that it works."""

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
    """One line of the output. ``good`` is None where the line is for information only."""

    name: str
    found: str
    good: bool | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")


def run(options: argparse.Namespace, console: Console) -> int:
    """Return 0 if no check fails, else 1."""
    checks = list(_checks(options.device))
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = {None: "      ", True: "[green]ok[/]    ", False: "[bold red]failed[/]"}[check.good]
            console.print(f"{mark} {check.name}: {escape(check.found)}")
    return 1 if any(check.good is False for check in checks) else 0


def _checks(device: str) -> Iterator[Check]:
    yield Check("python", platform.python_version())
    for package in ("radix-compile", NATIVE, "torch", "triton", "transformers", "rich", "matplotlib"):
        yield Check(package, _version(package))
    yield _device(device)
    yield _triton(device)
    yield _fold_and_scatter()
    yield Check("measurements", str(calibration_file() or "not saved: there is no home directory"))
    found = "radix" in torch.compiler.list_backends(exclude_tags=())
    yield Check('backend="radix"', "found" if found else "not found: install the package (pip install -e .)", found)
    yield from _known_problems(device)
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
        return Check("device", f"{device} is not available: {str(error).splitlines()[0]}", False)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    return Check("device", f"{device}, {name}", True)


def _triton(device: str) -> Check:
    if not device.startswith("cuda"):
        return Check("kernels", "plain torch: Triton kernels need a GPU")
    if importlib.util.find_spec("triton") is None:
        return Check("kernels", "plain torch: Triton is not installed", False)
    return Check("kernels", "Triton", True)


def _fold_and_scatter() -> Check:
    name = "compute_fold_and_scatter"
    if fold_and_scatter.extension is not None:
        return Check(name, f"in C, from {NATIVE}")
    if _version(NATIVE) == "not installed":
        return Check(name, f"in NumPy; install {NATIVE} for C")
    return Check(name, f"in NumPy: {NATIVE} is installed but cannot be imported", False)


def _known_problems(device: str) -> Iterator[Check]:
    """Yield the installed combinations that are known not to work."""
    transformers = _version("transformers")
    if transformers != "not installed" and int(transformers.partition(".")[0]) < 5:
        problem = f"{transformers}: versions before 5 build attention masks in other ways, and are not tested"
        yield Check("transformers", problem, False)
    if device == "cpu" and importlib.util.find_spec("torch.nn.attention.flex_attention") is not None:
        problem = "inductor's flex_attention on a CPU is wrong for head sizes of 8 and 16, with and without radix"
        yield Check("flex_attention", problem)


class _SmallModel(nn.Module):
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
    """Check that a small model folds, and that its outputs are those of the plain model."""
    name = f"fold with {inner}"
    before = radix_compile.stats()
    try:
        model = _SmallModel().to(device)
        ids = torch.arange(40, device=device).view(4, 10) % 50
        ids[:, :6] = ids[0, :6]
        torch.compiler.reset()
        options: dict[str, Any] = {"inner_backend": inner, "fold": "always", "strict": True}
        with torch.no_grad():
            folded_output = torch.compile(model, backend="radix", options=options)(ids)
            difference = float((folded_output - model(ids)).abs().max())
    except (ImportError, OSError, *BUGS) as error:  # a broken installation is shown, not raised
        return Check(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", False)
    after = radix_compile.stats()
    folded = after.folded_calls > before.folded_calls
    nodes = after.compact_tokens - before.compact_tokens
    found = f"40 rows -> {nodes} nodes, largest difference {difference:.1e}" if folded else "did not fold"
    return Check(name, found, folded and nodes == 22 and difference < 1e-4)

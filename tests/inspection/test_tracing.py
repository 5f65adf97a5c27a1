"""What torch's own tools show of a rewrite. Each runs in a process of its own, as a user would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from tests.models import build, shared_batch
{before}
model, ids = build("Qwen3", head_dim=16), shared_batch(4, 40, 30)
compiled = torch.compile(model, backend="radix", options={{"fold": "always", "inner_backend": {inner!r}}})
with {context}:
    compiled(ids, use_cache=False)
{after}
"""


def run(
    folder: Path, before: str = "", context: str = "torch.no_grad()", after: str = "", inner: str = "eager", **env: str
) -> str:
    program = PROGRAM.format(before=before, context=context, after=after, inner=inner)
    here = str(Path(__file__).parents[2])
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={**os.environ, "PYTHONPATH": here, **env}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout + ran.stderr


def test_torch_logs(tmp_path: Path) -> None:
    said = run(tmp_path, TORCH_LOGS="+radix_compile")
    before, _, after = said.partition("radix after")
    assert "radix before" in before
    assert "scaled_dot_product_attention" in before
    assert "radix.tree_attention" in after
    assert "radix before" not in run(tmp_path)


@pytest.mark.slow  # a process of its own, as the test of TORCH_LOGS
def test_tlparse(tmp_path: Path) -> None:
    run(tmp_path, TORCH_TRACE=str(tmp_path / "trace"))
    (trace,) = (tmp_path / "trace").glob("*.log")
    tool = Path(sys.executable).with_name("tlparse")
    subprocess.run([tool, trace, "-o", tmp_path / "page", "--no-browser"], check=True, capture_output=True)
    (report,) = (tmp_path / "page").rglob("radix_report*.json")
    assert json.loads(report.read_text())["folded"] is True
    (after,) = (tmp_path / "page").rglob("radix_after*.txt")
    assert "torch.ops.radix.tree_attention" in after.read_text()
    assert "radix_report" in (tmp_path / "page" / "index.html").read_text()


@pytest.mark.slow  # a process that compiles, as are the next two
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_depyf(tmp_path: Path, inner: str) -> None:
    run(tmp_path, "import depyf", "depyf.prepare_debug('kept')", inner=inner)
    kept = {path.name: path.read_text() for path in (tmp_path / "kept").iterdir()}
    (before,) = (code for name, code in kept.items() if "radix_before" in name)
    (after,) = (code for name, code in kept.items() if "radix_after" in name)
    assert "scaled_dot_product_attention" in before
    assert "radix.tree_attention" in after


@pytest.mark.slow
def test_compile_debug(tmp_path: Path) -> None:
    run(tmp_path, TORCH_COMPILE_DEBUG="1", inner="inductor")
    (folder,) = tmp_path.rglob("radix/graph_0")
    assert {path.name for path in folder.iterdir()} == {"before.py", "after.py", "report.json", "diff.html"}
    assert (folder.parents[1] / "torchinductor").is_dir()  # where inductor puts its own
    assert "tree_attention" in (folder / "after.py").read_text()


@pytest.mark.slow
def test_a_profile_has_a_range_for_each_call(tmp_path: Path) -> None:
    after = "profile.export_chrome_trace('trace.json')"
    run(tmp_path, context="torch.profiler.profile() as profile", after=after)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    (event,) = (event for event in events if event.get("name", "").startswith("radix: "))
    assert event["name"] == "radix: layers 0-1, 160 -> 69 rows"
    (attention, *_) = (one for one in events if one.get("name") == "radix::tree_attention")
    assert event["ts"] <= attention["ts"] <= event["ts"] + event["dur"]

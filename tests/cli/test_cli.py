"""Each command on a real small model, as it is called: what it prints, its data, its exit code and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import workloads
from radix_compile.cli import doctor, main
from tests.models import build

LAYERS = 4


class Reverses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(50, 16), nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(ids).flip(1))


class TwoArguments(nn.Module):
    def forward(self, ids: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        return ids + style


class Breaks(Reverses):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.linear(self.table(ids))
        torch._dynamo.graph_break()
        return self.linear(x)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("config")
    build("Qwen3", head_dim=16, num_hidden_layers=LAYERS).config.save_pretrained(place)
    return f"config:{place}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two instructions, in turn, with questions behind them."""
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    instructions = "Answer with a number only. Think first. ", "Translate what follows, word by word: .."
    assert len(set(map(len, instructions))) == 1  # so that an order by length does not keep them apart
    lines = [json.dumps({"prompt": instructions[i % 2] + f"question {i * 37 % 64}"}) for i in range(64)]
    file.write_text("\n".join(lines))
    return str(file)


def test_explain(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", config, "--batch", "6", "--prefix", "30", "--suffix", "10"]) == 0
    said = capsys.readouterr().out
    assert "folds: 240 rows -> 90 (2.67x)" in said
    assert "model.layers.1 .. 3 (3 equal layers)" in said
    assert "runs on the prefix tree" in said
    assert "\x1b" not in said  # no colours where it is piped
    assert main(["explain", config, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["compact_tokens"] == 64 + 8 * 16
    assert len(data["graphs"][0]["attentions"]) == LAYERS


def test_explain_what_does_not_fold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"python:{__name__}:Reverses"]) == 1
    said = capsys.readouterr().out
    assert "graph 0 does not fold" in said
    assert "reverses the sequence axis" in said
    assert "return self.linear(self.table(ids).flip(1))" in said  # the user's own line
    assert "Move it behind the model" in said
    assert main(["explain", f"python:{__name__}:Reverses", "--json"]) == 1
    assert "Move it" in json.loads(capsys.readouterr().out)["advice"]["flip"]


def test_explain_one_sequence_and_graph_breaks(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", config, "--batch", "1"]) == 1
    said = capsys.readouterr().out
    assert "there is one sequence only" in said
    assert "Send several sequences that share prefixes" in said
    main(["explain", f"python:{__name__}:Breaks"])
    said = capsys.readouterr().out
    assert "graph break: Call to `torch._dynamo.graph_break()`" in said
    assert "graph 1" in said


def test_diff(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", config, "--layer", "2"]) == 0
    said = capsys.readouterr().out
    assert "@@ model.layers.2 @@" in said
    assert "scaled_dot_product_attention -> tree_attention" in said
    assert "layers.1" not in said
    page = tmp_path / "diff.html"
    assert main(["diff", config, "-o", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert "run once per node" in capsys.readouterr().out
    patch = tmp_path / "model.patch"
    assert main(["diff", config, "-o", str(patch), "--format", "text"]) == 0
    assert patch.read_text().startswith("graph 0: ")
    capsys.readouterr()
    assert main(["diff", config, "--json", "--pass", "fold_graph"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    kinds = {line["kind"] for block in graph["blocks"] for line in block["lines"]}
    assert "compact" in kinds


def test_estimate(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", data, "--batch-size", "16"]) == 0
    said = capsys.readouterr().out
    assert "64 sequences" in said
    assert "counted in bytes" in said
    assert main(["estimate", data, "--batch-size", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    texts = [json.loads(line)["prompt"].encode() for line in Path(data).read_text().splitlines()]
    assert found["tree"]["tokens"] == sum(map(len, texts))
    assert found["tree"]["nodes"] == len({text[: i + 1] for text in texts for i in range(len(text))})
    orders = {order["name"]: order for order in found["orders"]}
    first = [texts[i : i + 16] for i in range(0, 64, 16)]
    nodes = sum(len({text[: i + 1] for text in batch for i in range(len(text))}) for batch in first)
    assert orders["as they come"]["compression"] == pytest.approx(nodes / found["tree"]["tokens"])
    padded = sum(16 * max(map(len, batch)) for batch in first)
    assert [orders["as they come"][name] for name in ("rows", "read", "distinct")] == [
        padded,
        sum(map(len, texts)),
        nodes,
    ]
    assert nodes < orders["as they come"]["with_padding"] <= nodes + padded - sum(map(len, texts))
    assert orders["for sharing"]["compression"] < 0.9 * orders["as they come"]["compression"]
    assert orders["for sharing"]["compression"] < 0.9 * orders["by length"]["compression"]
    assert orders["for sharing"]["speedup"]["8B"] > orders["as they come"]["speedup"]["8B"] > 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("tokenizer")
    workloads.tokenizer().save_pretrained(place)
    return str(place)


def test_a_batch_of_data(data: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows and nodes are those of the texts' tokens, padding rows among them."""
    by = workloads.tokenizer()
    build("Qwen3", vocab_size=len(by)).config.save_pretrained(tmp_path)
    given = ["--data", data, "--tokenizer", tokenizer, "--batch", "6", "--json"]
    assert main(["explain", f"config:{tmp_path}", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = Path(data).read_text().splitlines()[:6]
    rows = [by(json.loads(line)["prompt"])["input_ids"] for line in lines]
    longest = max(map(len, rows))
    assert min(map(len, rows)) < longest
    padded = [row + [None] * (longest - len(row)) for row in rows]
    assert found["tokens"] == 6 * longest
    assert found["compact_tokens"] == len({tuple(row[: i + 1]) for row in padded for i in range(longest)})


def test_estimate_in_tokens(data: str, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", data, "--tokenizer", tokenizer, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by = workloads.tokenizer()
    rows = [by(json.loads(line)["prompt"])["input_ids"] for line in Path(data).read_text().splitlines()]
    assert found["unit"] == "tokens"
    assert found["tree"]["tokens"] == sum(map(len, rows))


@pytest.mark.slow  # it compiles with inductor for several lengths
def test_bench(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "out.png"
    given = ["--batch", "4", "--prefixes", "0", "24", "--suffix", "8", "--runs", "1", "--pin"]
    assert main(["bench", config, *given, "-o", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "4 x (24 + 8)" in said
    assert "2.29x" in said  # 128 rows, 56 nodes
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert main(["bench", config, *given, "--json"]) == 0
    nothing, shared = json.loads(capsys.readouterr().out)
    assert (nothing["bound"], shared["nodes"]) == (1, 56)
    assert shared["difference"] < 1e-4
    assert shared["speedup"] == pytest.approx(shared["plain"] / shared["radix"])


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "fold with inductor: 40 rows -> 22 nodes" in said
    assert main(["doctor", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert checks["torch"]["found"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert checks['backend="radix"']["good"] is True


@pytest.mark.parametrize(
    ("extension", "version", "found", "good"),
    [
        (len, "0.1.0", "in C, from radix-compile-native", None),
        (None, "not installed", "in NumPy; install radix-compile-native for C", None),
        (None, "0.1.0", "in NumPy: radix-compile-native is installed but cannot be imported", False),
    ],
)
def test_doctor_says_which_plan_function_runs(
    extension: object, version: str, found: str, good: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.fold_and_scatter, "extension", extension)
    monkeypatch.setattr(doctor, "_version", lambda package: version)
    monkeypatch.setattr(doctor, "_fold", lambda device, inner: doctor.Check("a fold", "not looked at"))
    assert doctor.Check("compute_fold_and_scatter", found, good) in list(doctor._checks("cpu"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "no/such-model"], "no/such-model: no such path"),
        (["explain", "python:no_such_module:make"], "No module named 'no_such_module'"),
        (["explain", "python:math"], "expected python:MODULE:CALLABLE"),
        (["explain", "python:math:floor"], "python:math:floor"),
        (["explain", "{config}", "--device", "cuda:7"], "--device cuda:7 is not available"),
        (["explain", "{config}", "--data", "{data}"], "--tokenizer"),
        (["explain", f"python:{__name__}:TwoArguments"], "the model itself fails on ids of the shape [8, 80]"),
        (["explain", f"python:{__name__}:Reverses", "--data", "{data}"], "pass --tokenizer"),
        (["bench", "{config}", "-o", "/no/such/x.png"], "-o /no/such/x.png: expected a file"),
        (["diff", "{config}", "--pass", "fold"], "no pass 'fold' ran here"),
        (["diff", "{config}", "--layer", "99"], "the layers are 0 to 3"),
        (["diff", "{config}", "-o", "x.svg"], "-o x.svg: expected a file ending in .txt, .diff, .html, .json"),
        (["diff", "{config}", "-o", "/no/such/folder/x.html"], "-o /no/such/folder/x.html: No such file"),
        (["estimate", "no_such_file.jsonl"], "no_such_file.jsonl"),
        (
            ["estimate", "{data}", "--field", "answer"],
            "no field answer; the fields are prompt: choose one with --field",
        ),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    said: str,
    config: str,
    data: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "no/such-model" in arguments:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    filled = [one.format(config=config, data=data) for one in arguments]
    assert main(filled) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = [line for line in output.err.splitlines() if line.startswith("radix-compile")]
    assert said in line


@pytest.mark.slow  # tests/test_packaging.py installs it; the others call its main
def test_it_is_installed() -> None:
    tool = Path(sys.executable).with_name("radix-compile")
    for command in ([str(tool)], [sys.executable, "-m", "radix_compile"]):
        ran = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert "estimate" in ran.stdout


def test_without_its_extra_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['rich'] = None; sys.modules['rich.console'] = None; import radix_compile.cli"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "radix-compile needs an extra: pip install 'radix-compile[cli]'\n"

"""The demo's workloads, and its one line for what the user gets wrong. (What it measures is run by `make demo`.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import demo, workloads


def test_prompts_share_their_instruction_and_examples() -> None:
    prompts = workloads.few_shot_prompts(8, examples=2)
    assert len(set(prompts)) == 8
    assert all(prompt.count("Answer: ") == 2 for prompt in prompts)
    batch = workloads.tokenize(prompts, workloads.tokenizer())
    same = (batch["input_ids"] == batch["input_ids"][0]).all(0)
    shared = int(same.long().cumprod(0).sum())
    assert 60 < shared < batch["input_ids"].shape[1]
    assert batch["attention_mask"].sum(1).min() < batch["attention_mask"].shape[1]
    assert batch["input_ids"].dtype == torch.int64


def test_the_users_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "One."}\n{"question": "How many?"}\n')
    first, second = workloads.load_prompts(path)
    assert first == "One."
    assert second.startswith(workloads.FEW_SHOT_INSTRUCTION[:40])
    assert "How many?" in second


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no-such.jsonl"),
        ("", ":1: holds no"),
        ("{", ":1: is not JSON"),
        ('{"prompt": "One."}\n{"text": "Two."}\n', ":2: has neither"),
    ],
)
def test_bad_data_is_one_line(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("no-such.jsonl" if content is None else "prompts.jsonl")
    if content is not None:
        path.write_text(content)
    assert demo.main(["--data", str(path)]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert message in printed[0]
    assert path.name in printed[0]


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--model", str(tmp_path / "nowhere")]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("demo: the model")
    assert "nowhere" in printed[-1]

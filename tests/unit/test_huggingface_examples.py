"""The examples for transformers run, say what their README says, and go on where they were."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from pkm_fairseq.huggingface import tokenizers
from tests.glue_data import write_glue
from tests.hf_models import SMALL, add_memories, configuration, transformers

FOLDER = Path(__file__).resolve().parents[2] / "user_dir_examples/huggingface"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Lines of ten words."""
    words = [f"w{i}" for i in range(30)]
    lines = [" ".join(words[i % 30 : i % 30 + 10]) for i in range(64)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "text.txt"


def start(folder: Path, with_memory: bool = False) -> Path:
    """A small RoBERTa with a tokenizer of words."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(50)), "<mask>"]
    sizes = {"vocab_size": len(symbols), "pad_token_id": 1, "bos_token_id": 0}
    model = transformers.RobertaForMaskedLM(configuration("roberta", **sizes))
    if with_memory:
        add_memories(model, SMALL, [1])
    model.save_pretrained(folder)
    tokenizers.words(symbols, 38).save_pretrained(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, script: str, *options: Any) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    runpy.run_path(str(FOLDER / script), run_name="__main__")


@pytest.mark.parametrize("layers", [[], ["--memory-layers", "1", "--n-keys", "8"]])
def test_masked_language_modelling_is_continued(
    layers: "list[str]",
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = ["--model", start(tmp_path / "model"), "--train", text, "--valid", text]
    options += ["--out", out, "--steps", 6, "--save-steps", 3, "--lr", "1e-2", *layers]
    run(monkeypatch, "masked_lm.py", *options)
    printed = capsys.readouterr().out
    assert "accuracy of masked symbols" in printed and "after 6 updates" in printed
    assert ("memory1_top1_usage" in printed) == bool(layers)
    found = json.loads((out / "result.json").read_text())
    assert found["end"]["perplexity"] < found["start"]["perplexity"]
    (out / "result.json").unlink()  # as of one that was killed: from its last checkpoint on
    run(monkeypatch, "masked_lm.py", *options)
    again = json.loads((out / "result.json").read_text())
    assert again == found
    run(monkeypatch, "masked_lm.py", *options)
    assert "result.json is there" in capsys.readouterr().out


@pytest.mark.parametrize("with_memory", [False, True])
def test_a_task_of_glue_is_learnt(
    with_memory: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_glue(tmp_path / "data", ["RTE"])
    options = ["--model", start(tmp_path / "model", with_memory), "--data", tmp_path / "data"]
    run(monkeypatch, "glue.py", *options, "--task", "RTE", "--out", tmp_path / "out", "--epochs", 1)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("RTE: accuracy ")
    assert ("eval_memory1_top1_usage" in printed) == with_memory


def test_the_readme_gives_scripts_only_flags_that_they_have() -> None:
    blocks = README.split("```")[1::2]
    commands = [block.replace("\\\n", " ") for block in blocks if ".venv/bin/python" in block]
    assert len(commands) >= 2
    for command in commands:
        (script,) = re.findall(r"huggingface/(\w+\.py)", command)
        source = (FOLDER / script).read_text(encoding="utf-8")
        assert all(f'"{flag}"' in source for flag in re.findall(r"--[a-z-]+", command))

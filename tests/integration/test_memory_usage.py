"""scripts/memory_usage.py on checkpoints and logs of a real training."""

import json
import logging
import runpy
import shutil
import signal
import sys
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple
from xml.etree import ElementTree

import pytest
import torch

from pkm_fairseq.analysis.checkpoints import first_tokens, open_checkpoint, read_text
from pkm_fairseq.analysis.drift import drift_of_models
from pkm_fairseq.memory.observe.slot_counts import load_counts

from .runs import MEMORY, ROOT, Run, binarise, load, run, run_well, train

SCRIPT = ROOT / "scripts" / "memory_usage.py"
VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def evil_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, one word of which is a script."""
    folder = tmp_path_factory.mktemp("evil")
    words = [f"w{i}" for i in range(20)]
    for split, n_lines in (("train", 120), ("valid", 40)):
        lines = [
            " ".join([EVIL, *(words[(i * j) % 20] for j in range(1, 9))]) for i in range(n_lines)
        ]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return binarise(folder, folder / "bin")


@pytest.fixture(scope="module")
def trained(evil_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training with a checkpoint in its middle and one at its end, and a log."""
    out = tmp_path_factory.mktemp("arm")
    options = ["--max-update", "12", "--save-interval-updates", "6", "--keep-interval-updates", "2"]
    options += ["--memory-usage-interval", "3", "--memory-usage-tokens", "50"]
    train(evil_data, out, "--arch", "resm_roberta_tiny", *MEMORY, *options)
    return out


def usage(*options: Any) -> Run:
    return run(sys.executable, SCRIPT, *options)


def usage_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *options: Any
) -> Tuple[int, str]:
    """Run the script in this process, many times faster: its status, and what it printed."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(logging, "disable", lambda level: None)  # it would last
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, options)])
    capfd.readouterr()
    status = 0
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        print(end.code, file=sys.stderr)
    printed = capfd.readouterr()
    return status, printed.out + printed.err


class Page(HTMLParser):
    """Checks that every element is closed, and keeps what a test wants to know."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: List[str] = []
        self.tags: List[Tuple[str, Dict[str, Optional[str]]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_checkpoints_and_logs_together(trained: Path, evil_data: Path, tmp_path: Path) -> None:
    json_file, html_file = tmp_path / "usage.json", tmp_path / "usage.html"
    middle, last = next(trained.glob("checkpoint_*_6.pt")), trained / "checkpoint_last.pt"
    done = run_well(
        *(sys.executable, SCRIPT, "--checkpoint", f"<i>={middle}", last, "--data", evil_data),
        *("--log", trained / "memory_usage.jsonl", "--tokens", "150", "--hot", "3"),
        *("--probe", "40", "--json", json_file, "--html", html_file),
        *("--svg", tmp_path / "charts"),
    )
    for said in ("memory usage", "hottest slots", "staleness", "drift between", "last counts"):
        assert said in done.output
    report = json.loads(json_file.read_text())
    assert [c["updates"] for c in report["checkpoints"]] == [6, 12]
    assert [c["name"] for c in report["checkpoints"]] == ["<i>", trained.name]
    for checkpoint in report["checkpoints"]:
        (layer,) = checkpoint["layers"]
        assert (layer["layer"], layer["tokens"], layer["n_slots"]) == (1, 150, 256)
        assert len(layer["heads"]) == 2 and len(layer["hot_slots"]) == 3
        assert layer["staleness"]["updates"] == checkpoint["updates"]
        assert set(layer) >= {"top1_usage", "topk_ceiling", "kl_weighted", "gini", "dead_slots"}
    (pair,) = report["drift"]
    assert (pair["before"], pair["after"]) == ("<i>", trained.name)
    (moved,) = pair["layers"]
    assert moved["tokens"] == 40 and 0 < moved["values_moved"] < 1 and 0 < moved["keys_moved"] < 1
    page = Page(html_file.read_text())
    check_page(page)
    assert EVIL in page.text and "<i>" in page.text  # as text
    rows = "".join(tag for tag, _ in page.tags if tag in ("tr", "th", "td")).split("tr")
    assert max(row.count("th") + row.count("td") for row in rows) <= 11  # fits 800 pixels
    assert not [tag for tag, _ in page.tags if tag in ("script", "i")]
    figures = sum(tag == "figure" for tag, _ in page.tags)
    assert figures > 15
    assert "Through training" in page.text and f"{trained.name}, checkpoints" in "".join(
        str(attributes.get("aria-label")) for _, attributes in page.tags
    )
    charts = [ElementTree.parse(file).getroot() for file in (tmp_path / "charts").iterdir()]
    assert len(charts) == figures
    assert all(chart.tag == "{http://www.w3.org/2000/svg}svg" for chart in charts)


def check_page(page: Page) -> None:
    """The page is whole, described, and loads nothing."""
    images = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(images) == sum(tag == "figure" for tag, _ in page.tags) > 0
    assert all(image["role"] == "img" and len(image["aria-label"]) > 30 for image in images)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:image/png;base64,")), (tag, target[:80])
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "script")]
    assert ("html", {"lang": "en"}) in page.tags and any(tag == "title" for tag, _ in page.tags)
    viewport = [a for tag, a in page.tags if tag == "meta" and a.get("name") == "viewport"]
    assert viewport[0]["content"] == "width=device-width, initial-scale=1"


def test_logs_alone(trained: Path, tmp_path: Path) -> None:
    log = tmp_path / "cut.jsonl"
    log.write_bytes((trained / "memory_usage.jsonl").read_bytes()[:-20])
    html_file = tmp_path / "logs.html"
    options = ["--log", f"whole={trained / 'memory_usage.jsonl'}", f"cut={log}"]
    done = run_well(sys.executable, SCRIPT, *options, "--html", html_file)
    assert f"warning: {log}: skipped the last line, which is incomplete" in done.output
    page = Page(html_file.read_text())
    check_page(page)
    for said in (
        "Top-1 usage",
        "Staleness of first choices, median",
        "split valid",
        "split train",
        "incomplete",
    ):
        assert said in page.text, said


def test_a_short_text_is_said_and_read_to_its_end(
    trained: Path, evil_data: Path, tmp_path: Path
) -> None:
    text, file = tmp_path / "short.txt", tmp_path / "short.json"
    text.write_text("w1 w2 w3\nw4 w5\n")
    options = ["--checkpoint", trained / "checkpoint_last.pt", "--text", text, "--json", file]
    done = run_well(sys.executable, SCRIPT, *options, "--dict", evil_data / "dict.txt")
    (line,) = (line for line in done.output.splitlines() if line.startswith("warning:"))
    # 256 slots, 2 heads: 12,800 tokens are 100 draws; <s>, 5 words and 2 ends of lines are 8
    assert "has only 8 of the 12,800 tokens wanted" in line
    assert "0.0625 draws per slot instead of 100" in line
    assert json.loads(file.read_text())["checkpoints"][0]["layers"][0]["tokens"] == 8


def test_drift_from_before_to_after_finetuning(trained: Path, tmp_path: Path) -> None:
    before = load(trained / "checkpoint_last.pt")
    for part, n_outputs in (("dense", 32), ("out_proj", 2)):
        name = f"classification_heads.mrpc.{part}"
        before["model"][f"{name}.weight"] = torch.zeros(n_outputs, 32)
        before["model"][f"{name}.bias"] = torch.zeros(n_outputs)
    before["model"]["encoder.sentence_encoder.layers.1.memory.keys"] *= 2
    torch.save(before, tmp_path / "after.pt")
    sequences = [torch.arange(4, 14)]
    args = Namespace(data=None, text=None, dict=None)  # the dictionary beside the training data
    files = trained / "checkpoint_last.pt", tmp_path / "after.pt"
    models = [open_checkpoint(file.stem, file, args).model for file in files]
    (found,) = drift_of_models(*models, sequences, 1, 10)
    assert found["keys_moved"] == pytest.approx(1)
    assert (found["topk_jaccard"], found["top1_same"], found["values_moved"]) == (1, 1, 0)


def test_counts_of_slots_are_those_of_a_loop_over_batches(
    trained: Path,
    evil_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoint, file = trained / "checkpoint_last.pt", tmp_path / "counts.pt"
    options = ["--checkpoint", checkpoint, "--data", evil_data, "--unmasked", "--tokens", "150"]
    status, output = usage_here(
        monkeypatch, capfd, *options, "--save-counts", file, "--counts-batch", "2"
    )
    assert status == 0, output
    counts = load_counts(file, "it")
    assert (counts.about["checkpoint"], counts.about["updates"]) == (str(checkpoint), 12)
    assert (counts.about["text"], counts.about["split"]) == (str(evil_data), "valid")
    assert (counts.about["tokens"], counts.about["masked"]) == (150, False)
    assert counts.about["sequences_per_batch"] == 2
    origin = load(checkpoint)["model"]["encoder.sentence_encoder.layers.1.reads.origin"]
    assert counts.about["origins"] == {1: tuple(origin.long().tolist())}
    args = Namespace(data=str(evil_data), text=None, dict=None, split="valid")
    opened = open_checkpoint("it", checkpoint, args)
    text = read_text(args, opened.dictionary, opened.model.max_positions())
    sequences = first_tokens(text, 150)
    reads, batches = [0] * 256, [0] * 256
    for at in range(0, len(sequences), 2):
        seen = set()
        for sequence in sequences[at : at + 2]:
            slots = slots_read(opened.model, sequence)
            seen.update(slots)
            for slot in slots:
                reads[slot] += 1
        for slot in seen:
            batches[slot] += 1
    (table,) = counts.tables.values()
    assert table.reads.tolist() == reads and sum(reads) == 150 * 2 * 4  # heads, knn
    assert table.batches.tolist() == batches and table.n_batches == -(-len(sequences) // 2) > 1


def slots_read(model: Any, sequence: torch.Tensor) -> List[int]:
    """The slots of all reads of one sequence."""
    seen: List[int] = []
    (memory,) = (layer.memory for layer in model.memory_layers().values())
    observer = Namespace(observe=lambda look_up: seen.extend(look_up.slots.flatten().tolist()))
    with memory.observed_by(observer), torch.no_grad():
        model(sequence[None], features_only=True)
    return seen


def test_a_checkpoint_of_an_older_version_has_no_origin(
    trained: Path, evil_data: Path, tmp_path: Path
) -> None:
    checkpoint = load(trained / "checkpoint_last.pt")
    args = Namespace(data=str(evil_data), text=None, dict=None)
    file = tmp_path / "old.pt"
    for has_origin in (True, False):
        if not has_origin:
            del checkpoint["model"]["encoder.sentence_encoder.layers.1.reads.origin"]
        torch.save(checkpoint, file)
        assert (open_checkpoint("old", file, args).origins is not None) == has_origin


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--checkpoint", "none.pt", "--data", "DATA"], "--checkpoint none.pt: no such file"),
        (["--checkpoint", "PLAIN", "--data", "DATA"], "the model has no memory"),
        (["--checkpoint", "GOOD", "--data", "DATA", "--split", "t"], "has no split t"),
        (["--checkpoint", "GOOD", "--data", "DATA", "--tokens", "0"], "must be at least 1"),
        (["--checkpoint", "GOOD", "--data", "no-bin"], "no dictionary at"),
        (["--checkpoint", "GOOD", "--text", "none.txt"], "--text none.txt: no such file"),
        (["--checkpoint", "GOOD", "--text", "/dev/null"], "no such file"),
        (["--checkpoint", "GOOD"], "needs a text"),
        (["--log", "none.jsonl"], "none.jsonl: no such file"),
        (["--log", "DATA/dict.txt"], "line 1 is no"),
        (["--log", "LOG", "--html", "no-folder/x.html"], "must be a file in a folder that exists"),
        (["--log", "LOG", "LOG"], "two files are called"),
        ([], "nothing to analyse"),
        (["--log", "LOG", "--save-counts", "c.pt"], "--save-counts c.pt needs one --checkpoint"),
        (["--log", "LOG", "--counts-batch", "2"], "--counts-batch has no effect without"),
        (["--log", "LOG", "--counts-batch", "0"], "--counts-batch is 0, must be at least 1"),
    ],
)
def test_bad_input_is_one_line(
    trained: Path,
    evil_data: Path,
    plain_file: Path,
    options: List[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = {"DATA": evil_data, "GOOD": trained / "checkpoint_last.pt", "PLAIN": plain_file}
    names["LOG"] = trained / "memory_usage.jsonl"
    for name, path in names.items():
        options = [option.replace(name, str(path)) for option in options]
    status, output = usage_here(monkeypatch, capfd, *options)
    assert status != 0
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("memory_usage.py: "), output
    assert said in lines[0]


@pytest.fixture(scope="module")
def plain_file(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without memory."""
    checkpoint = load(trained / "checkpoint_last.pt")
    checkpoint["model"] = {k: v for k, v in checkpoint["model"].items() if ".memory." not in k}
    file = tmp_path_factory.mktemp("plain") / "plain.pt"
    torch.save(checkpoint, file)
    return file


def test_an_old_report_survives_a_failure(trained: Path, evil_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "usage.json"
    file.write_text("old")
    damaged = tmp_path / "damaged.pt"
    shutil.copy(trained / "checkpoint_last.pt", damaged)
    damaged.write_bytes(damaged.read_bytes()[:5000])
    options = ["--checkpoint", trained / "checkpoint_last.pt", damaged, "--data", evil_data]
    assert usage(*options, "--json", file).status != 0
    assert file.read_text() == "old" and {f.name for f in tmp_path.iterdir()} == {
        "usage.json",
        "damaged.pt",
    }

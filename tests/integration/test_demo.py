"""The demo with its quick preset: report, reuse, interruption, bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import torch

from .conftest import demo
from .runs import PATIENCE, ROOT, Run, load, run, run_well, wait_for

SCRIPTS = ROOT / "scripts"
N = 60  # updates of the quick preset's half
MEMORY_KEYS = {
    *("layer", "tokens", "top1_usage", "topk_usage", "top1_ceiling", "topk_ceiling"),
    *("kl_weighted", "kl_unweighted"),
}


def report_of(out: Path) -> Dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_the_report_says_what_was_trained(finished: "tuple[Path, Run]") -> None:
    out, printed = finished
    report = report_of(out)
    assert [arm["arm"] for arm in report["arms"]] == ["plain", "resm_init", "pkm"]
    for arm in report["arms"]:
        history = load(Path(arm["checkpoint"]))["optimizer_history"]
        assert history[-1]["num_updates"] == (N if arm["arm"] == "resm_init" else 2 * N)
        assert arm["updates"] == 2 * N
        assert 1 < arm["ppl"] < 300 and arm["words_per_second"] > 0
        assert f"{arm['ppl']:.2f}" in printed.output and f"{arm['parameters']:,}" in printed.output
        for layer in arm["memory"]:
            assert layer.keys() >= MEMORY_KEYS
            assert 0 < layer["top1_usage"] <= layer["topk_usage"] <= 1
    assert [len(arm["memory"]) for arm in report["arms"]] == [0, 1, 1]


def test_parameters_are_counted_once(finished: "tuple[Path, Run]") -> None:
    for arm in report_of(finished[0])["arms"]:
        state = load(Path(arm["checkpoint"]))["model"]
        tied = {"encoder.lm_head.weight", "encoder.sentence_encoder.version"}
        counted = sum(
            tensor.numel()
            for name, tensor in state.items()
            if name not in tied and "running" not in name and ".reads." not in name
        )
        assert arm["parameters"] == counted


def test_the_unigram_model_is_that_of_the_training_text(finished: "tuple[Path, Run]") -> None:
    """Its perplexity on all held-out tokens, naively, is near that on the masked ones."""
    data = finished[0] / "data"
    train, test = (
        (data / f"{split}.pieces").read_text().split("\n") for split in ("train", "test")
    )
    pieces = [piece for line in train[:-1] for piece in [*line.split(), "</s>"]]
    held_out = [piece for line in test[:-1] for piece in [*line.split(), "</s>"]]
    counts = {piece: 1 for piece in held_out}
    for piece in pieces:
        counts[piece] = counts.get(piece, 1) + 1
    n_symbols = len((data / "bin/dict.txt").read_text().splitlines()) + 5
    total = len(pieces) + n_symbols
    naive = np.exp(-np.mean([np.log(counts[piece] / total) for piece in held_out]))
    assert report_of(finished[0])["unigram_ppl"] == pytest.approx(naive, rel=0.1)


def test_resm_starts_from_plain_half_way(finished: "tuple[Path, Run]") -> None:
    half = load(finished[0] / "arms/plain/checkpoint_half.pt")
    assert half["optimizer_history"][-1]["num_updates"] == N
    (resm,) = [arm for arm in report_of(finished[0])["arms"] if arm["arm"] == "resm_init"]
    assert Path(resm["started_from"]).samefile(finished[0] / "arms/plain/checkpoint_half.pt")
    end = load(finished[0] / "arms/plain/checkpoint_last.pt")
    both = (
        state["extra_state"]["train_iterator"] for state in (end, load(Path(resm["checkpoint"])))
    )
    places = [(place["epoch"], place["iterations_in_epoch"]) for place in both]
    assert places[0] == places[1]  # it ends where plain ends in the data


def test_the_search_of_both_memories_is_validated(finished: "tuple[Path, Run]") -> None:
    found = report_of(finished[0])["validation"]
    assert [arm["arm"] for arm in found] == ["resm_init", "pkm"]
    assert all(arm["exact"] and arm["recall_at_k"] == 1 and arm["queries"] > 0 for arm in found)
    assert "ResM + INIT: search exact by FAISS" in finished[1].output
    assert (finished[0] / "report.html").read_text().count("<td>exact</td>") == 2


def test_both_arms_are_asked_for_facts(finished: "tuple[Path, Run]") -> None:
    out, facts = finished[0], report_of(finished[0])["facts"]
    assert [arm["arm"] for arm in facts["arms"]] == ["plain", "resm_init"]
    for arm in facts["arms"]:
        updates = load(Path(arm["checkpoint"]))["optimizer_history"][-1]["num_updates"]
        assert updates == facts["updates"] // (2 if arm["arm"] == "resm_init" else 1)
        assert arm["people"] == facts["people"] == 100 and ("zeroed" in arm) == ("memory" in arm)
        assert f"{100 * arm['by_name']['recall']:.1f}&nbsp;%" in (out / "report.html").read_text()
    assert "memory" in facts["arms"][1]
    assert "facts/plain/checkpoint10.pt" in (out / "facts/resm_init/train.log").read_text()
    assert "recall of facts about 100 people: plain RoBERTa" in finished[1].output.replace(
        "\n", " "
    )
    (answer, share), *_ = facts["example"]["top"]["resm_init"]
    filled = run_well(
        *(sys.executable, SCRIPTS / "fill_mask.py", facts["example"]["sentence"], "--words"),
        *("--data", out / "facts/data", "--checkpoint", out / "facts/resm_init/checkpoint_last.pt"),
    ).output.splitlines()
    assert filled[-5].split() == [f"{100 * share:.1f}", "%", answer]


def test_the_page_needs_no_network(finished: "tuple[Path, Run]") -> None:
    page = (finished[0] / "report.html").read_text()
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.search(r"@import|<script|<link", page)


def test_a_second_call_reuses_everything(finished: "tuple[Path, Run]", corpus: Path) -> None:
    out = finished[0]
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.pt")}
    report = report_of(out)
    again = run_well(*demo(out, corpus))
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.pt")} == before
    assert report_of(out) == report
    assert "preparing" not in again.output and "evaluating" not in again.output


def test_an_interrupted_demo_continues_to_the_same_end(
    finished: "tuple[Path, Run]", corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            list(map(str, demo(out, corpus))), stdout=output, stderr=subprocess.STDOUT
        )
        wait_for((out / "arms/pkm/checkpoint_last.pt").exists, process)
        process.terminate()  # as Ctrl-C
        assert process.wait(PATIENCE) == 130
    assert "interrupted; run it again to continue" in (tmp_path / "output").read_text()
    run_well(*demo(out, corpus))
    whole, continued = report_of(finished[0]), report_of(out)
    assert [arm["ppl"] for arm in continued["arms"]] == [arm["ppl"] for arm in whole["arms"]]
    assert [arm["memory"] for arm in continued["arms"]] == [arm["memory"] for arm in whole["arms"]]
    recalls = [[arm["by_name"] for arm in report["facts"]["arms"]] for report in (whole, continued)]
    assert recalls[0] == recalls[1]


def test_masks_are_filled(finished: "tuple[Path, Run]") -> None:
    out = finished[0]
    filled = run_well(
        *(sys.executable, SCRIPTS / "fill_mask.py", "Ba <mask> do.", "--data", out / "data"),
        *("--checkpoint", out / "arms/pkm/checkpoint_last.pt"),
    ).output.splitlines()
    shares = [float(line.split("%")[0]) for line in filled]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True)


MISTAKES = {
    "missing corpus": (["demo.py", "--corpus", "missing.txt"], "missing.txt: no such file"),
    "empty corpus": (["demo.py", "--corpus", "empty.txt"], "empty.txt is empty"),
    "not UTF-8": (["demo.py", "--corpus", "latin.txt"], "latin.txt is not UTF-8: byte 0xe9"),
    "too small": (["demo.py", "--corpus", "small.txt"], "small.txt is too small"),
    "foreign folder": (
        ["prepare_corpus.py", "lines.txt", "--out", "foreign"],
        "foreign holds files of another program",
    ),
    "no data": (["train_arms.py", "--data", "nothing"], "nothing"),
    "no checkpoint": (["fill_mask.py", "a <mask>", "--data", "nothing"], "nothing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(tmp_path: Path, mistake: str) -> None:
    (script, *options), message = MISTAKES[mistake]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 30)
    (tmp_path / "small.txt").write_text("one\ntwo\n")
    (tmp_path / "lines.txt").write_text("".join(f"a line {i}\n" for i in range(100)))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/precious.txt").write_text("keep me")
    failed = run(sys.executable, SCRIPTS / script, *options, cwd=tmp_path)
    assert failed.status == 1
    assert message in failed.output.splitlines()[-1]
    assert "Traceback" not in failed.output
    assert (tmp_path / "foreign/precious.txt").read_text() == "keep me"


def test_torch_and_the_demo_agree_on_the_usage_of_the_last_checkpoint(
    finished: "tuple[Path, Run]",
) -> None:
    """Usage in the report, against one counted here from the look-ups of the model."""
    from pkm_fairseq.experiments.demo.evaluate import load as load_arm
    from pkm_fairseq.experiments.demo.evaluate import masked_batches

    out = finished[0]
    (pkm,) = [arm for arm in report_of(out)["arms"] if arm["arm"] == "pkm"]
    model, task = load_arm(Path(pkm["checkpoint"]), out / "data/bin")
    first = set()
    caught: List[torch.Tensor] = []
    memory = model.memory_layers()[1].memory
    memory.register_forward_hook(lambda module, inputs, result: caught.append(inputs))
    with torch.no_grad():
        for batch in masked_batches(task):
            model(**batch["net_input"])
            x, padding = caught.pop()
            _, lookup = memory(x, padding, return_lookup=True)
            caught.clear()
            slots = lookup.slots if padding is None else lookup.slots[~padding]
            first |= set(slots[..., 0].flatten().tolist())
    assert pkm["memory"][0]["top1_usage"] == len(first) / memory.config.n_slots

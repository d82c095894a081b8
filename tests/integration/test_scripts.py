"""Scripts as the README runs them, on plain and on memory checkpoints; checkpoints of others."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

import pkm_fairseq.experiments.benchmark.kinds
from pkm_fairseq.experiments.demo.evaluate import evaluate, load, masked_batches
from pkm_fairseq.models.roberta import PkmRobertaModel
from tests.validation.models import load_script

from .runs import ROOT, Run, run, run_well
from .runs import load as load_file

SCRIPTS = ROOT / "scripts"
LAST = "checkpoint_last.pt"
# scripts that files of their own test, as processes and on checkpoints of both kinds
ELSEWHERE = {
    "demo.py": "integration/test_demo.py",
    "memory_usage.py": "integration/test_memory_usage.py",
    "memory_delta.py": "unit/test_delta.py",
    "finetune_glue.py": "integration/test_glue_finetune.py",
    "predict_glue.py": "integration/test_glue_predict.py",
    "prepare_glue.py": "integration/test_glue_prepare.py",
    "kill_training.py": "integration/test_faults.py",
    "convert_checkpoint.py": "unit/test_convert_checkpoint.py",
    "export_memory.py": "integration/test_mapped.py",
    "measure_mapped.py": "integration/test_mapped.py",
    "merge_checkpoint.py": "integration/test_parts.py",
    "measure_checkpoint.py": "integration/test_parts.py",
    "draw_architecture.py": "unit/test_architecture.py",
    "prepare_people.py": "integration/test_facts.py",
    "measure_recall.py": "integration/test_facts.py",
}


def script(name: str, *options: Any, **more: Any) -> Run:
    """Run a script that must succeed."""
    return run_well(sys.executable, SCRIPTS / name, *options, **more)


def report_of(finished: "tuple[Path, Run]") -> Dict[str, Any]:
    return json.loads((finished[0] / "report.json").read_text())


def checkpoints(out: Path) -> List[Path]:
    return [out / "arms" / arm / LAST for arm in ("plain", "resm_init", "pkm")]


def test_every_script_is_run() -> None:
    here = Path(__file__).read_text()
    names = {file.name for file in SCRIPTS.glob("[a-z]*.py")}
    called = {n for n in names if f'script("{n}"' in here or f'SCRIPTS / "{n}"' in here}
    assert called == names - ELSEWHERE.keys()
    for name, file in ELSEWHERE.items():
        assert name in (ROOT / "tests" / file).read_text(), name


def test_evaluate_mlm_says_what_the_report_says(
    finished: "tuple[Path, Run]", tmp_path: Path
) -> None:
    out, report = finished[0], report_of(finished)
    files = checkpoints(out)
    options = ["--data", out / "data/bin", "--ablate", "--json", tmp_path / "mlm.json"]
    printed = script("evaluate_mlm.py", *files, *options).output.splitlines()
    found = json.loads((tmp_path / "mlm.json").read_text())
    check_ablations(found["checkpoints"], [line for line in printed if "ablate" in line])
    for theirs, ours in zip(found["checkpoints"], report["arms"], strict=True):
        assert (theirs["perplexity"], theirs["memory"]) == (ours["ppl"], ours["memory"])
    lines = [line for line in printed if "ablate" not in line]
    assert lines[0] == f"split test: {report['masked_tokens']:,} masked tokens"
    assert lines[1] == f"unigram model: perplexity {report['unigram_ppl']:.2f}"
    expected = []
    for file, arm in zip(files, report["arms"], strict=True):
        expected.append(f"{file}: perplexity {arm['ppl']:.2f}")
        for layer in arm["memory"]:
            expected += [f"  layer {layer['layer']}: ", *(f"    head {h}: " for h in range(4))]
    assert len(lines[2:]) == len(expected) == 3 + 2 * 5
    assert all(line.startswith(start) for line, start in zip(lines[2:], expected, strict=True))
    last = report["arms"][-1]["memory"][-1]["heads"][-1]
    last_head = [line for line in lines if line.startswith("    head 3: ")][-1]
    assert last_head == "    head 3: " + ", ".join(
        f"{key} {value:.4g}" for key, value in last.items()
    )


def check_ablations(found: List[Dict[str, Any]], lines: List[str]) -> None:
    """What evaluate_mlm.py says of a plain model, and of two with a memory in layer 1."""
    plain, *others = found
    assert (plain["ablations"], plain["ablations_by_layer"]) == (None, {})
    assert lines[0] == "  no memory to ablate"
    assert len(lines) == 1 + 2 * len(others)
    for checkpoint, line in zip(others, lines[1::2], strict=True):
        ablations = checkpoint["ablations"]
        said = ", ".join(f"{kind} {ablations[kind]:.2f}" for kind in ("zero", "permuted", "top1"))
        assert line == f"  all memories ablated: {said}"
        assert checkpoint["ablations_by_layer"] == {"1": ablations}
        assert all(ppl > 1 and ppl != checkpoint["perplexity"] for ppl in ablations.values())


@pytest.mark.parametrize("arm", ["plain", "pkm"])
def test_fill_mask_says_what_the_report_says(finished: "tuple[Path, Run]", arm: str) -> None:
    out, filled = finished[0], report_of(finished)["fill_mask"][0]
    options = ["--checkpoint", out / "arms" / arm / LAST, "--data", out / "data"]
    lines = script("fill_mask.py", filled["sentence"], *options).output.splitlines()
    assert lines == [
        f"{100 * share:5.1f} %  {piece.strip()}" for piece, share in filled["top"][arm]
    ]


def test_a_prepared_text_and_fill_mask_with_the_pieces_of_another(
    finished: "tuple[Path, Run]", tmp_path: Path
) -> None:
    out, data = finished[0], tmp_path / "other"
    text = tmp_path / "other.txt"
    text.write_text("".join(f"{i * 7919 % 100_003} {i * 104_729 % 99_991}\n" for i in range(3000)))
    done = script("prepare_corpus.py", text, "--out", data, "--vocabulary", "60")
    assert done.output.splitlines()[-1] == f"data for fairseq-train in {data / 'bin'}"
    made = {file.name for file in (data / "bin").iterdir()}
    assert {"dict.txt", "train.bin", "valid.bin", "test.bin"} <= made
    (data / "bin/dict.txt").write_bytes((out / "data/bin/dict.txt").read_bytes())
    options = ["--checkpoint", out / "arms/pkm" / LAST, "--data", data]
    failed = run(sys.executable, SCRIPTS / "fill_mask.py", "123 <mask> 45678", *options)
    assert failed.status == 1
    assert "pieces are not in the dictionary" in failed.output.splitlines()[-1]


def test_validate_faiss_on_both_kinds(finished: "tuple[Path, Run]", tmp_path: Path) -> None:
    plain, resm, _ = checkpoints(finished[0])
    options = ["--data", finished[0] / "data/bin", "--queries", "50", "--json", tmp_path / "x.json"]
    last = script("validate_faiss.py", "--checkpoint", resm, *options).output.splitlines()[-1]
    assert last.startswith("EXACT: 400 float32 queries, recall@k 1,")
    assert "; memory layers judged: 1 (all) (" in last
    assert json.loads((tmp_path / "x.json").read_text())["exact"] is True
    failed = run(sys.executable, SCRIPTS / "validate_faiss.py", "--checkpoint", plain, *options)
    assert failed.status == 2
    assert (
        failed.output == f"validate_faiss: error: --checkpoint {plain}: the model has no memory\n"
    )


def test_the_demos_steps_one_by_one_reuse_what_is_there(finished: "tuple[Path, Run]") -> None:
    out, _ = finished
    before = {file: file.stat().st_mtime_ns for file in (out / "arms").rglob("*.pt")}
    report = report_of(finished)
    options = ["--data", out / "data", "--out", out / "arms", "--preset", "quick"]
    last = script("train_arms.py", *options).output.splitlines()[-1]
    assert last == f"one folder for each arm in {out / 'arms'}"
    last = script("make_report.py", "--out", out, "--preset", "quick").output.splitlines()[-1]
    assert last == str(out / "report.html")
    assert {file: file.stat().st_mtime_ns for file in (out / "arms").rglob("*.pt")} == before
    assert report_of(finished) == report


def test_fetch_corpus_without_a_registry_is_one_line(tmp_path: Path) -> None:
    """Fetching itself is tested with a registry of files."""
    failed = run(
        *(sys.executable, SCRIPTS / "fetch_corpus.py", "--out", tmp_path / "corpus"),
        env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)},
    )
    assert failed.status == 1
    assert failed.output.splitlines()[-1].startswith("fetch_corpus.py: ")
    assert "Traceback" not in failed.output


def test_measure_exchange_plans_as_in_the_docs() -> None:
    plan = ["--plan", "--n-keys", "512", "--workers", "64", "1024", "--shards", "1", "8"]
    last = script("measure_exchange.py", *plan).output.splitlines()[-1]
    assert last.startswith("| 1,024 | 8 | 1,024 | ")


def test_simulate_cluster_prints_the_totals_of_its_parts(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ["--workers", "4", "16", "--tokens", "64", "--shards", "1", "8", "--n-keys", "32"]
    last = script("simulate_cluster.py", *options, "--per-node", "4", "--json", file)
    found = json.loads(file.read_text())["updates"]
    assert len(found) == 4 + 7  # four workers have no groups of eight
    of_16 = [row for row in found if row["workers"] == 16]
    cells = " | ".join(f"{row['total']:,.1f}" for row in of_16)
    assert last.output.splitlines()[-1] == f"| 16 | 64 | {cells} |"
    for row in found:
        parts = ("base", "rest", "read", "group", "between", "update")
        assert row["total"] == pytest.approx(sum(row[part] for part in parts))
    slow = script("simulate_cluster.py", *options, "--per-node", "4", "--inter", "0.01")
    assert slow.output.splitlines()[-1] != last.output.splitlines()[-1]
    refused = run(sys.executable, SCRIPTS / "simulate_cluster.py", "--inter", "0")
    assert refused.status == 2
    assert refused.output == "simulate_cluster.py: error: --inter is 0.0, must be above 0\n"


def test_a_checkout_is_equal_to_itself(data_bin: Path) -> None:
    options = ["--data", data_bin, "--updates", "2", "--arms", "resm"]
    (last,) = script("compare_checkouts.py", ROOT, ROOT, *options).output.splitlines()
    assert last.startswith("resm: ") and last.endswith(" after 2 updates: equal to the bit")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("evaluate_mlm.py", ["x.pt", "--data", "none"]),
        ("measure_checkpoint.py", ["--data", "none"]),
        ("measure_mapped.py", []),
        ("measure_recall.py", ["x.pt", "--data", "none"]),
        ("simulate_cluster.py", []),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    name: str, options: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *options, "--json", "no-folder/x.json"])
    with pytest.raises(ValueError, match=r"--json no-folder/x\.json must be a file in"):
        load_script(SCRIPTS / name).main()


def test_benchmark_memory(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    sizes = ["--what", "layer", "--tokens", "16", "--n-keys", "32", "--pairs", "2"]
    script("benchmark_memory.py", *sizes, "--threads", "1", "--json", file)
    subjects = {result["subject"] for result in json.loads(file.read_text())["results"]}
    assert subjects == {"ours"}


@pytest.mark.parametrize("what", ["model", "usage"])
def test_benchmark_memory_finds_the_plugins_models(tmp_path: Path, what: str) -> None:
    file = tmp_path / "found.json"
    script("benchmark_memory.py", "--what", what, "--quick", "--pairs", "1", "--json", file)
    subjects = {result["subject"] for result in json.loads(file.read_text())["results"]}
    assert "resm_tiny" in subjects


# --- checkpoints of others --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain_run", "stock_pkm_run"])
def test_a_checkpoint_of_the_stock_task_is_evaluated(
    kind: str, data_bin: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """It stores no hash of its dictionary: elsewhere the dictionary is unknown, not another."""
    file = request.getfixturevalue(kind) / LAST
    options = ["--data", data_bin, "--split", "valid"]
    expected = script("evaluate_mlm.py", file, *options).output.splitlines()
    assert expected[2].startswith(f"{file}: perplexity ")
    elsewhere = load_file(file)
    elsewhere["cfg"]["task"]["data"] = "no-such-folder"
    torch.save(elsewhere, tmp_path / "elsewhere.pt")
    lines = script("evaluate_mlm.py", tmp_path / "elsewhere.pt", *options).output.splitlines()
    (warning,) = (line for line in lines if "stores no hash of its dictionary" in line)
    lines.remove(warning)
    assert lines[2].split()[-1] == expected[2].split()[-1]
    assert lines[3:] == expected[3:]


def as_old_as_sapiens(file: Path, data: str, out: Path) -> Path:
    """The checkpoint as fairseq 0.9 wrote it, of an architecture and a criterion of its own."""
    checkpoint = load_file(file)
    options = vars(checkpoint["cfg"]["model"])
    options.update(arch="roberta_small", criterion="smooth_masked_lm", task="masked_lm", data=data)
    options.update(optimizer="nag", lr_scheduler="fixed", tokens_per_sample=32, _name=None)
    old = {
        "args": Namespace(**options),
        "model": {f"decoder{k.removeprefix('encoder')}": v for k, v in checkpoint["model"].items()},
        "optimizer_history": checkpoint["optimizer_history"],
        "extra_state": {},
    }
    torch.save(old, out)
    return out


def test_a_checkpoint_of_an_old_fairseq_and_an_unknown_architecture(
    plain_run: Path, data_bin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = load(plain_run / LAST, data_bin)
    old_file = as_old_as_sapiens(plain_run / LAST, "no-such-folder", tmp_path / "old.pt")
    old = load(old_file, data_bin)
    assert "'roberta_small' is no known architecture; built as roberta" in caplog.text
    batches = masked_batches(new.task, "valid")
    assert evaluate(old.model, batches, new.task).ppl == evaluate(new.model, batches, new.task).ppl
    hub = PkmRobertaModel.from_pretrained(str(tmp_path), "old.pt", str(data_bin), bpe=None)
    tokens = batches[0]["net_input"]["src_tokens"]
    assert torch.equal(hub.extract_features(tokens), new.model(tokens, features_only=True)[0])


def other_order(data_bin: Path, out: Path) -> Path:
    out.mkdir()
    symbols = (data_bin / "dict.txt").read_text().splitlines()
    (out / "dict.txt").write_text("\n".join(reversed(symbols)) + "\n")
    return out


@pytest.mark.parametrize("kind", ["plain_run", "resm_run"])
def test_another_dictionary_is_refused_before_loading(
    kind: str, data_bin: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(kind)
    folder = found[0] if kind == "resm_run" else found
    data = other_order(data_bin, tmp_path / "other")
    said = {
        "plain_run": f"beside its training data, {data_bin / 'dict.txt'}, is another one",
        "resm_run": "was trained with another dictionary (sha256 ",
    }[kind]
    with pytest.raises(ValueError) as caught:
        load(folder / LAST, data)
    assert said in str(caught.value)
    with pytest.raises(ValueError) as caught:
        PkmRobertaModel.from_pretrained(str(folder), LAST, str(data), bpe=None)
    assert said in str(caught.value)


def test_what_is_no_masked_lm_is_said_to_be_none(
    plain_run: Path, data_bin: Path, tmp_path: Path
) -> None:
    checkpoint = load_file(plain_run / LAST)
    checkpoint["cfg"]["task"] = {"_name": "sentence_prediction"}
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="was trained on the task sentence_prediction, must be"):
        load(tmp_path / "x.pt", data_bin)


def test_sequences_that_are_too_long_for_a_model_are_refused(
    plain_run: Path, data_bin: Path
) -> None:
    loaded = load(plain_run / LAST, data_bin)
    tokens = torch.full((1, 600), 5)
    batch = {"net_input": {"src_tokens": tokens}, "target": tokens}
    with pytest.raises(ValueError, match="a sequence has 600 tokens, the model takes "):
        evaluate(loaded.model, [batch], loaded.task)


def test_kinds_are_compared_by_cost_and_by_what_they_learn(
    finished: "tuple[Path, Run]", tmp_path: Path
) -> None:
    sizes = ["--n-keys", "8", "--heads", "2", "--knn", "4", "--width", "16", "--tokens", "8"]
    lines = script("compare_kinds.py", "cost", *sizes, "--rounds", "2").output.splitlines()
    rows = {cells[1]: cells[2:] for cells in (re.split(r" *\| *", x) for x in lines[2:])}
    assert list(rows) == list(pkm_fairseq.experiments.benchmark.kinds.KINDS) and len(rows) == 6
    parameters = {name: float(row[0]) for name, row in rows.items()}
    assert parameters["values experts"] > parameters["plain"] == parameters["relu weights"]
    assert all(float(row[column]) > 0 for row in rows.values() for column in (2, 3))
    options = ["--preset", "quick", "--updates", "2", "--seeds", "3", "--arm", "resm"]
    options += ["--kinds", "plain", "relu weights"]
    options += ["--data", finished[0] / "data/bin", "--out", tmp_path]
    lines = script("compare_kinds.py", "train", *options).output.splitlines()
    rows = {cells[1]: cells[2:] for cells in (re.split(r" *\| *", x) for x in lines[2:4])}
    assert list(rows) == ["plain", "relu weights"] and all(r[0] == "3" for r in rows.values())
    plain, relu = rows["plain"][1], rows["relu weights"][1]
    assert plain != relu  # the option does something
    assert lines[7].startswith(f"| plain | {plain} ({plain} to {plain}) |")
    difference = float(lines[8].split(" | ")[-1].strip(" |"))
    assert difference == pytest.approx(float(relu) - float(plain), abs=0.1)

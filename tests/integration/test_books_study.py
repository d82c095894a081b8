"""The study of books at toy size, from end to end."""

import json
import lzma
from pathlib import Path

from pkm_fairseq.experiments.data import prepare
from tests.glue_data import write_glue

from .runs import ROOT, run, run_well, write_sentences

STUDY = ROOT / "user_dir_examples/studies/books/run.sh"
GLUE = STUDY.with_name("glue.sh")


def test_the_study_runs_through_and_is_not_repeated(tmp_path: Path) -> None:
    """With its half on downstream tasks, which needs the models of the first."""
    books, out = tmp_path / "books", tmp_path / "out"
    books.mkdir()
    for seed, (split, lines) in enumerate({"train": 3000, "valid": 60, "test": 60}.items()):
        write_sentences(tmp_path / split, lines, seed=seed)
        with lzma.open(books / f"{split}.txt.xz", "wb") as file:
            file.write((tmp_path / split).read_bytes())
    done = run_well(STUDY, books, out, "toy")
    assert "- 16²: 9, a higher value rate helps: " in done.output
    assert "open, runs are missing" not in done.output
    stored = (out / "results.json").read_bytes()
    results = {result["run"]["arm"]: result for result in json.loads(stored)}
    assert set(results) == {"plain", "plain_longer", "pkm", "pkm_init", "resm", "resm_init"}
    assert len(json.loads(stored)) == 8  # resm_init has two rates of values, resm one that falls
    for arm, result in results.items():
        assert result["perplexity"] < 300  # the size of the vocabulary
        assert ("half" in result) == (arm == "plain")
        if arm.startswith("plain"):
            continue
        assert set(result["ablated"]) == {"zero", "permuted", "top1"}
        updates = [at["updates"] for at in result["way"]]
        assert min(updates) >= (10 if arm.endswith("_init") else 0) and max(updates) <= 20
    assert (
        results["plain"]["half"] < 300
        and results["plain"]["half"] != results["plain"]["perplexity"]
    )
    log = (out / "runs/resm_init_16keys_values0.001_seed1/train.log").read_text()
    assert "plain_seed1/checkpoint_" in log
    again = run_well(STUDY, books, out, "toy")
    assert "[1/8]" in done.output and "[1/" not in again.output  # nothing is trained again
    assert (out / "results.json").read_bytes() == stored
    refused = run(STUDY, tmp_path, out, "toy")
    assert refused.status == 2 and "no file" in refused.output

    glue = write_glue(tmp_path / "glue", ["RTE"])
    done = run_well(GLUE, out, glue, tmp_path / "finetuned", "toy")
    found = json.loads((tmp_path / "finetuned/glue_results.json").read_text())
    runs = {(result["run"]["arm"], result["run"]["remedy"]) for result in found}
    assert runs == {("plain", "none")} | {
        (arm, how) for arm in ("pkm", "resm_init") for how in ("none", "freeze", "key_dropout")
    }
    for result in found:
        assert 0 <= result["tasks"]["RTE"]["score"] <= 100
        assert ("same" in result["tasks"]["RTE"]) == (result["run"]["arm"] != "plain")
    assert "| resm_init | key_dropout | 1 |" in done.output
    refused = run(GLUE, tmp_path, glue, out, "toy")
    assert refused.status == 2 and "no file" in refused.output


def test_several_processes_binarise_to_the_same_bits(tmp_path: Path) -> None:
    pieces = {"train": tmp_path / "train", "valid": tmp_path / "valid"}
    for seed, file in enumerate(pieces.values()):
        write_sentences(file, 50, seed=seed)
    for workers in (1, 2):
        prepare.binarise(pieces, tmp_path / str(workers), workers=workers)
    files = sorted(file.name for file in (tmp_path / "1").iterdir())
    assert {"dict.txt", "train.bin", "train.idx", "valid.bin", "valid.idx"} <= set(files)
    for name in files:
        if name != "preprocess.log":
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()

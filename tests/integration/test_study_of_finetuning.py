"""The study of finetuning on a new book at toy size, from end to end."""

import json
import lzma
from pathlib import Path

from .runs import ROOT, Run, run, run_well, write_sentences

STUDY = ROOT / "user_dir_examples/studies/finetuning_books/run.sh"
NEW = "Immanuel Kant — Critique of Pure Reason"


def test_the_study_runs_through_and_is_not_repeated(
    finished: "tuple[Path, Run]", tmp_path: Path
) -> None:
    demo, _ = finished
    books, out = tmp_path / "books", tmp_path / "out"
    books.mkdir()
    texts = []
    for seed, lines in enumerate((20, 400)):
        write_sentences(tmp_path / "text", lines, seed=seed)
        texts.append((tmp_path / "text").read_text().strip())
    (books / "train.titles.txt").write_text(f"Another book\n{NEW}\n", encoding="utf-8")
    with lzma.open(books / "train.txt.xz", "wt") as file:
        file.write("\n\n".join(texts) + "\n")
    done = run_well(STUDY, demo, books, out, "toy")
    assert "open, runs are missing" not in done.output
    stored = (out / "results.json").read_bytes()
    results = {result["run"]["arm"]: result for result in json.loads(stored)}
    assert len(results) == len(json.loads(stored)) - 2 == 8  # full and values have two rates
    starts = {arm: result["start"] for arm, result in results.items()}
    assert starts["full"] == starts["low rank"] != starts["plain low rank"]
    assert len((out / "new/train.pieces").read_text().splitlines()) == 360  # nine tenths
    for arm, result in results.items():
        assert result["new"] != result["start"]["new"]  # something is learned
        if arm.startswith("slots") and "once" not in arm:
            assert 0 < result["rows_chosen"] <= result["rows_read"]
    assert results["slots 16"]["rows_chosen"] == 16
    log = (out / "runs/plain_low_rank_lr0.0001_values0_seed1/train.log").read_text()
    assert "arms/plain/checkpoint_last.pt" in log and "'low_rank_roberta_any'" in log
    again = run_well(STUDY, demo, books, out, "toy")
    assert "[1/" in done.output and "[1/" not in again.output  # nothing is trained again
    assert (out / "results.json").read_bytes() == stored
    refused = run(STUDY, demo, tmp_path, out, "toy")
    assert refused.status == 2 and "no file" in refused.output
    (books / "train.titles.txt").write_text("Another book\nA third\n")
    refused = run(STUDY, demo, books, tmp_path / "other", "toy")
    assert refused.status == 1 and "2 books, 2 titles, or none is Immanuel" in refused.output

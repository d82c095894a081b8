"""The tables of docs/finetuning.md are those of the results."""

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "user_dir_examples/studies/finetuning_books"


def test_the_tables_are_those_of_the_results():
    table = runpy.run_path(str(STUDY / "table.py"))
    text = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8")
    results = json.loads((STUDY / "results.json").read_text())
    for arms in results.values():
        assert table["markdown"](arms) in text
        assert {len(found["new"]) for found in arms.values()} == {3}  # seeds
    results["runs"]["values_lr1e-2"]["old"][0] += 1
    assert table["markdown"](results["runs"]) not in text


def test_the_criteria_are_judged_seed_by_seed():
    table = runpy.run_path(str(STUDY / "table.py"))
    one = {"old": [10.0, 10.0], "new": [20.0, 20.0]}
    for old, new, forgets_less, dominates in (
        ([9.0, 9.0], [20.4, 20.0], True, False),
        ([9.0, 10.0], [20.0, 20.0], False, False),
        ([9.0, 9.0], [20.0, 20.5], False, False),
        ([9.9, 9.9], [20.0, 20.0], True, True),
        ([9.99, 9.99], [20.0, 20.0], True, False),
        ([10.0, 9.9], [19.8, 20.0], False, True),
    ):
        other = {"old": old, "new": new}
        judged = [
            table["every_seed"](other, one, table[name]) for name in ("forgets_less", "dominates")
        ]
        assert judged == [forgets_less, dominates], other


def test_the_picture_is_that_of_the_results(tmp_path, monkeypatch):
    picture = tmp_path / "finetuning.svg"
    argv = ["table.py", str(STUDY / "results.json"), "--svg", str(picture)]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(STUDY / "table.py"), run_name="__main__")
    assert picture.read_text() == (ROOT / "docs/evidence/finetuning.svg").read_text()

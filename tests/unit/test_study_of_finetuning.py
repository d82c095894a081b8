"""The study of finetuning on a new book: its runs, its verdicts, and its tables in the docs."""

from itertools import pairwise
from pathlib import Path

import pytest

from .studies import STUDIES, fixture_of

DOCS = STUDIES.parents[1] / "docs"
START = {"old": 20.0, "new": 40.0}


study = fixture_of("finetuning_books")


@pytest.fixture
def results(study):
    """All runs at one point of the frontier; an arm that learns less also forgets less."""
    arms, _ = study
    size = arms.SIZES["full"]
    runs = [run for part in arms.PARTS for run in arms.runs_of(size, part)]
    return {run: {"start": START, "old": 21.0, "new": 30.0} for run in runs}


def verdict(study, results, number):
    arms, table = study
    lines = table.Verdicts(results, arms.SIZES["full"]).lines()
    (line,) = (line for line in lines if line.startswith(f"- {number}, "))
    return line.split(": ", 1)[1]


def change(results, arm, **found):
    assert any(run.arm == arm for run in results)
    for run in results:
        if run.arm == arm:
            results[run] = {**results[run], **found}


def test_each_arm_trains_what_its_name_says(study):
    arms, _ = study
    counts = {"old": Path("old.pt"), "new": Path("new.pt")}
    size = arms.SIZES["full"]
    given = {}
    for part in arms.PARTS:
        for run in arms.runs_of(size, part):
            if run.seed == 2:
                flags = run.flags(size, counts)
                given[run.arm, run.lr, run.value_lr] = dict(pairwise(flags))
    slots = given["slots 50% once", 0, 1e-2]
    assert slots["--memory-finetune-slots"] == "50%" and slots["--lr"] == "0.0"
    assert slots["--memory-finetune-counts"] == "new.pt"
    assert slots["--memory-background"] == "old.pt" and slots["--memory-value-lr"] == "0.01"
    by_count = given["slots 50% by count", 0, 1e-2]
    assert by_count["--memory-finetune-score"] == "count" and "--memory-background" not in by_count
    assert given["values", 0, 3e-3]["--memory-finetune"] == "values"
    assert given["low rank", 3e-4, 0]["--memory-freeze"] == "all"
    for (arm, lr, value_lr), flags in given.items():
        assert (flags["--seed"], float(flags["--lr"])) == ("2", lr)
        assert float(flags.get("--memory-value-lr", 0)) == value_lr
        assert ("--memory-n-keys" in flags) != arm.startswith("plain")
        assert ("--memory-finetune" in flags) == arm.startswith(("values", "slots"))
        assert ("low_rank" in flags["--arch"]) == arm.endswith("low rank")
    names = [run.name for part in arms.PARTS for run in arms.runs_of(size, part)]
    assert len(set(names)) == len(names) == 3 * (27 + 12)


def test_equal_arms_support_nothing(study, results):
    for number in ("1", "2", "4a", "4b"):
        assert verdict(study, results, number) == "not supported"
    assert verdict(study, results, "3") == "not supported"
    assert verdict(study, results, "5").startswith("not supported: not low rank, lr 1e-4, nor ")
    assert verdict(study, results, "6").startswith("not supported: not plain full, lr 1e-5, nor ")


def test_the_criteria_are_met(study, results):
    change(results, "values", old=20.5)
    change(results, "slots 256", old=20.3)
    change(results, "slots 16", old=20.0, new=39.5)
    change(results, "freeze", old=20.9, new=30.6)
    said = verdict(study, results, "1")
    assert said == "values, lr 1e-3 over full, lr 1e-4; values, lr 1e-2 over full, lr 1e-4"
    assert verdict(study, results, "2").startswith("slots 256, lr 1e-3 over values, lr 1e-3; ")
    assert verdict(study, results, "3") == "5.0 % of values, lr 1e-3; 5.0 % of values, lr 1e-2"
    assert verdict(study, results, "4a") == "not supported"
    assert verdict(study, results, "4b").startswith("freeze, lr 1e-4 over full, lr 1e-4")
    assert verdict(study, results, "5") == verdict(study, results, "6") == "supported"


@pytest.mark.parametrize(
    ("old", "new", "forgets_less", "dominates"),
    [
        ([20.4, 20.4, 20.4], [30.6, 30.0, 30.0], True, False),  # 2 % more is equal
        ([20.4, 21.0, 20.4], [30.0, 30.0, 30.0], False, False),
        ([20.4, 20.4, 20.4], [30.0, 30.7, 30.0], False, False),
        ([20.4, 20.4, 20.4], [30.0, 30.0, 30.0], True, True),
        ([20.95, 20.95, 20.95], [30.0, 30.0, 30.0], True, False),  # less than 0.5 %
        ([21.0, 20.8, 20.8], [29.8, 30.0, 30.0], False, True),
    ],
)
def test_every_seed_counts(study, results, old, new, forgets_less, dominates):
    arms, table = study
    one, other = arms.Run("values", 0.0, 1e-3, 1), arms.Run("full", 1e-3, 1e-3, 1)
    for seed in (1, 2, 3):
        run = arms.Run("values", 0.0, 1e-3, seed)
        results[run] = {**results[run], "old": old[seed - 1], "new": new[seed - 1]}
    judge = table.Verdicts(results, arms.SIZES["full"])
    assert judge.holds(one, other, table.forgets_less) == forgets_less
    assert judge.holds(one, other, table.dominates) == dominates


def test_only_arms_that_forget_little_are_compared(study, results):
    change(results, "values", old=20.5)
    change(results, "low rank", old=25.0, new=20.0)  # learns more, and forgets 25 %
    assert verdict(study, results, "5") == "not supported: no arm forgets so little"
    arms, _ = study
    for seed in (1, 2, 3):
        run = arms.Run("low rank", 3e-4, 0.0, seed)
        results[run] = {**results[run], "old": 20.9, "new": 30.1}
    assert verdict(study, results, "5") == "supported"
    results[run] = {**results[run], "old": 20.4, "new": 30.1}
    assert verdict(study, results, "5") == "not supported: not low rank, lr 3e-4"


def test_forgetting_is_measured_from_the_arms_own_start(study, results):
    change(results, "values", old=20.5)
    for run in results:
        if run.start == "plain":  # 21 of 21 is less forgotten than 20.5 of 20
            results[run] = {"start": {"old": 21.0, "new": 40.0}, "old": 21.0, "new": 30.0}
    assert verdict(study, results, "6").startswith("not supported: not plain full, lr 1e-5")


def test_missing_runs_leave_criteria_open(study, results):
    arms, _ = study
    del results[arms.Run("plain full", 1e-4, 0.0, 2)]
    for number in ("5", "6"):
        assert verdict(study, results, number) == "open, runs are missing"
    assert verdict(study, results, "1") == "not supported"
    del results[arms.Run("freeze", 1e-4, 0.0, 3)]
    assert verdict(study, results, "1") == "open, runs are missing"


def test_the_tables_are_those_of_the_results(study):
    arms, table = study
    size = arms.SIZES["full"]
    found = table.read(STUDIES / "finetuning_books/results.json")
    page = (DOCS / "finetuning.md").read_text(encoding="utf-8")
    for part in arms.PARTS:
        runs = arms.runs_of(size, part)
        assert [run for run in runs if run in found] == runs  # all seeds of all arms
        assert table.table(found, size, part) in page
    found[arms.Run("values", 0.0, 1e-2, 1)]["old"] += 1
    assert table.table(found, size, "first") not in page


def test_the_picture_is_that_of_the_results(study):
    arms, table = study
    found = table.read(STUDIES / "finetuning_books/results.json")
    picture = table.draw(lambda axes: table.draw_frontier(found, arms.SIZES["full"], axes))
    assert picture == (DOCS / "evidence/finetuning.svg").read_text()

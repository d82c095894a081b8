"""The study of narrow tables: its runs, and its verdicts."""

from itertools import pairwise

import pytest

from .studies import STUDIES, fixture_of

study = fixture_of("narrow_tables")


@pytest.fixture
def results(study):
    """Three seeds whose noise is 0.4 of perplexity, and 4 points of recall."""
    arms, _ = study
    runs = arms.runs_in_order(arms.SEEDS["full"])
    of = {"text": [20.0, 20.1, 20.4], "facts": [0.60, 0.62, 0.64]}
    return {run: of[run.task][run.seed - 1] for run in runs}


def test_arms_differ_only_in_their_dtypes(study):
    arms, _ = study
    size = arms.SIZES["full"]
    for task in arms.TASKS:
        whole, *narrow = (arms.Run(task, arm, 2).flags(size) for arm in arms.ARMS)
        given = dict(pairwise(whole))
        assert (given["--seed"], given["--arch"]) == ("2", "resm_roberta_tiny")
        assert narrow == [whole + flags for flags in list(arms.ARMS.values())[1:]]
    updates = [arms.Run(task, "float8", 1).updates(size) for task in arms.TASKS]
    assert updates == [2000, 500]
    assert arms.Run("facts", "float8", 3).start == arms.Run("facts", "plain", 3)
    assert arms.Run("text", "float8", 3).start is None


def test_equal_results_are_as_good(study, results):
    _, table = study
    for task in ("text", "facts"):
        found = table.verdict(results, task, "bfloat16", (1, 2, 3))
        assert found.startswith("as good (losses by seed +0.000")
    assert "| float8 | 4.03 | 20.100 (20.000 to 20.400) | 62.0 (60.0 to 64.0) | 3 |" in table.table(
        results
    )


@pytest.mark.parametrize(
    ("task", "by", "kind"),
    [
        ("text", 0.39, "as good"),
        ("text", 0.41, "worse"),
        ("text", -0.41, "as good"),
        ("facts", -0.039, "as good"),
        ("facts", -0.041, "worse"),
    ],
)
def test_the_median_of_the_losses_decides(study, results, task, by, kind):
    arms, table = study
    for seed in (1, 3):
        results[arms.Run(task, "float8", seed)] += by
    for other in arms.TASKS:
        said = table.verdict(results, other, "float8", (1, 2, 3))
        assert said.startswith(kind if other == task else "as good")
        assert table.verdict(results, other, "bfloat16", (1, 2, 3)).startswith("as good")


def test_one_seed_alone_decides_nothing(study, results):
    arms, table = study
    results[arms.Run("text", "float8", 1)] += 5
    said = table.verdict(results, "text", "float8", (1, 2, 3))
    assert said == "as good (losses by seed +5.000, +0.000, +0.000; noise 0.400)"


def test_missing_runs_leave_a_verdict_open(study, results):
    arms, table = study
    del results[arms.Run("text", "float32", 2)]
    assert table.verdict(results, "text", "float8", (1, 2, 3)) == "open, runs are missing"


def test_the_page_has_the_table_and_the_verdicts_of_the_results(study):
    arms, table = study
    found = table.read(STUDIES / "narrow_tables/results.json")
    page = (STUDIES.parents[1] / "docs/evidence.md").read_text(encoding="utf-8")
    assert len(found) == len(arms.runs_in_order(arms.SEEDS["full"]))
    assert table.report(found, arms.SEEDS["full"]) in page
    found[arms.Run("facts", "float8", 1)] += 0.01
    assert table.report(found, arms.SEEDS["full"]) not in page

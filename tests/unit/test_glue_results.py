"""Results of finetuning runs, put together and printed."""

import json

import pytest

from pkm_fairseq.experiments.glue.results import (
    collect,
    memory_rows,
    print_results,
    summarise,
    to_markdown,
    write_results,
)

TASKS = {
    "CoLA": {"n_train": 8551, "baseline": {"mcc": 0.0}},
    "MRPC": {"n_train": 3668, "baseline": {"accuracy": 68.4, "f1": 81.2}},
}
ARMS = [{"name": "plain"}, {"name": "resm"}]
MEMORY = {
    "before": [{"layer": 1, "tokens": 100, "top1_usage": 0.5, "top1_ceiling": 0.9,
                "kl_weighted": 1.25}],
    "after": [{"layer": 1, "tokens": 100, "top1_usage": 0.25, "top1_ceiling": 0.9,
               "kl_weighted": 2.5}],
    "drift": [{"layer": 1, "top1_same": 0.75, "topk_jaccard": 0.625, "values_moved": None}],
}  # fmt: skip


def result(arm, task, seed, *dev, memory=None):
    return {
        **{"arm": arm, "task": task, "seed": seed, "memory": memory},
        "dev": dict(zip(TASKS[task]["baseline"], dev, strict=True)),
        **{"best_update": 5, "updates": 10, "warmup_updates": 1},
    }


RESULTS = [
    *(result("plain", "CoLA", seed, score) for seed, score in ((3, 50.0), (1, 40.0), (2, 44.0))),
    *(result("plain", "MRPC", seed, 70.0 + seed, 80.0 + seed) for seed in (1, 2)),
    result("resm", "CoLA", 1, 60.0, memory=MEMORY),
]


def test_median_and_extremes():
    assert summarise([3.0, 1.0, 10.0]) == {
        **{"median": 3.0, "min": 1.0, "max": 10.0},
        "seeds": [3.0, 1.0, 10.0],
    }
    assert summarise([1.0, 4.0])["median"] == 2.5


def test_results_by_arm_and_task_in_the_order_of_seeds():
    plain, resm = collect(ARMS, TASKS, RESULTS)["arms"]
    assert plain["tasks"]["CoLA"]["seeds"] == [1, 2, 3]
    assert plain["tasks"]["CoLA"]["dev"]["mcc"] == summarise([40.0, 44.0, 50.0])
    assert plain["average"] == pytest.approx((44 + (71.5 + 81.5) / 2) / 2)
    assert list(resm["tasks"]) == ["CoLA"]
    assert resm["average"] is None  # a mean over fewer tasks would compare with nothing


def test_seeds_may_end_after_different_numbers_of_updates():
    runs = [{**run, "updates": 10 * run["seed"]} for run in RESULTS]
    results = collect(ARMS, TASKS, runs)
    assert results["arms"][0]["tasks"]["CoLA"]["updates"] == [10, 20, 30]
    lines = to_markdown(results).splitlines()
    assert "| plain | CoLA | 8,551 | 10-30 | 1 | 1, 2, 3 |" in lines


def test_the_markdown_has_every_number(tmp_path):
    results = collect(ARMS, TASKS, RESULTS)
    lines = to_markdown(results).splitlines()
    assert "| arm | CoLA mcc | MRPC accuracy | MRPC f1 | average |" in lines
    row = "| plain | 44.0 [40.0-50.0] | 71.5 [71.0-72.0] | 81.5 [81.0-82.0] | 60.2 |"
    assert row in lines
    assert "| resm | 60.0 | - | - | - |" in lines
    assert "| majority class | 0.0 | 68.4 | 81.2 |  |" in lines
    assert "| plain | CoLA | 8,551 | 10 | 1 | 1, 2, 3 |" in lines
    write_results(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.md").read_text().splitlines() == lines


def test_memory_before_and_after():
    (row,) = memory_rows(collect(ARMS, TASKS, RESULTS))
    assert row[:4] == ["resm", "CoLA", "1", "100"]
    assert row[4:] == ["50.0% -> 25.0% (90.0%)", "1.25 -> 2.50", "75.0%", "62.5%", "-"]


def test_the_terminal_shows_spread_and_baseline(capsys):
    print_results(collect(ARMS, TASKS, RESULTS))
    printed = capsys.readouterr().out
    for text in ("44.0 [40.0-50.0]", "[lowest-highest]", "68.4", "majority class", "62.5%"):
        assert text in printed, text

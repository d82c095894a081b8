"""Results of finetuning runs, put together and printed."""

import json
import os

import pytest

from pkm_fairseq.experiments.glue.results import (
    collect,
    memory_rows,
    print_results,
    read_results,
    summarise,
    to_markdown,
    write_results,
)
from pkm_fairseq.experiments.runs.folders import finish, key_of

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


def write_runs(out, runs, settings="s", sha256="1", data="d"):
    """Finished runs of one arm on one task, as finetune_glue.py leaves them."""
    arm, task = runs[0]["arm"], runs[0]["task"]
    folder = out / arm / task
    for run in runs:
        seed = folder / f"seed{run['seed']}"
        seed.mkdir(parents=True)
        (seed / "result.json").write_text(json.dumps(run))
        finish(seed, key_of(settings, run["seed"]))
    about_arm = {"name": arm, "checkpoint": f"{arm}.pt", "sha256": sha256}
    about = {"key": settings, "arm": about_arm, "task": {"name": task, "key": data, **TASKS[task]}}
    (folder / "settings.json").write_text(json.dumps(about))


def test_all_finished_runs_below_a_folder_count_whichever_call_made_them(tmp_path):
    for task, arm in (("MRPC", "plain"), ("CoLA", "resm"), ("CoLA", "plain")):
        write_runs(tmp_path, [r for r in RESULTS if (r["arm"], r["task"]) == (arm, task)])
    found = read_results(tmp_path, ["resm"])
    arms = [{"name": name, "checkpoint": f"{name}.pt", "sha256": "1"} for name in ("resm", "plain")]
    assert found == collect(arms, TASKS, RESULTS)
    assert list(found["tasks"]) == ["CoLA", "MRPC"]  # GLUE's order
    assert [arm["name"] for arm in read_results(tmp_path)["arms"]] == ["plain", "resm"]


def test_unfinished_runs_and_those_of_other_settings_do_not_count(tmp_path):
    runs = [result("plain", "CoLA", seed, 40.0) for seed in (1, 2, 3)]
    write_runs(tmp_path, runs)
    finish(tmp_path / "plain/CoLA/seed1", key_of("earlier settings", 1))
    (tmp_path / "plain/CoLA/seed2/made_with.json").unlink()
    write_runs(tmp_path, [result("plain", "MRPC", 1, 70.0, 80.0)])
    (tmp_path / "plain/MRPC/seed1/made_with.json").unlink()
    write_runs(tmp_path, [result("old", "CoLA", 1, 40.0)])
    (tmp_path / "old/CoLA/settings.json").write_text('{"key": "s"}')  # of an earlier version
    found = read_results(tmp_path)
    assert list(found["tasks"]) == ["CoLA"]
    (plain,) = found["arms"]
    assert plain["tasks"]["CoLA"]["seeds"] == [3]


def test_a_row_has_one_checkpoint_and_a_column_one_data_set(tmp_path):
    """An arm was pretrained anew, or a task prepared anew, and only a part was finetuned again."""
    write_runs(tmp_path, [result("plain", "MRPC", 1, 70.0, 80.0)], sha256="earlier")
    write_runs(tmp_path, [result("resm", "CoLA", 1, 60.0)], data="earlier")
    write_runs(tmp_path, [result("plain", "CoLA", 1, 40.0)])
    for at, file in enumerate(("plain/MRPC", "resm/CoLA", "plain/CoLA")):
        os.utime(tmp_path / file / "settings.json", (at, at))
    found = read_results(tmp_path)
    assert [(arm["name"], list(arm["tasks"])) for arm in found["arms"]] == [("plain", ["CoLA"])]


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

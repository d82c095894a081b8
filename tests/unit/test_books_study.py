"""The study of books: its runs, and its answers to the claims."""

import importlib
import json
import math
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from matplotlib.figure import Figure

from .studies import STUDIES, fixture_of

DOCS = STUDIES.parents[1] / "docs"


study = fixture_of("books")


def entry(perplexity, top1=0.0, topk=1.0, zeroed=None, way=(1.0, 0.5, 1.0)):
    usage = {"top1_usage": top1, "topk_usage": topk, "draws_per_slot": 100.0}
    points = [
        {
            "updates": 312 * at,
            "topk_usage": share,
            "top1_usage": top1,
            "values_moved": 0.1,
            "effective_neighbours": 30.0,
        }
        for at, share in enumerate(way)
    ]
    ablated = {"zero": zeroed or perplexity, "top1": perplexity, "permuted": perplexity}
    return {"perplexity": perplexity, "usage": usage, "ablated": ablated, "way": points}


@pytest.fixture
def results(study):
    """A study that agrees with every claim."""
    arms, _ = study
    of = {
        "plain": entry(30.0),
        "plain_longer": entry(29.5),
        "pkm": entry(29.0, 0.3, 0.99),
        "resm": entry(28.0, 0.6),
        "pkm_init": entry(28.0, 0.7),
        "resm_init": entry(26.0, 0.97, zeroed=29.0),
    }
    size = arms.SIZES["full"]
    found = {run: of[run.arm] for run in arms.runs_in_order(size)}
    for seed in size.seeds:
        found[arms.run_of(size, "resm_init", seed, 64, arms.HIGH_VALUE_LR)] = entry(25.0)
        found[arms.run_of(size, "resm", seed, 64, value_schedule="follow")] = entry(27.0)
    return found


def said(study, found, n_keys):
    arms, table = study
    return [
        line.rpartition(": ")[2] for line in table.Claims(found, arms.SIZES["full"], n_keys).lines()
    ]


def test_every_seed_has_all_arms_and_few_slots_come_first(study):
    arms, _ = study
    runs = arms.runs_in_order(arms.SIZES["full"])
    assert len(set(runs)) == len(runs) == 3 * 5 + 3 + 3 + 3 + 3 * 4
    assert [run.arm for run in runs[:5]] == list(arms.ARMS)
    assert {run.n_keys for run in runs[:24]} == {0, 64}
    assert {(run.n_keys, run.seed) for run in runs[24:]} == {(128, seed) for seed in (1, 2, 3)}


def test_an_arm_with_init_goes_on_in_plains_schedule(study):
    arms, _ = study
    size = arms.SIZES["full"]
    run = arms.run_of(size, "pkm_init", 2, 64)
    assert run.start == arms.Run("plain", 2, 12_500)
    flags = run.flags(size)
    given = dict(pairwise(flags))
    # plain's rate falls in a straight line from 1e-3 after 400 updates to 0 after 12,500
    assert math.isclose(float(given["--lr"]), 1e-3 * (12_500 - 6250) / (12_500 - 400))
    assert given["--warmup-updates"] == "0"
    assert given["--max-update"] == given["--total-num-update"] == "6250"
    assert "--save-interval-updates" in arms.run_of(size, "plain", 1, 64).flags(size)


def test_claims_that_all_agree(study, results):
    assert said(study, results, 64) == ["agrees"] * 12
    assert said(study, results, 128) == ["agrees"] * 8


@pytest.mark.parametrize(
    ("arm", "changed", "which"),
    [
        ("pkm", entry(29.0, 0.6, 0.99), [0, 2]),
        ("pkm", entry(29.0, 0.3, 0.90), [0]),
        ("pkm_init", entry(28.0, 0.34), [1]),
        ("resm", entry(28.0, 0.34), [2]),
        ("resm_init", entry(26.0, 0.94, zeroed=29.0), [3]),
        ("pkm", entry(29.8, 0.3, 0.99), [4]),
        ("pkm_init", entry(26.1, 0.7), [5]),
        ("pkm", entry(29.0, 0.3, 0.99, way=(1.0, 0.95, 1.0)), [6]),
        ("resm_init", entry(26.0, 0.97, zeroed=27.0), [7]),
    ],
)
def test_one_seed_makes_a_claim_unclear(study, results, arm, changed, which):
    arms, _ = study
    before = said(study, results, 128)
    results[arms.run_of(arms.SIZES["full"], arm, 2, 128)] = changed
    answers = said(study, results, 128)
    assert [i for i, answer in enumerate(answers) if answer != before[i]] == which
    assert all(answers[i] == "cannot be said here" for i in which)
    assert said(study, results, 64) == ["agrees"] * 12


@pytest.mark.parametrize(
    ("arm", "changed", "which"),
    [
        ("resm", entry(28.0, 0.2), [2]),
        ("resm_init", entry(26.0, 0.7, zeroed=29.0), [3]),
        ("pkm", entry(30.5, 0.3, 0.99), [4]),
        ("resm", entry(25.0, 0.6), [5]),
        ("pkm", entry(29.0, 0.3, 0.99, way=(1.0, 0.8, 0.7)), [6]),
        ("resm_init", entry(26.0, 0.97, zeroed=26.1), [7]),
    ],
)
def test_all_seeds_can_contradict_a_claim(study, results, arm, changed, which):
    arms, _ = study
    before = said(study, results, 128)
    for seed in (1, 2, 3):
        results[arms.run_of(arms.SIZES["full"], arm, seed, 128)] = changed
    answers = said(study, results, 128)
    changes = [i for i, answer in enumerate(answers) if answer != before[i]]
    assert changes == which
    assert all(answers[i] == "does not agree" for i in which)


def test_a_memory_is_compared_with_longer_training(study, results):
    arms, _ = study
    size = arms.SIZES["full"]
    longer = arms.run_of(size, "plain_longer", 1, 64)
    assert longer == arms.Run("plain_longer", 1, 18_750)
    results[longer] = entry(26.0)
    assert said(study, results, 64)[9:11] == ["cannot be said here"] * 2
    for seed in size.seeds:
        results[arms.run_of(size, "plain_longer", seed, 64)] = entry(25.7)
    assert said(study, results, 64)[:11] == ["agrees"] * 9 + ["does not agree"] * 2
    for seed in size.seeds:
        results[arms.run_of(size, "resm", seed, 64)] = entry(25.4, 0.6)
    assert said(study, results, 64)[9:11] == ["does not agree", "agrees"]


def test_a_falling_value_rate_is_an_arm_of_its_own(study, results):
    arms, table = study
    size = arms.SIZES["full"]
    run = arms.run_of(size, "resm", 1, 64, value_schedule="follow")
    constant = arms.run_of(size, "resm", 1, 64)
    assert (run.name, constant.name) == (
        "resm_64keys_values0.001_follow_seed1",
        "resm_64keys_values0.001_seed1",
    )
    for of in (run, constant):
        assert dict(pairwise(of.flags(size)))["--memory-value-lr-schedule"] == of.value_schedule
    chart = table.charts(results, size, 64)["usage"]
    results[run] = entry(28.0)
    assert said(study, results, 64)[11] == "cannot be said here"
    assert table.charts(results, size, 64)["usage"] == chart
    for seed in size.seeds:
        results[arms.run_of(size, "resm", seed, 64, value_schedule="follow")] = entry(28.3)
    assert said(study, results, 64) == ["agrees"] * 11 + ["does not agree"]


def test_a_memory_that_does_not_go_stale_contradicts_the_paper(study, results):
    arms, _ = study
    for seed in (1, 2, 3):
        results[arms.run_of(arms.SIZES["full"], "pkm", seed, 64)] = entry(29.0, 0.8, 0.99)
    answers = said(study, results, 64)
    assert answers[0] == answers[2] == "does not agree"
    assert answers[1] == "cannot be said here"


def test_missing_runs_leave_a_claim_open(study, results):
    arms, _ = study
    del results[arms.run_of(arms.SIZES["full"], "resm", 3, 64)]
    answers = said(study, results, 64)
    assert {i: answer for i, answer in enumerate(answers) if answer != "agrees"} == {
        i: "open, agrees in 2 of 3 seeds" for i in (1, 2, 5, 10, 11)
    }
    for seed in (1, 2):
        del results[arms.run_of(arms.SIZES["full"], "resm", seed, 64)]
    answers = said(study, results, 64)
    assert [answers[i] for i in (1, 2, 5, 10, 11)] == ["open, runs are missing"] * 5


def test_one_seed_decides_what_cannot_be_said(study, results):
    arms, _ = study
    size = arms.SIZES["full"]
    results[arms.run_of(size, "resm_init", 1, 64)] = entry(26.0, 0.94, zeroed=27.0)
    for seed in (2, 3):
        del results[arms.run_of(size, "resm_init", seed, 64)]
    answers = said(study, results, 64)
    assert answers[3] == answers[7] == "cannot be said here"
    assert answers[5] == "open, agrees in 1 of 3 seeds"
    results[arms.run_of(size, "resm_init", 1, 64)] = entry(26.0, 0.89, zeroed=26.0)
    answers = said(study, results, 64)
    assert answers[3] == answers[7] == "open, does not agree in 1 of 3 seeds"


def test_results_of_several_places_are_one_table(study, results, tmp_path):
    arms, table = study
    entries = [{"run": vars(run), **result} for run, result in results.items()]
    for name, part in (("a", entries[:10]), ("b", entries[8:])):
        (tmp_path / name).write_text(json.dumps(part))
    assert table.read([tmp_path / "a", tmp_path / "b"]) == {
        arms.Run(**e["run"]): e for e in entries
    }
    rows = table.table(results).splitlines()
    assert len(rows) == 2 + 2 + 5 + 1 + 4
    assert rows[2].startswith("| plain |  |  | 3 | 30.00 (30.00 to 30.00) |")


def test_results_from_before_effective_neighbours_leave_its_cell_empty(study, results):
    arms, table = study
    run = arms.run_of(arms.SIZES["full"], "pkm", 2, 64)

    def cell():
        row = next(line for line in table.table(results).splitlines() if line.startswith("| pkm |"))
        return row.split("|")[-3].strip()

    assert cell() == "30.0 (30.0 to 30.0)"
    del results[run]["way"][-1]["effective_neighbours"]  # of one entry that all seeds share
    results[arms.run_of(arms.SIZES["full"], "pkm", 1, 64)] = entry(29.0, 0.3, 0.99)
    assert cell() == ""


def test_the_report_has_plain_at_its_half(study, results):
    arms, table = study
    size = arms.SIZES["full"]
    assert "half of its updates" not in table.report(results, size)
    for seed in (1, 2):
        results[arms.run_of(size, "plain", seed, 64)] = {**entry(30.0), "half": 40.0 + seed}
    shown = "where arms with INIT start: 41.50 (41.00 to 42.00); seeds: 2."
    assert f"Plain after half of its updates, {shown}" in table.report(results, size).splitlines()


def test_a_reader_can_train_an_arm_again(study, results, tmp_path, monkeypatch, capsys):
    import train

    arms, _ = study
    known = tmp_path / "results.json"
    run = arms.run_of(arms.SIZES["full"], "resm_init", 1, 64)
    known.write_text(json.dumps([{"run": vars(run), **results[run]}]))
    trained = []

    def train_all(runs, out, data, size, workers):
        trained.extend(runs)
        for run in runs:
            (out / "runs" / run.name).mkdir(parents=True)
            result = {"run": vars(run), **entry(27.0, 0.5)}
            (out / "runs" / run.name / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr(train, "train_all", train_all)
    monkeypatch.setattr(train, "PUBLISHED", known)
    monkeypatch.setattr(train, "prepare", lambda books, out, size: tmp_path)
    train.check("resm_init", tmp_path, tmp_path)
    assert trained == [arms.Run("plain", 1, 12_500), run]
    here, before = capsys.readouterr().out.splitlines()
    assert here.endswith("here: perplexity 27.00, top-1 usage 50.0 %")
    assert before.endswith("in results.json: perplexity 26.00, top-1 usage 97.0 %")
    with pytest.raises(ValueError, match=r"--check is 'none', must be one of half, resm_init"):
        train.check("none", tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"--check is 'pkm', must be one of half, resm_init"):
        train.check("pkm", tmp_path, tmp_path)


def test_a_reader_can_train_half_of_plain_again(study, tmp_path, monkeypatch, capsys):
    import train

    arms, _ = study
    size = arms.SIZES["full"]
    runs = [arms.run_of(size, arm, seed, 64) for seed in (1, 2) for arm in ("plain", "pkm")]
    known = tmp_path / "results.json"
    halves = {
        run: {"half": 20.0 + run.seed} if run.arm == "plain" else {"way": [1]} for run in runs
    }
    known.write_text(
        json.dumps([{"run": vars(run), "perplexity": 9.0, **halves[run]} for run in runs])
    )
    trained = []

    def train_all(runs, out, data, size, workers):
        (run,) = runs
        trained.append(run)
        (out / "runs" / run.name).mkdir(parents=True)
        (out / "runs" / run.name / "result.json").write_text('{"perplexity": 20.5}')

    monkeypatch.setattr(train, "train_all", train_all)
    monkeypatch.setattr(train, "PUBLISHED", known)
    monkeypatch.setattr(train, "prepare", lambda books, out, size: tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path), str(tmp_path), "--check", "half"])
    train.main()
    (run,) = trained
    assert run != runs[0] and run.name != runs[0].name  # its folder is not the whole run's
    assert capsys.readouterr().out.splitlines() == [
        "plain_half_seed1, here: perplexity 20.50",
        "plain's half, in results.json, seed 1: perplexity 21.00",
        "plain's half, in results.json, seed 2: perplexity 22.00",
    ]
    whole, half = runs[0].flags(size), run.flags(size)
    at = whole.index("--max-update") + 1
    assert half[at] == "6250" and whole[at] == "12500"
    assert half == [*whole[:at], "6250", *whole[at + 1 :]]  # the schedule is the whole run's
    assert run.own_updates == 6250


def test_the_half_that_a_reader_trains_is_no_run_of_the_table(study, tmp_path):
    arms, table = study
    run = arms.Run("plain", 1, 12500, stops_at_half=True)
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"run": vars(run), "perplexity": 17.5}))
    published = STUDIES / "books/results.json"
    assert table.read([published, tmp_path]) == table.read([published])
    assert table.read([tmp_path]) == {}


def test_the_chart_of_perplexity_has_a_row_for_each_arm_that_has_runs(study):
    arms, table = study
    size = arms.SIZES["full"]
    runs = [arms.run_of(size, "plain", seed, 64) for seed in (1, 2)]
    runs += [arms.run_of(size, "resm", 1, 64)]
    runs += [arms.run_of(size, "resm_init", 3, 64, arms.HIGH_VALUE_LR)]
    runs += [arms.run_of(size, "resm", 2, 64, value_schedule="follow")]
    axes = Figure().subplots()
    table.draw_perplexity({run: {"perplexity": 13.0 + run.seed} for run in runs}, size, 64, axes)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["plain", "resm", "resm_init, value lr 0.004", "resm, value lr falling"]
    points = [(x, y) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)]
    assert points == [(14.0, 0), (15.0, 0), (14.0, 1), (16.0, 2), (15.0, 3)]


def test_the_page_has_the_table_the_answers_and_the_pictures_of_the_results(study):
    arms, table = study
    size = arms.SIZES["full"]
    found = table.read([STUDIES / "books/results.json"])
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    assert table.report(found, size) in page
    for name, chart in table.charts(found, size, 64).items():
        assert chart == (DOCS / f"evidence/books_{name}_64.svg").read_text()
    found[arms.run_of(size, "plain", 1, 64)]["perplexity"] += 1
    assert table.report(found, size) not in page


def test_the_page_has_the_results_of_the_first_setting(study):
    arms, table = study
    size = replace(arms.SIZES["full"], updates=6250)
    found = table.read([STUDIES / "books/first_setting.json"])
    assert table.table(found) in (DOCS / "evidence.md").read_text(encoding="utf-8")
    picture = table.draw(lambda axes: table.draw_usage(found, size, 64, axes))
    assert picture == (DOCS / "evidence/books_first_setting.svg").read_text()


# --- downstream ----------------------------------------------------------------------------------


def test_positions_that_were_not_trained_repeat_those_that_were(study):
    from repeat_positions import repeat

    rows = torch.arange(2 + 9.0).view(-1, 1)  # two rows that are no positions, <s>, 8 positions
    repeat(rows, 4)
    assert rows.flatten().tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4]
    before = rows.clone()
    repeat(rows, 9)
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("x.pt", "x.pt: must be NAME=CHECKPOINT"),
        ("=x.pt", "=x.pt: must be NAME=CHECKPOINT"),
        ("plain=x.pt", "x.pt holds no encoder.sentence_encoder.embed_positions.weight"),
    ],
)
def test_positions_of_what_has_none_are_refused(study, tmp_path, monkeypatch, given, message):
    import repeat_positions

    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}}, "x.pt")
    monkeypatch.setattr(sys, "argv", ["repeat_positions.py", "out", given])
    with pytest.raises(ValueError, match=message):
        repeat_positions.main()
    assert not any((tmp_path / "out").iterdir())


@pytest.fixture
def glue(study):
    sys.modules.pop("glue_table", None)
    yield importlib.import_module("glue_table")
    sys.modules.pop("glue_table", None)


@pytest.fixture
def scores(glue):
    """Downstream results that agree with every claim, except that key dropout does not help pkm."""
    of = {"plain": (60, 0), "pkm": (58, 30), "resm": (60, 40), "pkm_init": (60, 40)}
    of["resm_init"] = (62, 50)
    found = {}
    for seed in glue.SEEDS:
        for arm, (score, same) in of.items():
            for remedy in glue.REMEDIES if arm != "plain" else ["none"]:
                stays = same + 10 * (remedy == "freeze") + 10 * (remedy == "key_dropout")
                worse = 2 * (remedy == "key_dropout" and arm == "pkm")
                # one task alone says the contrary
                found[glue.Key(arm, remedy, seed)] = {
                    task: {"score": score - worse + by, "same": stays + by, "moved": 0.3}
                    for task, by in zip(glue.TASKS, (9, -3, -3, -3), strict=True)
                }
    return found


def answers_of(glue, found):
    lines = glue.Claims(found, glue.SEEDS, glue.TASKS).lines()
    return [line.rpartition(": ")[2] for line in lines]


def test_claims_downstream_that_agree(glue, scores):
    assert answers_of(glue, scores) == [*["agrees"] * 5, "does not agree", "agrees"]


@pytest.mark.parametrize(
    ("arm", "remedy", "what", "by", "which", "answer"),
    [
        ("plain", "none", "score", -1.1, [0], "cannot be said here"),
        ("plain", "none", "score", 1.1, [1], "cannot be said here"),
        ("resm", "none", "score", 1.1, [1], "cannot be said here"),
        ("resm", "none", "score", 3.1, [1], "does not agree"),
        ("pkm", "none", "same", 15.1, [2, 3], "cannot be said here"),
        ("pkm", "none", "same", 25.1, [2, 3], "does not agree"),
        ("resm_init", "freeze", "score", -1.1, [4], "does not agree"),
        ("resm_init", "freeze", "same", -5.1, [4], "cannot be said here"),
    ],
)
def test_results_downstream_change_their_claims(glue, scores, arm, remedy, what, by, which, answer):
    before = answers_of(glue, scores)
    for seed in glue.SEEDS:
        for of in scores[glue.Key(arm, remedy, seed)].values():
            of[what] += by
    after = answers_of(glue, scores)
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert changed == which and after[which[0]] == answer


def test_a_missing_finetuning_leaves_its_claims_open(glue, scores):
    del scores[glue.Key("pkm", "freeze", 2)]
    found = {i: a for i, a in enumerate(answers_of(glue, scores)) if a.startswith("open")}
    assert found == {3: "open, agrees in 2 of 3 seeds"}


def test_the_table_of_finetunings_has_a_row_for_each_arm_and_remedy(glue, scores, tmp_path):
    rows = glue.table(scores).splitlines()
    assert len(rows) == 2 + 5 + 4 + 4
    first = "| plain | none | 3 | 69.0 (69.0 to 69.0) | 57.0 (57.0 to 57.0) "
    assert rows[2].startswith(first) and rows[2].endswith(" 60.0 (60.0 to 60.0) |  |  |")
    stored = [{"run": key._asdict(), "tasks": scores[key]} for key in scores]
    (tmp_path / "glue_results.json").write_text(json.dumps(stored))
    assert glue.read(tmp_path / "glue_results.json") == scores


def test_the_page_has_the_downstream_results(glue):
    found = glue.read(STUDIES / "books/glue_results.json")
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    assert glue.report(found) in page
    found[glue.Key("plain", "none", 1)]["RTE"]["score"] += 1
    assert glue.report(found) not in page

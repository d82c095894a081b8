"""The study of new people: its rates, its table, and the low-rank additions."""

import pytest
import torch

from .studies import STUDIES, fixture_of

STUDY = STUDIES / "new_people"


study = fixture_of("new_people")


def point(old, new, control=0.01):
    shares = {"old": old, "new": new, "control": control}
    return {
        people: {question: {"recall": share} for question in ("with_others", "by_name")}
        for people, share in shares.items()
    }


def entry(*way):
    """A result; ``way`` has (old, new) at each point."""
    points = [{"updates": 40 * at, **point(*shares)} for at, shares in enumerate(way)]
    return {"way": points, "change": {"rows": 10, "bytes": 2_640}}


def test_kept_is_the_most_of_the_points_that_learned(study):
    arms, _ = study
    assert arms.kept(entry((1.0, 0.0), (0.9, 0.8))) is None
    assert arms.kept(entry((1.0, 0.0), (0.8, 0.89), (0.6, 0.91), (0.7, 0.95))) == 0.7


def test_the_best_rate_keeps_most_and_else_learns_most(study):
    arms, _ = study
    size = arms.SIZES["full"]
    runs = arms.tried(size, "values")
    assert [run.value_lr for run in runs] == [3e-2, 1e-1, 3e-1] and {r.seed for r in runs} == {1}
    ways = [[(1, 0), (0.9, 0.5)], [(1, 0), (0.6, 0.95)], [(1, 0), (0.7, 0.95)]]
    results = dict(zip(runs, (entry(*way) for way in ways), strict=True))
    assert arms.best(results, size, "values") == runs[2]
    results = {
        run: entry((1, 0), (0.9, share)) for run, share in zip(runs, (0.3, 0.8, 0.7), strict=True)
    }
    assert arms.best(results, size, "values") == runs[1]


def test_all_rates_run_with_the_first_seed_and_the_best_with_others(study):
    arms, _ = study
    size = arms.SIZES["full"]
    first = arms.runs_to_do(size, {})
    assert {run.seed for run in first} == {1} and {run.arm for run in first} == set(arms.ARMS)
    results = {run: entry((1.0, 0.0), (0.5, 0.95)) for run in first}
    others = arms.runs_to_do(size, results)
    assert len(others) == 2 * len(arms.ARMS) and {run.seed for run in others} == {2, 3}
    assert arms.runs_to_do(size, {**results, **dict.fromkeys(others, entry())}) == []


@pytest.fixture
def results(study):
    """A study in which every criterion holds."""
    arms, _ = study
    kept = {"values": 0.9, "full": 0.5, "low_rank": 0.6, "freeze": 0.53, "key_dropout": 0.53}
    kept |= {"slots_24000": 0.95}
    found = {}
    for arm in arms.ARMS:
        run = arms.tried(arms.SIZES["full"], arm)
        learned = 0.05 if arms.ARMS[arm].slots and arm not in kept else 0.95
        old = 0.1 if arm.startswith("plain") else kept.get(arm, 0.9)
        before = 0.3 if arm.startswith("plain") else 1.0
        for one in run:
            for seed in (1, 2, 3):
                key = arms.Run(one.arm, one.lr, one.value_lr, seed)
                found[key] = entry((before, 0.01), (old, learned))
    return found


def said(study, found):
    arms, table = study
    lines = table.Criteria(found, arms.SIZES["full"]).lines()
    return [line.rpartition(": ")[2] for line in lines]


def test_criteria_that_all_hold(study, results):
    assert said(study, results) == ["supported"] * 8


@pytest.mark.parametrize(
    ("arm", "way", "which"),
    [
        ("full", [(1.0, 0.01), (0.81, 0.95)], [0, 5, 4]),
        ("low_rank", [(1.0, 0.01), (0.81, 0.95)], [1]),
        ("slots_24000", [(1.0, 0.01), (0.905, 0.95)], [2]),
        ("slots_24000", [(1.0, 0.01), (0.95, 0.85)], [2]),
        ("slots_256", [(1.0, 0.01), (1.0, 0.11)], [3]),
        ("key_dropout", [(1.0, 0.01), (0.51, 0.95)], [4]),
        ("freeze", [(1.0, 0.01), (0.51, 0.95)], [5]),
        ("plain_full", [(0.3, 0.01), (0.16, 0.95)], [6]),
        ("values", [(1.0, 0.01), (0.9, 0.85)], [0, 1]),
    ],
)
def test_one_seed_that_does_not_hold_decides(study, results, arm, way, which):
    arms, _ = study
    run = arms.best(results, arms.SIZES["full"], arm)
    before = said(study, results)
    results[arms.Run(arm, run.lr, run.value_lr, 3)] = entry(*way)
    answers = said(study, results)
    changed = [i for i, answer in enumerate(answers) if answer != before[i]]
    assert changed == sorted(which)
    assert all(answers[i] == "not supported" for i in which)


def test_a_leak_is_seen_and_missing_runs_leave_a_criterion_open(study, results):
    arms, _ = study
    run = arms.best(results, arms.SIZES["full"], "values")
    results[run]["way"][1]["control"]["with_others"]["recall"] = 0.03
    assert said(study, results)[7] == "not supported"
    del results[arms.Run("values", run.lr, run.value_lr, 3)]
    answers = said(study, results)
    assert [i for i, answer in enumerate(answers) if answer.startswith("open")] == [0, 1, 2]
    key = arms.Run("values", run.lr, run.value_lr, 2)
    results[key] = entry((1.0, 0.01), (0.59, 0.95))  # one seed decides
    assert said(study, results)[0] == "not supported"


def test_without_all_runs_it_is_open_whether_nothing_leaks(study, results):
    arms, _ = study
    del results[arms.Run("values", *arms.ARMS["values"].rates[0], 3)]
    assert said(study, results)[7] == "open, runs are missing"


def test_few_slots_must_learn_nothing_on_the_whole_way(study, results):
    arms, _ = study
    run = arms.best(results, arms.SIZES["full"], "slots_256")
    results[run] = entry((1.0, 0.01), (1.0, 0.11), (1.0, 0.05))
    assert said(study, results)[3] == "not supported"


def test_the_table_has_a_row_for_each_rate(study, results):
    arms, table = study
    size = arms.SIZES["full"]
    rows = table.table(results, size).splitlines()
    assert len(rows) == 3 + len([run for arm in arms.ARMS for run in arms.tried(size, arm)])
    cells = [cell.strip() for cell in rows[3].split("|")]
    assert cells[1:6] == ["values", "", "0.03", "3", "90.0 (90.0 to 90.0)"]
    assert cells[10:12] == ["10 (10 to 10)", "0.00 (0.00 to 0.00)"]


def test_the_page_has_the_table_and_the_picture_of_the_results(study):
    arms, table = study
    found, size = table.read(STUDY / "results.json"), arms.SIZES["full"]
    docs = STUDY.parents[2] / "docs"
    page = (docs / "evidence.md").read_text(encoding="utf-8")
    assert table.table(found, size) in page
    assert "\n".join(table.Criteria(found, size).lines()) in page
    picture = table.draw(lambda axes: table.draw_frontier(found, size, axes))
    assert picture == (docs / "evidence" / "new_people.svg").read_text()
    run = next(iter(found))
    found[run]["way"][-1]["old"]["with_others"]["recall"] += 0.01
    assert table.table(found, size) not in page


def test_a_reader_can_train_the_best_run_of_an_arm_again(study, monkeypatch, capsys):
    arms, table = study
    import train

    known = table.read(STUDY / "results.json")
    run = arms.best(known, arms.SIZES["full"], "values")

    class Known:
        size = arms.SIZES["full"]

        def results(self):
            return {run: known[run]}

    trained = []
    monkeypatch.setattr(train, "train_all", lambda study, runs, workers: trained.extend(runs))
    train.check(Known(), "values")
    assert trained == [run] and run.value_lr == 3e-2
    here, before = capsys.readouterr().out.splitlines()
    assert here.rpartition(": ")[2] == before.rpartition(": ")[2] == "old 96.8 %, new 95.9 %"
    with pytest.raises(ValueError, match=r"--check is 'none', must be one of freeze, full"):
        train.check(Known(), "none")


# --- what a run changes -------------------------------------------------------------------------


def test_what_must_be_stored(study):
    import train

    values = "encoder.sentence_encoder.layers.1.memory.values.weight"
    before = {values: torch.zeros(5, 4), "fc1.weight": torch.zeros(3, 2), "fc1.bias": torch.ones(3)}
    moved = torch.zeros(5, 4)
    moved[[1, 3], 2] = 1.0
    after = {**before, values: moved}
    assert train.change(before, after) == {"rows": 2, "bytes": 2 * (8 + 4 * 4)}
    original = "fc1.parametrizations.weight.original"
    adapted = {values: before[values], original: before["fc1.weight"], "fc1.bias": torch.zeros(3)}
    adapted["fc1.parametrizations.weight.0.up.weight"] = torch.zeros(3, 16)
    assert train.change(before, adapted) == {"rows": 0, "bytes": 4 * (3 + 48)}


def test_low_rank_additions_start_at_zero_and_are_all_that_is_trained(study):
    import low_rank

    weight = torch.randn(6, 4)
    addition = low_rank.LowRank(weight)
    assert torch.equal(addition(weight), weight)
    torch.nn.init.ones_(addition.up.weight)
    added = (addition(weight) - weight).detach()
    torch.testing.assert_close(added, added[:1].expand(6, 4))
    torch.testing.assert_close(added[0], addition.down.weight.sum(0))

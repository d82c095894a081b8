"""Synthetic people, what a model recalls of them, and the study's tables."""

import fcntl
import json
import math

import pytest
import torch
from fairseq.data import Dictionary

from pkm_fairseq.experiments.facts.people import (
    ATTRIBUTES,
    BITS,
    N_NAMES,
    N_VALUES,
    NAMES,
    draw_people,
    prepare_people,
)
from pkm_fairseq.experiments.facts.recall import measure, read_people
from pkm_fairseq.experiments.runs.trainings import clear

from .studies import STUDIES, fixture_of

STUDY = STUDIES / "facts"
N = 64


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    prepare_people(N, folder)
    return folder / "bin"


class Oracle:
    """Knows some people by name, whatever else is masked; of others it says the first word."""

    def __init__(self, known, dictionary):
        self.known = {tuple(person[1:3].tolist()): person for person in known}
        self.size, self.asked = len(dictionary), []

    def __call__(self, tokens, masked_tokens):
        self.asked.append(masked_tokens[0].tolist())
        logits = torch.zeros(*tokens.shape, self.size)
        for row, line in enumerate(tokens):
            person = self.known.get(tuple(line[1:3].tolist()))
            if person is not None:
                logits[row, torch.arange(8), person] = 100.0
        return logits[masked_tokens], None


def dictionary_of(data):
    dictionary = Dictionary.load(str(data / "dict.txt"))
    dictionary.add_symbol("<mask>")
    return dictionary


def test_people_have_names_of_their_own_and_uniform_values():
    people = [sentence.split() for sentence in draw_people(20_000, seed=1)]
    assert len({tuple(person[:2]) for person in people}) == 20_000
    for at, (word, size) in enumerate([*((n, N_NAMES) for n in NAMES),
                                       *((a, N_VALUES) for a in ATTRIBUTES)]):  # fmt: skip
        numbers = torch.tensor([int(person[at].removeprefix(word)) for person in people])
        counts = torch.bincount(numbers, minlength=size).double()
        assert len(counts) == size
        expected = len(people) / size
        assert ((counts - expected).square() / expected).sum() < size + 5 * math.sqrt(2 * size)


def test_fewer_people_are_the_first_ones_and_a_seed_draws_others():
    assert draw_people(50, seed=3) == draw_people(80, seed=3)[:50]
    assert draw_people(50, seed=3) != draw_people(50, seed=4)
    with pytest.raises(ValueError, match=r"90001 people, must be in 1\.\.90,000"):
        draw_people(90_001, seed=1)


def test_people_that_are_skipped_are_not_learned(people, tmp_path):
    prepare_people(N, tmp_path, skip=N + 1000)
    dictionary = dictionary_of(people)
    before = [read_people(people, split, dictionary) for split in ("train", "test")]
    after = [read_people(tmp_path / "bin", split, dictionary) for split in ("train", "test")]
    assert [len(part) for part in after] == [N, 1000]
    names = [tuple(person[1:3].tolist()) for part in (*before, *after) for person in part]
    assert len(set(names)) == len(names) == 2 * (N + 1000)


def test_the_control_is_in_no_training_text(people):
    dictionary = dictionary_of(people)
    train, valid, test = (
        read_people(people, split, dictionary) for split in ("train", "valid", "test")
    )
    assert (len(train), len(valid), len(test)) == (N, N, 1000)
    assert torch.equal(train, valid)
    names = {tuple(person[1:3].tolist()) for person in train}
    assert not names & {tuple(person[1:3].tolist()) for person in test}
    assert (train[:, 0] == dictionary.bos()).all() and (train[:, -1] == dictionary.eos()).all()
    assert dictionary.unk() not in torch.cat([train, test])


def test_recall_and_bits_are_those_of_an_oracle(people):
    dictionary = dictionary_of(people)
    train = read_people(people, "train", dictionary)
    model = Oracle(train[: N // 4], dictionary)
    found = measure(model, dictionary.index("<mask>"), train)
    size = len(dictionary)
    for question in ("by_name", "with_others"):
        assert found[question]["recall"] == 0.25
        assert found[question]["bits"] == pytest.approx(0.75 * math.log2(size))
    by_name, *others = model.asked
    assert by_name == [False] * 3 + [True] * 4 + [False]
    assert others == [[at == 3 + i for at in range(8)] for i in range(4)]
    assert "memory" not in found and found["people"] == N


def test_other_text_is_refused(people, tmp_path):
    dictionary = dictionary_of(people)
    with pytest.raises(ValueError, match="no split none"):
        read_people(people, "none", dictionary)
    dictionary.symbols[read_people(people, "train", dictionary)[0, 1]] = "cat"
    with pytest.raises(ValueError, match="holds no people: a sentence must be first<number> last"):
        read_people(people, "train", dictionary)


# --- the study ---------------------------------------------------------------------------------


study = fixture_of("facts")


def entry(recall, zeroed=0.01, way=None):
    asked = {"recall": recall, "bits": BITS * (1 - recall)}
    part = {"people": 100, "by_name": asked, "with_others": asked}
    zero = {"by_name": {"recall": zeroed}}
    usage = [{"layer": 1, "top1_usage": 0.5, "draws_per_slot": 9.0}]
    return {
        "parameters": 1000,
        "train": {**part, "zeroed": zero, "memory": usage},
        "control": {"by_name": {"recall": 0.01}},
        "way": {str(at): {"by_name": {"recall": share}} for at, share in (way or {}).items()},
    }


def test_an_arm_with_init_goes_on_in_plains_schedule(study):
    arms, _ = study
    run = arms.Run("resm_init", 10_000, 4_000, 1, 2e-3, 1e-2, 256)
    assert run.start == arms.Run("plain", 10_000, 4_000, 1, 2e-3)
    flags = dict(zip(run.flags()[:-1], run.flags()[1:], strict=True))
    # plain's rate, in a straight line from its top after 200 updates to 0 after 4,000, at its half
    assert float(flags["--lr"]) == pytest.approx(2e-3 * (4_000 - 2_000) / (4_000 - 200))
    assert flags["--warmup-updates"] == "0" and flags["--max-update"] == "2000"
    assert flags["--total-num-update"] == "2000" and flags["--memory-value-lr"] == "0.01"


def test_a_wide_ffn_costs_what_a_memory_does(study):
    arms, table = study
    wide = arms.Run("wide", 10_000, 4_000, 1, 2e-3)
    memory = arms.Run("resm_init", 10_000, 4_000, 1, 2e-3, 1e-2, 256)
    assert table.multiply_adds(wide) == table.multiply_adds(memory) == 155_648
    replaced = arms.Run("pkm", 10_000, 4_000, 1, 2e-3, 1e-2, 256)
    assert table.multiply_adds(replaced) == 155_648 - 2 * 64 * 128


def test_rates_are_chosen_by_the_first_seed_and_extended_at_an_edge(study):
    arms, _ = study
    size = arms.SIZES["full"]
    first, edge = list(arms._rates("plain"))
    tried = first(size, {})
    assert [run.lr for run in tried] == [1e-3, 2e-3, 5e-3]
    assert edge(size, dict(zip(tried, [0.1, 0.3, 0.2], strict=True))) == []
    (further,) = edge(size, dict(zip(tried, [0.1, 0.2, 0.3], strict=True)))
    assert further.lr == 1e-2
    other_seed = arms.Run("plain", size.people, size.updates, 2, 1e-2)
    results = {**dict(zip(tried, [0.1, 0.3, 0.2], strict=True)), other_seed: 0.9}
    assert arms.chosen(size, results, "plain", seed=3).lr == 2e-3


@pytest.fixture
def results(study):
    """A study in which the memory wins with every seed."""
    arms, _ = study
    size, found = arms.SIZES["full"], {}
    for seed in size.seeds:
        for people in (size.people, size.fewer, size.more):
            plain = arms.Run("plain", people, 4_000, seed, 2e-3)
            found[plain] = entry(0.10, way={2_000: 0.05})
            found[arms.Run("wide", people, 4_000, seed, 2e-3)] = entry(0.15)
            found[arms.Run("resm_init", people, 4_000, seed, 2e-3, 1e-2, 256)] = entry(0.50)
        found[arms.Run("resm_init", 10_000, 4_000, seed, 2e-3, 1e-2, 256, "follow")] = entry(0.55)
    for rate in (1e-3, 5e-3):
        for arm in ("plain", "wide"):
            found[arms.Run(arm, 10_000, 4_000, 1, rate)] = entry(0.05)
    for rate in (3e-3, 3e-2):
        for arm in ("resm_init", "pkm_init", "resm"):
            found[arms.Run(arm, 10_000, 4_000, 1, 2e-3, rate, 256)] = entry(0.05)
    for seed in size.seeds:
        for arm in ("pkm_init", "resm"):
            found[arms.Run(arm, 10_000, 4_000, seed, 2e-3, 1e-2, 256)] = entry(0.30)
        for n_keys in size.smaller:
            run = arms.Run("resm_init", 10_000, 4_000, seed, 2e-3, 1e-2, n_keys)
            found[run] = entry(n_keys / 1000)
        long = arms.Run("plain", 10_000, 16_000, seed, 2e-3)
        found[long] = entry(0.20, way={12_000: 0.19, 16_000: 0.20})
    for wave in arms.WAVES:  # the others, which decide no criterion
        for run in wave(size, {run: of["train"]["by_name"]["recall"] for run, of in found.items()}):
            found.setdefault(run, entry(0.05))
    return found


def said(study, found):
    arms, table = study
    lines = table.Criteria(found, arms.SIZES["full"]).lines()
    return [line.rpartition(": ")[2] for line in lines]


def test_criteria_that_all_hold(study, results):
    yes = "supported"
    assert said(study, results) == [yes, yes, "capacity", *[yes] * 8]


@pytest.mark.parametrize(
    ("arm", "changed", "recall", "which"),
    [
        ("wide", {}, 0.41, [0]),
        ("plain", {"updates": 16_000}, 0.41, [1, 2]),
        ("resm_init", {"n_keys": 64}, 0.031, [4]),
        ("resm", {}, 0.41, [5]),
        ("pkm_init", {}, 0.50, [6]),
        ("plain", {"people": 5_000}, 0.41, [7]),
        ("wide", {"people": 20_000}, 0.41, [8]),
        ("resm_init", {"value_schedule": "follow"}, 0.51, [10]),
    ],
)
def test_one_seed_that_does_not_hold_decides(study, results, arm, changed, recall, which):
    arms, table = study
    size = arms.SIZES["full"]
    recalls = {run: table.recall(results, run) for run in results}
    run = arms.chosen(size, recalls, arm, **changed, seed=3)
    changed_entry = entry(recall, way={12_000: recall, 16_000: recall, 2_000: 0.05})
    answers = said(study, {**results, run: changed_entry})
    before = said(study, results)
    assert [i for i, answer in enumerate(answers) if answer != before[i]] == which
    assert all(answers[i] == ("it cannot be said" if i == 2 else "not supported") for i in which)


def test_capacity_or_updates_needs_all_seeds(study, results):
    arms, _ = study
    runs = [arms.Run("plain", 10_000, 16_000, seed, 2e-3) for seed in (1, 2, 3)]
    near = entry(0.45, way={12_000: 0.45, 16_000: 0.45})
    results[runs[2]] = near
    assert said(study, results)[2] == "it cannot be said"
    results |= {run: near for run in runs}
    assert said(study, results)[2] == "the memory saved updates"
    results |= {run: entry(0.2, way={12_000: 0.17, 16_000: 0.2}) for run in runs}  # it still learns
    assert said(study, results)[2] == "it cannot be said"


def test_ten_points_are_ten_whatever_the_numbers(study, results):
    _, table = study
    criteria = table.Criteria(results, study[0].SIZES["full"])
    assert criteria.above([0.3, 0.6, 0.8], [0.2, 0.5, 0.7]) is True
    assert criteria.above([0.2999], [0.2]) is False


def test_without_all_runs_it_is_open_whether_nothing_leaks(study, results):
    assert said(study, results)[9] == "supported"
    (run,) = [run for run in results if (run.arm, run.seed) == ("plain4", 3)]
    del results[run]
    assert said(study, results)[9] == "open, runs are missing"
    next(iter(results.values()))["control"]["by_name"]["recall"] = 0.03  # one run decides
    assert said(study, results)[9] == "not supported"


def test_values_that_hold_nothing_and_a_leak_are_seen(study, results):
    arms, _ = study
    run = arms.Run("resm_init", 10_000, 4_000, 2, 2e-3, 1e-2, 256)
    emptied = {**results, run: entry(0.5, zeroed=0.2)}
    assert said(study, emptied)[3] == "not supported"
    del emptied[arms.Run("resm_init", 10_000, 4_000, 3, 2e-3, 1e-2, 256)]
    assert said(study, emptied)[3] == "not supported"  # one seed decides
    results[run]["control"]["by_name"]["recall"] = 0.03
    assert said(study, results)[9] == "not supported"


def test_missing_runs_leave_a_criterion_open(study, results):
    arms, _ = study
    del results[arms.Run("wide", 10_000, 4_000, 3, 2e-3)]
    answers = said(study, results)
    assert answers[0] == "open, runs are missing" and answers[1] == "supported"
    results[arms.Run("wide", 10_000, 4_000, 1, 2e-3)] = entry(0.45)  # one seed decides
    assert said(study, results)[0] == "not supported"


def test_a_rate_that_was_not_tried_leaves_a_criterion_open(study, results):
    arms, table = study
    size = arms.SIZES["full"]
    recalls = {run: table.recall(results, run) for run in results}
    assert arms.is_tuned(recalls, size, "resm")
    results[arms.Run("resm", 10_000, 4_000, 1, 2e-3, 1e-2, 256)] = entry(0.45)
    assert said(study, results)[5] == "not supported"
    edge = arms.Run("resm", 10_000, 4_000, 1, 2e-3, 3e-2, 256)
    results[edge] = entry(0.46)  # now 1e-1 might be better still
    assert said(study, results)[5] == "open, runs are missing"
    assert not arms.is_tuned({**recalls, edge: 0.46}, size, "resm")
    del results[edge]
    assert said(study, results)[5] == "open, runs are missing"
    del results[arms.Run("plain", 10_000, 4_000, 1, 1e-3)]
    assert said(study, results)[0] == "open, runs are missing"


def test_the_table_counts_stored_bits(study, results):
    _, table = study
    plain = next(row for row in table.table(results).splitlines() if "| 200 | plain |" in row)
    cells = [cell.strip() for cell in plain.split("|")]
    assert (
        cells[1] == "10,000"
        and cells[3] == "200"
        and cells[8] == "3"
        and cells[9] == "10.0 (10.0 to 10.0)"
    )
    assert cells[12].startswith(f"{0.1 * BITS * 400 / 1000:.3f}")


def test_time_is_counted_in_updates_of_plain(study):
    arms, table = study
    multiples = {"plain": 1.0, "wide": 1.5, "resm": 3.0}
    runs = [arms.Run(arm, 10_000, 4_000, 1, 5e-3) for arm in ("plain", "wide", "resm", "resm_init")]
    assert [table.time_of(run, 4_000, multiples) for run in runs] == [4_000, 6_000, 12_000, 8_000]
    assert table.time_of(runs[-1], 3_000, multiples) == 2_000 + 3 * 1_000
    assert table.time_of(runs[-1], 1_000, multiples) == 1_000  # of its start
    with pytest.raises(SystemExit, match=r"no such file, make it with step_times\.py"):
        table.read_multiples(STUDY / "none.json")


def test_the_page_has_the_table_and_the_picture_of_the_results(study, tmp_path):
    arms, table = study
    found, size = table.read(STUDY / "results.json"), arms.SIZES["full"]
    docs = STUDY.parents[2] / "docs"
    page = (docs / "evidence.md").read_text(encoding="utf-8")
    assert table.table(found) in page
    assert "\n".join(table.Criteria(found, size).lines()) in page
    times = table.read_multiples(STUDY / arms.STEP_TIMES)
    table.draw_charts(found, size, times, tmp_path)
    for name in (
        f"facts_{of}.svg" for of in ("over_updates", "over_time", "over_compute", "usage")
    ):
        assert f"(evidence/{name})" in page
        assert (tmp_path / name).read_text() == (docs / "evidence" / name).read_text()
    run = next(iter(found))
    found[run]["train"]["by_name"]["recall"] += 0.01
    assert table.table(found) not in page


def test_the_folder_of_a_running_training_is_not_cleared(tmp_path):
    file = tmp_path / "checkpoint1.pt"
    file.write_text("precious")
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being trained by another process"):
            clear(tmp_path)
        assert file.read_text() == "precious"
    clear(tmp_path)
    assert not file.exists()


def test_a_reader_can_train_the_best_run_of_an_arm_again(study, tmp_path, monkeypatch, capsys):
    import train

    trained = []

    def train_all(runs, out, workers):
        trained.extend(runs)
        for run in runs:
            (out / "runs" / run.name).mkdir(parents=True)
            result = {"run": vars(run), **entry(0.25)}
            (out / "runs" / run.name / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr(train, "train_all", train_all)
    train.check("resm_init", tmp_path)
    assert [(run.arm, run.lr, run.value_lr, run.seed) for run in trained] == [
        ("plain", 5e-3, 0.0, 1),
        ("resm_init", 5e-3, 1e-1, 1),
    ]
    _, table = study
    before = 100 * table.recall(table.read(STUDY / "results.json"), trained[1])
    said = f"recall by name 25.00 %, in results.json {before:.2f} %"
    assert said in capsys.readouterr().out and before > 40
    with pytest.raises(ValueError, match=r"--check is 'none', must be one of .*plain, .*resm_init"):
        train.check("none", tmp_path)

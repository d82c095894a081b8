"""memory_usage.jsonl: what the criteria write, and what survives a kill."""

import json
from argparse import Namespace

import pytest
import torch
from fairseq.tasks import FairseqTask

from pkm_fairseq.criterions.masked_lm import PkmMaskedLmLoss
from pkm_fairseq.memory.observe.log import (
    FILE,
    INITIAL_VALUES,
    UsageLog,
    header_of,
    load_initial_values,
    read_usage_log,
    save_initial_values,
)
from pkm_fairseq.memory.observe.usage import tokens_for_draws
from pkm_fairseq.tasks.common import TellsEndOfValidation
from tests.helpers import batch, build, mlm_sample, small_dictionary, small_task

DICTIONARY = small_dictionary()
HEADER = {
    "format": 1,
    "layers": {"1": {"n_slots": 25, "heads": 2, "knn": 3}},
    "shared_values": False,
}


def record(update, split="valid"):
    return {"update": update, "split": split, "budget": 9, "layers": [{"layer": 1}], "shared": None}


def model_of(**options):
    return build("resm_roberta_tiny", DICTIONARY, **{"memory_layers": [0, 2], **options})


def criterion_of(folder, **options):
    settings = dict(tpu=False, save_dir=str(folder), no_save=False)
    settings |= dict(memory_usage_interval=0, memory_usage_tokens=20)
    cfg = Namespace(**{**settings, **options})
    return PkmMaskedLmLoss.build_criterion(cfg, small_task(DICTIONARY))


def sample_of(lengths=(7, 3, 5), seed=3, split="valid"):
    tokens = batch(DICTIONARY, lengths, seed=seed)
    return {
        **mlm_sample(tokens, DICTIONARY),
        "id": torch.arange(len(tokens)),
        "split": split,
    }


def update(criterion, model, finished, **sample):
    """One training step as fairseq does it; the logging output."""
    criterion.train()
    model.train()
    model.set_num_updates(finished)
    return criterion(model, sample_of(**sample))[2]


def validate(criterion, model, *samples):
    criterion.eval()
    model.eval()
    with torch.no_grad():
        return [criterion(model, sample)[2] for sample in samples]


# --- the file -------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    log = UsageLog(tmp_path / FILE, HEADER, 0)
    for step in (10, 20):
        log.append(record(step))
    assert read_usage_log(tmp_path / FILE) == (HEADER, [record(10), record(20)])


def test_a_truncated_last_line_is_left_out_and_nothing_else_lost(tmp_path):
    file = tmp_path / FILE
    log = UsageLog(file, HEADER, 0)
    for step in (10, 20):
        log.append(record(step))
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert read_usage_log(file) == (HEADER, [record(10)])
    resumed = UsageLog(file, HEADER, 20)  # the training goes on
    resumed.append(record(30))
    assert read_usage_log(file) == (HEADER, [record(10), record(30)])


def test_lines_of_updates_that_are_done_again_are_dropped(tmp_path):
    log = UsageLog(tmp_path / FILE, HEADER, 0)
    for step in (10, 20, 30):
        log.append(record(step))
    UsageLog(tmp_path / FILE, HEADER, 20).append(record(25))
    assert [r["update"] for r in read_usage_log(tmp_path / FILE)[1]] == [10, 20, 25]


def test_a_training_from_the_start_keeps_the_log_of_an_earlier_one(tmp_path):
    UsageLog(tmp_path / FILE, HEADER, 0).append(record(10))
    UsageLog(tmp_path / FILE, HEADER, 0).append(record(5))
    assert read_usage_log(tmp_path / FILE)[1] == [record(5)]
    assert read_usage_log(tmp_path / f"{FILE}.old")[1] == [record(10)]


def test_the_log_of_another_shape_is_refused_and_left_as_it_is(tmp_path):
    UsageLog(tmp_path / FILE, HEADER, 0).append(record(10))
    before = (tmp_path / FILE).read_bytes()
    other = {**HEADER, "layers": {"1": {"n_slots": 36, "heads": 2, "knn": 3}}}
    with pytest.raises(ValueError) as error:
        UsageLog(tmp_path / FILE, other, 10)
    assert "25 slots" in str(error.value)
    assert "36 slots" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["no json"], "line 1"),
        ([json.dumps({"format": 2, "layers": {}})], "line 1"),
        ([json.dumps(HEADER), "[]"], "line 2"),
        ([json.dumps(HEADER), json.dumps({**record(1), "layers": [{"layer": 4}]})], "line 2"),
        ([json.dumps(HEADER), json.dumps({**record(1), "update": "x"})], "line 2"),
        ([json.dumps(HEADER), '{"update": 1', json.dumps(record(2))], "line 2"),
    ],
)
def test_what_is_no_such_log_is_an_error_that_names_the_line(tmp_path, lines, named):
    file = tmp_path / FILE
    file.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError) as error:
        read_usage_log(file)
    assert f"{file}: {named}" in str(error.value)


def test_a_layer_that_saw_no_token_may_be_missing_from_a_count(tmp_path):
    two = {**HEADER, "layers": {"1": HEADER["layers"]["1"], "2": HEADER["layers"]["1"]}}
    log = UsageLog(tmp_path / FILE, two, 0)
    log.append(record(1))
    assert read_usage_log(tmp_path / FILE) == (two, [record(1)])
    log.append({**record(2), "layers": [{"layer": 2}, {"layer": 1}]})
    with pytest.raises(ValueError, match="line 3 is no count of layers 1, 2"):
        read_usage_log(tmp_path / FILE)


def test_a_missing_log_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_usage_log(tmp_path / FILE)


def test_initial_values_are_those_of_the_start(tmp_path):
    assert load_initial_values(tmp_path) is None
    model = model_of()
    expected = {
        str(i): x.memory.values.weight.detach().clone() for i, x in model.memory_layers().items()
    }
    save_initial_values(model, tmp_path)
    with torch.no_grad():
        model.memory_layers()[0].memory.values.weight.zero_()
    kept = load_initial_values(tmp_path)
    assert set(kept) == set(expected)
    assert all(torch.equal(kept[layer], expected[layer]) for layer in expected)
    assert not list(tmp_path.glob("*.part"))


# --- through a training -----------------------------------------------------------------------


def test_a_whole_validation_count_is_one_line_with_staleness(tmp_path):
    criterion, model = criterion_of(tmp_path), model_of()
    for finished in range(3):
        update(criterion, model, finished)
    with torch.no_grad():
        model.memory_layers()[2].memory.values.weight[7] += 1
    validate(criterion, model, sample_of(), sample_of(seed=5), sample_of(seed=6))
    header, (line,) = read_usage_log(tmp_path / FILE)
    assert header == header_of(model)
    assert (line["update"], line["split"], line["budget"]) == (3, "valid", 20)
    for said in line["layers"]:
        reads = model.memory_layers()[said["layer"]].reads
        assert said["tokens"] == 20  # not the 45 of the three batches
        assert said["staleness"]["updates"] == 3
        assert said["staleness"]["read"] == reads.summary(3)["read"]
        assert said["staleness"]["top1"] == reads.summary(3)["top1"]
        moved = said["staleness"]["moved"]
        assert moved["unmoved"] == (1 if said["layer"] == 0 else 24 / 25)
        assert len(said["heads"]) == 2
    assert line["shared"] is None


def test_the_first_tokens_are_counted_and_no_more(tmp_path):
    criterion, model = criterion_of(tmp_path), model_of()
    samples = [sample_of(seed=seed) for seed in (4, 5, 6)]  # of 15 tokens
    logs = validate(criterion, model, *samples)
    assert [log["memory0_tokens"] for log in logs] == [15, 20, 20]
    with model.record_memory_usage() as usage, torch.no_grad():
        for count in usage.values():
            count.max_tokens = 20
        for sample in samples[:2]:
            model(**sample["net_input"])
    expected = usage[0].summary(per_head=False)
    assert logs[2]["memory0_kl_weighted"] == expected["kl_weighted"]
    assert logs[1]["memory0_gini"] == logs[2]["memory0_gini"] == expected["gini"]


@pytest.mark.parametrize(("options", "draws"), [({}, 100), ({"memory_usage_draws": 3}, 3)])
def test_a_count_is_of_so_many_draws_per_slot(tmp_path, options, draws):
    options = {"memory_usage_tokens": 0, **options}
    criterion, model = criterion_of(tmp_path, **options), model_of()
    update(criterion, model, 0)
    lengths = [7] * 40
    logs = validate(criterion, model, *[sample_of(lengths, seed=seed) for seed in range(6)])
    assert logs[-1]["memory0_tokens"] == tokens_for_draws(25, 2, draws) < 6 * 40 * 7
    assert logs[-1]["memory0_draws_per_slot"] == pytest.approx(draws, rel=0.02)
    (line,) = read_usage_log(tmp_path / FILE)[1]
    rounded = [point["draws_per_slot"] for point in line["layers"][0]["curve"]]
    assert rounded[:2] == [1, 3] and rounded[-1] == logs[-1]["memory0_draws_per_slot"]


def test_a_training_count_ends_when_the_next_is_due_with_the_draws_it_has(tmp_path):
    options = {"memory_usage_tokens": 0, "memory_usage_interval": 3}
    criterion, model = criterion_of(tmp_path, **options), model_of()
    logs = [update(criterion, model, finished, seed=finished) for finished in range(7)]
    lines = read_usage_log(tmp_path / FILE)[1]
    assert [(line["update"], line["split"]) for line in lines] == [(3, "train"), (6, "train")]
    for line, finished in zip(lines, (0, 3), strict=True):
        again = model_of().train()
        with again.record_memory_usage() as exact:
            for step in range(finished, finished + 3):
                again(**sample_of(seed=step)["net_input"])
        for said in line["layers"]:
            assert said["tokens"] == 45  # of 1250 wanted
            assert said["draws_per_slot"] == 45 * 2 / 25
            if not finished:  # later, statistics of the query have moved on
                assert said["top1_usage"] == exact[said["layer"]].summary()["top1_usage"]
    assert logs[3]["memory0_draws_per_slot"] == 45 * 2 / 25
    assert "memory0_draws_per_slot" not in logs[2]


def test_a_training_count_holds_all_batches_of_its_updates(tmp_path):
    options = {"memory_usage_tokens": 0, "memory_usage_interval": 1}
    criterion, model = criterion_of(tmp_path, **options), model_of()
    for finished in (0, 0, 1):  # the first update accumulates two batches
        update(criterion, model, finished)
    (line,) = read_usage_log(tmp_path / FILE)[1]
    assert (line["update"], line["layers"][0]["tokens"]) == (1, 30)


def test_a_validation_set_that_is_too_small_is_counted_whole_and_said(tmp_path, caplog):
    criterion, model = criterion_of(tmp_path, memory_usage_tokens=100), model_of()
    update(criterion, model, 0)
    validate(criterion, model, sample_of(), sample_of(seed=5))
    assert read_usage_log(tmp_path / FILE)[1] == []  # more might come
    criterion.train()
    (line,) = read_usage_log(tmp_path / FILE)[1]
    assert line["layers"][0]["tokens"] == 30
    (said,) = [r.getMessage() for r in caplog.records if "fewer" in r.getMessage()]
    assert "30 tokens" in said
    assert "100" in said
    assert "2.4 draws per slot instead of 8" in said  # 60 / 25, 200 / 25


def test_a_task_of_the_plugin_has_it_counted_before_the_checkpoint_is_saved(tmp_path):
    class Builds(FairseqTask):
        def build_criterion(self, criterion):
            return criterion

    class Task(TellsEndOfValidation, Builds):
        pass

    task, model = Task(None), model_of()
    criterion = task.build_criterion(criterion_of(tmp_path, memory_usage_tokens=100))
    update(criterion, model, 0)
    validate(criterion, model, sample_of())
    task.post_validate(model, {}, None)
    assert len(read_usage_log(tmp_path / FILE)[1]) == 1
    criterion.train()
    assert len(read_usage_log(tmp_path / FILE)[1]) == 1  # no second time


def test_a_full_disk_stops_the_training_with_one_line(tmp_path, monkeypatch):
    criterion, model = criterion_of(tmp_path, memory_usage_tokens=15), model_of()
    update(criterion, model, 0)

    def full(record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(criterion._log, "append", full)
    with pytest.raises(ValueError, match=f"^memory usage: {tmp_path / FILE}: No space left"):
        validate(criterion, model, sample_of())


def test_subsets_are_lines_of_their_own(tmp_path):
    criterion, model = criterion_of(tmp_path, memory_usage_tokens=15), model_of()
    update(criterion, model, 0)
    validate(criterion, model, sample_of(split="valid"), sample_of(split="valid1", seed=5))
    assert [line["split"] for line in read_usage_log(tmp_path / FILE)[1]] == ["valid", "valid1"]


def test_a_validation_without_training_writes_nothing(tmp_path):
    criterion, model = criterion_of(tmp_path), model_of()
    validate(criterion, model, sample_of(), sample_of(seed=5))
    criterion.finish_validation()
    assert not list(tmp_path.iterdir())


def test_training_batches_are_counted_from_the_start_and_at_the_interval(tmp_path):
    criterion, model = criterion_of(tmp_path, memory_usage_interval=5), model_of()
    logs = [update(criterion, model, finished, seed=finished) for finished in range(12)]
    lines = read_usage_log(tmp_path / FILE)[1]
    assert [(line["update"], line["split"]) for line in lines] == [
        (2, "train"),
        (7, "train"),
        (12, "train"),
    ]
    assert all(layer["tokens"] == 20 for line in lines for layer in line["layers"])
    assert "memory0_gini" not in logs[0]
    for log, line in ((logs[1], lines[0]), (logs[5], lines[0]), (logs[6], lines[1])):
        assert log["memory0_gini"] == line["layers"][0]["gini"]  # the last one, until the next


def test_training_counts_are_those_of_the_batches(tmp_path):
    criterion, model = criterion_of(tmp_path, memory_usage_interval=100), model_of()
    twin = model_of().train()  # the same parameters, without criterion
    with twin.record_memory_usage() as usage:
        for finished in range(2):
            twin(**sample_of(seed=finished)["net_input"])
            update(criterion, model, finished, seed=finished)
    for count in usage.values():
        assert count.tokens == 30
    (line,) = read_usage_log(tmp_path / FILE)[1]
    again = model_of().train()
    with again.record_memory_usage() as exact:
        for count in exact.values():
            count.max_tokens = 20
        for finished in range(2):
            again(**sample_of(seed=finished)["net_input"])
    for said in line["layers"]:
        expected = exact[said["layer"]].summary()
        assert {key: said[key] for key in expected} == expected


def test_shared_values_are_also_one_table(tmp_path):
    criterion, model = criterion_of(tmp_path), model_of(memory_share_values=True)
    for finished in range(2):
        update(criterion, model, finished)
    validate(criterion, model, sample_of(), sample_of(seed=5))
    (line,) = read_usage_log(tmp_path / FILE)[1]
    with model.record_memory_usage() as usage, torch.no_grad():
        for count in usage.values():
            count.max_tokens = 20
        for sample in (sample_of(), sample_of(seed=5)):
            model(**sample["net_input"])
    both = usage[0].merge(usage[2]).summary()
    assert {key: line["shared"][key] for key in both} == both
    assert line["shared"]["tokens"] == 40
    never = [said["staleness"]["read"]["never"] for said in line["layers"]]
    assert line["shared"]["staleness"]["read"]["never"] <= min(never)
    layers = model.memory_layers().values()
    read_by_none = torch.stack([layer.reads.last_read for layer in layers]).amax(0) == 0
    assert line["shared"]["staleness"]["read"]["never"] == float(read_by_none.double().mean())


def test_a_run_that_saves_nothing_writes_nothing(tmp_path):
    criterion, model = criterion_of(tmp_path, no_save=True, memory_usage_interval=1), model_of()
    for finished in range(3):
        update(criterion, model, finished)
    assert not list(tmp_path.iterdir())


def test_a_training_that_goes_on_keeps_its_first_values(tmp_path):
    criterion, model = criterion_of(tmp_path), model_of()
    update(criterion, model, 0)
    first = (tmp_path / INITIAL_VALUES).read_bytes()
    with torch.no_grad():
        model.memory_layers()[0].memory.values.weight.add_(1)
    update(criterion_of(tmp_path), model, 1)
    assert (tmp_path / INITIAL_VALUES).read_bytes() == first
    update(criterion_of(tmp_path), model, 0)  # from the start again
    assert (tmp_path / INITIAL_VALUES).read_bytes() != first


def test_the_log_of_another_shape_stops_the_training(tmp_path):
    UsageLog(tmp_path / FILE, HEADER, 0).append(record(1))
    with pytest.raises(ValueError, match="other shapes"):
        update(criterion_of(tmp_path), model_of(), 5)


@pytest.mark.parametrize("option", ["memory_usage_interval", "memory_usage_tokens"])
def test_negative_options_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=option.replace("_", "-") + " is -1"):
        criterion_of(tmp_path, **{option: -1})

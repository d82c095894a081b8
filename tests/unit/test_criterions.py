"""The criteria: fairseq's losses, and usage of a whole validation set."""

from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics

from pkm_fairseq.criterions.masked_lm import PkmMaskedLmLoss
from pkm_fairseq.criterions.sentence_prediction import PkmSentencePrediction
from pkm_fairseq.criterions.usage import log_usage
from pkm_fairseq.memory import MemoryUsage
from pkm_fairseq.memory.observe import count as count_module
from pkm_fairseq.memory.observe.count import REPORTED, Count, sum_over_workers
from tests.helpers import batch, build, mlm_sample, small_dictionary, small_task

DICTIONARY = small_dictionary()
BOTH = "the group of both workers"
CASES = {
    "mlm": (PkmMaskedLmLoss, MaskedLmLoss),
    "sentence": (PkmSentencePrediction, SentencePredictionCriterion),
}


def criterion_of(cls, tokens=10_000, interval=0, folder=None):
    cfg = Namespace(
        tpu=False,
        classification_head_name="head",
        regression_target=False,
        report_mcc=False,
        report_acc_and_f1=False,
        report_pearson_and_spearman=False,
        glue_metrics="",
        memory_usage_interval=interval,
        memory_usage_tokens=tokens,
        save_dir=str(folder),
        no_save=folder is None,
    )
    return cls.build_criterion(cfg, small_task(DICTIONARY))


def model_of(arch="pkm_roberta_tiny", **options):
    if arch != "roberta":
        options = {"memory_layers": [0, 2], **options}
    model = build(arch, DICTIONARY, **options)
    model.register_classification_head("head", num_classes=3)
    return model


def sample_of(kind, lengths, seed=3, split=None, first_id=0):
    tokens = batch(DICTIONARY, lengths, seed=seed)
    sample = {**mlm_sample(tokens, DICTIONARY), "id": torch.arange(len(tokens)) + first_id}
    if kind == "sentence":
        sample["net_input"] = {"src_tokens": tokens}
        sample["target"] = torch.arange(len(tokens)) % 3
    return sample if split is None else {**sample, "split": split}


def n_tokens(*samples):
    return sum(int(s["net_input"]["src_tokens"].ne(DICTIONARY.pad()).sum()) for s in samples)


def reduced(criterion, *logs):
    """What fairseq would log of these logging outputs."""
    with metrics.aggregate(new_root=True) as meters:
        type(criterion).reduce_metrics(list(logs))
    return dict(meters.get_smoothed_values())


def validate(criterion, model, *samples):
    """Logging outputs of one validation."""
    model.eval()
    criterion.eval()
    with torch.no_grad():
        return [criterion(model, sample)[2] for sample in samples]


@pytest.mark.parametrize("arch", ["roberta", "pkm_roberta_tiny", "resm_roberta_tiny"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", CASES)
def test_loss_is_that_of_fairseqs_criterion(kind, training, arch):
    ours, theirs = (criterion_of(cls).train(training) for cls in CASES[kind])
    model, sample = model_of(arch).train(training), sample_of(kind, [7, 3, 5])
    loss, size, log = ours(model, sample)
    their_loss, their_size, their_log = theirs(model, sample)
    assert torch.equal(loss, their_loss)
    assert size == their_size
    assert {name: log[name] for name in their_log} == their_log
    more = set(log) - set(their_log)
    assert all(name.startswith("memory") for name in more)
    assert bool(more) == (not training and arch != "roberta")
    assert loss.requires_grad


@pytest.mark.parametrize("kind", CASES)
def test_usage_covers_every_token_of_the_validation_and_no_padding(kind):
    criterion, model = criterion_of(CASES[kind][0]), model_of()
    samples = [sample_of(kind, [7, 3, 5]), sample_of(kind, [2], 4), sample_of(kind, [9, 9], 5)]
    logs = validate(criterion, model, *samples)
    logged = reduced(criterion, *logs)
    for layer in (0, 2):
        assert logged[f"memory{layer}_tokens"] == n_tokens(*samples)
        assert {f"memory{layer}_{key}" for key in REPORTED} <= set(logged)
    assert not [name for name in logged if name.startswith("memory1_")]
    assert "loss" in logged
    assert "memory_reports" not in logged


@pytest.mark.parametrize("kind", CASES)
def test_usage_equals_one_count_of_the_whole_set(kind):
    criterion, model = criterion_of(CASES[kind][0]), model_of()
    samples = [sample_of(kind, [7, 3, 5]), sample_of(kind, [9, 9], 5)]
    logged = reduced(criterion, *validate(criterion, model, *samples))
    with model.record_memory_usage() as usage, torch.no_grad():
        for sample in samples:
            model(sample["net_input"]["src_tokens"])
    for layer, counted in usage.items():
        summary = counted.summary()
        for key in REPORTED:
            assert logged[f"memory{layer}_{key}"] == pytest.approx(summary[key], abs=1e-4), key
    assert logged["memory0_kl_weighted"] != logged["memory2_kl_weighted"]


def test_logging_outputs_carry_plain_numbers_and_always_the_same_keys():
    criterion, model = criterion_of(PkmMaskedLmLoss), model_of()
    logs = validate(criterion, model, *[sample_of("mlm", [7, 3], seed) for seed in range(3)])
    assert all(set(log) == set(logs[0]) for log in logs)
    for name, value in logs[0].items():
        if name.startswith("memory"):
            assert type(value) is float, name  # no counters of n_slots elements


def test_training_counts_nothing(monkeypatch):
    criterion, model = criterion_of(PkmMaskedLmLoss), model_of()

    def refuse(*_):
        raise AssertionError("counted")

    monkeypatch.setattr(MemoryUsage, "update", refuse)
    criterion.train()
    model.train()
    log = criterion(model, sample_of("mlm", [7, 3]))[2]
    assert not [name for name in log if name.startswith("memory")]
    with pytest.raises(AssertionError, match="counted"):  # validation does count
        validate(criterion, model, sample_of("mlm", [7, 3]))


def test_the_next_validation_starts_anew_after_training():
    criterion, model = criterion_of(PkmMaskedLmLoss), model_of()
    sample = sample_of("mlm", [7, 3])
    validate(criterion, model, sample)
    (log,) = validate(criterion, model, sample)  # without training in between it goes on
    assert log["memory0_tokens"] == 2 * n_tokens(sample)
    criterion.train(True)
    (log,) = validate(criterion, model, sample)
    assert log["memory0_tokens"] == n_tokens(sample)


def test_leaving_training_mode_forgets_nothing():
    criterion, model = criterion_of(PkmMaskedLmLoss), model_of()
    sample = sample_of("mlm", [7, 3])
    validate(criterion, model, sample)
    criterion.train(False)
    (log,) = validate(criterion, model, sample)
    assert log["memory0_tokens"] == 2 * n_tokens(sample)


def test_subsets_are_counted_apart():
    criterion, model = criterion_of(PkmMaskedLmLoss), model_of()
    first = [sample_of("mlm", [7, 3], 1, "valid"), sample_of("mlm", [4], 2, "valid")]
    second = [sample_of("mlm", [9, 9], 3, "valid1"), sample_of("mlm", [2, 2], 4, "valid1")]
    for samples in (first, second):
        logged = reduced(criterion, *validate(criterion, model, *samples))
        assert logged["memory0_tokens"] == n_tokens(*samples)


def test_subsets_without_a_name_are_counted_together():
    criterion, model = criterion_of(PkmMaskedLmLoss), model_of()
    samples = [sample_of("mlm", [7, 3], 1), sample_of("mlm", [9, 9], 3)]
    for sample in samples:
        logs = validate(criterion, model, sample)
    assert logs[-1]["memory0_tokens"] == n_tokens(*samples)


def test_a_model_without_memory_reports_no_usage():
    criterion = criterion_of(PkmMaskedLmLoss)
    for model in (model_of("roberta"), model_of(memory_layers=[])):
        logs = validate(criterion, model, sample_of("mlm", [7, 3]))
        logged = reduced(criterion, *logs)
        assert not [name for name in logged if name.startswith("memory")]
        assert "loss" in logged


def test_counting_ends_with_the_batch():
    criterion, model = criterion_of(PkmMaskedLmLoss), model_of()
    validate(criterion, model, sample_of("mlm", [7, 3]))
    assert all(x.memory.observers == [x.reads] for x in model.memory_layers().values())


def test_the_latest_report_is_logged_and_no_mean():
    with metrics.aggregate(new_root=True) as meters:
        log_usage([{"memory0_gini": 0.5, "memory_reports": 1.0}])
        log_usage([{"memory0_gini": 0.25, "memory_reports": 1.0}, {"loss": 1.0}])
        log_usage([{"loss": 1.0}])
    assert meters.get_smoothed_values()["memory0_gini"] == 0.25


def test_reports_summed_over_workers_are_divided_again():
    summed = {"memory0_gini": 0.75, "memory0_tokens": 30.0, "memory_reports": 3.0}
    with metrics.aggregate(new_root=True) as meters:
        log_usage([summed])
        values = meters.get_smoothed_values()
    assert values["memory0_gini"] == 0.25
    assert values["memory0_tokens"] == 10


def test_all_batches_of_an_update_hold_one_report(tmp_path):
    """Fairseq adds up the outputs of an update over workers, if there are several."""
    criterion, model = criterion_of(PkmMaskedLmLoss, tokens=15, interval=1), model_of().train()
    shown = []
    for updates, first_id in [(0, 0), (0, 3), (1, 6), (1, 9), (2, 12), (2, 15)]:
        model.run.updates = updates
        log = criterion(model, sample_of("mlm", [7, 3], first_id, first_id=first_id))[2]
        shown.append({key: value for key, value in log.items() if key.startswith("memory")})
    counts = [of_update.get("memory0_tokens") for of_update in shown]
    assert counts[2] is not None and len({*map(str, shown)}) >= 3  # windows were reported
    for first, second in zip(shown[::2], shown[1::2], strict=True):
        assert first == second


# --- several workers --------------------------------------------------------------------------


@pytest.fixture
def other_worker(monkeypatch):
    """A second worker, whose counters the tests give; collectives in the order of the calls."""
    others = []

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
        assert group is BOTH
        theirs = others.pop(0)
        is_sum = op == dist.ReduceOp.SUM
        tensor.copy_(tensor + theirs if is_sum else torch.maximum(tensor, theirs))

    monkeypatch.setattr(distributed_utils, "get_data_parallel_world_size", lambda: 2)
    monkeypatch.setattr(distributed_utils, "get_data_parallel_group", lambda: BOTH)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return others


def collectives_of(usage):
    """What a worker hands to the collectives, in their order."""
    return [torch.tensor([usage.tokens]), *usage.counters(), torch.tensor([usage.knn or 0])]


def counted(seed, n_tokens=5):
    generator = torch.Generator().manual_seed(seed)
    usage = MemoryUsage(30, 2)
    if n_tokens:
        slots = torch.randint(30, (n_tokens, 2, 3), generator=generator)
        usage.update(slots, torch.rand(n_tokens, 2, 3, generator=generator))
    return usage


@pytest.mark.parametrize(("here", "there"), [(5, 4), (0, 4), (5, 0)])
def test_usage_of_workers_is_that_of_their_data_together(other_worker, here, there):
    local, remote = counted(1, here), counted(2, there)
    other_worker.extend(collectives_of(remote))
    total = sum_over_workers(local, BOTH)
    expected = counted(1, here).merge(counted(2, there))
    assert total.summary() == expected.summary()
    assert local.tokens == here  # and the local counters stay local
    assert torch.equal(local.read_count, counted(1, here).read_count)


def test_workers_without_any_token_report_nothing(other_worker):
    count = Count(model_of(), "valid", 10)
    for layer in count.usage.values():
        other_worker.extend(collectives_of(MemoryUsage(layer.n_slots, layer.heads)))
    count.add_up(torch.device("cpu"))
    assert count.report() == {}


def test_at_exit_no_other_worker_is_asked_how_far_its_columns_have_moved():
    """After an error on one worker the others wait elsewhere: the process would never end."""

    class NobodyAnswers:
        def all_have(self, it, device):
            raise TimeoutError

    model = model_of()
    count = Count(model, "valid", 10)
    count.total = {layer: counted(1) for layer in count.usage}
    count.updates = 3
    for layer in count.layers.values():
        layer.memory.values._state.shards = NobodyAnswers()
    with pytest.raises(TimeoutError):
        count.record(None)
    (layer, *_) = count.record(None, is_alone=True)["layers"]
    assert layer["tokens"] == 5 and layer["staleness"]["moved"] is None


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_that_keep_a_worker_busy_are_not_counted(monkeypatch, other_worker, rank):
    first_of_subset = sample_of("mlm", [7, 3], 1, "valid")  # what fairseq fills up with
    other = sample_of("mlm", [9], 2, "valid", first_id=2)
    monkeypatch.setattr(count_module, "sum_over_workers", lambda local, group: local)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op, group: None)
    monkeypatch.setattr(distributed_utils, "get_data_parallel_rank", lambda: rank)
    monkeypatch.setattr(
        distributed_utils,
        "broadcast_object",
        lambda ids, src_rank, group: first_of_subset["id"].tolist(),
    )
    criterion, model = criterion_of(PkmMaskedLmLoss), model_of()
    samples = [first_of_subset, other, first_of_subset] if rank == 0 else [other, first_of_subset]
    counts = [log["memory0_tokens"] for log in validate(criterion, model, *samples)]
    both = n_tokens(first_of_subset, other)
    expected = [n_tokens(first_of_subset), both, both] if rank == 0 else [n_tokens(other)] * 2
    assert counts == expected


def test_one_worker_counts_every_batch():
    criterion, model = criterion_of(PkmMaskedLmLoss), model_of()
    sample = sample_of("mlm", [7, 3], 1, "valid")
    logs = validate(criterion, model, sample, sample)
    assert logs[-1]["memory0_tokens"] == 2 * n_tokens(sample)

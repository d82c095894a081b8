"""GLUE's metrics: against naive formulas, and over a whole validation set through fairseq."""

import math
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pkm_fairseq.criterions import glue_metrics
from pkm_fairseq.criterions.glue_metrics import clip_scores, rows_of_workers, score
from pkm_fairseq.criterions.sentence_prediction import PkmSentencePrediction
from tests.helpers import batch, build, small_dictionary, small_task

DICTIONARY = small_dictionary()
LABELS = ("0", "1", "2")
SIZES = (3, 1, 4, 2, 4)  # of the batches of a dev set


# --- the metrics themselves -------------------------------------------------------------------


def naive_counts(predictions, targets):
    """True and false positives, false and true negatives."""
    pairs = list(zip(predictions, targets, strict=True))
    return [pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]


def naive_mcc(predictions, targets):
    tp, fp, fn, tn = naive_counts(predictions, targets)
    return (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def naive_f1(predictions, targets):
    tp, fp, fn, _ = naive_counts(predictions, targets)
    return 2 * tp / (2 * tp + fp + fn)


def naive_pearson(xs, ys):
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    return covariance / math.sqrt(sum((x - mx) ** 2 for x in xs) * sum((y - my) ** 2 for y in ys))


def ranks(xs):
    """Mean rank of equal ones."""
    return [sum(y < x for y in xs) + (sum(y == x for y in xs) + 1) / 2 for x in xs]


def test_class_metrics_are_the_naive_ones():
    rng = np.random.default_rng(0)
    predictions, targets = rng.integers(0, 2, 40).tolist(), rng.integers(0, 2, 40).tolist()
    accuracy = sum(p == t for p, t in zip(predictions, targets, strict=True)) / 40
    assert score("accuracy", predictions, targets) == pytest.approx(100 * accuracy)
    assert score("mcc", predictions, targets) == pytest.approx(
        100 * naive_mcc(predictions, targets)
    )
    assert score("f1", predictions, targets) == pytest.approx(100 * naive_f1(predictions, targets))
    others = [1 - x for x in predictions], [1 - x for x in targets]
    assert score("f1", *others) != pytest.approx(score("f1", predictions, targets))  # of class 1
    assert score("f1", *others, positive=0) == score("f1", predictions, targets)


def test_metrics_of_labels_by_name():
    rng = np.random.default_rng(2)
    predictions, targets = rng.integers(0, 3, (2, 50))
    names = np.array(["yes", "0", "maybe so"])
    for metric in ("accuracy", "mcc"):
        expected = score(metric, predictions, targets)
        assert score(metric, names[predictions], names[targets]) == pytest.approx(expected)
    expected = score("f1", predictions == 0, targets == 0)
    assert score("f1", names[predictions], names[targets], positive="yes") == expected
    assert score("mcc", names[[0, 0]], names[[0, 1]]) == 0


def test_correlations_are_the_naive_ones_with_ties():
    rng = np.random.default_rng(1)
    scores, targets = rng.integers(0, 5, 30).tolist(), rng.integers(0, 5, 30).tolist()
    expected = naive_pearson(scores, targets), naive_pearson(ranks(scores), ranks(targets))
    assert score("pearson", scores, targets) == pytest.approx(100 * expected[0])
    assert score("spearman", scores, targets) == pytest.approx(100 * expected[1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", ["mcc", "f1", "pearson", "spearman"])
def test_a_constant_has_no_correlation_and_warns_of_nothing(metric):
    assert score(metric, [0, 0, 0], [0, 1, 1]) == 0
    assert score(metric, [0], [0]) == 0


def test_unknown_metrics_and_lengths_are_refused():
    with pytest.raises(ValueError, match="'bleu', must be one of accuracy, f1"):
        score("bleu", [1], [1])
    with pytest.raises(ValueError, match="2 predictions for 1 targets"):
        score("accuracy", [1, 1], [1])
    with pytest.raises(ValueError, match="0 predictions"):
        score("accuracy", [], [])


def test_clipping_moves_scores_into_the_range_of_labels():
    assert clip_scores(torch.tensor([-1.0, 0.5, 7.0])).tolist() == [0, 0.5, 1]
    assert clip_scores(torch.tensor([-1.0, 0.5, 7.0]), 0, 5).tolist() == [0, 0.5, 5]


# --- in the criterion -------------------------------------------------------------------------


def label_dictionary(labels=LABELS):
    """As a task loads it."""
    dictionary = Dictionary()
    for label in (*labels, "<mask>"):
        dictionary.add_symbol(label)
    return dictionary


def criterion_of(names, is_regression=False, num_classes=2, labels=LABELS, positive="1"):
    cfg = Namespace(
        classification_head_name="head",
        regression_target=is_regression,
        report_mcc=False,
        report_acc_and_f1=False,
        report_pearson_and_spearman=False,
        glue_metrics=names,
        glue_positive_label=positive,
    )
    task = small_task(DICTIONARY)
    task.cfg = SimpleNamespace(num_classes=num_classes)
    task.label_dictionary = label_dictionary(labels[:num_classes])
    return PkmSentencePrediction.build_criterion(cfg, task).eval()


def model_of(num_classes, arch="resm_roberta_tiny"):
    model = build(arch, DICTIONARY, memory_layers=[1]) if "resm" in arch else build(arch)
    model.register_classification_head("head", num_classes=num_classes)
    with torch.no_grad():  # predictions of all kinds, and scores beyond 0..1
        torch.manual_seed(5)
        model.classification_heads["head"].out_proj.weight.normal_(
            0, 20 if num_classes > 1 else 0.3
        )
        if num_classes == 1:
            model.classification_heads["head"].out_proj.bias.fill_(0.5)
    return model.eval()


def dev_set(is_regression=False):
    """Batches of different sizes, with ids over all of them."""
    generator = torch.Generator().manual_seed(0)
    samples, first = [], 0
    for seed, size in enumerate(SIZES):
        tokens = batch(DICTIONARY, torch.randint(3, 9, (size,), generator=generator), seed=seed)
        target = torch.rand(size, generator=generator)
        samples.append(
            {
                "id": torch.arange(first, first + size),
                "net_input": {"src_tokens": tokens},
                "target": target if is_regression else (target > 0.4).long(),
                "ntokens": int(tokens.ne(DICTIONARY.pad()).sum()),
                "nsentences": size,
            }
        )
        first += size
    return samples


@torch.no_grad()
def predicted(model, samples, is_regression=False):
    """Predictions and targets of samples, one sentence at a time."""
    predictions, targets = [], []
    for sample in samples:
        for tokens, target in zip(sample["net_input"]["src_tokens"], sample["target"], strict=True):
            tokens = tokens[tokens.ne(DICTIONARY.pad())][None]
            logits = model(tokens, features_only=True, classification_head_name="head")[0][0]
            one = min(max(float(logits), 0.0), 1.0) if is_regression else int(logits.argmax())
            predictions.append(one)
            targets.append(target.item())
    return predictions, targets


@torch.no_grad()
def validate(criterion, model, samples):
    """What fairseq-train logs: a reduction for every batch, nested in that of the set."""
    with metrics.aggregate(new_root=True) as meters:
        for sample in samples:
            log = criterion(model, sample)[2]
            with metrics.aggregate("valid"):
                type(criterion).reduce_metrics([log])
    return meters.get_smoothed_values()


@pytest.mark.parametrize("arch", ["roberta", "resm_roberta_tiny"])
def test_metrics_are_those_of_the_whole_set_and_no_mean_over_batches(arch):
    names = ("mcc", "f1", "accuracy")
    criterion, model, samples = criterion_of(",".join(names)), model_of(2, arch), dev_set()
    logged = validate(criterion, model, samples)
    predictions, targets = predicted(model, samples)
    assert len(set(predictions)) == 2
    for name in names:
        assert logged[name] == round(score(name, predictions, targets), 2), name
    means = [score("mcc", *predicted(model, [sample])) for sample in samples]
    assert logged["mcc"] != pytest.approx(sum(means) / len(means), abs=1)
    assert "glue_rows" not in str(logged.keys())  # what is collected is not printed


def test_regression_scores_are_clipped():
    names = ("pearson", "spearman")
    criterion, model = criterion_of(" pearson , spearman", True, 1), model_of(1)
    samples = dev_set(is_regression=True)
    logged = validate(criterion, model, samples)
    scores, targets = predicted(model, samples, is_regression=True)
    assert scores.count(0.0) > 1, "nothing is clipped"
    assert len(set(scores)) > 3
    for name in names:
        assert logged[name] == pytest.approx(score(name, scores, targets), abs=0.02), name


def test_an_example_that_comes_twice_counts_once():
    criterion, model, samples = criterion_of("mcc"), model_of(2), dev_set()
    once = validate(criterion, model, samples)["mcc"]
    assert validate(criterion, model, [*samples, samples[2], samples[0]])["mcc"] == once
    other_ids = {**samples[2], "id": samples[2]["id"] + 100}
    assert validate(criterion, model, [*samples, other_ids])["mcc"] != once


@torch.no_grad()
def test_one_reduction_of_all_batches_is_the_same():
    """fairseq-validate reduces once."""
    criterion, model, samples = criterion_of("mcc"), model_of(2), dev_set()
    with metrics.aggregate(new_root=True) as meters:
        type(criterion).reduce_metrics([criterion(model, sample)[2] for sample in samples])
    expected = validate(criterion, model, samples)["mcc"]
    assert meters.get_smoothed_values()["mcc"] == expected


def test_two_subsets_do_not_mix():
    criterion, model, samples = criterion_of("mcc"), model_of(2), dev_set()
    first = validate(criterion, model, samples[:3])["mcc"]
    validate(criterion, model, samples[3:])
    assert validate(criterion, model, samples[:3])["mcc"] == first


def test_rows_of_a_finished_validation_are_forgotten():
    """Else fairseq keeps those of all validations, and stores them in each checkpoint."""
    criterion, samples = criterion_of("accuracy,mcc"), dev_set()
    model = model_of(2)
    found = [validate(criterion, model, samples)]
    kept = metrics.get_meter("valid", "_glue_rows")
    assert len(kept.tensor)
    criterion.finish_validation()
    assert kept.tensor is None
    found.append(validate(criterion, model, samples))
    assert found[0] == found[1] and len(kept.tensor) == sum(len(x["id"]) for x in samples)


def test_training_and_no_metrics_add_nothing():
    samples = dev_set()
    model = model_of(2, "roberta")
    assert "mcc" not in validate(criterion_of(""), model, samples)
    log = criterion_of("mcc")(model.train(), samples[0])[2]
    assert not [key for key in log if key.startswith("glue")]


@pytest.mark.parametrize(
    ("labels", "positive"), [(("1", "0"), "1"), (("0", "1"), "1"), (("no", "yes"), "no")]
)
def test_f1_is_that_of_a_label_whatever_its_class(labels, positive):
    criterion = criterion_of("accuracy,f1,mcc", labels=labels, positive=positive)
    model, samples = model_of(2), dev_set()
    logged = validate(criterion, model, samples)
    predictions, targets = (np.array(labels)[rows] for rows in predicted(model, samples))
    assert 0 < (predictions == positive).sum() < len(predictions)
    expected = {
        "accuracy": accuracy_score(targets, predictions),
        "f1": f1_score(targets, predictions, pos_label=positive),
        "mcc": matthews_corrcoef(targets, predictions),
    }
    for name, value in expected.items():
        assert logged[name] == round(100 * value, 2), name


def test_a_positive_label_that_is_not_there_ends_with_one_line():
    with pytest.raises(ValueError, match=r"label '1', but the label dictionary has bad, good: nam"):
        criterion_of("f1", labels=("bad", "good"))
    criterion_of("accuracy,mcc", labels=("bad", "good"))  # which need none


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("bleu", {}, "--glue-metrics names bleu, must be one of accuracy, f1, mcc without"),
        ("pearson", {}, "names pearson, must be one of accuracy, f1, mcc without --regression"),
        (
            "mcc",
            {"is_regression": True},
            "must be one of pearson, spearman with --regression-target",
        ),
        ("f1", {"num_classes": 3}, "f1 needs --num-classes 2, not 3"),
        ("pearson", {"is_regression": True}, "of a regression needs --num-classes 1, not 2"),
    ],
)
def test_impossible_metrics_end_with_one_line(names, options, message):
    with pytest.raises(ValueError, match=message):
        criterion_of(names, **options)


def test_targets_that_are_not_scaled_end_with_one_line():
    sample = dev_set(is_regression=True)[0]
    sample["target"] = sample["target"] * 5 + 1
    with pytest.raises(ValueError, match=r"the data: .* is not in 0\.\.1: --glue-metrics needs"):
        criterion_of("pearson", True, 1)(model_of(1), sample)


# --- several workers --------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_of_all_workers_come_in_the_order_of_workers(monkeypatch, rank):
    rows = [torch.rand(2, 3).double(), torch.rand(4, 3).double()]
    sizes = torch.tensor([2.0, 4.0]).double()
    everyone = torch.zeros(2, 4, 3).double()
    everyone[0, :2], everyone[1, :4] = rows
    others = [sizes.clone(), everyone.clone()]
    others[0][rank], others[1][rank] = 0, 0

    def all_reduce(tensor, group, op="sum"):
        tensor += others.pop(0)

    monkeypatch.setattr(distributed_utils, "get_data_parallel_world_size", lambda: 2)
    monkeypatch.setattr(distributed_utils, "get_data_parallel_rank", lambda: rank)
    monkeypatch.setattr(distributed_utils, "get_data_parallel_group", lambda: None)
    monkeypatch.setattr(distributed_utils, "all_reduce", all_reduce)
    assert torch.equal(rows_of_workers(rows[rank]), torch.cat(rows))


@torch.no_grad()
@pytest.mark.parametrize("n_busy", [1, 2, 3])
def test_logging_outputs_that_fairseq_summed_over_workers(monkeypatch, n_busy):
    """Each busy worker reports the rows of all; an idle one is summed as zeros."""
    criterion, model, samples = criterion_of("mcc,f1"), model_of(2), dev_set()
    expected = validate(criterion, model, samples)
    rows = torch.cat([criterion(model, sample)[2][glue_metrics.ROWS] for sample in samples])
    monkeypatch.setattr(glue_metrics, "rows_of_workers", lambda own: rows)
    log = criterion(model, samples[0])[2]
    summed = {key: value * n_busy for key, value in log.items()}
    with metrics.aggregate(new_root=True) as meters:
        type(criterion).reduce_metrics([summed])
    logged = meters.get_smoothed_values()
    assert (logged["mcc"], logged["f1"]) == (expected["mcc"], expected["f1"])
    assert logged["f1"] > 0

"""One model, one text, one usage: wherever it is counted, at equal draws per slot."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from pkm_fairseq.analysis.checkpoints import Opened, count_tokens, first_tokens
from pkm_fairseq.analysis.examine import examine, tokens_for
from pkm_fairseq.criterions.masked_lm import PkmMaskedLmLoss
from pkm_fairseq.experiments.demo.evaluate import evaluate
from pkm_fairseq.memory.observe.log import FILE, read_usage_log
from tests.helpers import batch, build, mlm_sample, small_dictionary, small_task

DICTIONARY = small_dictionary(200)
TASK = small_task(DICTIONARY)
DRAWS = 100
SAMPLES = [
    {
        **mlm_sample(batch(DICTIONARY, [12] * 100, seed=seed), DICTIONARY),
        "id": torch.arange(100),
        "split": "valid",
    }
    for seed in range(20)
]


@pytest.fixture
def model():
    options = dict(memory_n_keys=20, memory_k_dim=16, memory_knn=4, memory_query_norm="layer")
    return build("resm_roberta_tiny", DICTIONARY, max_positions=20, **options)


def logged(model, folder, draws, training):
    """The usage that a criterion writes of its validation, or of its training batches."""
    cfg = Namespace(tpu=False, save_dir=str(folder), no_save=False)
    cfg.memory_usage_draws, cfg.memory_usage_interval = draws, 1000 if training else 0
    criterion = PkmMaskedLmLoss.build_criterion(cfg, TASK)
    model.train().set_num_updates(0)
    criterion.train()
    if not training:
        criterion(model, SAMPLES[0])
        model.eval(), criterion.eval()
    with torch.no_grad():
        for finished, sample in enumerate(SAMPLES):
            if training:
                model.set_num_updates(finished)
            criterion(model, sample)
    (line,) = read_usage_log(folder / FILE)[1]
    assert line["split"] == ("train" if training else "valid")
    return line["layers"][0]


def examined(model, draws):
    """The usage that ``memory_usage.py`` reports."""
    opened = Opened("m", Path("m.pt"), model.eval(), DICTIONARY, None, False)
    rows = [row for sample in SAMPLES for row in sample["net_input"]["src_tokens"]]
    sequences = first_tokens(rows, tokens_for(opened, draws))
    assert count_tokens(sequences) == draws * 400 // 2
    return examine(opened, sequences, 1, lambda _: None).report["layers"][0]


@pytest.fixture
def places(model, tmp_path):
    return {
        "log of validations": logged(model, tmp_path / "valid", DRAWS, training=False),
        "log of training batches": logged(model, tmp_path / "train", DRAWS, training=True),
        "memory_usage.py": examined(model, DRAWS),
        "demo": evaluate(model.eval(), SAMPLES, TASK).memory[0],
    }


def test_all_places_say_one_number(places):
    first, *others = places.values()
    assert first["draws_per_slot"] == DRAWS and 0.5 < first["top1_usage"] < 1
    for other in others:
        assert other["draws_per_slot"] == DRAWS
        for ours, theirs in zip(first["curve"], other["curve"], strict=True):
            assert theirs == pytest.approx(ours, abs=0.01)


@pytest.mark.parametrize("draws", [3, 30])
def test_the_curve_says_what_a_count_of_fewer_draws_would(model, draws, tmp_path):
    whole, fewer = examined(model, DRAWS), examined(model, draws)
    (point,) = [p for p in whole["curve"] if p["draws_per_slot"] == draws]
    assert fewer["draws_per_slot"] == draws
    assert fewer["top1_usage"] == pytest.approx(point["top1_usage"], abs=0.03)
    assert fewer["topk_usage"] == pytest.approx(point["topk_usage"], abs=0.03)
    assert whole["top1_usage"] > point["top1_usage"] + 0.05 or draws == 30

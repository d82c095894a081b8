"""--memory-finetune in fairseq's model and optimizer: what is frozen, said and refused."""

import contextlib
import logging
import re

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY

from pkm_fairseq.memory.observe.slot_counts import CountsFile, SlotCounts, save_counts
from pkm_fairseq.models import check_options
from pkm_fairseq.optim.pkm_adam import PkmAdam
from tests.helpers import batch, build, mlm_sample, model_args, small_dictionary, small_task
from tests.unit.test_pkm_adam import options

VALUES = "encoder.sentence_encoder.layers.1.memory.values.weight"
N_SLOTS = 25


def finetuned(part="values", arch="resm_roberta_tiny", **settings):
    settings = {"optimizer": "pkm_adam", **settings}
    return build(arch, memory_finetune=part, **settings)


def background(file, n_slots=N_SLOTS, layers=(1,), **about):
    counts = SlotCounts(n_slots)
    counts.update(torch.arange(5))
    counts.end_batch()
    save_counts(file, CountsFile({layers: counts}, about))
    return str(file)


def trained_of(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_values_alone_are_trained_and_a_new_head_and_both_is_said(caplog):
    with caplog.at_level(logging.INFO):
        model = finetuned()
        model.register_classification_head("new", num_classes=3)
    said = [record.message for record in caplog.records if "--memory-finetune" in record.message]
    frozen = sum(p.numel() for name, p in finetuned().named_parameters() if name != VALUES)
    assert said == [
        "--memory-finetune values: 400 parameters of values are trained, in each update all rows "
        f"that are read; {frozen:,} are frozen",
        "--memory-finetune values: the head new is trained, too",
    ]
    head = {f"classification_heads.new.{x}.{y}" for x in ("dense", "out_proj")
            for y in ("weight", "bias")}  # fmt: skip
    assert trained_of(model) == {VALUES, *head}


def test_queries_are_normalised_by_statistics_that_stay():
    model, free = finetuned(), build("resm_roberta_tiny", optimizer="pkm_adam")
    dictionary = small_dictionary()
    sample = mlm_sample(batch(dictionary, [7, 5]), dictionary)
    optimizer = PkmAdam(options(), [p for p in model.parameters() if p.requires_grad])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for x in (model, free):
        x.train()(**sample["net_input"])[0].square().mean().backward()
    optimizer.step()
    for name, x in model.state_dict().items():
        if ".reads." not in name:
            assert torch.equal(x, before[name]) != (name == VALUES), name
    statistics = VALUES.replace("values.weight", "query_norm.running_mean")
    assert not torch.equal(free.state_dict()[statistics], before[statistics])


def test_a_checkpoint_does_not_ask_for_counts_again(tmp_path):
    args = model_args(
        "resm_roberta_tiny", optimizer="pkm_adam", memory_finetune="slots",
        memory_finetune_slots="3", memory_background=background(tmp_path / "b.pt"),
    )  # fmt: skip
    make = ARCH_MODEL_REGISTRY["resm_roberta_tiny"].build_model
    assert trained_of(make(args, small_task())) == {VALUES}
    assert args.memory_finetune is None and args.memory_background is None
    assert len(trained_of(make(args, small_task()))) > 1


@pytest.mark.parametrize(
    ("part", "settings", "said"),
    [
        ("values", {"optimizer": "adam"}, "values does not work with --optimizer adam"),
        ("values", {"memory_freeze": "keys"}, "and --memory-freeze keys exclude each other"),
        ("slots", {"memory_layers": []}, "--memory-finetune slots: no layer has a memory"),
        ("slots", {}, "scores by tf-idf, which needs --memory-background FILE"),
        ("slots", {"memory_background": "none.pt"}, "--memory-background none.pt: no such file"),
        ("values", {"memory_finetune_slots": "9"}, "--memory-finetune-slots 9 has no effect"),
        (None, {"memory_finetune_score": "count"}, "has no effect without --memory-finetune slots"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(part, settings, said):
    if part == "slots" and "memory_layers" in settings:
        settings = {**settings, "memory_finetune_score": "count"}
    with pytest.raises(ValueError, match=said) as stop:
        finetuned(part, **settings)
    assert str(stop.value).startswith("pkm_roberta: ") and "\n" not in str(stop.value)


def test_counts_of_another_model_are_refused(tmp_path):
    for n_slots, layers, said in (
        (36, (1,), "counts 36 slots of layer 1: must count 25 slots of layer 1"),
        (N_SLOTS, (1, 2), "counts 25 slots of layer 1, 2: must count 25 slots of layer 1"),
    ):
        file = background(tmp_path / "b.pt", n_slots, layers)
        with pytest.raises(ValueError, match=f"--memory-background {file} {said}"):
            finetuned("slots", memory_background=file)


def test_counts_of_a_model_of_another_training_are_refused_when_parameters_are_loaded(tmp_path):
    sample = mlm_sample(batch(small_dictionary(), [7, 5]), small_dictionary())
    theirs = build("resm_roberta_tiny", seed=5).state_dict()
    origin = theirs["encoder.sentence_encoder.layers.1.reads.origin"].long().tolist()
    file = background(tmp_path / "b.pt", origins={1: origin}, checkpoint="theirs.pt")
    for loads, is_refused in ((True, False), (False, True)):
        model = finetuned("slots", memory_background=file)
        if loads:
            model.load_state_dict(theirs)
        said = re.escape(f"--memory-background {file} counts the reads of theirs.pt")
        refused = pytest.raises(ValueError, match=said)
        with refused if is_refused else contextlib.nullcontext(), torch.no_grad():
            model(**sample["net_input"])


def test_torchs_ddp_is_refused_on_several_workers_and_others_are_not(monkeypatch):
    monkeypatch.setattr(check_options.distributed_utils, "get_data_parallel_world_size", lambda: 2)
    with pytest.raises(ValueError, match="does not work with --ddp-backend pytorch_ddp"):
        finetuned(ddp_backend="pytorch_ddp")
    finetuned(ddp_backend="legacy_ddp", encoder_layerdrop=0.1)  # no statistics are taken


@pytest.mark.parametrize("value_optimizer", ["adam", "sgd"])
def test_the_optimizer_of_values_is_an_option(value_optimizer):
    model = finetuned()
    dictionary = small_dictionary()
    sample = mlm_sample(batch(dictionary, [7, 5]), dictionary)
    values = dict(model.named_parameters())[VALUES]
    optimizer = PkmAdam(options(memory_value_optimizer=value_optimizer), [values])
    model.train()(**sample["net_input"])[0].square().mean().backward()
    by_hand = values.detach() - 0.1 * values.grad.dense()
    optimizer.step()
    is_by_hand = torch.allclose(values, by_hand, rtol=1e-5, atol=1e-7)
    assert is_by_hand == (value_optimizer == "sgd")
    assert ("exp_avg" in optimizer.optimizer.state[values]) == (value_optimizer == "adam")

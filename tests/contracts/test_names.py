"""Names that other people's code, checkpoints and commands rely on: frozen lists."""

import argparse
from dataclasses import fields

import pytest
import torch
from fairseq import options
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.models.roberta import RobertaModel
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.tasks import TASK_REGISTRY

import pkm_fairseq.memory
from pkm_fairseq.criterions.masked_lm import PkmMaskedLmLoss
from pkm_fairseq.criterions.sentence_prediction import PkmSentencePrediction
from pkm_fairseq.memory import MemoryConfig, MemoryUsage
from pkm_fairseq.models.config import PkmRobertaConfig
from pkm_fairseq.models.roberta import PkmRobertaModel
from pkm_fairseq.optim.pkm_adam import PkmAdam
from pkm_fairseq.tasks.masked_lm import PkmMaskedLMTask
from pkm_fairseq.tasks.sentence_prediction import PkmSentencePredictionTask
from tests.helpers import build

FLAGS = {
    "--memory-layers",
    "--memory-mode",
    "--memory-n-keys",
    "--memory-heads",
    "--memory-knn",
    "--memory-k-dim",
    "--memory-v-dim",
    "--memory-query",
    "--memory-query-norm",
    "--memory-score-activation",
    "--memory-score-scale",
    "--memory-learn-score-scale",
    "--memory-values",
    "--memory-output",
    "--memory-values-init",
    "--memory-input-dropout",
    "--memory-query-dropout",
    "--memory-read-dropout",
    "--memory-key-dropout",
    "--memory-freeze",
    "--memory-finetune",
    "--memory-finetune-slots",
    "--memory-finetune-score",
    "--memory-finetune-scope",
    "--memory-finetune-counts",
    "--memory-background",
    "--memory-shards",
    "--memory-share-values",
    "--memory-usage-interval",
    "--memory-moment-dtype",
    "--memory-exchange",
    "--memory-checkpoint",
    "--memory-usage-draws",
    "--memory-usage-tokens",
    "--memory-value-clip-norm",
    "--memory-value-dtype",
    "--memory-value-lr",
    "--memory-value-lr-factor",
    "--memory-value-lr-schedule",
    "--memory-value-optimizer",
    "--memory-values-file",
    "--init-from",
    "--glue-metrics",
    "--glue-positive-label",
}
SIZES = ("tiny", "base", "large")
ARCHS = {f"{kind}_roberta_{size}" for kind in ("pkm", "resm") for size in SIZES} | {"pkm_roberta"}
COMMAND = ["data", "--task=pkm_masked_lm", "--criterion=pkm_masked_lm", "--optimizer=pkm_adam"]
SUMMARY = {
    "n_slots",
    "draws_per_slot",
    "holds_1",
    "holds_10",
    "holds_100",
    "effective_neighbours",
    "tokens",
    "top1_usage",
    "topk_usage",
    "top1_ceiling",
    "topk_ceiling",
    "dead_slots",
    "kl_weighted",
    "kl_unweighted",
    "gini",
    "slots_50",
    "slots_90",
    "slots_99",
    "top1_weight",
    "entropy",
    "subkey1_usage",
    "subkey2_usage",
}


def flags_of(add_args):
    """The options that a class adds to a parser, by flag."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group(argument_default=argparse.SUPPRESS)  # as fairseq does
    add_args(group)
    return {flag: action for action in parser._actions for flag in action.option_strings}


def our_flags():
    parts = (PkmRobertaModel, PkmAdam, PkmMaskedLmLoss, PkmSentencePrediction)
    return {flag: action for part in parts for flag, action in flags_of(part.add_args).items()}


def test_flags_are_the_frozen_list():
    fairseqs = {"--adam-betas", "--adam-eps", "--checkpoint-activations", "--offload-activations"}
    fairseqs |= flags_of(RobertaModel.add_args).keys() | {"--weight-decay", "--lr"}
    fairseqs |= flags_of(SentencePredictionCriterion.add_args).keys()
    assert set(our_flags()) - fairseqs == FLAGS


@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_every_flag_has_a_help_text_that_says_where_its_default_is_from(flag):
    help_text = our_flags()[flag].help
    assert help_text
    if flag != "--init-from":
        assert "default" in help_text or flag == "--memory-share-values"
    assert any(source in help_text for source in ("20", "our choice", "paper")), flag


def test_every_setting_of_a_memory_has_a_flag_and_a_field():
    names = {f"memory_{f.name}" for f in fields(MemoryConfig)}
    assert names <= {f.name for f in fields(PkmRobertaConfig)}
    assert {"--" + name.replace("_", "-") for name in names} <= FLAGS


def test_every_option_of_fairseqs_roberta_is_repeated_with_its_type():
    theirs, ours = flags_of(RobertaModel.add_args), flags_of(PkmRobertaModel.add_args)
    assert set(theirs) <= set(ours)
    for flag, action in theirs.items():
        mine = ours[flag]
        if action.type is not None:
            assert mine.type is action.type, flag
        assert (mine.nargs == 0) == (action.nargs == 0), flag  # a switch stays a switch
        if action.choices is not None:
            assert set(map(str, mine.choices)) == set(action.choices), flag


def test_options_that_an_architecture_sets_have_no_default_of_their_own():
    # under hydra a default of the dataclass would win over the architecture
    set_by_all = {"encoder_layers_to_keep", "encoder_layerdrop", "untie_weights_roberta"}
    set_by_all |= {"quant_noise_pq", "quant_noise_pq_block_size", "quant_noise_scalar"}
    set_by_all |= {"memory_learn_score_scale"}
    set_by_all |= {"spectral_norm_classification_head", "memory_share_values"}  # to this default
    said = argparse.Namespace()
    ARCH_CONFIG_REGISTRY["pkm_roberta_tiny"](said)
    for f in fields(PkmRobertaConfig):
        if f.name in set_by_all:
            assert f.default == getattr(said, f.name), f.name
        elif hasattr(said, f.name):
            assert f.default is None, f.name


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_flags_are_accepted_on_the_command_line(arch):
    values = {
        "--memory-layers": "1,2",
        "--memory-mode": "residual",
        "--memory-query-norm": "layer",
        "--memory-values-init": "zero",
        "--memory-query": "mlp",
        "--memory-score-activation": "relu",
        "--memory-learn-score-scale": None,
        "--memory-values": "experts",
        "--memory-output": "swilu",
        "--memory-value-lr-schedule": "follow",
        "--memory-value-dtype": "bfloat16",
        "--init-from": "plain.pt",
        "--memory-share-values": None,
        "--memory-freeze": "keys",
        "--memory-finetune": "slots",
        "--memory-finetune-score": "count",
        "--memory-finetune-scope": "data",
        "--memory-value-optimizer": "sgd",
        "--memory-moment-dtype": "bfloat16",
        "--memory-exchange": "dense",
        "--memory-checkpoint": "parts",
    }
    command = [*COMMAND, "--arch", arch]
    others = {"--glue-metrics", "--glue-positive-label"}  # of the other criterion
    for flag in sorted(FLAGS - others):
        value = values.get(flag, "0.5" if flag.endswith(("dropout", "lr")) else "4")
        command += [flag] if value is None else [flag, value]
    args = options.parse_args_and_arch(options.get_training_parser(), command)
    assert args.memory_layers == [1, 2]
    assert (args.memory_mode, args.memory_query_norm) == ("residual", "layer")
    assert (args.memory_n_keys, args.memory_read_dropout, args.memory_value_lr) == (4, 0.5, 0.5)
    assert (args.memory_share_values, args.init_from) == (True, "plain.pt")


@pytest.mark.parametrize("arch", ["pkm_roberta_tiny", "resm_roberta_tiny"])
def test_a_command_line_without_options_gives_what_the_architecture_says(arch):
    command = [*COMMAND, "--arch", arch]
    args = options.parse_args_and_arch(options.get_training_parser(), command)
    said = argparse.Namespace()
    ARCH_CONFIG_REGISTRY[arch](said)
    model_cfg = convert_namespace_to_omegaconf(args).model
    for name, value in vars(said).items():
        if name in model_cfg:  # not all are options
            given = model_cfg[name]
            assert (str(given) if isinstance(value, str) else given) == value, name


@pytest.mark.parametrize(
    ("registry", "name", "ours"),
    [
        (MODEL_REGISTRY, "pkm_roberta", PkmRobertaModel),
        *[(ARCH_MODEL_REGISTRY, arch, PkmRobertaModel) for arch in sorted(ARCHS)],
        (CRITERION_REGISTRY, "pkm_masked_lm", PkmMaskedLmLoss),
        (CRITERION_REGISTRY, "pkm_sentence_prediction", PkmSentencePrediction),
        (TASK_REGISTRY, "pkm_masked_lm", PkmMaskedLMTask),
        (TASK_REGISTRY, "pkm_sentence_prediction", PkmSentencePredictionTask),
        (OPTIMIZER_REGISTRY, "pkm_adam", PkmAdam),
    ],
)
def test_registered_name_is_our_class(registry, name, ours):
    assert registry[name] is ours


@pytest.mark.parametrize(
    "registry",
    [MODEL_REGISTRY, ARCH_MODEL_REGISTRY, CRITERION_REGISTRY, TASK_REGISTRY, OPTIMIZER_REGISTRY],
)
def test_nothing_of_ours_is_registered_without_our_prefix(registry):
    for name, registered in registry.items():
        if registered.__module__.startswith("pkm_fairseq"):
            assert name.startswith(("pkm_", "resm_")), name


def test_no_other_architecture_is_ours():
    ours = {arch for arch, model in ARCH_MODEL_REGISTRY.items() if model is PkmRobertaModel}
    assert ours == ARCHS


@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("v_dim", [None, 7])
def test_parameters_of_a_memory_in_a_checkpoint_have_these_names(query_norm, v_dim):
    model = build("resm_roberta_tiny", memory_query_norm=query_norm, memory_v_dim=v_dim)
    expected = {"query_proj.weight", "query_proj.bias", "keys", "values.weight"}
    if query_norm != "none":
        expected |= {"query_norm.weight", "query_norm.bias"}
    if query_norm == "batch":
        expected |= {"query_norm.running_mean", "query_norm.running_var"}
    if v_dim is not None:
        expected |= {"output_proj.weight"}
    prefix = "encoder.sentence_encoder.layers.1.memory."
    names = {n.removeprefix(prefix) for n in model.state_dict() if n.startswith(prefix)}
    assert names == expected
    plain = build("roberta").state_dict()
    times = ("last_read", "last_top1", "origin")
    reads = {f"{prefix.removesuffix('memory.')}reads.{name}" for name in times}
    assert set(model.state_dict()) - set(plain) == {prefix + name for name in expected} | reads


def test_usage_summary_has_these_keys():
    usage = MemoryUsage(4, 1)
    usage.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.5]]]))
    summary = usage.summary()
    assert set(summary) == SUMMARY | {"heads", "curve", "extrapolation"}
    assert set(summary.pop("extrapolation")) == {"top1", "topk"}
    assert set(summary.pop("curve")[0]) == {"draws_per_slot", "top1_usage", "topk_usage"}
    (head,) = summary.pop("heads")
    assert set(head) == SUMMARY - {"n_slots", "tokens"}
    for said in (summary, head):
        assert all(type(value) in (int, float) for value in said.values())  # goes into JSON


def test_the_core_offers_these_names():
    for name in ("MemoryConfig", "ProductKeyMemory", "MemoryUsage", "product_topk"):
        assert name in pkm_fairseq.memory.__all__
        assert hasattr(pkm_fairseq.memory, name)

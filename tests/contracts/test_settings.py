"""An option's declaration, flag, help text, default, documentation and check say the same."""

import re
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq.criterions.sentence_prediction import SentencePredictionConfig
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY
from omegaconf import OmegaConf

from pkm_fairseq import settings
from pkm_fairseq.criterions.sentence_prediction import (
    PkmSentencePrediction,
    PkmSentencePredictionConfig,
)
from pkm_fairseq.memory import MemoryConfig
from pkm_fairseq.memory.option import declared_in, flag_of
from pkm_fairseq.models.config import PkmRobertaConfig
from pkm_fairseq.optim.pkm_adam import PkmAdam, PkmAdamConfig
from tests.contracts.test_names import FLAGS, our_flags
from tests.helpers import build

ROOT = Path(__file__).resolve().parents[2]
PARTS = settings.declared_options()
OPTIONS = {name: option for part in PARTS.values() for name, option in part.items()}
MODEL = {**PARTS["model"], **PARTS["memory"], **PARTS["finetuning"]}
SIZES = ("base", "tiny", "large")
BY_MODE = "replace; resm_roberta*: residual"

# an impossible value of each option, and what the message must say of it and of what is right
BAD = {
    "memory_layers": ([0, 3], ["memory-layers names layer 3", "0..2"]),
    "memory_mode": ("both", ["memory-mode is 'both'", "replace, residual"]),
    "memory_freeze": ("slots", ["memory-freeze is 'slots'", "values, keys, all"]),
    "memory_finetune": ("rows", ["memory-finetune is 'rows'", "values, slots"]),
    "memory_finetune_slots": ("0", ["memory-finetune-slots is '0'", "a number of rows"]),
    "memory_finetune_score": ("idf", ["memory-finetune-score is 'idf'", "tf-idf, count"]),
    "memory_finetune_scope": ("epoch", ["memory-finetune-scope is 'epoch'", "batch, data"]),
    "memory_finetune_counts": (
        "c.pt",
        ["--memory-finetune-counts c.pt", "--memory-finetune slots"],
    ),
    "memory_background": ("b.pt", ["--memory-background b.pt", "--memory-finetune slots"]),
    "memory_shards": (2, ["memory-shards is 2", "use --optimizer pkm_adam"]),
    "memory_values_file": ("missing.pt", ["values file missing.pt: no such file"]),
    "init_from": ("missing.pt", ["--init-from missing.pt: no such file"]),
    "memory_n_keys": (1, ["n_keys is 1", "at least 2"]),
    "memory_heads": (0, ["heads is 0", "at least 1"]),
    "memory_knn": (1, ["knn is 1", "at least 2"]),
    "memory_k_dim": (5, ["k_dim is 5", "even"]),
    "memory_v_dim": (0, ["v_dim is 0", "at least 1"]),
    "memory_query": ("deep", ["query is 'deep'", "linear, mlp"]),
    "memory_score_activation": ("tanh", ["score_activation is 'tanh'", "softmax, relu"]),
    "memory_score_scale": (0.0, ["score_scale is 0.0", "above 0"]),
    "memory_learn_score_scale": (2, ["learn_score_scale is 2", "True or False"]),
    "memory_values": ("rows", ["values is 'rows'", "table, experts"]),
    "memory_output": ("glu", ["output is 'glu'", "linear, swilu"]),
    "memory_query_norm": ("group", ["query_norm is 'group'", "batch, layer, none"]),
    "memory_values_init": ("ones", ["values_init is 'ones'", "normal, zero"]),
    "memory_value_dtype": ("float16", ["value_dtype is 'float16'", "float32, bfloat16"]),
    "memory_input_dropout": (1.0, ["input_dropout is 1.0", "[0, 1)"]),
    "memory_query_dropout": (-0.5, ["query_dropout is -0.5", "[0, 1)"]),
    "memory_read_dropout": (2.0, ["read_dropout is 2.0", "[0, 1)"]),
    "memory_key_dropout": (0.9, ["key_dropout is 0.9", "1 of 5", "at least knn, which is 3"]),
    "memory_share_values": (1, ["share_values is 1", "True or False"]),
    "memory_value_lr": (-1e-3, ["memory-value-lr is -0.001", "at least 0"]),
    "memory_value_lr_factor": (-1.0, ["memory-value-lr-factor is -1.0", "at least 0"]),
    "memory_value_lr_schedule": (
        "linear",
        ["memory-value-lr-schedule is 'linear'", "constant, follow"],
    ),
    "memory_value_optimizer": ("rms", ["memory-value-optimizer is 'rms'", "adam, sgd"]),
    "memory_moment_dtype": ("int8", ["memory-moment-dtype is 'int8'", "float32, bfloat16, f"]),
    "memory_exchange": ("sparse", ["memory-exchange is 'sparse'", "auto, factors, dense"]),
    "memory_checkpoint": ("shards", ["memory-checkpoint is 'shards'", "whole, parts"]),
    "memory_value_clip_norm": (-1.0, ["memory-value-clip-norm is -1.0", "at least 0"]),
    "memory_usage_interval": (-1, ["memory-usage-interval is -1", "at least 0"]),
    "memory_usage_draws": (0, ["memory-usage-draws is 0", "at least 1"]),
    "memory_usage_tokens": (-5, ["memory-usage-tokens is -5", "at least 0"]),
    "glue_metrics": ("bleu", ["--glue-metrics names bleu", "accuracy, f1, mcc"]),
    "glue_positive_label": ("yes", ["uses label 'yes'", "has 0, 1", "--glue-positive-label"]),
}


def sized_defaults(name):
    """What each architecture makes of an option that nobody gives."""
    found = {}
    for size in SIZES:
        args = Namespace()
        ARCH_CONFIG_REGISTRY[f"pkm_roberta_{size}"](args)
        found[size] = getattr(args, name, OPTIONS[name].default)
    return found


def in_words(value):
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else str(value)


def test_every_flag_is_declared():
    assert {flag_of(name) for name in OPTIONS} == FLAGS


@pytest.mark.parametrize("name", OPTIONS)
def test_the_help_text_of_a_flag_is_made_from_the_declaration(name):
    option, action = OPTIONS[name], our_flags()[flag_of(name)]
    start, end = f"{option.meaning()} (default: ", f"; {option.source})"
    assert action.help.startswith(start) and action.help.endswith(end)
    assert tuple(action.choices or ()) == tuple(option.allowed())
    default = action.help.removeprefix(start).removesuffix(end)
    if name == "memory_mode":
        assert default == BY_MODE
    elif option.default_text is not None:
        assert default == option.default_text
    elif name in MODEL:
        values = {size: in_words(value) for size, value in sized_defaults(name).items()}
        base = values["base"]
        differs = {f"{size}: {value}" for size, value in values.items() if value != base}
        assert default.split("; ")[0] == base and set(default.split("; ")[1:]) == differs
    else:
        assert default == in_words(action.default)


@pytest.mark.parametrize("name", OPTIONS)
def test_both_drivers_have_the_declared_default(name):
    option = OPTIONS[name]
    (config,) = [
        config
        for config in (PkmRobertaConfig, PkmAdamConfig, PkmSentencePredictionConfig)
        if name in declared_in(config)
    ]
    hydras = OmegaConf.structured(config)[name]
    if name in MODEL and name not in (
        "memory_shards",
        "memory_share_values",
        "memory_learn_score_scale",
    ):
        assert hydras is None  # ask the architecture
    else:
        assert hydras == option.default
        assert name in MODEL or our_flags()[flag_of(name)].default == option.default
    if name in PARTS["memory"]:
        assert sized_defaults(name)["base"] == option.default
        assert getattr(MemoryConfig(), name.removeprefix("memory_")) == option.default


@pytest.mark.parametrize("file", ["docs/pretraining.md", "docs/settings.md"])
def test_tables_are_those_of_the_declarations(file):
    """If this fails: python -m pkm_fairseq.settings docs/settings.md docs/pretraining.md"""
    text = (ROOT / file).read_text(encoding="utf-8")
    assert settings.renewed(text) == text
    rows = re.findall(r"^\| `--([a-z-]+)` \| (.*?) \| (.*) \| (.*?) \|$", text, re.MULTILINE)
    rows = {flag: row for flag, *row in rows if f"--{flag}" in FLAGS}
    expected = settings.FIRST if file == "docs/pretraining.md" else OPTIONS
    assert list(rows) == [name.replace("_", "-") for name in expected]
    for name in expected:
        default, meaning, source = rows[name.replace("_", "-")]
        said = our_flags()[flag_of(name)].help
        assert said.startswith(f"{meaning.replace('`', '')} (default: {default}; ")
        if source.startswith("["):
            (source,) = re.findall(rf"^{re.escape(source)}: (.*)$", text, re.MULTILINE)
        assert source == OPTIONS[name].source


def test_what_is_no_table_is_refused_and_the_rest_of_a_file_stays():
    with pytest.raises(ValueError, match="table is mine, must be one of model, memory"):
        settings.renewed("<!-- table: mine -->\n<!-- end -->")
    text = "before\n<!-- table: optimizer -->\nold\n<!-- end -->\nafter\n"
    new = settings.renewed(text)
    assert new.startswith("before\n<!-- table: optimizer -->\n| flag |")
    assert new.endswith("<!-- end -->\nafter\n") and "\nold\n" not in new


def test_the_command_prints_the_tables_or_renews_files(tmp_path, capsys):
    settings.main([])
    printed = capsys.readouterr().out
    assert all(f"| `{flag}` |" in printed for flag in FLAGS)
    file = tmp_path / "a.md"
    file.write_text("<!-- table: criteria -->\n<!-- end -->\n")
    settings.main([str(file)])
    assert "--glue-metrics" in file.read_text()


def start(name, value, **others):
    """Make what an option belongs to."""
    if name in MODEL:
        build("resm_roberta_tiny", **{**others, name: value})
    elif name in PARTS["optimizer"]:
        values = {name: value, "lr": [1e-3], "adam_betas": "(0.9, 0.999)"}
        PkmAdam(PkmAdamConfig(**values), [torch.nn.Parameter(torch.zeros(1))])
    else:
        given = {"save_dir": "", "no_save": True, "glue_metrics": "f1", name: value}
        labels = Dictionary()
        for label in "01":
            labels.add_symbol(label)
        task = SimpleNamespace(cfg=SimpleNamespace(num_classes=2), label_dictionary=labels)
        config = PkmSentencePredictionConfig(**given)
        PkmSentencePrediction(config, task)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_impossible_value_is_refused_and_the_message_says_what_is_right(name):
    value, named = BAD[name]
    with pytest.raises(ValueError) as stop:
        start(name, value)
    message = str(stop.value)
    assert "\n" not in message
    for words in named:
        assert words in message


@pytest.mark.parametrize("name", OPTIONS)
def test_a_default_is_not_refused(name):
    value = sized_defaults(name)["tiny"] if name in MODEL else OPTIONS[name].default
    start(name, value, memory_n_keys=64)


def test_every_declared_field_of_a_memory_is_a_flag():
    assert {f"memory_{f.name}" for f in fields(MemoryConfig)} == set(PARTS["memory"])
    assert set(declared_in(MemoryConfig)) == {f.name for f in fields(MemoryConfig)}
    assert not declared_in(SentencePredictionConfig)

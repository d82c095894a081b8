"""fairseq's options become one plan; what is of the run only is cleared in one place."""

import ast
import copy
import re
from argparse import Namespace
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf, open_dict

from pkm_fairseq.memory import MemoryConfig
from pkm_fairseq.models import roberta
from pkm_fairseq.models.config import RunOptions
from pkm_fairseq.models.plan import complete_options, read_plan, write_back
from tests.helpers import batch, build, model_args, small_dictionary, small_task
from tests.unit.test_example_configs import EXAMPLES, composed
from tests.unit.test_example_configs import data as data  # a fixture

# as flags, and as fairseq-hydra-train takes them; each is no default
FLAGS = (
    "--memory-layers 0,2 --memory-mode replace --memory-n-keys 6 --memory-heads 3 --memory-knn 2 "
    "--memory-k-dim 8 --memory-v-dim 9 --memory-query-norm none --memory-values-init zero "
    "--memory-value-dtype bfloat16 --memory-input-dropout 0.1 --memory-query-dropout 0.2 "
    "--memory-read-dropout 0.3 --memory-key-dropout 0.4 --memory-share-values "
    "--memory-freeze keys --memory-shards 2 --init-from plain.pt "
    "--encoder-layers-to-keep 0,2 --encoder-layerdrop 0.25 --ffn-reg-scale-factor 0.5 "
    "--ffn-blocks-to-remove 3"
)
RUN = "--optimizer pkm_adam --fp16 --memory-efficient-fp16 --ddp-backend slowmo --store-ema"
RUN += " --zero-sharding os --save-dir out --restore-file a.pt --finetune-from-model b.pt"
RUN += " --no-save-optimizer-state --use-bmuf --continue-once c.pt"
NODES = {
    "fp16": "common",
    "memory_efficient_fp16": "common",
    "ddp_backend": "distributed_training",
    "zero_sharding": "distributed_training",
    "store_ema": "ema",
    "use_bmuf": "optimization",
}


def words_of(flags):
    """Pairs of an option's name and its value, None for a switch."""
    words = flags.split()
    for index, word in enumerate(words):
        if word.startswith("--"):
            following = words[index + 1] if index + 1 < len(words) else "--"
            name = word.removeprefix("--").replace("-", "_")
            yield name, None if following.startswith("--") else following


def by_command_line(flags, arch="resm_roberta_tiny"):
    parser = options.get_training_parser(default_task="pkm_masked_lm")
    command = ["no-data", "--task", "pkm_masked_lm", "--arch", arch, *flags.split()]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, command))


def by_hydra(data):
    overrides = []
    for name, value in words_of(FLAGS):
        value = {None: "true", "0,2": "[0,2]" if name == "memory_layers" else "'0,2'"}.get(
            value, value
        )
        overrides.append(f"++model.{name}={value}")
    for name, value in words_of(RUN):
        if name != "optimizer":  # of the configuration
            node = NODES.get(name, "checkpoint")
            overrides.append(f"++{node}.{name}={'true' if value is None else value}")
    return composed(EXAMPLES / "pretraining/config/resm_tiny.yaml", data, *overrides)


def planned(args):
    with open_dict(args):
        complete_options(args, small_task())
        return read_plan(args)


def test_both_drivers_lead_to_the_same_plan(data: Path) -> None:
    plan = planned(by_command_line(f"{FLAGS} {RUN}").model)
    assert plan == planned(by_hydra(data).model)
    memory = MemoryConfig(
        n_keys=6,
        heads=3,
        knn=2,
        k_dim=8,
        v_dim=9,
        query_norm="none",
        values_init="zero",
        value_dtype="bfloat16",
        input_dropout=0.1,
        query_dropout=0.2,
        read_dropout=0.3,
        key_dropout=0.4,
        share_values=True,
    )
    assert plan.memory == memory
    assert (plan.memory_layers, plan.memory_mode) == ((0, 1), "replace")
    assert (plan.n_layers, plan.kept_layers) == (2, (0, 2))
    assert (plan.freeze, plan.n_shards, plan.init_from) == ("keys", 2, "plain.pt")
    assert (plan.encoder_layerdrop, plan.ffn_reg_scale_factor) == (0.25, 0.5)
    assert (plan.ffn_blocks_to_remove, plan.grouped_optimizers) == (3, ())
    assert plan.run == RunOptions(
        optimizer="pkm_adam",
        fp16=True,
        memory_efficient_fp16=True,
        ddp_backend="slowmo",
        zero_sharding="os",
        save_dir="out",
        restore_file="a.pt",
        finetune_from_model="b.pt",
        continue_once="c.pt",
        no_save_optimizer_state=True,
        store_ema=True,
        use_bmuf=True,
    )
    types = {f.name: type(getattr(plan.run, f.name)) for f in fields(RunOptions)}
    assert set(types.values()) == {str, bool}  # no Enum of fairseq's


def test_reading_changes_no_option_and_the_plan_cannot_be_changed():
    args = model_args("resm_roberta_tiny", encoder_layers_to_keep="1,2", init_from="a.pt")
    before = copy.deepcopy(vars(args))
    plan = read_plan(args)
    assert vars(args) == before
    with pytest.raises(FrozenInstanceError):
        plan.n_shards = 2


@pytest.mark.parametrize("arch", ["pkm_roberta", "resm_roberta_tiny"])
def test_what_is_of_the_run_only_is_cleared_in_what_checkpoints_hold(arch):
    """With its bare name a model gets a copy of the options; checkpoints hold the original."""
    flags = "--encoder-layers 3 --encoder-embed-dim 16 --encoder-attention-heads 2 "
    flags += "--memory-layers 0,2 --memory-n-keys 4 --memory-knn 2 --encoder-layers-to-keep 1,2 "
    cfg = by_command_line(f"{flags} --init-from gone.pt --memory-shards 2 --optimizer adam", arch)
    args = cfg.model
    if arch == "pkm_roberta":
        args = OmegaConf.merge(cfg.model)  # as fairseq's merge_with_parent
        args.__dict__["_parent"] = cfg.model.__dict__["_parent"]
    plan = planned(args)
    with open_dict(args):
        write_back(plan, args)
    for held in (args, cfg.model):
        assert (held.init_from, held.memory_shards) == (None, 1)
        assert held.encoder_layers_to_keep is None
        assert (held.encoder_layers, held.memory_layers) == (2, [1])
        assert held.memory_n_keys == 4
    assert (plan.init_from, plan.n_shards, plan.kept_layers) == ("gone.pt", 2, (1, 2))


def test_what_was_read_is_not_asked_again(monkeypatch):
    """The model is built from the plan: without the options that it was read from, too."""
    asked = {f.name for f in fields(RunOptions)} | {"init_from", "encoder_layers_to_keep"}
    original = roberta.write_back

    def write_back_and_forget(plan, args):
        original(plan, args)
        for name in [n for n in vars(args) if n.startswith("memory_") or n in asked]:
            delattr(args, name)

    shape = dict(memory_layers=[0, 2], encoder_layers_to_keep="0,2", memory_freeze="keys")
    shape |= dict(optimizer="pkm_adam", memory_share_values=True, memory_query_norm="layer")
    model = build("pkm_roberta_tiny", **shape)
    monkeypatch.setattr(roberta, "write_back", write_back_and_forget)
    other = build("pkm_roberta_tiny", **shape)
    assert not hasattr(other.args, "memory_layers")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    names = "_ddp_params_and_buffers_to_ignore"
    assert getattr(model, names) == getattr(other, names) != []
    trained = [[p.requires_grad for p in m.parameters()] for m in (model, other)]
    assert trained[0] == trained[1] and not all(trained[0])
    tokens = batch(small_dictionary(), [5, 3])
    assert torch.equal(model.eval()(tokens)[0], other.eval()(tokens)[0])


def test_options_that_a_namespace_lacks_are_fairseqs_defaults():
    args = model_args("resm_roberta_tiny")
    for option in fields(RunOptions):
        vars(args).pop(option.name, None)
    assert read_plan(args).run == RunOptions()
    for option in fields(RunOptions):
        setattr(args, option.name, None)
    assert read_plan(args).run == RunOptions()


def test_an_optimizer_is_known_by_its_name_and_those_of_its_groups():
    args = Namespace(**vars(model_args("resm_roberta_tiny")))
    args.optimizer = OmegaConf.create({"_name": "adam"})
    assert (read_plan(args).run.optimizer, read_plan(args).grouped_optimizers) == ("adam", ())
    groups = {"a": {"optimizer": {"_name": "adam"}}, "b": {"optimizer": {"_name": "pkm_adam"}}}
    args.optimizer = OmegaConf.create({"_name": "composite", "groups": groups})
    plan = read_plan(args)
    assert (plan.run.optimizer, plan.grouped_optimizers) == ("composite", ("adam", "pkm_adam"))


def test_a_bare_model_trained_with_shards_or_init_asks_for_neither_later(data: Path) -> None:
    """Built by the task as fairseq's trainer does, from the configuration that is saved."""
    overrides = ["model._name=pkm_roberta", "++model.encoder_layers=2", "++model.memory_layers=[1]"]
    overrides += ["model.memory_n_keys=8", "model.memory_knn=4", "++model.encoder_embed_dim=48"]
    overrides += ["++model.init_from=gone.pt", f"checkpoint.save_dir='{data}'"]
    cfg = composed(EXAMPLES / "pretraining/config/resm_tiny.yaml", data, *overrides)
    (data / "checkpoint_last.pt").write_bytes(b"")  # so that the run resumes
    assert cfg.model.init_from == "gone.pt"
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    assert type(model) is ARCH_MODEL_REGISTRY["pkm_roberta"]
    assert cfg.model.init_from is None


@pytest.mark.parametrize(
    ("said", "wrong"),
    [("1.7", "1.7"), ("[0,1.0]", "1.0"), ("'12'", "'1'"), ("True", "True"), ("['a']", "'a'")],
)
def test_a_memory_layer_that_is_no_whole_number_is_refused(capsys, said, wrong):
    with pytest.raises(SystemExit) as end:
        by_command_line(f"--memory-layers {said}")
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    message = f"names layer {wrong}, must be a whole number"
    assert last.endswith(f"error: argument --memory-layers: {message}")
    with pytest.raises(ValueError, match=f"^memory-layers {re.escape(message)}$"):
        given = ast.literal_eval(said)
        layers = list(given) if isinstance(given, (list, str)) else [given]
        read_plan(model_args("resm_roberta_tiny", memory_layers=layers))


@pytest.mark.parametrize(
    ("said", "layers"),
    [("0,2", (0, 2)), ("[0,2]", (0, 2)), ("2", (2,)), ("[]", ()), ("[-1]", (-1,))],
)
def test_memory_layers_are_read_in_all_their_forms(said, layers):
    assert planned(by_command_line(f"--memory-layers {said}").model).memory_layers == layers


def test_memory_layers_that_cannot_be_read_are_named(capsys):
    with pytest.raises(SystemExit):
        by_command_line("--memory-layers 1;2")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("--memory-layers: '1;2' is no list of layers, such as 3,7")

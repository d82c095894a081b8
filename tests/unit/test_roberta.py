"""The model pkm_roberta and its architectures, in one process."""

from argparse import Namespace

import pytest
import torch
from fairseq import options
from fairseq.dataclass.configs import EMAConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.ema.ema import EMA
from fairseq.tasks import FairseqTask
from omegaconf import OmegaConf
from torch import nn

from pkm_fairseq.memory import MemoryConfig, MemoryUsage
from pkm_fairseq.models import roberta
from pkm_fairseq.models.config import memory_config
from pkm_fairseq.models.plan import read_plan
from pkm_fairseq.tasks.common import MemoryTrainStep
from tests.helpers import LAYERS, WIDTH, batch, build, model_args, small_dictionary, small_task

DICTIONARY = small_dictionary()
TOKENS = batch(DICTIONARY, [7, 3, 5])
REAL = TOKENS.ne(DICTIONARY.pad())
SIZES = ("tiny", "base", "large")

SETTINGS = dict(
    n_keys=6,
    heads=3,
    knn=2,
    k_dim=8,
    v_dim=9,
    query_norm="layer",
    values_init="zero",
    value_dtype="bfloat16",
    input_dropout=0.1,
    query_dropout=0.2,
    read_dropout=0.3,
    key_dropout=0.4,
    share_values=True,
)


def outputs(model, tokens=TOKENS):
    return model(tokens)[0]


def assert_same_states(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


# --- equal to fairseq's roberta where it must be ----------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pre_ln", [False, True])
@pytest.mark.parametrize("arch", ["pkm_roberta_tiny", "resm_roberta_tiny"])
def test_without_memory_layers_it_is_fairseqs_roberta_bit_for_bit(arch, pre_ln, training):
    shared = dict(encoder_normalize_before=pre_ln, dropout=0.1, attention_dropout=0.1)
    ours = build(arch, memory_layers=[], **shared).train(training)
    theirs = build("roberta", **shared).train(training)
    assert_same_states(ours, theirs)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(7)  # dropout draws the same
        results.append(outputs(model))
        results[-1].square().mean().backward()
    assert torch.equal(*results)
    for (name, mine), yours in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, yours.grad), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("v_dim", [None, 7])
@pytest.mark.parametrize("pre_ln", [False, True])
def test_residual_memories_of_zero_values_compute_fairseqs_roberta_bit_for_bit(
    pre_ln, v_dim, training
):
    plain = build("roberta", encoder_normalize_before=pre_ln)
    resm = build(
        "resm_roberta_tiny",
        seed=5,
        encoder_normalize_before=pre_ln,
        memory_layers=[0, 2],
        memory_values_init="zero",
        memory_v_dim=v_dim,
    )
    assert not torch.equal(outputs(plain.eval()), outputs(resm.eval()))
    resm.load_state_dict(plain.state_dict())
    plain.train(training)
    resm.train(training)
    assert torch.equal(outputs(plain), outputs(resm))
    outputs(plain).square().mean().backward()
    outputs(resm).square().mean().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(resm.get_parameter(name).grad, parameter.grad), name
    with torch.no_grad():
        resm.memory_layers()[0].memory.values.weight.fill_(0.1)
    assert not torch.equal(outputs(plain), outputs(resm))


# --- what is built ----------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "mode"), [("pkm", "replace"), ("resm", "residual")])
def test_memories_stand_in_the_layers_that_were_named(prefix, mode):
    model = build(f"{prefix}_roberta_tiny", memory_layers=[0, 2])
    assert list(model.memory_layers()) == [0, 2]
    layers = model.encoder.sentence_encoder.layers
    assert [hasattr(layer, "memory") for layer in layers] == [True, False, True]
    for layer in model.memory_layers().values():
        assert layer.mode == mode
        assert layer.memory.config == MemoryConfig(n_keys=5, heads=2, knn=3, k_dim=4)
        assert layer.memory.input_dim == WIDTH


def test_layers_that_are_dropped_in_training_keep_their_place():
    model = build("pkm_roberta_tiny", encoder_layerdrop=0.9, memory_layers=[0, 2]).train()
    for _ in range(5):  # iterating over the layers drops some
        assert list(model.memory_layers()) == [0, 2]
        layers = model.memory_layers()
        with model.record_memory_usage() as usage:
            for i, layer in layers.items():
                assert layer.memory.observers == [layer.reads, usage[i]]
        assert all(layer.memory.observers == [layer.reads] for layer in layers.values())


@pytest.mark.parametrize("size", SIZES)
def test_residual_architecture_is_the_replacing_one_but_for_the_mode(size):
    pkm, resm = Namespace(), Namespace()
    ARCH_CONFIG_REGISTRY[f"pkm_roberta_{size}"](pkm)
    ARCH_CONFIG_REGISTRY[f"resm_roberta_{size}"](resm)
    assert (pkm.memory_mode, resm.memory_mode) == ("replace", "residual")
    assert {**vars(pkm), "memory_mode": None} == {**vars(resm), "memory_mode": None}


@pytest.mark.parametrize("size", ["base", "large"])
def test_sizes_are_those_of_fairseqs_roberta_and_memories_those_of_the_papers(size):
    ours, theirs = Namespace(), Namespace()
    ARCH_CONFIG_REGISTRY[f"pkm_roberta_{size}"](ours)
    ARCH_CONFIG_REGISTRY[f"roberta_{size}"](theirs)
    assert {name: getattr(ours, name) for name in vars(theirs)} == vars(theirs)
    assert memory_config(ours) == MemoryConfig()
    assert list(read_plan(_with_run(ours)).memory_layers) == ours.memory_layers


def test_the_bare_architecture_is_the_base_size_with_layers_3_and_7(monkeypatch):
    def capture(args, dictionary, plan):
        raise BuiltError(args, plan)

    # fairseq completes the options of a bare model name only when the model is built
    monkeypatch.setattr(roberta, "MemoryRobertaEncoder", capture)
    built = []
    for arch in ("pkm_roberta", "pkm_roberta_base"):
        args = _with_run(Namespace())
        ARCH_CONFIG_REGISTRY[arch](args)
        with pytest.raises(BuiltError) as stop:
            ARCH_MODEL_REGISTRY[arch].build_model(args, small_task())
        built.append(stop.value.args)
    (bare, plan), (base, base_plan) = built
    assert vars(bare) == vars(base)
    assert plan == base_plan
    assert (plan.memory_layers, plan.memory_mode, plan.n_shards) == ((3, 7), "replace", 1)
    assert plan.memory == MemoryConfig()
    assert (bare.encoder_layers, bare.encoder_embed_dim) == (12, 768)


class BuiltError(Exception):
    """Stops before a model of full size is built."""


@pytest.mark.parametrize("arch", [f"{p}_roberta_{s}" for p in ("pkm", "resm") for s in SIZES])
def test_an_option_wins_over_the_architecture(arch):
    chosen = dict(
        memory_layers=[0],
        memory_mode="residual" if arch.startswith("pkm") else "replace",
        memory_n_keys=6,
        memory_heads=3,
        memory_knn=2,
        memory_k_dim=8,
        memory_v_dim=9,
        memory_query_norm="layer",
        memory_values_init="zero",
        memory_value_dtype="bfloat16",
        memory_input_dropout=0.1,
        memory_query_dropout=0.2,
        memory_read_dropout=0.3,
        memory_key_dropout=0.4,
        memory_share_values=True,
    )
    model = build(arch, **chosen)
    (layer,) = model.memory_layers().values()
    assert layer.mode == chosen["memory_mode"]
    expected = MemoryConfig(**SETTINGS)
    assert layer.memory.config == expected


def _with_run(args):
    """Add what the model looks at of the rest of the run."""
    args.optimizer, args.init_from = "adam", None
    args.fp16 = args.bf16 = args.memory_efficient_fp16 = args.memory_efficient_bf16 = False
    return args


def test_flags_reach_the_model():
    flags = (
        "--memory-layers 0,2 --memory-mode residual --memory-n-keys 6 --memory-heads 3 "
        "--memory-knn 2 --memory-k-dim 8 --memory-v-dim 9 --memory-query-norm layer "
        "--memory-values-init zero --memory-value-dtype bfloat16 --memory-input-dropout 0.1 "
        "--memory-query-dropout 0.2 "
        "--memory-read-dropout 0.3 --memory-key-dropout 0.4 --memory-share-values "
        "--encoder-embed-dim 16 "
        "--encoder-normalize-before --optimizer pkm_adam --memory-value-lr 0.5"
    )
    parser = options.get_training_parser(default_task="pkm_masked_lm")
    command = ["no-data", "--task", "pkm_masked_lm", "--arch", "pkm_roberta_tiny", *flags.split()]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, command))
    assert cfg.optimizer.memory_value_lr == 0.5
    model = ARCH_MODEL_REGISTRY[cfg.model._name].build_model(cfg.model, small_task())
    assert list(model.memory_layers()) == [0, 2]
    layer = model.memory_layers()[0]
    assert layer.mode == "residual"
    assert layer.normalize_before
    expected = MemoryConfig(**SETTINGS)
    assert layer.memory.config == expected
    assert model.memory_layers()[2].memory.values is layer.memory.values


def test_init_of_fairseq_reaches_the_projections_and_leaves_keys_and_values():
    model = build(
        "pkm_roberta_tiny", memory_n_keys=40, memory_v_dim=50, memory_k_dim=32, encoder_embed_dim=64
    )
    memory = model.memory_layers()[1].memory
    for linear in (memory.query_proj, memory.output_proj):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not memory.query_proj.bias.any()
    keys, values = memory.keys.detach(), memory.values.weight.detach()
    assert float(keys.std()) == pytest.approx(16**-0.5 / 3**0.5, rel=0.1)
    assert float(values.std()) == pytest.approx(50**-0.5, rel=0.1)


@pytest.mark.parametrize("arch", ["pkm_roberta_tiny", "resm_roberta_tiny"])
@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("v_dim", [None, 7])
def test_every_parameter_gets_a_gradient(arch, query_norm, v_dim):
    tokens = batch(DICTIONARY, [11, 9, 10, 11])
    model = build(
        arch, memory_layers=[0, 2], memory_query_norm=query_norm, memory_v_dim=v_dim
    ).double()
    for layer in model.memory_layers().values():  # values that matter beside the rest
        with torch.no_grad():
            layer.memory.query_proj.weight.mul_(50)
    loss = nn.functional.cross_entropy(outputs(model, tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        largest = parameter.grad.abs().max()
        if name.endswith("k_proj.bias"):
            assert largest < 1e-15  # adds the same to every score of a softmax
        elif name.endswith("query_proj.bias") and query_norm == "batch":
            assert largest < 1e-15  # subtracted again by batch normalisation
        else:
            assert largest > 1e-9, name


# --- padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("arch", ["pkm_roberta_tiny", "resm_roberta_tiny"])
def test_more_padding_changes_nothing_for_tokens_statistics_and_usage(arch, query_norm, training):
    results = []
    for extra in (0, 4):
        model = build(arch, memory_layers=[0, 2], memory_query_norm=query_norm).double()
        model.train(training)
        tokens = batch(DICTIONARY, [7, 3, 5], extra)
        with model.record_memory_usage() as usage:
            out = outputs(model, tokens)[:, :7]
        results.append((out[REAL], dict(model.named_buffers()), usage))
    (ours, our_buffers, our_usage), (theirs, their_buffers, their_usage) = results
    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    for name, buffer in our_buffers.items():
        assert torch.allclose(buffer, their_buffers[name], rtol=1e-10, atol=1e-12), name
    for layer in (0, 2):
        assert our_usage[layer].tokens == their_usage[layer].tokens == int(REAL.sum())
        assert torch.equal(our_usage[layer].read_count, their_usage[layer].read_count)


# --- shared values ----------------------------------------------------------------------------


def shared_model(**options):
    return build("resm_roberta_tiny", memory_layers=[0, 2], memory_share_values=True, **options)


def test_shared_values_are_one_parameter():
    model = shared_model()
    tables = [layer.memory.values for layer in model.memory_layers().values()]
    assert tables[0] is tables[1]
    names = [name for name, _ in model.named_parameters() if "values" in name]
    assert len(names) == 1
    own = build("resm_roberta_tiny", memory_layers=[0, 2])
    assert len([name for name, _ in own.named_parameters() if "values" in name]) == 2


def test_shared_values_gather_the_gradients_of_all_layers():
    model = shared_model().double()
    table = model.memory_layers()[0].memory.values.weight
    outputs(model).square().mean().backward()
    # the same computation with two tables of equal content
    apart = build("resm_roberta_tiny", memory_layers=[0, 2]).double()
    apart.load_state_dict(model.state_dict())
    outputs(apart).square().mean().backward()
    parts = [layer.memory.values.weight.grad for layer in apart.memory_layers().values()]
    assert all(part.any() for part in parts)
    assert torch.allclose(table.grad, parts[0] + parts[1], rtol=1e-10, atol=1e-14)


def test_shared_values_survive_the_state_dict():
    model, other = shared_model(), shared_model(seed=9)
    state = model.state_dict()
    names = [name for name in state if name.endswith("values.weight")]
    assert len(names) == 2
    assert torch.equal(state[names[0]], state[names[1]])
    other.load_state_dict(state)
    tables = [layer.memory.values for layer in other.memory_layers().values()]
    assert tables[0] is tables[1]
    assert_same_states(model, other)
    assert torch.equal(outputs(model.eval()), outputs(other.eval()))


# --- usage ------------------------------------------------------------------------------------


def test_usage_is_counted_while_asked_for_and_only_then():
    model = build("pkm_roberta_tiny", memory_layers=[0, 2]).eval()
    outputs(model)
    with model.record_memory_usage() as usage:
        outputs(model)
        outputs(model)
    outputs(model)
    assert {layer: counted.tokens for layer, counted in usage.items()} == {
        0: 2 * int(REAL.sum()),
        2: 2 * int(REAL.sum()),
    }
    assert all(x.memory.observers == [x.reads] for x in model.memory_layers().values())


def test_usage_goes_on_from_given_counters():
    model = build("pkm_roberta_tiny").eval()
    with model.record_memory_usage() as usage:
        outputs(model)
    with model.record_memory_usage(usage) as again:
        outputs(model)
    assert again is usage
    assert usage[1].tokens == 2 * int(REAL.sum())
    assert isinstance(usage[1], MemoryUsage)


def test_an_error_while_counting_ends_the_counting():
    model = build("pkm_roberta_tiny")
    with pytest.raises(RuntimeError), model.record_memory_usage():
        raise RuntimeError
    assert all(x.memory.observers == [x.reads] for x in model.memory_layers().values())


def test_counters_have_the_size_of_their_memory():
    model = build("pkm_roberta_tiny", memory_layers=[0, 2])
    usage = model.new_memory_usage()
    assert {layer: (u.n_slots, u.heads, u.tokens) for layer, u in usage.items()} == {
        0: (25, 2, 0),
        2: (25, 2, 0),
    }


# --- impossible options -----------------------------------------------------------------------

IMPOSSIBLE = [
    ({"memory_layers": [LAYERS]}, ["memory-layers", f"layer {LAYERS}", f"0..{LAYERS - 1}"]),
    ({"memory_layers": [0, -1]}, ["memory-layers", "layer -1", f"0..{LAYERS - 1}"]),
    ({"memory_layers": [1, 0, 1]}, ["memory-layers", "layer 1", "twice"]),
    ({"memory_layers": [3], "encoder_layers_to_keep": "0,1,3"}, ["to-keep", "layer 3", "0..2"]),
    ({"encoder_layers_to_keep": "0,-1"}, ["encoder-layers-to-keep", "layer -1", "0..2"]),
    ({"encoder_layers_to_keep": "0,"}, ["encoder-layers-to-keep", "layer ''", "0..2"]),
    ({"encoder_layers_to_keep": "1,1"}, ["encoder-layers-to-keep", "layer 1", "twice", "1,1"]),
    ({"encoder_layerdrop": 1.0}, ["encoder-layerdrop", "1.0", "[0, 1)"]),
    ({"optimizer": "pkm_adam", "zero_sharding": "os"}, ["--zero-sharding os", "pkm_adam", "none"]),
    ({"optimizer": "pkm_adam", "ddp_backend": "slowmo"}, ["--ddp-backend slowmo", "legacy_ddp"]),
    (
        {"optimizer": "pkm_adam", "ddp_backend": "fully_sharded"},
        ["--ddp-backend fully_sharded", "pkm_adam", "legacy_ddp"],
    ),
    ({"memory_shards": 2, "optimizer": "pkm_adam"}, ["memory-shards is 2", "divisor", "is 1"]),
    ({"memory_shards": 0, "optimizer": "pkm_adam"}, ["memory-shards is 0", "divisor", "is 1"]),
    ({"memory_shards": 2, "optimizer": "adam"}, ["memory-shards is 2", "--optimizer pkm_adam"]),
    ({"memory_shards": 2, "memory_layers": []}, ["memory-shards is 2, must be 1"]),
    ({"optimizer": "pkm_adam", "tpu": True}, ["--tpu", "pkm_adam", "--optimizer adam"]),
    ({"memory_mode": "beside"}, ["memory-mode", "beside", "replace", "residual"]),
    ({"memory_knn": 6}, ["knn", "6", "5"]),
    ({"memory_knn": 1}, ["knn", "1", "at least 2"]),
    ({"memory_k_dim": 5}, ["k_dim", "5", "even"]),
    ({"memory_query_norm": "group"}, ["query_norm", "group", "batch, layer, none"]),
    ({"memory_values_init": "one"}, ["values_init", "one", "normal, zero"]),
    ({"memory_value_dtype": "float16"}, ["value_dtype", "float16", "float32, bfloat16"]),
    ({"memory_read_dropout": 1.0}, ["read_dropout", "1.0", "[0, 1)"]),
    (
        {
            "optimizer": OmegaConf.create(
                {"_name": "composite", "groups": {"a": {"optimizer": {"_name": "pkm_adam"}}}}
            )
        },
        ["composite", "pkm_adam alone"],
    ),
    ({"bf16": True, "tpu": True}, ["--bf16", "torch_xla", "common.bf16=true"]),
    ({"memory_efficient_fp16": True}, ["common.memory_efficient_fp16 alone", "common.fp16=true"]),
    ({"memory_efficient_bf16": True}, ["common.memory_efficient_bf16 alone", "common.bf16=true"]),
    ({"ffn_reg_scale_factor": 0.1}, ["--ffn-reg-scale-factor", "replace"]),
    ({"ffn_blocks_to_remove": 2}, ["--ffn-blocks-to-remove", "replace"]),
]
NOT_WITH_SHARDS = [
    ("no_save_optimizer_state", True),
    ("store_ema", True),
    ("use_bmuf", True),
    ("encoder_layerdrop", 0.5),
    ("memory_freeze", "values"),
    ("memory_freeze", "all"),
]
IMPOSSIBLE += [
    (
        {"memory_shards": 2, "optimizer": "pkm_adam", option: value},
        ["--" + option.replace("_", "-"), "does not work with --memory-shards 2"],
    )
    for option, value in NOT_WITH_SHARDS
]


@pytest.mark.parametrize(("options", "named"), IMPOSSIBLE)
def test_impossible_options_stop_with_one_line_that_names_them(options, named):
    with pytest.raises(ValueError) as stop:
        build("pkm_roberta_tiny", **options)
    message = str(stop.value)
    assert "\n" not in message
    assert stop.value.__cause__ is None
    assert stop.value.__suppress_context__  # no traceback of what was behind it
    for words in named:
        assert words in message


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "fp16": True, "memory_efficient_fp16": True},
        {"optimizer": "adam", "bf16": True, "memory_efficient_bf16": True},
        {"optimizer": "adam", "fp16": True},
        {"optimizer": "adam", "bf16": True},
        {"optimizer": "adam", "ddp_backend": "slowmo", "zero_sharding": "os"},
        {"optimizer": "pkm_adam", "ddp_backend": "legacy_ddp", "zero_sharding": "none"},
        {"optimizer": "pkm_adam", "fp16": True},
        {"optimizer": "pkm_adam", "bf16": True, "memory_efficient_bf16": True},
        {"optimizer": "pkm_adam", "bf16": True, "tpu": True, "memory_layers": []},
        {"ffn_reg_scale_factor": 0.1, "memory_mode": "residual"},
        {"ffn_reg_scale_factor": 0.1, "memory_layers": []},
    ],
)
def test_options_that_do_go_together_are_not_refused(options):
    build("pkm_roberta_tiny", **options)


def test_max_positions_comes_from_the_task_if_not_given():
    model = build("pkm_roberta_tiny", max_positions=None)
    assert model.max_positions() == small_task().max_positions()


def test_model_is_saved_and_loaded_with_its_memory(tmp_path):
    model, other = build("resm_roberta_tiny"), build("resm_roberta_tiny", seed=9)
    model(TOKENS)  # running statistics move
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert_same_states(model, other)
    assert torch.equal(outputs(model.eval()), outputs(other.eval()))


def test_args_helper_completes_options_as_the_architecture_does():
    args = model_args("resm_roberta_tiny")
    assert args.memory_mode == "residual"
    assert args.memory_query_norm == "batch"


@pytest.mark.parametrize("share", [True, False])
def test_torchs_ddp_is_told_to_leave_factored_gradients_and_times_of_reads_alone(share):
    """It asks for every name of a parameter, shared or not."""
    options = {"memory_layers": [0, 2], "memory_share_values": share}
    model = build("resm_roberta_tiny", optimizer="pkm_adam", **options)
    layers = [f"encoder.sentence_encoder.layers.{i}.memory.values.weight" for i in (0, 2)]
    times = [
        f"encoder.sentence_encoder.layers.{i}.reads.{name}"
        for i in (0, 2)
        for name in ("last_read", "last_top1")
    ]
    assert model._ddp_params_and_buffers_to_ignore == times + layers
    dense = build("resm_roberta_tiny", optimizer="adam", **options)
    assert dense._ddp_params_and_buffers_to_ignore == times


# --- several workers; what they train is in tests/integration/test_workers.py ----------------


def test_layers_dropped_by_each_worker_do_not_go_with_joint_statistics(monkeypatch):
    options = dict(encoder_layerdrop=0.2, memory_query_norm="batch")
    build("resm_roberta_tiny", **options)
    monkeypatch.setattr(distributed_utils, "get_data_parallel_world_size", lambda: 2)
    with pytest.raises(
        ValueError, match=r"--encoder-layerdrop 0.2 .* use --memory-query-norm layer"
    ):
        build("resm_roberta_tiny", **options)
    for harmless in (
        {"memory_query_norm": "layer"},
        {"memory_freeze": "all"},
        {"encoder_layerdrop": 0.0},
        {"memory_layers": []},
    ):
        build("resm_roberta_tiny", **{**options, **harmless})


def test_norms_ask_fairseq_for_the_workers(monkeypatch):
    norm = build("resm_roberta_tiny").memory_layers()[1].memory.query_norm
    assert norm.run.group() is None
    monkeypatch.setattr(distributed_utils, "get_data_parallel_world_size", lambda: 2)
    monkeypatch.setattr(distributed_utils, "get_data_parallel_group", lambda: "the group")
    assert norm.run.group() == "the group"


def test_trainings_that_know_nothing_of_each_other_are_refused(monkeypatch):
    model = build("resm_roberta_tiny")
    monkeypatch.setenv("WORLD_SIZE", "2")
    model.set_num_updates(0)  # not torchrun's
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match=r"2 workers, but .* --distributed-world-size 2"):
        model.set_num_updates(0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model.set_num_updates(3)
    assert model.run.updates == 3


@pytest.mark.parametrize("ignore_grad", [False, True])
@pytest.mark.parametrize("query_norm", ["batch", "layer"])
def test_a_dummy_batch_of_an_idle_worker_is_no_data(ignore_grad, query_norm):
    model, asked = build("resm_roberta_tiny", memory_query_norm=query_norm), []
    model.set_num_updates(0)
    (layer,) = model.memory_layers().values()

    class Step(FairseqTask):
        def train_step(self, *args, **kwargs):
            asked.append((args, kwargs))
            with model.train().record_memory_usage() as usage:
                outputs(model)
            return usage[1].tokens, model.run.is_dummy

    class Task(MemoryTrainStep, Step):
        pass

    args = ("sample", model, "criterion", "optimizer", 7)
    tokens, is_dummy = Task(None).train_step(*args, ignore_grad=ignore_grad, more=1)
    assert asked == [((*args, ignore_grad), {"more": 1})]
    assert tokens == (0 if ignore_grad else int(REAL.sum()))
    assert bool(layer.reads.last_read.any()) != ignore_grad
    assert is_dummy == ignore_grad and not model.run.is_dummy
    with model.record_memory_usage() as usage:
        outputs(model)
    assert usage[1].tokens == int(REAL.sum())
    plain = build("roberta")
    Task(None).train_step("sample", plain, "criterion", "optimizer", 7, ignore_grad)


def test_a_moving_average_keeps_the_last_layer_norm():
    """fairseq's EMA loads states without a version, which fairseq takes for very old ones."""
    model = build("resm_roberta_tiny", encoder_normalize_before=True)
    average = EMA(model, EMAConfig(store_ema=True, ema_decay=0.5))
    model(TOKENS)
    average.step(model)
    assert set(average.get_model().state_dict()) == set(model.state_dict())
    copy = average.get_model().encoder.sentence_encoder
    assert copy.layer_norm is not None and copy.version.tolist() == [3]

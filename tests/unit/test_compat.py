"""The cures for fairseq."""

import argparse
import contextlib
import inspect
import math
import os
import resource
import threading
import time
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary, MonolingualDataset, TokenBlockDataset
from fairseq.data.encoders.utils import get_whole_word_mask
from fairseq.data.iterators import BackgroundConsumer, BufferedIterator
from fairseq.dataclass.configs import EMAConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.models import distributed_fairseq_model
from fairseq.models.ema.ema import EMA
from fairseq.modules import LearnedPositionalEmbedding
from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules import IntEmbedding, IntLinear
from fairseq.modules.quantization.scalar.utils import quantize_model_
from fairseq.nan_detector import NanDetector
from fairseq.optim.adam import FairseqAdam
from fairseq.options import get_training_parser, parse_args_and_arch
from fairseq.tasks import LegacyFairseqTask, setup_task
from fairseq_cli.train import should_stop_early
from omegaconf import OmegaConf

import pkm_fairseq
from pkm_fairseq import compat
from pkm_fairseq.compat.checkpoints import (
    copy_whole_files,
    remove_leftovers_first,
    save_whole_files,
)
from pkm_fairseq.compat.processes import end_prefetching, forget_previous_training
from pkm_fairseq.experiments.data.prepare import load_sentencepiece, train_sentencepiece
from tests.helpers import batch, build, small_dictionary, write_split

pkm_fairseq.register()
ROOT = Path(__file__).resolve().parents[2]


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cure", compat.CURES, ids=[cure.test for cure in compat.CURES])
def test_a_cure_has_a_target_and_a_test_and_is_applied(cure):
    assert cure.reason and cure.needed_on
    file, test = cure.test.split("::")
    assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8")
    owner, name = compat.find(cure.target)
    is_stock = inspect.getattr_static(owner, name) is compat.STOCK[cure]
    assert (cure.replace is None, cure.prepare is None) == (is_stock, not is_stock)


def test_the_cures_are_applied_once():
    before = [inspect.getattr_static(*compat.find(cure.target)) for cure in compat.CURES]
    compat.apply()
    assert [inspect.getattr_static(*compat.find(cure.target)) for cure in compat.CURES] == before
    assert len(set(compat.CURES)) == len(compat.CURES) == len(compat.STOCK)


# --- current torch and numpy ----------------------------------------------------------------------


def test_checkpoints_of_fairseq_load_safely(tmp_path):
    saved = {"args": argparse.Namespace(arch="roberta"), "cfg": OmegaConf.create({"a": [1, "b"]})}
    torch.save(saved, tmp_path / "c.pt")
    assert torch.load(tmp_path / "c.pt", weights_only=True) == saved
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(UnpicklingError, match="Unsupported global"):
            torch.load(tmp_path / "c.pt", weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)


LITERALS = [
    *("0.9, 0.98", "(0.9, 0.999)", " 0.0005", "[1e-4]", "-1", "1e-30, 1e-3", "'a'", "True", "None"),
    "{'name': 'linformer', 'dropout': 0.1}",
    "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
]


@pytest.mark.parametrize("text", LITERALS)
def test_options_are_read_as_literals_and_not_run(text):
    assert utils.eval_str_dict(text) == eval(text)
    assert utils.eval_bool(text) == bool(eval(text))
    if isinstance(eval(text), (tuple, float)):
        assert utils.eval_str_list(text) == list(np.atleast_1d(eval(text)))
    for code in (f"print({text})", f"[x for x in ({text},)]", f"({text}).__class__", "x", "9**9"):
        for evaluate in (utils.eval_str_dict, utils.eval_str_list, utils.eval_bool):
            with pytest.raises(ValueError, match="must be a Python literal") as caught:
                evaluate(code)
            assert "\n" not in str(caught.value)


def test_what_is_no_text_and_no_python_is_as_before():
    assert utils.eval_bool(True) is False  # so fairseq has it
    assert utils.eval_bool(None, default=True) is True
    assert utils.eval_str_list([1, 2]) == [1.0, 2.0]
    for text in ("", "1 +", "a\n" * 100, "[" * 10_000, "[1] + 1", "\0"):
        with pytest.raises(ValueError, match="must be a Python literal") as caught:
            utils.eval_str_dict(text)
        assert len(str(caught.value)) < 200


def test_betas_of_adam_are_read_as_literals():
    parameter = torch.nn.Parameter(torch.ones(1))
    options = {"lr": [1e-3], "adam_eps": 1e-8, "weight_decay": 0.0, "use_old_adam": True}
    options |= {"fp16_adam_stats": False, "tpu": False, "adam_betas": "(0.9, 0.98)"}
    for betas in ("(0.9, 0.98)", "0.9, 0.98"):
        adam = FairseqAdam(argparse.Namespace(**{**options, "adam_betas": betas}), [parameter])
        assert adam.optimizer_config["betas"] == (0.9, 0.98)
    with pytest.raises(ValueError, match=r"an option is 'print\(1\)', must be a Python literal"):
        FairseqAdam(argparse.Namespace(**{**options, "adam_betas": "print(1)"}), [parameter])


@pytest.mark.parametrize("part", ["arch", "task", "criterion"])
def test_a_training_starts_from_a_checkpoint_of_unknown_names(tmp_path, part):
    options = dict(arch="roberta", task="masked_lm", criterion="masked_lm", max_positions=12)
    args = argparse.Namespace(**{**options, part: "registered_nowhere"}, data="nowhere")
    state = {
        "args": args,
        "model": {"a": torch.ones(2)},
        "optimizer_history": [{"lr_scheduler_state": {}, "num_updates": 7}],
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    torch.save(state, tmp_path / "c.pt")
    loaded = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "c.pt"))
    assert torch.equal(loaded["model"]["a"], torch.ones(2))
    assert loaded["args"] == args
    assert loaded.get("cfg") is None


def test_sentences_are_cut_at_their_ends():
    sentences = [torch.tensor([4, 5, 2]), torch.tensor([6, 2])]
    blocks = TokenBlockDataset(sentences, [3, 2], 4, pad=1, eos=2, break_mode="eos")
    assert [block.tolist() for block in blocks] == [[4, 5, 2], [6, 2]]


# --- threads --------------------------------------------------------------------------------------


class Endless:
    """Batches without end; says how many were asked for."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return 1_000_000

    def __iter__(self):
        while True:
            self.asked += 1
            yield torch.zeros(3)


def prefetching():
    return [t for t in threading.enumerate() if isinstance(t, BackgroundConsumer)]


@pytest.mark.parametrize("size", [1, 50_000])
def test_threads_that_prepare_batches_end(size):
    source = Endless()
    batches = BufferedIterator(size, source)
    next(batches)
    (thread,) = prefetching()
    if size == 1:
        while source.asked < 3:  # it waits for room with a batch in its hands
            time.sleep(0.001)
    end_prefetching()
    assert not thread.is_alive()
    assert not prefetching()
    asked = source.asked
    time.sleep(0.01)
    assert source.asked == asked


def test_without_such_threads_nothing_happens():
    threads = threading.enumerate()
    end_prefetching()
    assert threading.enumerate() == threads


def test_pytorch_ddp_wraps_a_model_on_the_cpu(tmp_path):
    """Two workers are in tests/integration/test_workers.py."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        model, places = torch.nn.Linear(2, 2), {"device_ids": [0], "output_device": 0}
        with pytest.raises(ValueError, match="device_ids"):
            torch.nn.parallel.DistributedDataParallel(model, **places)
        wrapped = distributed_fairseq_model.DistributedDataParallel(
            model, **places, broadcast_buffers=False
        )
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
        assert wrapped.broadcast_buffers is False
        assert wrapped(torch.ones(1, 2)).shape == (1, 2)
    finally:
        dist.destroy_process_group()


def workers_config(**settings):
    training = dict(distributed_world_size=2, distributed_no_spawn=False, tpu=False)
    training.update(
        pipeline_model_parallel=False,
        distributed_backend="nccl",
        distributed_init_method="tcp://localhost:1",
    )
    training = SimpleNamespace(**{**training, **settings})
    common = SimpleNamespace(cpu=True, tpu=False)
    return SimpleNamespace(distributed_training=training, common=common)


def test_workers_on_the_cpu_need_gloo():
    with pytest.raises(ValueError, match=r"--distributed-backend is nccl.* it must be gloo"):
        distributed_utils.call_main(workers_config(), main=None)


def test_a_single_worker_starts_as_ever():
    asked = []
    config = workers_config(distributed_world_size=1, distributed_init_method=None)
    distributed_utils.call_main(config, lambda cfg, x: asked.append((cfg, x)), x=3)
    assert asked == [(config, 3)]


def test_the_best_score_of_another_training_is_forgotten():
    save_checkpoint = checkpoint_utils.save_checkpoint
    kept = [(save_checkpoint, "best"), (should_stop_early, "best"), (should_stop_early, "num_runs")]
    for function, name in kept:
        setattr(function, name, 1.0)
    for _ in range(2):  # the second time there is nothing
        forget_previous_training()
        assert not [name for function, name in kept if hasattr(function, name)]


# --- whole words ----------------------------------------------------------------------------------


def masked_lm_of_words(folder, *options):
    """A task of stock fairseq over text that sentencepiece has cut into pieces."""
    text = ["the mouse sleeps", "houses and horses are sleeping", "mice and sheep sleep"]
    (folder / "spm.model").write_bytes(train_sentencepiece(text * 20, 40))
    pieces, dictionary = load_sentencepiece(folder / "spm.model"), Dictionary()
    sentences = [
        dictionary.encode_line(" ".join(pieces.encode(line, out_type=str))).tolist()
        for line in text
    ]
    write_split(folder, "train", dictionary, sentences)
    command = [str(folder), "--task", "masked_lm", "--arch", "roberta", "--batch-size", "1"]
    command += ["--sample-break-mode", "eos", "--mask-prob", "0.4", "--mask-whole-words"]
    args = parse_args_and_arch(get_training_parser(), [*command, *options])
    return setup_task(convert_namespace_to_omegaconf(args).task)


def test_whole_words_are_masked(tmp_path):
    sentencepiece = ["--bpe", "sentencepiece", "--sentencepiece-model", str(tmp_path / "spm.model")]
    task = masked_lm_of_words(tmp_path, *sentencepiece)
    task.load_dataset("train")
    begins = get_whole_word_mask(task.args, task.source_dictionary)
    data, split, whole = task.datasets["train"], 0, 0
    for epoch in range(20):
        data.set_epoch(epoch)
        for index in range(len(data)):
            target, source = data[index]["target"], data[index]["net_input.src_tokens"]
            chosen = target.ne(task.source_dictionary.pad())
            starts = begins[torch.where(chosen, target, source)].nonzero().flatten().tolist()
            ends = [*starts[1:], len(source)]
            words = [chosen[start:end] for start, end in zip(starts, ends, strict=True)]
            split += sum(bool(word.any()) and not bool(word.all()) for word in words)
            whole += sum(len(word) > 1 and bool(word.all()) for word in words)
    assert split == 0 and whole > 20


@pytest.mark.parametrize("options", [[], ["--bpe", "characters"]])
def test_whole_words_need_to_know_where_words_begin(tmp_path, options):
    task = masked_lm_of_words(tmp_path, *options)
    with pytest.raises(ValueError, match=r"needs a --bpe that marks where words begin.* it is"):
        task.load_dataset("train")


# --- noise of quantization ------------------------------------------------------------------------


def test_scalar_noise_leaves_positions_alone():
    model = build("resm_roberta_tiny").train()
    quantize_model_(model, p=0.5)
    encoder = model.encoder.sentence_encoder
    assert type(encoder.embed_positions) is LearnedPositionalEmbedding
    assert isinstance(encoder.embed_tokens, IntEmbedding)
    assert isinstance(encoder.layers[0].fc1, IntLinear)
    tokens = batch(small_dictionary(), [5, 7])
    one, other = (model(tokens, features_only=True)[0] for _ in range(2))
    assert not torch.equal(one, other)  # the only noise there is


def test_scalar_noise_is_drawn_on_the_cpu():
    weight = torch.randn(50, 20)
    quantized, scale, zero_point = ops.emulate_int(weight, 8, "histogram")
    levels = quantized / scale + zero_point
    assert torch.allclose(levels, levels.round(), atol=1e-3) and len(levels.unique()) <= 256
    inside = (weight > quantized.min()) & (weight < quantized.max())
    assert inside.float().mean() > 0.9
    assert ((quantized - weight).abs()[inside] <= 0.51 * scale).all()
    assert ops.emulate_int(weight, 8, "histogram", scale, zero_point)[1] is scale


# --- gradients that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_search_for_the_first_nan_finds_it(caplog, where):
    model = build("roberta")
    with NanDetector(model):
        if where == "forward":
            model.encoder.lm_head.bias.data.fill_(math.inf)
        output = model(batch(small_dictionary(), [5, 7]))[0]
        (output.sum() * (math.inf if where == "backward" else 1.0)).backward()
    found = [r.getMessage() for r in caplog.records if "Inf detected" in r.getMessage()]
    name = "encoder.lm_head" if where == "forward" else ""  # of the gradient: the whole model
    assert any(f"in output of {name}, shape" in m and f", {where}" in m for m in found), found


def test_an_error_of_the_search_does_not_hide_the_first_one(caplog):
    model = torch.nn.Linear(1, 1)

    def search(error):
        try:
            raise FloatingPointError("gradients are Nan/Inf")
        except FloatingPointError:
            with NanDetector(model):
                raise error from None
            raise

    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        search(StopIteration("nothing"))
    assert "ended with StopIteration: nothing" in caplog.records[-1].getMessage()
    with pytest.raises(KeyboardInterrupt):
        search(KeyboardInterrupt())


# --- moving averages ------------------------------------------------------------------------------


def shared_tables():
    options = {"memory_layers": [0, 1, 2], "memory_share_values": True}
    return build("resm_roberta_tiny", **options)


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [lambda: build("roberta"), shared_tables])
def test_the_average_of_tied_parameters_is_that_of_any_other(model, dtype, fp32):
    """Against a naive average by parameter: three layers, two names of the embedding."""
    model = model().to(dtype)
    config = EMAConfig(store_ema=True, ema_decay=0.9, ema_fp32=fp32)
    average = EMA(model, config)
    is_float32 = fp32 or dtype == torch.float32
    expected = {name: value.clone().float() for name, value in model.state_dict().items()}
    for update in range(1, 4):
        with torch.no_grad():
            for value in [*model.parameters(), *model.buffers()]:
                value.add_(torch.randn_like(value))
        average.step(model, update)
        for name, value in model.state_dict().items():
            if not name.endswith("version"):
                expected[name].mul_(0.9).add_(value.float(), alpha=0.1)
    found = average.fp32_params if fp32 else average.get_model().state_dict()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if is_float32 else {"rtol": 0.05, "atol": 0.05}
    for name, value in expected.items():
        if not name.endswith("version"):
            assert torch.allclose(found[name].float(), value, **tolerance), name
    assert found.keys() == expected.keys()
    assert_same_average(average)


def assert_same_average(average):
    """What a checkpoint holds is what the model of the average has."""
    state = average.get_model().state_dict()
    for name, value in average.fp32_params.items():
        if name.endswith("version"):
            continue  # fairseq keeps it as it was, and loads the model's own
        assert torch.equal(state[name], value.to(state[name].dtype)), name


def test_a_moving_average_that_goes_on_from_a_checkpoint_moves_once():
    model = shared_tables()
    config = EMAConfig(store_ema=True, ema_decay=0.9, ema_fp32=True)
    average = EMA(model, config)
    average.restore(deepcopy(model.state_dict()), build_fp32_params=False)
    average.build_fp32_params(deepcopy(average.fp32_params))
    name = "encoder.sentence_encoder.layers.0.memory.values.weight"
    before = average.fp32_params[name].clone()
    with torch.no_grad():
        model.state_dict()[name].add_(1.0)
    average.step(model, 1)
    assert torch.allclose(average.fp32_params[name] - before, torch.tensor(0.1), atol=1e-6)


# --- checkpoints that are whole or absent ---------------------------------------------------------


def checkpoint(updates):
    return {"updates": updates, "model": [torch.zeros(20_000), torch.zeros(100_000)]}


def updates_in(file):
    return torch.load(file, weights_only=True)["updates"]


def save(folder):
    """As fairseq's trainer saves under the first name of a checkpoint."""
    checkpoint_utils.torch_persistent_save(checkpoint(2), str(folder / "checkpoint_last.pt"))


def copy(folder):
    """As fairseq saves under all other names."""
    names = (str(folder / "checkpoint_1_2.pt"), str(folder / "checkpoint_last.pt"))
    assert PathManager.copy(*names, overwrite=True)


@pytest.fixture
def folder(tmp_path):
    torch.save(checkpoint(2), tmp_path / "checkpoint_1_2.pt")
    torch.save(checkpoint(1), tmp_path / "checkpoint_last.pt")
    return tmp_path


@contextlib.contextmanager
def full_disk():
    """No file can have more than 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [save, copy])
def test_a_checkpoint_gets_its_name_when_it_is_whole_and_on_the_disk(folder, monkeypatch, write):
    last, part = folder / "checkpoint_last.pt", folder / "saving0.part"
    on_disk, seen = os.fsync, []

    def fsync(descriptor):
        seen.append((updates_in(last), updates_in(part)))
        on_disk(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(folder)
    assert seen == [(1, 2)]
    assert updates_in(last) == 2
    assert not part.exists()


@pytest.mark.parametrize("write", [save, copy])
def test_on_a_full_disk_the_checkpoint_before_stays(folder, write):
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with full_disk(), pytest.raises(ValueError) as stopped:
        write(folder)
    last = folder / "checkpoint_last.pt"
    assert str(stopped.value).startswith(f"{last} was not saved: File too large;")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_what_a_kill_leaves_is_no_checkpoint_and_taken_up_by_the_next_save(folder):
    (folder / "saving0.part").write_bytes(b"half")
    found = checkpoint_utils.checkpoint_paths(str(folder), r".*\.pt")
    assert str(folder / "saving0.part") not in found
    save(folder)
    names = ["checkpoint_1_2.pt", "checkpoint_last.pt"]
    assert sorted(file.name for file in folder.iterdir()) == names


def test_what_a_killed_save_left_is_removed_before_the_next(tmp_path):
    left = tmp_path / "saving0.part"

    def has_room(cfg, trainer):
        assert trainer == "trainer"
        return not left.exists()

    save_checkpoint = remove_leftovers_first(has_room)
    for no_save, room in ((True, False), (False, True), (False, True)):
        left.write_bytes(b"half")
        cfg = argparse.Namespace(no_save=no_save, save_dir=str(tmp_path))
        assert save_checkpoint(cfg, "trainer") == room
    file = tmp_path / "file"
    file.touch()
    for save_dir in (tmp_path / "gone", file):
        cfg = argparse.Namespace(no_save=False, save_dir=str(save_dir))
        assert save_checkpoint(cfg, "trainer")


def test_elsewhere_than_on_the_local_disk_fairseq_does_it_itself(folder, monkeypatch):
    calls = []
    save = save_whole_files(lambda *a: calls.append(("save", *a)))
    copy = copy_whole_files(staticmethod(lambda *a: calls.append(("copy", *a)) or True)).__func__
    save(1, "a.pt", async_write=True)
    monkeypatch.setattr(PathManager, "supports_rename", lambda path: not path.startswith("s3:"))
    save(1, "s3://a.pt")
    assert copy("a.pt", "s3://b.pt", overwrite=True)
    saved = [("save", 1, "a.pt", True), ("save", 1, "s3://a.pt", False)]
    assert calls == [*saved, ("copy", "a.pt", "s3://b.pt", True)]


# --- validation -----------------------------------------------------------------------------------


class TaskOfLines(LegacyFairseqTask):
    """As much of a stock task as makes batches."""

    def __init__(self, sizes):
        super().__init__(argparse.Namespace())
        for split in ("train", "valid"):
            lines = [torch.full((size,), 5) for size in sizes]
            self.datasets[split] = MonolingualDataset(lines, np.array(sizes), small_dictionary())


def batches_of(sizes, split="valid", **options):
    """How many examples the batches of a split have."""
    task = TaskOfLines(sizes)
    given = {"max_sentences": 8, "required_batch_size_multiple": 8, **options}
    iterator = task.get_batch_iterator(task.dataset(split), **given)
    return [len(batch) for batch in iterator.frozen_batches]


@pytest.mark.parametrize(
    ("n_examples", "options", "kept", "left_out"),
    [
        (53, {}, 48, "5 of 53 examples (15 of 159 tokens)"),
        (53, {"max_sentences": 6}, 48, "5 of 53 examples (15 of 159 tokens)"),
        (48, {"max_sentences": 6}, 42, "6 of 48 examples (18 of 144 tokens)"),  # a whole batch
        (53, {"max_sentences": None, "max_tokens": 30}, 48, "5 of 53 examples"),
        (1_003, {"max_sentences": 500}, 1_000, "3 of 1,003 examples"),
        (53, {"required_batch_size_multiple": 1}, 53, None),
        (48, {}, 48, None),
        (53, {"split": "train"}, 48, None),
    ],
)
def test_what_is_left_out_of_a_validation_is_told(caplog, n_examples, options, kept, left_out):
    """fairseq's own rule is not changed: the last batch goes if its own length is no multiple."""
    assert sum(batches_of([3] * n_examples, **options)) == kept
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    if left_out is None:
        assert not told
        return
    (line,) = told
    assert line.startswith(f"split valid: {left_out}")
    assert line.endswith("not a multiple of 8: --required-batch-size-multiple 1 keeps all")


def test_a_validation_of_which_nothing_is_left_is_an_error():
    with pytest.raises(ValueError, match=r"split valid: 3 of 3 examples \(12 of 12 tokens\) are"):
        batches_of([4] * 3)


def test_only_the_first_worker_tells_what_is_left_out(caplog, monkeypatch):
    monkeypatch.setattr(distributed_utils, "get_global_rank", lambda: 1)
    assert sum(batches_of([3] * 53)) == 48
    assert not [record for record in caplog.records if record.levelname == "WARNING"]

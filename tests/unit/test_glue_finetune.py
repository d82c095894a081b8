"""Finetuning: settings, what it starts from, and how many updates there will be."""

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary

from pkm_fairseq.experiments.glue import finetune as finetune_module
from pkm_fairseq.experiments.glue.data import (
    PreparedTask,
    load_dictionary,
    majority_baseline,
    prepared_tasks,
)
from pkm_fairseq.experiments.glue.finetune import Choices, parse_flags, plan
from pkm_fairseq.experiments.glue.presets import (
    PRESETS,
    check_further,
    flags_of,
    load_preset,
    parse_overrides,
    settings_of,
)
from pkm_fairseq.experiments.glue.start import read_arms
from pkm_fairseq.experiments.glue.tasks import TASKS
from pkm_fairseq.models.checkpoints import dictionary_sha256, options_of
from tests.helpers import build, model_args, small_dictionary, write_split

N_TRAIN = 23
SCORED = {"STS-B"}


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["roberta", "small"])
def test_presets_know_the_nine_tasks_and_only_them(name):
    preset = load_preset(name)
    assert set(preset["tasks"]) <= set(TASKS)
    for task in TASKS:
        settings = settings_of(preset, task, False, {})
        assert {"lr", "batch_size", "max_epoch", "warmup_ratio"} <= set(settings)


def test_later_settings_win():
    preset = {
        "all": {"lr": 1, "batch_size": 2, "dropout": 3},
        "memory": {"lr": 4, "memory_value_lr": 5},
        "tasks": {"CoLA": {"batch_size": 6}},
    }
    overrides = {"dropout": "7", "memory_freeze": "keys"}
    plain = settings_of(preset, "CoLA", False, overrides)
    assert plain == {"lr": 1, "batch_size": 6, "dropout": "7"}
    memory = settings_of(preset, "CoLA", True, overrides)
    assert memory["lr"] == 4
    assert memory["memory_freeze"] == "keys"
    assert settings_of(preset, "mine", False, {})["batch_size"] == 2


def test_settings_as_flags():
    settings = {"lr": "1e-5", "no_shuffle": True, "fp16": "false", "adam_betas": "(0.9,0.98)"}
    assert flags_of(settings) == [
        *("--lr", "1e-5", "--no-shuffle", "--adam-betas", "(0.9,0.98)"),
    ]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["lr"], "--set lr: must be KEY=VALUE"),
        (["=1"], "must be KEY=VALUE"),
        (["lr="], "--set lr=: must be KEY=VALUE"),
        (["seed=1"], "--set: this script sets seed itself"),
        (["save-dir=x"], "this script sets save_dir itself"),
        (["max_valid_steps=1"], "this script sets max_valid_steps itself"),
        (["train_subset=valid"], "this script sets train_subset itself"),
        (["disable-validation=true"], "this script sets disable_validation itself"),
    ],
)
def test_impossible_overrides_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(pairs)


def test_further_flags_may_not_say_what_the_script_decides():
    check_further(["--fp16", "--update-freq", "2"])
    with pytest.raises(ValueError, match="this script sets restore_file"):
        check_further(["--restore-file=x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all: [", "is not yaml"),
        ("- 1", "only the parts all, memory, tasks"),
        ("alle: {}", "only the parts"),
        ("all: 3", "must be keys and values"),
        ("tasks: {CoLA: 1e-5}", "must be keys and values"),
        ("tasks: [a]", "must be keys and values"),
        ("tasks: {CoLA: {arch: roberta}}", "this script sets arch itself"),
        ("all: {valid-subset: train}", "this script sets valid_subset itself"),
        ("memory: {1: 2}", "key 1 must be text, as in lr: 1e-5"),
        ("all: {lr: }", "lr is empty, must have a value, as in lr: 1e-5"),
    ],
)
def test_impossible_presets_are_refused(tmp_path, text, message):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_preset(str(file))


def test_keys_of_a_preset_may_have_dashes(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("all: {warmup-ratio: 0.1}\ntasks: {CoLA: {batch-size: 4}}")
    preset = load_preset(str(file))
    assert settings_of(preset, "CoLA", False, {}) == {"warmup_ratio": 0.1, "batch_size": 4}


def test_a_missing_preset_is_refused():
    with pytest.raises(ValueError, match="preset large: no such file"):
        load_preset("large")


# --- data -------------------------------------------------------------------------------------


def write_task(folder, name, dictionary, n_train=N_TRAIN):
    """A prepared task with two labels, or with scores."""
    here = folder / name
    torch.manual_seed(3)
    for split, n_rows in (("train", n_train), ("valid", 9)):
        lengths = torch.randint(2, 8, (n_rows,)).tolist()
        sentences = [
            [*torch.randint(4, len(dictionary) - 1, (length,)).tolist(), dictionary.eos()]
            for length in lengths
        ]
        write_split(here / "input0", split, dictionary, sentences)
        classes = [i % 3 == 0 for i in range(n_rows)]
        if name in SCORED:
            (here / "label").mkdir(exist_ok=True)
            (here / "label" / f"{split}.label").write_text("0.5\n" * n_rows)
        else:
            words = Dictionary()
            for label in TASKS[name].labels:
                words.add_symbol(label)
            ids = [[words.index(TASKS[name].labels[i])] for i in classes]
            write_split(here / "label", split, words, ids)
    spec = TASKS[name]
    about = {"name": name, "labels": spec.labels, "metrics": spec.metrics, "key": "k"}
    about["splits"] = {"train": n_train, "valid": 9}
    (here / "task.json").write_text(json.dumps(about))
    return here


def without_mask():
    """What prepare_glue.py writes as dict.txt: the mask is added by the task."""
    dictionary = small_dictionary()
    dictionary.symbols.pop()
    dictionary.count.pop()
    dictionary.indices.pop("<mask>")
    return dictionary


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for name in ("RTE", "CoLA", "STS-B"):
        write_task(folder, name, without_mask())
    return folder


def test_prepared_tasks_come_in_glues_order(data):
    tasks = prepared_tasks(data)
    assert [task.name for task in tasks] == ["CoLA", "STS-B", "RTE"]
    assert [task.name for task in prepared_tasks(data, ["RTE", "CoLA"])] == ["RTE", "CoLA"]
    assert tasks[0].n_train == N_TRAIN
    assert tasks[1].is_regression
    assert not tasks[0].is_regression
    dictionary = load_dictionary(tasks)
    assert dictionary_sha256(dictionary) == dictionary_sha256(small_dictionary())


def test_tasks_that_are_not_there_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"WNLI is not prepared; --data .* holds CoLA, STS-B, RTE"):
        prepared_tasks(data, ["CoLA", "WNLI"])
    with pytest.raises(ValueError, match="Cola is no task"):
        prepared_tasks(data, ["Cola"])
    with pytest.raises(ValueError, match="holds no prepared task"):
        prepared_tasks(tmp_path / "nothing")
    (data / "RTE" / "task.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a file of prepare_glue.py"):
        prepared_tasks(data, ["RTE"])
    (data / "CoLA" / "input0" / "dict.txt").write_text("x 1\n")
    with pytest.raises(ValueError, match="one dictionary"):
        load_dictionary(prepared_tasks(data, ["STS-B", "CoLA"]))


def test_the_baseline_always_answers_the_most_frequent_training_label(data):
    cola, sts, rte = prepared_tasks(data)
    assert majority_baseline(cola) == {"mcc": 0.0}
    assert majority_baseline(rte) == {"accuracy": pytest.approx(100 * 6 / 9)}
    assert majority_baseline(sts) == {"pearson": 0.0, "spearman": 0.0}


def test_the_baseline_can_be_a_longer_label_than_all_of_dev(tmp_path):
    words = Dictionary()
    ids = {label: [words.add_symbol(label)] for label in ("no", "no_way")}
    write_split(tmp_path / "label", "train", words, [ids["no"], ids["no_way"], ids["no_way"]])
    write_split(tmp_path / "label", "valid", words, [ids["no"], ids["no"]])
    metrics = ("accuracy", "f1")
    task = PreparedTask("own", tmp_path, ("no_way", "no"), metrics, ("valid",), 3, "k")
    assert majority_baseline(task) == {"accuracy": 0.0, "f1": 0.0}


# --- what it starts from ----------------------------------------------------------------------


def save(file, arch="resm_roberta_tiny", dictionary=None, options=None, **model_options):
    """A checkpoint as fairseq writes one, as far as it is read."""
    dictionary = dictionary or small_dictionary()
    model = build(arch, dictionary, **model_options)
    args = vars(model_args(arch, **model_options))
    stored = {**args, "_name": arch, **(options or {})}
    checkpoint = {
        "cfg": {"model": Namespace(**stored) if arch == "roberta" else stored},
        "model": model.state_dict(),
        "task_state": {"dictionary_sha256": dictionary_sha256(dictionary)},
    }
    file.parent.mkdir(exist_ok=True)
    torch.save(checkpoint, file)
    return file


@pytest.mark.parametrize("arch", ["roberta", "pkm_roberta_tiny", "resm_roberta_tiny"])
def test_the_architecture_is_taken_from_the_checkpoint(tmp_path, data, arch):
    options = {} if arch == "roberta" else {"memory_layers": [0, 2], "memory_share_values": True}
    file = save(tmp_path / "arm" / "a.pt", arch, **options)
    (arm,) = read_arms([str(file)], small_dictionary())
    assert (arm.name, arm.has_memory, arm.max_positions) == ("arm", arch != "roberta", 12)
    tasks = prepared_tasks(data, ["CoLA"])
    choices = Choices(tmp_path / "out", (1,), load_preset("small"), {})
    (run,) = plan([arm], tasks, choices)
    args = parse_flags(run.flags)
    assert args.arch == arch
    stored = options_of(torch.load(file, weights_only=True), "model")
    names = ["encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "max_positions"]
    names += [name for name in stored if name.startswith("memory_") and "efficient" not in name]
    for name in names:
        assert getattr(args, name) == stored[name], name
    assert args.dropout == 0.1  # of the preset, not of the checkpoint
    assert args.optimizer == ("adam" if arch == "roberta" else "pkm_adam")


@pytest.mark.parametrize("arch", ["roberta", "resm_roberta_tiny"])
def test_a_roberta_of_an_unknown_name_is_taken_by_what_it_holds(tmp_path, arch):
    known = save(tmp_path / "known" / "a.pt", arch)
    unknown = save(tmp_path / "unknown" / "a.pt", arch, options={"_name": "own", "arch": "own"})
    arms = read_arms([str(known), str(unknown)], small_dictionary())
    assert [arm.has_memory for arm in arms] == 2 * [arch != "roberta"]
    base = "roberta" if arch == "roberta" else "pkm_roberta"
    assert [arm.flags[:2] for arm in arms] == [("--arch", arch), ("--arch", base)]
    assert len(arms[0].flags) > 8  # all that makes it this model
    assert arms[0].flags[2:] == arms[1].flags[2:]


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    dictionary = small_dictionary()
    file = save(tmp_path / "a" / "x.pt")
    with pytest.raises(ValueError, match=r"another dictionary \(20 symbols, this one has 9"):
        read_arms([str(file)], small_dictionary(4))
    other = small_dictionary()
    other.symbols[5] = "other"
    with pytest.raises(
        ValueError, match=r"--checkpoint .*x.pt was trained with another dictionary"
    ):
        read_arms([str(file)], other)
    with pytest.raises(ValueError, match="no such file"):
        read_arms([str(tmp_path / "missing.pt")], dictionary)
    foreign = save(tmp_path / "a" / "y.pt", options={"_name": "transformer", "arch": "transformer"})
    with pytest.raises(ValueError, match="is a model 'transformer', must be a RoBERTa"):
        read_arms([str(foreign)], dictionary)
    unknown = torch.load(file, weights_only=True)
    unknown["cfg"]["model"] = {"_name": "somebodys_own", "max_positions": 12}
    unknown["model"] = {"encoder.layers.0.fc1.weight": torch.ones(2)}
    torch.save(unknown, tmp_path / "a" / "z.pt")
    with pytest.raises(ValueError, match="is a model 'somebodys_own', must be a RoBERTa"):
        read_arms([str(tmp_path / "a" / "z.pt")], dictionary)
    with pytest.raises(ValueError, match="names arm a twice"):
        read_arms([str(file), str(file)], dictionary)
    with pytest.raises(ValueError, match=r"'../a' cannot be the name of an arm"):
        read_arms([f"../a={file}"], dictionary)


# --- the plan ---------------------------------------------------------------------------------


@pytest.fixture
def arms(tmp_path):
    files = [save(tmp_path / "plain" / "x.pt", "roberta"), save(tmp_path / "resm" / "x.pt")]
    return read_arms(list(map(str, files)), small_dictionary())


def chosen(tmp_path, seeds=(1,), further=(), **overrides):
    texts = {key: str(value) for key, value in overrides.items()}
    return Choices(tmp_path / "out", seeds, load_preset("roberta"), texts, tuple(further))


def test_warm_up_is_six_per_cent_of_the_updates_there_will_be(tmp_path, data, arms):
    tasks = prepared_tasks(data, ["CoLA"])
    (run,) = plan(arms[:1], tasks, chosen(tmp_path, batch_size=4, max_epoch=50))
    assert run.updates == 50 * math.ceil(N_TRAIN / 4)
    assert run.warmup == round(0.06 * run.updates) == 18
    args = parse_flags(run.flags)
    assert (args.warmup_updates, int(args.total_num_update)) == (18, run.updates)
    (run,) = plan(arms[:1], tasks, chosen(tmp_path, batch_size=4, update_freq=4, max_epoch=50))
    assert run.updates == 50 * math.ceil(6 / 4)
    (run,) = plan(arms[:1], tasks, chosen(tmp_path, batch_size=4, max_update=100))
    assert run.updates == 10 * 6
    (run,) = plan(arms[:1], tasks, chosen(tmp_path, batch_size=4, max_update=30))
    assert run.updates == 30
    (run,) = plan(arms[:1], tasks, chosen(tmp_path, max_tokens=12, max_epoch=1))
    assert run.updates > math.ceil(N_TRAIN / 16)  # the longest sentences fill a batch alone


def test_each_epoch_has_its_own_update_freq(tmp_path, data, arms):
    tasks = prepared_tasks(data, ["CoLA"])
    batches = {"batch_size": 4, "update_freq": "1,4", "max_epoch": 5}
    (run,) = plan(arms[:1], tasks, chosen(tmp_path, **batches))
    assert run.updates == 6 + 4 * 2
    assert int(parse_flags(run.flags).total_num_update) == run.updates
    (run,) = plan(arms[:1], tasks, chosen(tmp_path, **{**batches, "max_epoch": 1}))
    assert run.updates == 6


def test_the_warm_up_is_the_users_if_it_is_given(tmp_path, data, arms):
    tasks = prepared_tasks(data, ["CoLA"])
    for choices in (
        chosen(tmp_path, warmup_updates=3),
        chosen(tmp_path, further=("--warmup-updates", "3")),
    ):
        (run,) = plan(arms[:1], tasks, choices)
        assert parse_flags(run.flags).warmup_updates == run.warmup == 3


def test_no_dev_example_is_left_out_with_a_preset_of_ones_own(tmp_path, data, arms):
    tasks, file = prepared_tasks(data, ["CoLA"]), tmp_path / "own.yaml"
    text = "all: {batch_size: 4, max_epoch: 1, lr_scheduler: polynomial_decay}\n"
    multiple = "required_batch_size_multiple"
    for own in (text, text.replace("{", f"{{{multiple}: 1, ")):
        file.write_text(own)
        choices = Choices(tmp_path / "out", (1,), load_preset(str(file)), {})
        (run,) = plan(arms[:1], tasks, choices)
        assert parse_flags(run.flags).required_batch_size_multiple == 1
    for choices in (
        chosen(tmp_path, required_batch_size_multiple=8),
        chosen(tmp_path, further=("--required-batch-size-multiple=8",)),
    ):
        with pytest.raises(ValueError, match=f"{multiple} is 8, must be 1"):
            plan(arms[:1], tasks, choices)


@pytest.mark.parametrize(
    ("flags", "option"),
    [(("--nval", "1"), "max_valid_steps"), (("--nval=1",), "max_valid_steps"),
     (("-a", "roberta_large"), "arch")],
)  # fmt: skip
def test_other_names_of_what_the_script_decides_are_refused(tmp_path, data, arms, flags, option):
    message = f"a setting changes {option}: this script sets {option} itself"
    with pytest.raises(ValueError, match=message):
        plan(arms[:1], prepared_tasks(data, ["CoLA"]), chosen(tmp_path, further=flags))


def test_every_seed_has_its_own_number_of_updates(tmp_path, data, arms):
    """How many batches of at most 24 tokens there are depends on the order of the examples."""
    tasks, seeds = prepared_tasks(data, ["CoLA"]), (2, 3, 4, 5, 6)
    runs = plan(arms[:1], tasks, chosen(tmp_path, seeds, max_tokens=24, max_epoch=10))
    for run in runs:
        args = parse_flags([*run.flags, "--seed", str(run.seed)])
        updates = finetune_module.count_updates(args)
        assert run.updates == int(args.total_num_update) == updates
        assert run.warmup == args.warmup_updates == round(0.06 * updates)
    assert len({run.updates for run in runs}) > 1
    assert len({run.settings for run in runs}) == 1
    (again,) = plan(arms[:1], tasks, chosen(tmp_path, (6,), max_tokens=24, max_epoch=10))
    assert again.key == runs[-1].key  # whatever the other seeds are


def test_the_number_of_updates_is_the_last_one_in_the_log(tmp_path):
    """An interrupted run had done two updates more than its checkpoint when it was stopped."""
    logged = [("train_inner", "", 8), ("valid", "valid_", 8), ("train_inner", "", 10)]
    logged += [("train_inner", "", 9), ("valid", "valid_", 9), ("train", "train_", 9)]
    lines = [
        f'now | INFO | {tag} | {{"epoch": 1, "{prefix}num_updates": "{updates}"}}'
        for tag, prefix, updates in logged
    ]
    lines.append('now | INFO | train | {"epoch": 2, "train_num_updates": null}')
    (tmp_path / "train.log").write_text("\n".join([*lines, "now | INFO | done training"]))
    assert finetune_module.updates_logged(tmp_path / "train.log") == 9


def test_every_arm_on_every_task_with_every_seed(tmp_path, data, arms):
    runs = plan(arms, prepared_tasks(data), chosen(tmp_path, seeds=(2, 5)))
    assert len({run.folder for run in runs}) == len({run.key for run in runs}) == 2 * 3 * 2
    assert runs[0].folder == tmp_path / "out" / "plain" / "CoLA" / "seed2"
    sts = next(run for run in runs if run.task.name == "STS-B")
    args = parse_flags(sts.flags)
    assert args.regression_target
    assert (args.num_classes, args.glue_metrics) == (1, "pearson,spearman")
    assert args.best_checkpoint_metric == "pearson"
    assert args.lr == [2e-5]


def test_the_key_knows_what_decides_a_result(tmp_path, data, arms):
    tasks = prepared_tasks(data, ["CoLA"])
    keys = {
        plan(arms[1:], tasks, choices)[0].key
        for choices in (
            chosen(tmp_path),
            chosen(tmp_path, seeds=(2,)),
            chosen(tmp_path, lr=1e-4),
            chosen(tmp_path, further=("--clip-norm", "3")),
        )
    }
    assert len(keys) == 4
    same = plan(arms[1:], tasks, chosen(tmp_path / "elsewhere"))[0].key
    assert same in keys  # the folder does not decide it


def test_the_key_knows_what_files_hold(tmp_path, data, arms):
    tasks, file = prepared_tasks(data, ["CoLA"]), tmp_path / "background.pt"
    settings = {"memory_finetune": "slots", "memory_background": file}
    with pytest.raises(ValueError, match=r"--memory-background .*background.pt: no such file"):
        plan(arms[1:], tasks, chosen(tmp_path, **settings))
    keys = []
    for content in (b"a", b"b", b"a"):
        file.write_bytes(content)
        keys.append(plan(arms[1:], tasks, chosen(tmp_path, **settings))[0].key)
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("option", ["memory-background", "memory-finetune-counts"])
def test_the_key_knows_files_named_in_one_word(tmp_path, data, arms, option):
    tasks, file = prepared_tasks(data, ["CoLA"]), tmp_path / "counts.pt"
    further = ("--memory-finetune", "slots", f"--{option}={file}")
    with pytest.raises(ValueError, match=rf"--{option} .*counts.pt: no such file"):
        plan(arms[1:], tasks, chosen(tmp_path, further=further))
    keys = set()
    for content in (b"a", b"b"):
        file.write_bytes(content)
        keys.add(plan(arms[1:], tasks, chosen(tmp_path, further=further))[0].key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lrr": 1}, "fairseq-train refuses a setting: unrecognized arguments: --lrr 1"),
        ({"batch_size": "many"}, "--max-sentences: invalid int value"),
        ({"max_epoch": 0}, "max_epoch is 0, must be at least 1"),
        ({"update_freq": 0}, r"update_freq is \[0\], must be at least 1"),
        ({"update_freq": ""}, r"update_freq is \[\], must be at least 1"),
        ({"warmup_ratio": 2}, "warmup_ratio is 2, must be from 0 to below 1"),
        ({"warmup_ratio": "x"}, "warmup_ratio is x"),
    ],
)
def test_settings_that_fairseq_refuses(tmp_path, data, arms, overrides, message):
    with pytest.raises(ValueError, match=message):
        plan(arms, prepared_tasks(data, ["CoLA"]), chosen(tmp_path, **overrides))
    assert not (tmp_path / "out").exists()


def test_memory_settings_need_a_memory(tmp_path, data, arms):
    tasks = prepared_tasks(data, ["CoLA"])
    runs = plan(arms, tasks, chosen(tmp_path, memory_value_lr=0.5))
    assert "--memory-value-lr" not in runs[0].flags
    assert parse_flags(runs[1].flags).memory_value_lr == 0.5
    with pytest.raises(ValueError, match="--set memory_value_lr: no checkpoint has a memory"):
        plan(arms[:1], tasks, chosen(tmp_path, memory_value_lr=0.5))


def test_a_kill_before_a_run_is_marked_leaves_what_it_needs_to_resume(
    tmp_path, data, arms, monkeypatch
):
    choices = chosen(tmp_path)
    (run,) = plan(arms[:1], prepared_tasks(data, ["CoLA"]), choices)
    run.folder.mkdir(parents=True)
    best = {"model": {}, "optimizer_history": [{"num_updates": 2}]}
    torch.save(best, run.folder / "checkpoint_best.pt")
    (run.folder / "checkpoint_last.pt").touch()
    logged = '{"valid_mcc": "5.0", "valid_num_updates": "2"}'
    (run.folder / "train.log").write_text(f"now | INFO | valid | {logged}\n")

    def killed(folder, key):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_module, "finish", killed)
        finetune_module._finish(run, 0, choices)
    assert (run.folder / "checkpoint_last.pt").exists()
    assert finetune_module._finish(run, 0, choices)["dev"] == {"mcc": 5.0}
    assert run.is_finished
    assert not (run.folder / "checkpoint_last.pt").exists()


def test_runs_share_the_processors_and_the_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(finetune_module.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    environments = [finetune_module._environment(slot, 3) for slot in range(3)]
    assert [e["OMP_NUM_THREADS"] for e in environments] == ["2", "2", "2"]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["4", "6", "4"]


def test_presets_are_where_the_readme_says():
    assert Path(PRESETS, "roberta.yaml").is_file()
    assert PreparedTask.__dataclass_params__.frozen

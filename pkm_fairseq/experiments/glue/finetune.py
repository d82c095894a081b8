"""Finetune pretrained checkpoints on prepared tasks with fairseq-train, over several seeds."""

import io
import json
import math
import os
import re
from argparse import Namespace
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import torch
from fairseq import options, utils
from fairseq import tasks as fairseq_tasks
from fairseq.tasks.sentence_prediction import SentencePredictionTask

from ...memory.files import write_file
from ...memory.observe.log import INITIAL_VALUES
from ..runs.folders import PACKAGE, begin, finish, is_finished, key_of
from ..runs.logs import last_line, logged_by_update, read_log
from ..runs.processes import Child, Children
from ..runs.progress import RunsProgress
from ..runs.trainings import LAST, LOG, run_all, start_training, updates_of
from .data import PreparedTask, dev_name, majority_baseline
from .memory import measure_memory
from .presets import (
    WARMUP_RATIO,
    Settings,
    check_further,
    check_parsed,
    flags_of,
    settings_of,
)
from .results import RESULT, SETTINGS
from .start import Arm, sha256_of

SECONDS_BETWEEN_LINES = 300.0  # about a run, without a terminal
BEST = "checkpoint_best.pt"
MULTIPLE = "required_batch_size_multiple"
UPDATES = re.compile(r'"(?:\w+_)?num_updates": "(\d+)"')  # in a line of the log
FILES = ("memory_background", "memory_finetune_counts")  # options that name one


@dataclass(frozen=True)
class Choices:
    """The user's choices.

    Attributes:
        out: folder for ``<arm>/<task>/seed<k>/``.
        seeds: one run per seed.
        preset: from ``presets.load_preset``.
        overrides: settings that override the preset.
        further: flags for fairseq-train, unchanged.
        workers: number of parallel runs.
        keep_last: whether finished runs keep their last checkpoint, to train further.
        memory_tokens: dev tokens on which to compare memories; 0 for none.
    """

    out: Path
    seeds: Tuple[int, ...]
    preset: Dict[str, Settings]
    overrides: Settings
    further: Tuple[str, ...] = ()
    workers: int = 1
    keep_last: bool = False
    memory_tokens: int = 20_000


@dataclass(frozen=True)
class Finetuning:
    """One finetuning: an arm on a task with a seed.

    Attributes:
        arm: the checkpoint to start from.
        task: the data.
        seed: seed of the new head, dropout, and the order of the examples.
        folder: folder for checkpoints, log and result.
        flags: flags of fairseq-train, except the seed and the folder.
        updates: planned number of updates; a run may end earlier, for example by ``patience``.
        warmup: number of updates in which the learning rate rises.
        settings: hash of all inputs of the result, except the seed.
        key: hash of all inputs of the result.
    """

    arm: Arm
    task: PreparedTask
    seed: int
    folder: Path
    flags: Tuple[str, ...]
    updates: int
    warmup: int
    settings: str
    key: str

    @property
    def name(self) -> str:
        """The run's name, for the user."""
        return f"{self.arm.name} {self.task.name} seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether its result exists and was made with the same settings."""
        return is_finished(self.folder, self.key) and (self.folder / RESULT).is_file()


# --- planning: check all runs before starting any -----------------------------------------------


def plan(arms: Sequence[Arm], tasks: Sequence[PreparedTask], choices: Choices) -> List[Finetuning]:
    """All runs: every task, with every seed, of every arm.

    Raises:
        ValueError: fairseq-train would refuse a setting.
    """
    check_further(choices.further)
    if not any(arm.has_memory for arm in arms):
        for key in choices.overrides:
            if key.startswith("memory_"):
                raise ValueError(f"--set {key}: no checkpoint has a memory")
    runs = []
    for task in tasks:
        of_arms = [_plan(arm, task, choices) for arm in arms]
        runs += [run for of_seed in zip(*of_arms, strict=True) for run in of_seed]
    return runs


def _plan(arm: Arm, task: PreparedTask, choices: Choices) -> List[Finetuning]:
    """The runs of an arm on a task, one per seed."""
    settings = settings_of(choices.preset, task.name, arm.has_memory, choices.overrides)
    ratio = _ratio(settings.pop(WARMUP_RATIO, 0.0))
    fixed, chosen = _fixed_flags(arm, task), [*flags_of(settings), *choices.further]
    args = parse_flags([*fixed, *chosen])
    check_parsed(args, parse_flags(fixed))
    _check(args)
    hashes = _hashes_of_files(args)

    def counted(seed: int) -> "tuple[Tuple[str, ...], int, int]":
        """Flags, number of updates, and number of warm-up updates."""
        updates = count_updates(Namespace(**{**vars(args), "seed": seed}))
        schedule = ["--warmup-updates", str(round(ratio * updates))]
        if args.lr_scheduler == "polynomial_decay":
            schedule += ["--total-num-update", str(updates)]
        # not every schedule has a warm-up; the user may have set its length
        warmup = parse_flags([*fixed, *schedule, *chosen]).warmup_updates
        interval = ["--log-interval", str(max(1, updates // 50))]
        return (*fixed, *schedule, *interval, *chosen), updates, warmup

    planned = {seed: counted(seed) for seed in {args.seed, *choices.seeds}}
    # the same for all seeds, so with the numbers of updates of fairseq's default seed
    key = key_of(planned[args.seed][0], arm.sha256, task.key, choices.memory_tokens, *hashes)
    folder = choices.out.resolve() / arm.name / task.name
    return [
        Finetuning(arm, task, seed, folder / f"seed{seed}", *planned[seed], key, key_of(key, seed))
        for seed in choices.seeds
    ]


def _check(args: Any) -> None:
    """Refuse settings and data before hours of training.

    Raises:
        ValueError: a number is impossible, or the data do not fit together.
    """
    multiple = getattr(args, MULTIPLE)
    if multiple != 1:
        raise ValueError(f"{MULTIPLE} is {multiple}, must be 1, to keep all dev examples")
    if args.max_epoch is None or args.max_epoch < 1:
        raise ValueError(f"max_epoch is {args.max_epoch}, must be at least 1")
    if min(args.update_freq, default=0) < 1:
        raise ValueError(f"update_freq is {args.update_freq}, must be at least 1")
    task = fairseq_tasks.setup_task(args)
    for split in (*args.valid_subset.split(","), "train"):
        task.check(split)


def _hashes_of_files(args: Any) -> List[str]:
    """Hashes of the files that options name.

    Raises:
        ValueError: there is no such file.
    """
    named = {name: getattr(args, name, None) for name in FILES}
    files = {name: Path(file) for name, file in named.items() if file}
    for name, file in files.items():
        if not file.is_file():
            raise ValueError(f"--{name.replace('_', '-')} {file}: no such file")
    return [sha256_of(file) for file in files.values()]


def _ratio(value: Any) -> float:
    try:
        ratio = float(value)
    except (TypeError, ValueError):
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise ValueError(f"warmup_ratio is {value}, must be from 0 to below 1")
    return ratio


def _fixed_flags(arm: Arm, task: PreparedTask) -> List[str]:
    """The flags that checkpoint, task and machine determine."""
    values = {
        "user-dir": PACKAGE,
        "task": "pkm_sentence_prediction",
        "criterion": "pkm_sentence_prediction",
        "glue-metrics": ",".join(task.metrics),
        **_positive_label(task),
        "num-classes": 1 if task.is_regression else len(task.labels),
        "init-token": 0,  # <s> a </s></s> b </s>, as RoBERTa
        "separator-token": 2,
        "shorten-method": "truncate",
        "max-positions": arm.max_positions,
        "valid-subset": ",".join(task.dev_splits),
        "best-checkpoint-metric": task.metrics[0],
        "optimizer": "pkm_adam" if arm.has_memory else "adam",
        "finetune-from-model": arm.file,  # on a fresh run only
        "required-batch-size-multiple": 1,  # else fairseq leaves out the last dev examples
        "distributed-world-size": 1,
        "log-format": "json",
    }
    flags = [str(task.folder)]
    flags += [part for name, value in values.items() for part in (f"--{name}", str(value))]
    flags += ["--maximize-best-checkpoint-metric", "--no-epoch-checkpoints", *arm.flags]
    flags += ["--regression-target"] if task.is_regression else []
    return flags if torch.cuda.is_available() else [*flags, "--cpu", "--num-workers", "0"]


def _positive_label(task: PreparedTask) -> Dict[str, str]:
    """The positive label of F1, if it differs from the option's default."""
    is_asked = "f1" in task.metrics and task.positive != "1"
    return {"glue-positive-label": task.positive} if is_asked else {}


def parse_flags(flags: Sequence[str]) -> Any:
    """Parse flags as fairseq-train would.

    Raises:
        ValueError: fairseq-train would refuse them.
    """
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            return options.parse_args_and_arch(options.get_training_parser(), list(flags))
    except SystemExit:
        said = (stderr.getvalue().strip().splitlines() or ["it prints a help text"])[-1]
        raise ValueError(f"fairseq-train refuses a setting: {said.split('error: ')[-1]}") from None


def count_updates(args: Any) -> int:
    """The number of updates of fairseq-train, from the batches that it will make.

    With ``--max-tokens`` the number of batches depends on the order of the examples, so on the
    seed.
    """
    task = fairseq_tasks.setup_task(args)
    batches = task.get_batch_iterator(
        # fairseq's own way, since ours would check each label again for each seed
        SentencePredictionTask.load_dataset(task, "train"),
        max_tokens=args.max_tokens,
        max_sentences=args.batch_size,
        max_positions=utils.resolve_max_positions(task.max_positions(), args.max_tokens),
        ignore_invalid_inputs=True,
        required_batch_size_multiple=args.required_batch_size_multiple,
        seed=args.seed,
    )
    # update_freq has one entry per epoch; its last one also counts for all later epochs
    first, later = args.update_freq[: args.max_epoch], args.max_epoch - len(args.update_freq)
    updates = sum(math.ceil(len(batches) / freq) for freq in first)
    updates += max(0, later) * math.ceil(len(batches) / args.update_freq[-1])
    return min(updates, args.max_update or updates)


# --- running ----------------------------------------------------------------------------------


def finetune(runs: Sequence[Finetuning], choices: Choices, after_each: Any = lambda: None) -> None:
    """Do the unfinished runs; an interrupted run continues from its last checkpoint.

    Args:
        runs: from ``plan``.
        choices: the user's choices.
        after_each: called when a run is finished.

    Raises:
        ValueError: a run failed; the others were stopped.
    """
    waiting = [run for run in runs if not run.is_finished]
    _write_settings(runs)

    def start(children: Children, run: Finetuning, worker: int) -> Child:
        begin(run.folder, run.key)
        flags = [*run.flags, "--seed", str(run.seed)]
        return start_training(children, run.folder, flags, _environment(worker, choices.workers))

    def finish_one(run: Finetuning, status: int) -> None:
        result = _finish(run, status, choices)
        after_each()
        progress.end(run.name, _told(result["dev"]))

    with RunsProgress(len(runs), len(runs) - len(waiting), SECONDS_BETWEEN_LINES) as progress:
        run_all(waiting, choices.workers, start, lambda run: _show(run, progress), finish_one)


def _write_settings(runs: Sequence[Finetuning]) -> None:
    """Write what ``results.read_results`` needs to know of an arm and a task."""
    baselines = {task: majority_baseline(task) for task in {run.task for run in runs}}
    for run in runs:
        arm, task = run.arm, run.task
        of_arm = {"name": arm.name, "checkpoint": str(arm.file), "sha256": arm.sha256}
        of_task = {"name": task.name, "key": task.key, "n_train": task.n_train}
        of_task["baseline"] = baselines[task]
        about = {"key": run.settings, "arm": of_arm, "task": of_task}
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        write_file(run.folder.parent / SETTINGS, json.dumps(about))


def _environment(worker: int, workers: int) -> Dict[str, str]:
    """Environment of one of several parallel runs: its threads and its GPU."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    n_gpus = torch.cuda.device_count()
    if n_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[worker % n_gpus]
    return environment


def _show(run: Finetuning, progress: RunsProgress) -> None:
    trained = read_log(run.folder / LOG, "train_inner")
    updates = int(trained[-1]["num_updates"]) if trained else 0
    metric = run.task.metrics[0]
    found = [dev[metric] for dev in read_log(run.folder / LOG, "valid")]
    state = f"best {metric} {max(found):.1f}" if found else "no dev score yet"
    progress.show(run.name, updates, run.updates, state)


def _finish(run: Finetuning, status: int, choices: Choices) -> Dict[str, Any]:
    """Check the output of a process, and write the result."""
    best, log = run.folder / BEST, run.folder / LOG
    if status or not best.is_file():
        raise ValueError(f"{run.name} failed with status {status}, see {log}: {last_line(log)}")
    at = updates_of(best)
    logs = {split: logged_by_update(log, split) for split in run.task.dev_splits}
    dev = {
        dev_name(metric, split): logs[split][at][metric]
        for split in run.task.dev_splits
        for metric in run.task.metrics
    }
    memory = None
    if run.arm.has_memory and choices.memory_tokens:
        task = fairseq_tasks.setup_task(parse_flags(run.flags))
        memory = measure_memory(run.arm.file, best, task, choices.memory_tokens)
    result = {
        **{"arm": run.arm.name, "task": run.task.name, "seed": run.seed, "dev": dev},
        **{"best_update": at, "updates": updates_logged(log), "warmup_updates": run.warmup},
        **{"settings": run.settings, "memory": memory},
    }
    write_file(run.folder / RESULT, json.dumps(result, indent=2))
    finish(run.folder, run.key)
    if not choices.keep_last:
        for name in (LAST, INITIAL_VALUES):  # large, and only needed to resume
            (run.folder / name).unlink(missing_ok=True)
    return result


def updates_logged(log: Path) -> int:
    """The last number of updates in a log of fairseq-train."""
    return int(UPDATES.findall(log.read_text(encoding="utf-8", errors="replace"))[-1])


def _told(dev: Dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in dev.items())

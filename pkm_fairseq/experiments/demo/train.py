"""Train the arms with fairseq-train, two processes at a time, one thread each."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import List, Tuple

from ...memory.files import whole_file
from ..data.prepare import SPLITS
from ..runs.folders import PACKAGE, begin, finish, key_of, key_of_code, key_of_files
from ..runs.logs import last_line, read_log
from ..runs.processes import Child, Children
from ..runs.progress import RunsProgress
from ..runs.trainings import LAST, LOG, run_all, start_training, updates_of
from .presets import ARMS, Preset, arm_flags

WORKERS = 2
HALF = "checkpoint_half.pt"
INIT_FLAGS = ("--reset-optimizer", "--reset-lr-scheduler", "--reset-meters")


@dataclass(frozen=True)
class ArmTraining:
    """One process of fairseq-train: an arm, and the update where it stops."""

    arm: str
    updates: int
    needs_half: bool  # waits for plain's checkpoint after N updates


def train_arms(preset: Preset, data: Path, folder: Path) -> None:
    """Train the unfinished arms; an interrupted arm continues from its last checkpoint.

    Args:
        preset: the settings.
        data: a folder with ``bin``, made by fairseq-preprocess.
        folder: gets one folder for each arm.

    Raises:
        ValueError: a training failed; the others were stopped.
    """
    data, folder = data.resolve() / "bin", folder.resolve()
    for name in ("dict.txt", *(f"{split}.{ext}" for split in SPLITS for ext in ("bin", "idx"))):
        if not (data / name).is_file():  # before any folder is touched
            raise ValueError(f"{data / name}: no such file; prepare the corpus first")
    inputs = sorted(file for file in data.glob("*") if file.suffix in (".bin", ".idx", ".txt"))
    code = key_of_code("memory", "models", "tasks", "criterions", "optim", "compat")
    flags = {arm: arm_flags(arm, preset) for arm in ARMS}
    key = key_of(key_of_files(*inputs), code, flags, preset.half)
    unfinished = [arm for arm in ARMS if begin(folder / arm, key)]
    n = preset.half
    runs = [ArmTraining("plain", n, False), ArmTraining("pkm", 2 * n, False)]
    runs += [ArmTraining("plain", 2 * n, True), ArmTraining("resm_init", n, True)]
    waiting = [run for run in runs if run.arm in unfinished and not _is_trained(run, folder)]
    _train(waiting, preset, data, folder)
    for arm in unfinished:
        finish(folder / arm, key)


def _train(waiting: List[ArmTraining], preset: Preset, data: Path, folder: Path) -> None:
    """Start each training when a worker is free and the checkpoint it needs exists."""
    half = folder / "plain" / HALF

    def start(children: Children, run: ArmTraining, worker: int) -> Child:
        flags = _flags(run, preset, data, folder)
        return start_training(children, folder / run.arm, flags, {"OMP_NUM_THREADS": "1"})

    def show(run: ArmTraining) -> None:
        updates, state = _reached(folder / run.arm / LOG)
        progress.show(run.arm, updates, run.updates, state)

    def finish_one(run: ArmTraining, status: int) -> None:
        _check(run, status, folder)
        progress.end(run.arm, f"{run.updates} updates, {_reached(folder / run.arm / LOG)[1]}")

    with RunsProgress(len(waiting)) as progress:
        run_all(
            waiting,
            WORKERS,
            start,
            show,
            finish_one,
            is_ready=lambda run: not run.needs_half or half.exists(),
        )


def _reached(log: Path) -> Tuple[int, str]:
    """The updates of an arm so far, and its perplexity and speed as text."""
    logged = read_log(log, "train_inner")
    if not logged:
        return 0, "nothing logged yet"
    last = logged[-1]
    return int(last["num_updates"]), f"perplexity {last['ppl']:.1f}, {last['wps']:,.0f} words/s"


def _flags(run: ArmTraining, preset: Preset, data: Path, folder: Path) -> List[str]:
    flags = [str(data), "--user-dir", str(PACKAGE), *arm_flags(run.arm, preset)]
    flags += ["--max-update", str(run.updates)]
    if run.arm == "resm_init" and not (folder / run.arm / LAST).exists():
        # INIT that also keeps plain's position in the data; --init-from would start at epoch 1
        flags += ["--restore-file", str(folder / "plain" / HALF), *INIT_FLAGS]
    return flags


def _is_trained(run: ArmTraining, folder: Path) -> bool:
    """Whether a run is finished; also keeps plain's checkpoint after N updates."""
    last, half = folder / run.arm / LAST, folder / run.arm / HALF
    if not last.exists() or updates_of(last) < run.updates:
        return False
    if run.arm == "plain" and not half.exists():
        with last.open("rb") as source, whole_file(half) as out:
            shutil.copyfileobj(source, out)
    return True


def _check(run: ArmTraining, status: int, folder: Path) -> None:
    if status or not _is_trained(run, folder):
        log = folder / run.arm / LOG
        raise ValueError(
            f"training {run.arm} failed with status {status}, see {log}: {last_line(log)}"
        )

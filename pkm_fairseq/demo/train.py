"""Train the arms with fairseq-train, two processes at a time, one thread each."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List

from ..data.prepare import SPLITS
from ..memory.files import whole_file
from ..models.checkpoints import read_checkpoint
from ..runs import Child, Children
from .logs import read_log
from .presets import ARMS, Preset, arm_flags
from .progress import Progress
from .steps import PACKAGE, begin, finish, key_of, key_of_code, key_of_files

WORKERS = 2
POLL = 1.0  # seconds
LAST = "checkpoint_last.pt"
HALF = "checkpoint_half.pt"
LOG = "train.log"
INIT_FLAGS = ("--reset-optimizer", "--reset-lr-scheduler", "--reset-meters")


@dataclass(frozen=True)
class Run:
    """One process of fairseq-train: an arm, and the update where it stops."""

    arm: str
    updates: int
    needs_half: bool  # waits for plain's checkpoint after N updates


def train_arms(preset: Preset, data: Path, folder: Path) -> None:
    """Train what is not trained yet; an interrupted arm continues at its last checkpoint.

    Args:
        preset: the settings.
        data: the folder whose ``bin`` fairseq-preprocess made.
        folder: gets one folder for each arm.

    Raises:
        ValueError: a training failed; the others were stopped.
    """
    data, folder = data.resolve() / "bin", folder.resolve()
    for name in ("dict.txt", *(f"{split}.{ext}" for split in SPLITS for ext in ("bin", "idx"))):
        if not (data / name).is_file():  # before any folder is touched
            raise ValueError(f"{data / name}: no such file; prepare the corpus first")
    inputs = sorted(file for file in data.glob("*") if file.suffix in (".bin", ".idx", ".txt"))
    code = key_of_code("memory", "models", "tasks", "criterions", "optim")
    flags = {arm: arm_flags(arm, preset) for arm in ARMS}
    key = key_of(key_of_files(*inputs), code, flags, preset.half)
    unfinished = [arm for arm in ARMS if begin(folder / arm, key)]
    n = preset.half
    runs = [Run("plain", n, False), Run("pkm", 2 * n, False)]
    runs += [Run("plain", 2 * n, True), Run("resm_init", n, True)]
    waiting = [run for run in runs if run.arm in unfinished and not _is_trained(run, folder)]
    with Progress({arm: n if arm == "resm_init" else 2 * n for arm in unfinished}) as progress:
        _run_all(waiting, preset, data, folder, progress)
    for arm in unfinished:
        finish(folder / arm, key)


def _run_all(
    waiting: List[Run], preset: Preset, data: Path, folder: Path, progress: Progress
) -> None:
    """Run in the given order, as workers and plain's checkpoint allow; stop all if one fails."""
    half = folder / "plain" / HALF
    running: Dict[Run, Child] = {}
    with Children() as children:
        while waiting or running:
            for run in [run for run in waiting if not run.needs_half or half.exists()]:
                if len(running) < WORKERS:
                    waiting.remove(run)
                    running[run] = _start(children, run, preset, data, folder)
            children.pause(POLL)
            for run, child in list(running.items()):
                status = child.status
                progress.show(run.arm, read_log(folder / run.arm / LOG, "train_inner"))
                if status is not None:
                    del running[run]
                    _check(run, status, folder)


def _command(run: Run, preset: Preset, data: Path, folder: Path) -> List[str]:
    save_dir = folder / run.arm
    command = [str(Path(sys.executable).parent / "fairseq-train"), str(data)]
    command += ["--user-dir", str(PACKAGE), "--save-dir", str(save_dir)]
    command += [*arm_flags(run.arm, preset), "--max-update", str(run.updates)]
    if run.arm == "resm_init" and not (save_dir / LAST).exists():
        # INIT that also takes over where plain was in the data: --init-from would start epoch 1
        command += ["--restore-file", str(folder / "plain" / HALF), *INIT_FLAGS]
    return command


def _start(children: Children, run: Run, preset: Preset, data: Path, folder: Path) -> Child:
    command, save_dir = _command(run, preset, data, folder), folder / run.arm
    with (save_dir / LOG).open("ab") as log:
        one_thread = {"OMP_NUM_THREADS": "1"}
        return children.start(command, log, environment=one_thread, lock=save_dir / "lock")


def _is_trained(run: Run, folder: Path) -> bool:
    """Whether a run is done; keeps plain's checkpoint after N updates."""
    last, half = folder / run.arm / LAST, folder / run.arm / HALF
    if not last.exists() or updates_of(last) < run.updates:
        return False
    if run.arm == "plain" and not half.exists():
        with last.open("rb") as source, whole_file(half) as out:
            shutil.copyfileobj(source, out)
    return True


def updates_of(checkpoint: Path) -> int:
    """Number of updates that a checkpoint has seen, without those of what it was started from."""
    history = read_checkpoint(str(checkpoint), "checkpoint")["optimizer_history"]
    return history[-1]["num_updates"]


def _check(run: Run, status: int, folder: Path) -> None:
    if status or not _is_trained(run, folder):
        log = folder / run.arm / LOG
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(
            f"training {run.arm} failed with status {status}, see {log}: "
            f"{lines[-1] if lines else 'it printed nothing'}"
        )

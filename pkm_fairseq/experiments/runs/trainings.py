"""Run several trainings of fairseq-train in parallel, each in a folder with a log and a lock."""

import sys
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple, TypeVar

from ...models.checkpoints import read_checkpoint
from .lock import LOCK, locked
from .processes import Child, Children

LAST = "checkpoint_last.pt"
LOG = "train.log"
POLL = 0.5  # seconds

Run = TypeVar("Run")
Start = Callable[[Children, Run, int], Child]


def run_all(
    runs: Sequence[Run],
    workers: int,
    start: Start[Run],
    show: Callable[[Run], None],
    finish: Callable[[Run, int], None],
    is_ready: Callable[[Run], bool] = lambda run: True,
) -> None:
    """Do runs in the given order, several in parallel; stop all if one fails.

    Args:
        runs: the runs.
        workers: number of parallel runs.
        start: starts a run; also receives the number of its worker, from 0.
        show: called at intervals during a run, and after its end.
        finish: called with the exit status of an ended run; raises if the run failed.
        is_ready: whether a run can start yet.

    Raises:
        ValueError: there are no workers, or the runs that are left wait for something that none of
            them makes.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, must be at least 1")
    waiting: List[Run] = list(runs)
    running: Dict[int, Tuple[Run, Child]] = {}  # by worker
    with Children() as children:
        while waiting or running:
            for run in filter(is_ready, list(waiting)):
                idle = set(range(workers)) - set(running)
                if idle:
                    waiting.remove(run)
                    running[min(idle)] = run, start(children, run, min(idle))
            if not running:
                names = ", ".join(map(str, waiting))
                raise ValueError(f"{names} cannot start: no run is left that they could wait for")
            children.pause(POLL)
            for worker, (run, child) in list(running.items()):
                status = child.status  # before reading the end of its log
                show(run)
                if status is not None:
                    del running[worker]
                    finish(run, status)


def start_training(
    children: Children, folder: Path, flags: Sequence[str], environment: Dict[str, str]
) -> Child:
    """Start fairseq-train.

    Args:
        children: adds the process to these.
        folder: folder for checkpoints and the log, locked while the process lives.
        flags: flags of fairseq-train, except the folder.
        environment: variables in addition to our own.

    Raises:
        ValueError: another process trains in this folder.
    """
    command = [str(Path(sys.executable).parent / "fairseq-train"), *flags]
    command += ["--save-dir", str(folder)]
    with (folder / LOG).open("ab") as log:
        return children.start(command, log, environment=environment, lock=folder / LOCK)


def clear(folder: Path) -> None:
    """Remove the checkpoints and the log of an interrupted training.

    Raises:
        ValueError: a process still trains in this folder.
    """
    with locked(folder / LOCK):
        for file in (*folder.glob("checkpoint*.pt"), folder / LOG):
            file.unlink(missing_ok=True)


def updates_of(checkpoint: Path) -> int:
    """Number of updates of a checkpoint, without those of the checkpoint it started from."""
    history = read_checkpoint(str(checkpoint), "checkpoint")["optimizer_history"]
    updates: int = history[-1]["num_updates"]
    return updates

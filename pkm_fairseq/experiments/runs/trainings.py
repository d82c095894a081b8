"""Trainings by fairseq-train, several at a time, each in a folder with its log and its lock."""

import sys
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple, TypeVar

from ...models.checkpoints import read_checkpoint
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
    """Do runs in the given order, some at a time; all are stopped if one fails.

    Args:
        runs: what is to be done.
        workers: how many at a time.
        start: starts a run; it is also given which of the workers does it, from 0.
        show: called now and then while a run is on, and when it has ended.
        finish: called with the exit status of an ended run; raises if it failed.
        is_ready: whether a run can be started yet.
    """
    waiting: List[Run] = list(runs)
    running: Dict[int, Tuple[Run, Child]] = {}  # by worker
    with Children() as children:
        while waiting or running:
            for run in filter(is_ready, list(waiting)):
                idle = set(range(workers)) - set(running)
                if idle:
                    waiting.remove(run)
                    running[min(idle)] = run, start(children, run, min(idle))
            children.pause(POLL)
            for worker, (run, child) in list(running.items()):
                status = child.status  # before its log is read to the end
                show(run)
                if status is not None:
                    del running[worker]
                    finish(run, status)


def start_training(
    children: Children, folder: Path, flags: Sequence[str], environment: Dict[str, str]
) -> Child:
    """Start fairseq-train.

    Args:
        children: the process is one of these.
        folder: gets checkpoints and the log, and is locked as long as the process lives.
        flags: of fairseq-train, but for the folder.
        environment: variables that the process has besides our own.

    Raises:
        ValueError: another process trains in this folder.
    """
    command = [str(Path(sys.executable).parent / "fairseq-train"), *flags]
    command += ["--save-dir", str(folder)]
    with (folder / LOG).open("ab") as log:
        return children.start(command, log, environment=environment, lock=folder / "lock")


def updates_of(checkpoint: Path) -> int:
    """Number of updates that a checkpoint has seen, without those of what it was started from."""
    history = read_checkpoint(str(checkpoint), "checkpoint")["optimizer_history"]
    updates: int = history[-1]["num_updates"]
    return updates

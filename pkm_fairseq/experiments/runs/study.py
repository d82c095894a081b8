"""The runs of a study: train and measure them, and write down what they found."""

import json
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterable, List, Optional, Protocol, Sequence, Set, TypeVar

from ...memory.files import write_file
from .logs import last_line, read_log
from .processes import Child, Children
from .progress import RunsProgress
from .trainings import LAST, LOG, clear, run_all, start_training

RESULT = "result.json"
SIZE = "size"


class StudyRun(Protocol):
    """A run: its settings, as a dataclass of plain data."""

    @property
    def name(self) -> str:
        """The name of its folder."""


Run = TypeVar("Run", bound=StudyRun)


def folder_of(out: Path, run: StudyRun) -> Path:
    """The folder of a run."""
    return out / "runs" / run.name


def train_and_measure(
    runs: Sequence[Run],
    out: Path,
    workers: int,
    updates: Callable[[Run], int],
    flags: Callable[[Run], List[str]],
    measure: Callable[[Run], Dict[str, Any]],
    describe: Callable[[Dict[str, Any]], str],
    is_ready: Callable[[Run], bool] = lambda run: True,
) -> None:
    """Train runs, with one thread each; write ``result.json`` into the folder of each.

    An interrupted run is done again.

    Args:
        runs: duplicates and finished runs are skipped.
        out: the study's folder.
        workers: number of parallel runs.
        updates: number of updates of a run.
        flags: options of fairseq-train for a run, except the folder.
        measure: what a trained run has found; it may remove checkpoints.
        describe: a result in one line.
        is_ready: whether a run can start.

    Raises:
        ValueError: a training failed (the message names its log), or another process trains one of
            the runs.
    """
    waiting = [run for run in dict.fromkeys(runs) if not is_finished(out, run)]
    if not waiting:
        return

    def start(children: Children, run: Run, worker: int) -> Child:
        folder = folder_of(out, run)
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        return start_training(children, folder, flags(run), {"OMP_NUM_THREADS": "1"})

    def show(run: Run) -> None:
        logged = read_log(folder_of(out, run) / LOG, "train_inner")
        if logged:
            reached, loss = int(logged[-1]["num_updates"]), logged[-1]["loss"]
            progress.show(run.name, reached, updates(run), f"loss {loss:.2f}")

    def end(run: Run, status: int) -> None:
        folder = folder_of(out, run)
        if status or not (folder / LAST).exists():
            raise ValueError(f"{run.name} failed, see {folder / LOG}: {last_line(folder / LOG)}")
        result = {"run": vars(run), **measure(run)}
        write_file(folder / RESULT, json.dumps(result, indent=1) + "\n")
        progress.end(run.name, describe(result))

    with RunsProgress(len(waiting), interval=120) as progress:
        run_all(waiting, workers, start, show, end, is_ready)


def claim(out: Path, size: str) -> None:
    """Note the size of a study in its folder.

    Runs of two sizes can have the same name, and the result of one would pass for the other's.

    Raises:
        ValueError: the folder belongs to the study in another size.
    """
    file = out / SIZE
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_file(file, size)
    before = file.read_text()
    if before != size:
        raise ValueError(f"{out} holds the study in size {before}: choose another OUT for {size}")


def is_finished(out: Path, run: StudyRun) -> bool:
    """Whether a run has been measured."""
    return (folder_of(out, run) / RESULT).exists()


def rows_per_update(folder: Path) -> Dict[str, float]:
    """The mean numbers of rows that an update of a run read and chose to train.

    Args:
        folder: of the run.

    Returns:
        ``rows_read`` and ``rows_chosen``, without what its log does not hold.
    """
    found = {}
    for name in ("read", "chosen"):
        key = f"value_rows_{name}"
        logged = [line[key] for line in read_log(folder / LOG, "train_inner") if key in line]
        if logged:
            found[f"rows_{name}"] = round(sum(logged) / len(logged), 1)
    return found


def schedule(
    updates: int, lr: float, starts_at_half: bool, warm_up: Optional[int] = None
) -> Dict[str, str]:
    """Flags of the learning rate: warm-up, then linear decay to 0.

    Args:
        updates: of the whole schedule.
        lr: the highest rate.
        starts_at_half: whether to begin in the middle of the schedule, for a model with INIT.
        warm_up: updates of the warm-up, at most half of all (default: 1/20 of all).
    """
    warm_up = updates // 20 if warm_up is None else warm_up
    own = updates // 2 if starts_at_half else updates
    return {
        "--lr": str(lr * own / (updates - warm_up) if starts_at_half else lr),
        "--warmup-updates": str(0 if starts_at_half else warm_up),
        "--max-update": str(own),
        "--total-num-update": str(own),
    }


def in_every(answers: Iterable[Optional[bool]]) -> Optional[bool]:
    """Whether a criterion holds in every seed; None if that is open.

    Args:
        answers: one for each seed, None if its run is missing. One that is False decides.
    """
    found = list(answers)
    return False if False in found else None if None in found else True


def no_leak(highest: float, is_complete: bool) -> Optional[bool]:
    """Whether no run recalls more than 2 % of facts that are in no text; None if that is open.

    Args:
        highest: recall of these facts in any finished run.
        is_complete: whether all runs have finished.
    """
    return False if highest > 0.02 else True if is_complete else None


def refuse_unknown_arm(arm: str, known: Set[str]) -> None:
    """Raise ValueError if ``--check`` names what is not known: an arm without results."""
    if arm not in known:
        raise ValueError(f"--check is {arm!r}, must be one of {', '.join(sorted(known))}")


def write_results(file: Path, results: Sequence[Dict[str, Any]]) -> None:
    """Write results as JSON, one run a line."""
    lines = ",\n".join(json.dumps(result) for result in results)
    write_file(file, f"[\n{lines}\n]\n")


def median_and_range(values: Sequence[float], text: str = "{:.1f}") -> str:
    """A cell of a table: the median, and the range if there are several values.

    Args:
        values: one for each seed.
        text: the format of a number.
    """
    shown = text.format(median(values))
    if len(values) == 1:
        return shown
    return f"{shown} ({text.format(min(values))} to {text.format(max(values))})"


def collect_results(place: Path) -> List[Dict[str, Any]]:
    """As ``read_results``; if a folder holds results, they are written to its results.json, too."""
    found = read_results(place)
    if found and not place.is_file():
        write_results(place / "results.json", found)
    return found


def read_results(place: Path) -> List[Dict[str, Any]]:
    """The results in a results.json, or those of all finished runs in a study's folder."""
    if place.is_file():
        stored: List[Dict[str, Any]] = json.loads(place.read_text())
        return stored
    return [json.loads(file.read_text()) for file in sorted(place.glob(f"runs/*/{RESULT}"))]

"""Show progress: bars on a terminal, otherwise a line at intervals."""

import time
from typing import Dict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft


def progress_bars() -> Progress:
    """Bars on standard error; nothing if that is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    return Progress(*columns, console=console, disable=not console.is_terminal)


class RunsProgress:
    """Shows the current runs, their progress and their scores; a context manager.

    Args:
        n_runs: number of runs.
        n_finished: number of runs that are already finished.
        interval: seconds between two lines about a run, without a terminal.
    """

    def __init__(self, n_runs: int, n_finished: int = 0, interval: float = 30.0) -> None:
        self._console = Console()
        columns = (TextColumn("{task.description:<22}"), BarColumn(24), MofNCompleteColumn())
        self._bars = Progress(
            *columns,
            TextColumn("{task.fields[state]}"),
            TimeLeft(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._all = self._bars.add_task("runs", total=n_runs, completed=n_finished, state="")
        self._running: Dict[str, TaskID] = {}
        self._told: Dict[str, float] = {}
        self._n_runs, self._n_finished, self._interval = n_runs, n_finished, interval

    def __enter__(self) -> "RunsProgress":
        if self._n_finished:
            self._say(f"{self._n_finished} of {self._n_runs} runs are finished already")
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def show(self, run: str, updates: int, total: int, state: str) -> None:
        """Show the progress of a run."""
        if run not in self._running:
            self._running[run] = self._bars.add_task(run, total=total, state="")
            self._told[run] = time.monotonic()
        self._bars.update(self._running[run], completed=updates, state=state)
        is_due = time.monotonic() - self._told[run] > self._interval
        if is_due and not self._console.is_terminal:
            self._told[run] = time.monotonic()
            self._say(f"  {run:<10} {updates}/{total} updates, {state}")

    def end(self, run: str, state: str) -> None:
        """Mark a run as finished."""
        if run in self._running:
            self._bars.remove_task(self._running.pop(run))
        self._n_finished += 1
        self._bars.update(self._all, completed=self._n_finished)
        self._say(f"[{self._n_finished}/{self._n_runs}] {run}: {state}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

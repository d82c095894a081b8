"""Progress of the arms: one bar each on a terminal, else a line now and then."""

import time
from typing import Any, Dict, List

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

PLAIN_INTERVAL = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Shows how far each arm is; a context manager.

    Args:
        totals: updates of each arm.
    """

    def __init__(self, totals: Dict[str, int]) -> None:
        console = Console()
        self.is_terminal = console.is_terminal
        self.totals = totals
        self.state = {arm: "waiting" for arm in totals}
        self.printed = time.monotonic()
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn())
        self.bars = Bars(*columns, TextColumn("{task.fields[state]}"), TimeRemainingColumn(),
                         console=console)  # fmt: skip
        self.ids: Dict[str, Any] = {}
        if self.is_terminal:
            for arm, total in totals.items():
                self.ids[arm] = self.bars.add_task(arm, total=total, state="waiting")

    def __enter__(self) -> "Progress":
        if self.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_terminal:
            self.bars.stop()

    def show(self, arm: str, logged: List[Dict[str, float]]) -> None:
        """Show the last of what an arm has logged."""
        if not logged:
            return
        last = logged[-1]
        done = int(last["num_updates"])
        state = f"perplexity {last['ppl']:.1f}, {last['wps']:,.0f} words/s"
        if self.is_terminal:
            self.bars.update(self.ids[arm], completed=done, state=state)
            return
        self.state[arm] = f"{done}/{self.totals[arm]} updates, {state}"
        if time.monotonic() - self.printed > PLAIN_INTERVAL:
            self.printed = time.monotonic()
            for name, text in self.state.items():
                print(f"  {name:<10} {text}", flush=True)

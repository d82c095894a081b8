"""Start, await and interrupt child processes, and never leave one running."""

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO, Any, Dict, Iterator, List, Optional, Sequence

from .lock import locked

POLL = 0.05  # seconds
PATIENCE = 10.0  # seconds for a process to end by itself
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Child:
    """A process and all processes that it starts.

    It has its own session, so Ctrl-C reaches only its parent, which then ends it.

    Args:
        process: started with ``start_new_session``.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    @property
    def status(self) -> Optional[int]:
        """Its exit status; None while it runs. This also ends processes that it left running."""
        if self.process.returncode is None and self.process.poll() is not None:
            self.send(signal.SIGKILL)
        return self.process.returncode

    def send(self, signum: int) -> None:
        """Send a signal to the process and all processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no process is left
            os.killpg(self.process.pid, signum)

    def kill(self) -> None:
        """Kill it immediately."""
        self.send(signal.SIGKILL)
        self.process.wait()


class Children:
    """Child processes that all end with this context.

    Ctrl-C and SIGTERM raise KeyboardInterrupt, with two differences from Python's behaviour. They
    wait while a child is started or ended, so that no child is lost. They are also stored: Python
    drops exceptions in destructors and callbacks, and libraries may catch them. The next ``check``
    or ``pause``, or the end of the context, raises a lost interrupt again.
    """

    def __init__(self) -> None:
        self._children: List[Child] = []
        self._is_interrupted = self._is_held = False
        self._handlers: Dict[int, Any] = {}

    def __enter__(self) -> "Children":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # only the main thread gets signals
            self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
            for number, handler in self._handlers.items():
                if handler != signal.SIG_IGN:
                    signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_held = True
        end_all(self._children)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._is_interrupted:
            raise KeyboardInterrupt

    def _interrupt(self, signum: int, frame: Optional[FrameType]) -> None:
        self._is_interrupted = True
        if not self._is_held:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Hold back interrupts while the context is open."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        self.check()

    def start(
        self,
        command: Sequence[str],
        out: "IO[bytes]",
        err: "Optional[IO[bytes]]" = None,
        environment: Optional[Dict[str, str]] = None,
        lock: Optional[Path] = None,
    ) -> Child:
        """Start a process.

        Args:
            command: the program and its arguments.
            out: file for its output.
            err: file for its errors (default: ``out``).
            environment: variables in addition to our own.
            lock: a file to lock while the process lives.

        Raises:
            ValueError: another process holds the lock.
            OSError: the process cannot be started.
        """
        with contextlib.ExitStack() as stack:
            files = []
            if lock is not None:
                files.append(stack.enter_context(locked(lock)).fileno())
            with self._held():
                process = subprocess.Popen(
                    command,
                    env={**os.environ, **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT if err is None else err,
                    pass_fds=files,
                    start_new_session=True,
                )
                self._children.append(Child(process))
        return self._children[-1]

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was an interrupt."""
        if self._is_interrupted:
            raise KeyboardInterrupt

    def pause(self, seconds: float = POLL) -> None:
        """Sleep; raise KeyboardInterrupt if there was an interrupt."""
        self.check()
        time.sleep(seconds)
        self.check()


def end_all(children: Sequence[Child]) -> None:
    """End processes and all that they started: SIGTERM, then SIGKILL if they still run."""
    running = [child for child in children if child.status is None]
    for child in running:
        child.send(signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    for child in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, deadline - time.monotonic()))
        child.kill()


def run_to_end(
    command: Sequence[str], environment: Optional[Dict[str, str]] = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command; an interrupt ends it and all processes that it started.

    Args:
        command: the program and its arguments.
        environment: variables in addition to our own.

    Returns:
        Its exit status and its output.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with Children() as children:
            child = children.start(command, out, err, environment)
            while child.status is None:
                children.pause()
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))
    assert child.status is not None
    return subprocess.CompletedProcess(list(command), child.status, *printed)

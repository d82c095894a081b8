"""Child processes: an interrupt ends all of them, wherever it arrives, and none is forgotten."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pkm_fairseq.experiments.runs import processes
from pkm_fairseq.experiments.runs.processes import Children, run_to_end

LONG = 600  # seconds, of what is waited for or should be ended
SLEEP = [sys.executable, "-S", "-c", f"import time; time.sleep({LONG})"]
# starts a process, which minds no SIGTERM, says that it is ready, and waits
FAMILY = """
import signal, subprocess, sys, time
code = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True);"
        "time.sleep(600)")
child = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
{}
"""


def wait_for(happened):
    deadline = time.monotonic() + LONG
    while not happened():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def is_running(pid):
    """Whether a process is there, and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture
def out(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        yield log


@pytest.fixture(autouse=True)
def handlers():
    """Pytest's own, whoever started it; afterwards they must be what they were."""
    before = {number: signal.getsignal(number) for number in processes.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    signal.signal(signal.SIGINT, before[signal.SIGINT])


def started(monkeypatch, interrupt):
    """Processes that are started; ``interrupt`` is called before Popen hands one out."""
    pids = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pids.append(self.pid)
            interrupt()

    monkeypatch.setattr(processes.subprocess, "Popen", Popen)
    return pids


@pytest.mark.parametrize("number", processes.SIGNALS)
def test_a_process_that_is_interrupted_while_it_starts_is_not_left_behind(monkeypatch, out, number):
    pids = started(monkeypatch, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt), Children() as children:
        children.start(SLEEP, out)
    assert len(pids) == 1
    assert not is_running(pids[0])


def test_an_interrupt_that_a_library_catches_is_raised_again(monkeypatch, out):
    pids = started(monkeypatch, lambda: None)
    n_rounds = 0
    with pytest.raises(KeyboardInterrupt), Children() as children:
        children.start(SLEEP, out)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(LONG)
        except BaseException:
            n_rounds += 1
        children.pause()
        n_rounds += 1
    assert n_rounds == 1
    assert not is_running(pids[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_lost_in_a_destructor_is_raised_again(out):
    class Interrupted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), Children() as children:
        children.start(SLEEP, out)
        thing = Interrupted()
        del thing
        children.pause()
        pytest.fail("went on")


@pytest.mark.parametrize("is_second", [False, True])
def test_an_interrupt_while_processes_are_ended_keeps_none_alive(monkeypatch, out, is_second):
    pids, send = started(monkeypatch, lambda: None), processes.Child.send

    def send_and_interrupt(child, number):
        os.kill(os.getpid(), signal.SIGINT)
        send(child, number)

    monkeypatch.setattr(processes.Child, "send", send_and_interrupt)
    with pytest.raises(KeyboardInterrupt), Children() as children:
        children.start([sys.executable, "-S", "-c", FAMILY.format("child.wait()")], out)
        wait_for(lambda: Path(out.name).read_text().endswith("\n"))
        if is_second:
            os.kill(os.getpid(), signal.SIGINT)
    assert not is_running(pids[0])
    grandchild = int(Path(out.name).read_text())
    wait_for(lambda: not is_running(grandchild))  # nobody waits for it but init


def test_all_that_a_process_started_ends_with_it(out):
    with Children() as children:
        child = children.start([sys.executable, "-S", "-c", FAMILY.format("sys.exit(3)")], out)
        wait_for(lambda: child.status is not None)
        grandchild = int(Path(out.name).read_text())
        wait_for(lambda: not is_running(grandchild))
    assert child.status == 3


def test_an_error_ends_all_processes(monkeypatch, out):
    pids = started(monkeypatch, lambda: None)
    with pytest.raises(ZeroDivisionError), Children() as children:
        children.start(SLEEP, out)
        children.start(SLEEP, out)
        raise ZeroDivisionError
    assert len(pids) == 2
    assert not any(map(is_running, pids))


def test_a_lock_lives_as_long_as_the_process(out, tmp_path):
    lock = tmp_path / "lock"
    with Children() as others, Children() as children:
        child = others.start(SLEEP, out, lock=lock)
        with pytest.raises(ValueError, match=f"{tmp_path} is being trained by another process"):
            children.start(SLEEP, out, lock=lock)
        child.kill()
        children.start(SLEEP, out, lock=lock)


def test_in_a_thread_signals_are_left_alone(out):
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with Children() as children:
            found.append(signal.getsignal(signal.SIGTERM) == before)
            child = children.start(SLEEP, out)
        found.append(child.status is not None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_a_command_is_run_to_its_end():
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(5)"
    done = run_to_end([sys.executable, "-S", "-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (5, "out\n", "err\n")


def test_a_command_that_is_interrupted_does_not_go_on(monkeypatch):
    pids = started(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_to_end(SLEEP)
    assert not is_running(pids[0])

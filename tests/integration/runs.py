"""The real fairseq commands, run as a user runs them."""

import atexit
import functools
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, TextIO

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 1500.0  # seconds; no machine is so busy
USER_DIR = ROOT / "pkm_fairseq"

# a model with two layers whose memory has 16 * 16 slots
MODEL = [
    *("--encoder-layers", "2", "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64"),
    *("--encoder-attention-heads", "2", "--dropout", "0.1"),
]
MEMORY = [
    *("--memory-layers", "1", "--memory-n-keys", "16", "--memory-heads", "2"),
    *("--memory-knn", "4", "--memory-k-dim", "16"),
]
TRAIN = [
    *("--user-dir", str(USER_DIR), "--optimizer", "pkm_adam", "--lr", "1e-3"),
    *("--batch-size", "8", "--seed", "7", "--num-workers", "0", "--cpu"),
    *("--log-format", "json", "--log-interval", "1", "--no-epoch-checkpoints"),
]
MASKED_LM = [
    *("--task", "pkm_masked_lm", "--criterion", "pkm_masked_lm", "--tokens-per-sample", "32"),
]


@dataclass
class Run:
    """What a command printed, and how it ended."""

    status: int
    output: str

    def logged(self, tag: str) -> List[Dict[str, Any]]:
        """The JSON lines that fairseq logged under a tag, such as train_inner or valid."""
        start = rf"(?:\| {tag} \||\[{tag}\]\[INFO\] -)"  # without and with hydra
        found = re.finditer(rf"{start} (\{{.*\}})$", self.output, re.MULTILINE)
        return [json.loads(match[1]) for match in found]


def values_of(run: Run, key: str) -> List[float]:
    """What a training logged of each update under a key."""
    return [float(log[key]) for log in run.logged("train_inner")]


class Commands:
    """The process of ``commands.py``, which is started when it is first asked."""

    NAMES = ("fairseq-train", "fairseq-validate", "fairseq-hydra-train", "fairseq-preprocess")

    def run(self, argv: List[str], cwd: Path) -> Run:
        """Run a command to its end."""
        process, answers = self._process
        with tempfile.NamedTemporaryFile(mode="r") as output:
            asked = {"argv": argv, "cwd": str(cwd), "output": output.name}
            print(json.dumps(asked), file=process.stdin, flush=True)
            if not select.select([answers], [], [], PATIENCE)[0]:
                process.kill()
                raise TimeoutError(f"{argv} did not end; it has written:\n{output.read()}")
            return Run(int(answers.readline()), output.read())

    @functools.cached_property
    def _process(self) -> "tuple[subprocess.Popen[str], TextIO]":
        read, write = os.pipe()
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("commands.py"), str(write)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            pass_fds=[write],
        )
        os.close(write)
        atexit.register(process.kill)
        return process, os.fdopen(read)


_commands = Commands()


def run_alike(*command: Any, cwd: Optional[Path] = None) -> Run:
    """Run a command of fairseq to its end, as :func:`run` does, in a few seconds less.

    The process has not imported fairseq itself, but comes of one that has.
    """
    assert Path(command[0]).name in Commands.NAMES
    return _commands.run([str(part) for part in command], cwd or ROOT)


def run(*command: Any, cwd: Optional[Path] = None, env: Optional[Dict[str, str]] = None) -> Run:
    """Run a command of the environment, or of the repository, to its end."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd or ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return Run(done.returncode, done.stdout)


def start(*command: Any, env: Optional[Dict[str, str]] = None) -> "subprocess.Popen[str]":
    """Start a command and do not wait for it."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(happened: Callable[[], Any], process: "subprocess.Popen[Any]") -> None:
    """Wait for something that a process does; it must not end before."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, "ended before"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def run_well(*command: Any, **kwargs: Any) -> Run:
    """Run a command that must succeed."""
    done = run(*command, **kwargs)
    assert done.status == 0, done.output[-4000:]
    return done


def train(data: Path, save_dir: Path, *options: Any) -> Run:
    """Run fairseq-train with memory in a tiny model; it must succeed."""
    command = [BIN / "fairseq-train", data, *TRAIN, *MASKED_LM, *MODEL, "--save-dir", save_dir]
    return run_well(*command, *options)


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_workers(
    n_workers: int, data: Path, save_dir: Path, *options: Any
) -> "List[subprocess.Popen[str]]":
    """Start fairseq-train in some processes that exchange gradients."""
    address = f"tcp://127.0.0.1:{free_port()}"
    command = [BIN / "fairseq-train", data, *TRAIN, *MASKED_LM, *MODEL, "--save-dir", save_dir]
    command += ["--distributed-world-size", n_workers, "--distributed-backend", "gloo"]
    command += ["--distributed-init-method", address, "--distributed-no-spawn"]
    command += ["--ddp-backend", "legacy_ddp", *options, "--distributed-rank"]
    return [start(*command, rank) for rank in range(n_workers)]


def start_two_workers(data: Path, save_dir: Path, *options: Any) -> "List[subprocess.Popen[str]]":
    """Start fairseq-train in two processes that exchange gradients."""
    return start_workers(2, data, save_dir, *options)


def train_on_workers(n_workers: int, data: Path, save_dir: Path, *options: Any) -> List[Run]:
    """Run fairseq-train in some processes that exchange gradients; all must succeed."""
    workers = start_workers(n_workers, data, save_dir, *options)
    outputs = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
    tails = "\n\n".join(output[-2000:] for output in outputs)
    assert [worker.returncode for worker in workers] == [0] * n_workers, tails
    return [Run(0, output) for output in outputs]


def train_on_two_workers(data: Path, save_dir: Path, *options: Any) -> List[Run]:
    """Run fairseq-train in two processes that exchange gradients; both must succeed."""
    return train_on_workers(2, data, save_dir, *options)


def write_sentences(file: Path, n_lines: int, seed: int) -> None:
    """Write lines of words of very different frequencies, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(60)]
    with file.open("w") as out:
        for _ in range(n_lines):
            ranks = len(words) * rng.random(rng.integers(8, 20)) ** 4
            print(*(words[int(rank)] for rank in ranks), file=out)


def binarise(folder: Path, out: Path, *options: Any) -> Path:
    """Run fairseq-preprocess over train.txt and valid.txt of a folder."""
    run_well(
        *(BIN / "fairseq-preprocess", "--only-source", "--workers", "1", "--destdir", out),
        *("--trainpref", folder / "train.txt", "--validpref", folder / "valid.txt", *options),
    )
    return out


def load(file: Path) -> Dict[str, Any]:
    """Read a checkpoint safely."""
    import pkm_fairseq

    pkm_fairseq.register()  # puts what fairseq stores on torch's allow-list
    return torch.load(file, weights_only=True)

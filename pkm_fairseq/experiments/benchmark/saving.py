"""The memory that workers of fairseq-train need to save and to load a checkpoint.

``python -m pkm_fairseq.experiments.benchmark.saving FILE ...`` is fairseq-train, and writes the
peaks to FILE.
"""

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

from ..runs.folders import PACKAGE
from ..runs.processes import Children
from .machine import peak_bytes, release_free_memory, resident_bytes

POLL = 0.1  # seconds
FLAGS = (
    "--task masked_lm --criterion masked_lm --tokens-per-sample 32 --batch-size 8 "
    "--arch resm_roberta_tiny --encoder-layers 2 --encoder-embed-dim 64 --encoder-ffn-embed-dim 64 "
    "--encoder-attention-heads 2 --memory-layers 1 --memory-heads 2 --memory-knn 8 "
    "--memory-query-norm layer --optimizer pkm_adam --lr 1e-3 --seed 1 --num-workers 0 --cpu "
    "--disable-validation --no-epoch-checkpoints --log-format none --ddp-backend legacy_ddp "
    "--distributed-backend gloo --distributed-no-spawn"
)


class Setting(NamedTuple):
    """What to measure.

    Attributes:
        data: a folder that fairseq-preprocess made.
        n_keys: sub-keys per half; the table has n_keys² slots.
        v_dim: width of a value.
        workers: their number.
        shards: workers that share a table.
        stored: a choice of --memory-checkpoint.
    """

    data: Path
    n_keys: int
    v_dim: int
    workers: int
    shards: int
    stored: str


def measure(setting: Setting, folder: Path) -> List[Dict[str, Any]]:
    """Train three updates, save, and load in new processes.

    Args:
        setting: what to measure.
        folder: a new one, removed at the end.

    Returns:
        For each worker and phase, "saving" and "loading": ``worker``, ``phase``, and in bytes
        ``before``, the resident memory at its start, and ``peak``, the largest until its end.

    Raises:
        ValueError: a training failed, or did not save or load.
    """
    folder.mkdir(parents=True)
    try:
        for updates in (3, 4):
            _train(setting, folder, updates)
        found = []
        for worker in range(setting.workers):
            found += [{"worker": worker, **phase} for phase in _save_and_load(folder, worker)]
        return found
    finally:
        shutil.rmtree(folder)


def _save_and_load(folder: Path, worker: int) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """The last save of the first training, and the load of the second one."""
    lines = (folder / f"{worker}.jsonl").read_text().splitlines()
    noted = [json.loads(line) for line in lines]
    phases = [phase["phase"] for phase in noted]
    if "loading" not in phases[1:] or phases[0] != "saving":
        said = ", ".join(phases)
        raise ValueError(f"worker {worker} went through {said}, must save and then load")
    load = phases.index("loading")  # the first training loads nothing
    return noted[load - 1], noted[load]


def _train(setting: Setting, folder: Path, updates: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [str(setting.data), "--user-dir", str(PACKAGE), *FLAGS.split()]
    flags += ["--memory-n-keys", str(setting.n_keys), "--memory-v-dim", str(setting.v_dim)]
    flags += ["--memory-shards", str(setting.shards), "--memory-checkpoint", setting.stored]
    flags += ["--save-dir", str(folder / "run"), "--max-update", str(updates)]
    flags += ["--distributed-world-size", str(setting.workers)]
    flags += ["--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-rank"]
    with Children() as children, (folder / "log").open("ab") as log:
        started = [
            children.start(
                [sys.executable, "-m", __name__, str(folder / f"{w}.jsonl"), *flags, str(w)],
                log,
                environment={"OMP_NUM_THREADS": "1"},
            )
            for w in range(setting.workers)
        ]
        while any(child.status is None for child in started):
            if any(child.status for child in started):
                break
            children.pause(POLL)
        if any(child.status != 0 for child in started):
            last = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
            raise ValueError(f"a training failed: {' '.join(last)}")


def _note(phase: str, file: Path, do: Callable[[], Any]) -> Any:
    """Do something, and write down the peak of this process's memory meanwhile."""
    results: List[Any] = []
    release_free_memory()  # otherwise a part of the peak fits into it
    before = resident_bytes()
    peak = peak_bytes(lambda: results.append(do()))
    with file.open("a") as out:
        print(json.dumps({"phase": phase, "before": before, "peak": peak}), file=out)
    return results[0]


def main(file: Path) -> None:
    """Be fairseq-train; ``file`` gets a line for each phase."""
    from fairseq import checkpoint_utils
    from fairseq_cli import train

    class MeasuredTrainer(train.Trainer):  # type: ignore[misc,name-defined]
        """Notes peaks."""

        def load_checkpoint(self, path: str, *args: Any, **kwargs: Any) -> Any:
            """Load as fairseq does."""
            if not Path(path).exists():
                return super().load_checkpoint(path, *args, **kwargs)
            load = super().load_checkpoint
            return _note("loading", file, lambda: load(path, *args, **kwargs))

    save = checkpoint_utils.save_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        return _note("saving", file, lambda: save(*args, **kwargs))

    train.Trainer = MeasuredTrainer
    checkpoint_utils.save_checkpoint = save_checkpoint
    train.cli_main()


if __name__ == "__main__":
    told = Path(sys.argv.pop(1))
    main(told)

"""Short trainings of several kinds of memories on the same number of tokens."""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Dict, Iterator, List, Sequence, Tuple

from ..runs.folders import PACKAGE
from ..runs.logs import last_line, read_log
from ..runs.processes import Children
from .presets import PRESETS, arm_flags

KINDS: Dict[str, List[str]] = {
    "plain": [],
    "query mlp": ["--memory-query", "mlp"],
    "relu weights": ["--memory-score-activation", "relu"],
    "learned scale": ["--memory-learn-score-scale"],
    "output swilu": ["--memory-output", "swilu"],
    "values experts": ["--memory-values", "experts"],
    "value lr follows": ["--memory-value-lr-schedule", "follow"],
}
FOUND = ("ppl", "memory1_top1_usage", "memory1_topk_usage", "memory1_kl_weighted")
POLL = 0.5  # seconds
ARCHS = {"pkm": "pkm_roberta_tiny", "resm": "resm_roberta_tiny"}


def learned(
    data: Path,
    folder: Path,
    arm: str,
    preset: str,
    updates: int,
    seeds: Sequence[int],
    kinds: Sequence[str],
) -> Iterator[Tuple[str, int, Tuple[float, ...]]]:
    """Train each kind with each seed, one run after the other, and validate at the end.

    Args:
        data: made by fairseq-preprocess.
        folder: gets the logs.
        arm: "pkm" (memory in place of the FFN) or "resm" (memory beside it); both from scratch.
        preset: name of the demo's preset, for sizes.
        updates: of each run; the learning rate falls to 0 at the end.
        seeds: of weights, order of the data and masks.
        kinds: names of ``KINDS``.

    Yields:
        The kind, the seed, and perplexity, top-1 usage, top-k usage and weighted KL on the
        validation set.

    Raises:
        ValueError: a training failed; the message names its log and ends with the log's last line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = PRESETS[preset]
    warmup = min(sizes.warmup, updates // 10)
    for seed in seeds:
        settings = replace(sizes, seed=seed, interval=updates, warmup=warmup)
        for name in kinds:
            log = folder / f"{arm}_{name.replace(' ', '_')}_{seed}.log"
            flags = [*arm_flags("pkm", settings), "--arch", ARCHS[arm], *KINDS[name]]
            flags += ["--total-num-update", str(updates), "--max-update", str(updates)]
            command = [str(Path(sys.executable).parent / "fairseq-train"), str(data)]
            command += ["--user-dir", str(PACKAGE), "--no-save", *flags]
            _run(command, log)
            found = read_log(log, "valid")
            if not found or found[-1]["num_updates"] != updates:
                raise ValueError(f"a training ended without a validation: see {log}")
            yield name, seed, tuple(found[-1][key] for key in FOUND)


def spread(numbers: Sequence[float]) -> str:
    """The median and the range of the numbers."""
    return f"{median(numbers):.4g} ({min(numbers):.4g} to {max(numbers):.4g})"


def _run(command: List[str], log: Path) -> None:
    # in an empty folder: fairseq continues from a checkpoint that it finds, also with --no-save
    with TemporaryDirectory() as empty, log.open("wb") as out, Children() as children:
        command = [*command, "--save-dir", empty]
        child = children.start(command, out, environment={"OMP_NUM_THREADS": "1"})
        while child.status is None:
            children.pause(POLL)
    if child.status:
        raise ValueError(f"a training failed, see {log}: {last_line(log)}")

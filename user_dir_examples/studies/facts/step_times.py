#!/usr/bin/env python3
"""Measure how long an update of each arm takes, as a multiple of plain's.

The arms take turns, step by step, in one process with one thread. A step is forward, backward,
clipping and update of fairseq's trainer on people of the study; loading them is not timed. Writes
OUT/step_times.json: for each arm the median of the multiples, and their quartiles.
"""

import argparse
import json
import logging
import tempfile
from argparse import Namespace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List

import torch
from arms import SIZES, STEP_TIMES, WIDTHS, Run, Size
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from fairseq.utils import import_user_module
from train import data_of

from pkm_fairseq.experiments.benchmark.timing import interleave, quartiles
from pkm_fairseq.experiments.runs.folders import PACKAGE
from pkm_fairseq.memory.files import write_file

BATCHES = 4
ROUNDS = 42  # each order of six arms seven times


def runs_of(size: Size) -> List[Run]:
    """A run of each arm whose steps differ; INIT does not change a step."""
    settings = {"people": size.people, "updates": size.updates, "seed": 1, "lr": size.rates[0]}
    memory = {"value_lr": size.value_rates[0], "n_keys": size.n_keys}
    dense = [Run(arm, **settings) for arm in WIDTHS]
    return dense + [Run(arm, **settings, **memory) for arm in ("resm", "pkm")]


def steps_of(run: Run, data: Path, folder: str) -> Callable[[int], Callable[[], object]]:
    """Training steps on some batches of people, with a model as fairseq-train builds it."""
    flags = [str(data), "--user-dir", str(PACKAGE), *run.flags(), "--save-dir", folder]
    args = options.parse_args_and_arch(options.get_training_parser(), flags)
    cfg = convert_namespace_to_omegaconf(args)
    torch.manual_seed(run.seed)
    task = tasks.setup_task(cfg.task)
    task.load_dataset("train")
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    batches = task.get_batch_iterator(
        task.dataset("train"), max_sentences=cfg.dataset.batch_size, seed=run.seed
    ).next_epoch_itr()
    samples = list(islice(batches, BATCHES))
    return lambda turn: partial(trainer.train_step, [samples[turn % len(samples)]])


def measure(size: Size, out: Path, rounds: int = ROUNDS) -> Dict[str, Dict[str, Any]]:
    """The time of a step of each arm, as a multiple of plain's."""
    data = data_of(out, size.people)
    with tempfile.TemporaryDirectory() as folder:
        steps = {run.arm: steps_of(run, data, folder) for run in runs_of(size)}
        seconds = interleave(steps, rounds)
    found = {}
    for arm, took in seconds.items():
        multiples = [a / b for a, b in zip(took, seconds["plain"], strict=True)]
        low, high = quartiles(multiples)
        numbers = {"multiple": median(multiples), "low": low, "high": high}
        found[arm] = {name: round(number, 3) for name, number in numbers.items()}
    return found


def main() -> None:
    """Measure once; a second run keeps what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder that run.sh fills")
    parser.add_argument("--size", choices=SIZES, default="full")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq tells of each dictionary
    import_user_module(Namespace(user_dir=str(PACKAGE)))
    out = args.out.resolve()
    if not (out / STEP_TIMES).exists():
        print(f"timing {ROUNDS} steps of each arm", flush=True)
        write_file(out / STEP_TIMES, json.dumps(measure(SIZES[args.size], out), indent=1) + "\n")
    for arm, times in json.loads((out / STEP_TIMES).read_text()).items():
        print("{}: {multiple:.2f} ({low:.2f} to {high:.2f})".format(arm, **times))


if __name__ == "__main__":
    main()

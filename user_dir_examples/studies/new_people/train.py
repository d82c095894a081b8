#!/usr/bin/env python3
"""Run the study; finished runs are skipped. Each run ends with result.json in its folder."""

import argparse
import json
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Tuple

import low_rank  # registers the models with adapters
import torch
from arms import ARMS, BATCH_SIZE, HERE, SHARES, SIZES, Results, Run, Size, best, recall, runs_to_do
from torch import Tensor

from pkm_fairseq.experiments.demo.evaluate import load
from pkm_fairseq.experiments.facts.people import N_CONTROL, prepare_people
from pkm_fairseq.experiments.facts.recall import measure, read_people
from pkm_fairseq.experiments.facts.training import epoch_of
from pkm_fairseq.experiments.runs.folders import make_once
from pkm_fairseq.experiments.runs.study import (
    RESULT,
    claim,
    folder_of,
    read_results,
    refuse_unknown_arm,
    rows_per_update,
    train_and_measure,
)
from pkm_fairseq.experiments.runs.trainings import LAST
from pkm_fairseq.memory.delta import APART, VALUES
from pkm_fairseq.models.checkpoints import read_checkpoint

PUBLISHED = HERE / "results.json"
FOLLOWED = 2000  # old people whose recall is measured
USAGE = HERE.parents[2] / "scripts" / "memory_usage.py"


class Study:
    """The files of the study.

    Args:
        facts: the folder of the study of facts.
        out: the folder to fill.
        size: of the study.
    """

    def __init__(self, facts: Path, out: Path, size: Size) -> None:
        self.facts, self.out, self.size = facts, out, size
        self.old = facts / f"people{size.old}" / "bin"
        self.new = self._new_people()

    def _new_people(self) -> Path:
        new, skip = self.size.new, self.size.old + N_CONTROL
        make = partial(prepare_people, new, skip=skip)
        return make_once(self.out / f"people{new}", str(self.size), make) / "bin"

    def start(self, run: Run) -> Tuple[Path, int]:
        """The model that a run finetunes, and its number of sub-keys (0 without a memory).

        It was trained with the same seed and a constant rate of values. Of several, it is the one
        with fewest updates, most slots, and then the highest recall by name.
        """
        arm = ARMS[run.arm].start
        found: List[Tuple[Tuple[float, ...], Path, int]] = []
        for file in self.facts.glob(f"runs/*/{RESULT}"):
            result = json.loads(file.read_text())
            of = result["run"]
            if of.get("value_schedule") == "follow":
                continue
            if (of["arm"], of.get("people"), of["seed"]) == (arm, self.size.old, run.seed):
                recall = result["train"]["by_name"]["recall"]
                found.append(((-of["updates"], of["n_keys"], recall), file, of["n_keys"]))
        if not found:
            wanted = f"{arm} with {self.size.old:,} people and seed {run.seed}"
            raise SystemExit(f"{self.facts} has no finished run of {wanted}: run that study first")
        _, file, n_keys = max(found)
        return file.with_name(LAST), n_keys

    def counts(self, start: Path, seed: int) -> Dict[str, Path]:
        """How often old and new people read each slot of a start; counted if needed."""
        files = {}
        for name, data in (("old", self.old), ("new", self.new)):
            files[name] = file = self.out / f"counts.{name}.seed{seed}.pt"
            if not file.exists():
                command = [
                    sys.executable,
                    str(USAGE),
                    "--checkpoint",
                    str(start),
                    "--split",
                    "train",
                ]
                command += ["--data", str(data), "--tokens", "1000000", "--save-counts", str(file)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return files

    def flags(self, run: Run) -> List[str]:
        """Options of fairseq-train for a run."""
        start, n_keys = self.start(run)
        counts = self.counts(start, run.seed) if ARMS[run.arm].slots else {}
        flags = [str(self.new), "--user-dir", str(Path(low_rank.__file__).parent)]
        return [*flags, "--finetune-from-model", str(start), *run.flags(self.size, n_keys, counts)]

    def measure(self, run: Run) -> Dict[str, Any]:
        """The recall of old and new people at the start and on the way, and what has changed."""
        folder, (start, _) = folder_of(self.out, run), self.start(run)
        epoch = epoch_of(self.size.new, BATCH_SIZE)
        way = [{"updates": 0, **self._recall(start)}]
        for share in SHARES:
            updates = self.size.updates // share
            checkpoint = folder / f"checkpoint{updates // epoch}.pt"
            way.append({"updates": updates, **self._recall(checkpoint)})
        before, after = (read_checkpoint(str(f), "study:")["model"] for f in (start, folder / LAST))
        for file in folder.glob("checkpoint*.pt"):
            file.unlink()
        return {"way": way, "change": change(before, after), **rows_per_update(folder)}

    def _recall(self, checkpoint: Path) -> Dict[str, Any]:
        loaded = load(checkpoint, self.new)
        found = {}
        for name, data, split in (
            ("old", self.old, "train"), ("new", self.new, "train"), ("control", self.new, "test"),
        ):  # fmt: skip
            people = read_people(data, split, loaded.task.source_dictionary)[:FOLLOWED]
            asked = measure(loaded.model, loaded.task.mask_idx, people)
            found[name] = {
                question: {key: round(value, 6) for key, value in asked[question].items()}
                for question in ("by_name", "with_others")
            }
        return found

    def results(self) -> Results:
        """What finished runs found."""
        return {Run(**result["run"]): result for result in read_results(self.out)}


def change(before: Dict[str, Tensor], after: Dict[str, Tensor]) -> Dict[str, int]:
    """What must be stored to make a finetuned model from its start.

    Returns:
        ``rows`` of values that differ, and ``bytes``: these rows with a slot of 8 bytes each, and
        all other tensors that differ or are new.
    """
    rows = size = 0
    for name, now in after.items():
        was = before.get(name.replace(low_rank.ORIGINAL, "weight"))
        if APART.search(name) or (was is not None and torch.equal(was, now)):
            continue
        if was is not None and VALUES.search(name):
            moved = int((was != now).any(dim=1).sum())
            rows += moved
            size += moved * (8 + now[0].numel() * now.element_size())
        else:
            size += now.numel() * now.element_size()
    return {"rows": rows, "bytes": size}


def train_all(study: Study, runs: List[Run], workers: int) -> None:
    """Train and measure runs."""

    def describe(result: Dict[str, Any]) -> str:
        shares = (100 * result["way"][-1][who]["with_others"]["recall"] for who in ("new", "old"))
        return "new {:.1f} %, old {:.1f} %".format(*shares)

    train_and_measure(
        runs,
        study.out,
        workers,
        lambda run: study.size.updates,
        study.flags,
        study.measure,
        describe,
    )


def check(study: Study, arm: str) -> None:
    """Train the best run of an arm again, with the first seed, and compare what it keeps."""
    known = {Run(**result["run"]): result for result in read_results(PUBLISHED)}
    refuse_unknown_arm(arm, {run.arm for run in known})
    run = best(known, study.size, arm)
    train_all(study, [run], workers=1)
    for where, result in (("here", study.results()[run]), ("in results.json", known[run])):
        shares = (100 * recall(result["way"][-1], people) for people in ("old", "new"))
        print("{}, {}: old {:.1f} %, new {:.1f} %".format(run.name, where, *shares))


def main() -> None:
    """Train with the first seed, then with the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts", type=Path, help="the folder of the study of facts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--check",
        metavar="ARM",
        help="train only this arm, as the best run of results.json did, and compare the recall",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq tells of each dictionary
    out = args.out.resolve()
    claim(out, args.size)
    study = Study(args.facts.resolve(), out, SIZES[args.size])
    if args.check:
        return check(study, args.check)
    while runs := runs_to_do(study.size, study.results()):
        train_all(study, runs, args.workers)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None

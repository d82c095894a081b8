#!/usr/bin/env python3
"""Run the study; finished runs are skipped. Each run ends with result.json in its folder."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Dict, List

import torch
from arms import SIZES, WAVES, Results, Run, best

from pkm_fairseq.experiments.demo.evaluate import load, parameter_count
from pkm_fairseq.experiments.facts.people import prepare_people
from pkm_fairseq.experiments.facts.recall import measure, read_people
from pkm_fairseq.experiments.facts.training import epoch_of
from pkm_fairseq.experiments.runs.folders import PACKAGE, make_once
from pkm_fairseq.experiments.runs.study import (
    claim,
    folder_of,
    is_finished,
    read_results,
    refuse_unknown_arm,
    train_and_measure,
)
from pkm_fairseq.experiments.runs.trainings import LAST

PUBLISHED = Path(__file__).with_name("results.json")
FOLLOWED = 2000  # people whose recall is measured on earlier checkpoints


def half_of(folder: Path, run: Run) -> Path:
    """The checkpoint of a run after half of its updates."""
    return folder / f"checkpoint{run.updates // 2 // epoch_of(run.people)}.pt"


def data_of(out: Path, people: int) -> Path:
    """The data for this number of people, made if needed."""
    make = partial(prepare_people, people)
    return make_once(out / f"people{people}", str(people), make) / "bin"


def measure_run(run: Run, folder: Path, data: Path) -> Dict[str, Any]:
    """The recall of a finished run, and of its earlier checkpoints."""
    loaded = load(folder / LAST, data)
    found = {"parameters": parameter_count(loaded.model)}
    dictionary, mask = loaded.task.source_dictionary, loaded.task.mask_idx
    people = read_people(data, "train", dictionary)
    found["train"] = measure(loaded.model, mask, people, ablate=True)
    found["control"] = measure(loaded.model, mask, read_people(data, "test", dictionary))
    found["control"].pop("memory", None)
    way = {}
    for file in folder.glob("checkpoint[0-9]*.pt"):
        asked = measure(load(file, data).model, mask, people[:FOLLOWED])
        asked.pop("memory", None)
        updates = int(file.stem.removeprefix("checkpoint")) * epoch_of(run.people)
        way[updates + run.updates - run.own_updates] = asked
    found["way"] = dict(sorted(way.items()))
    return found


def train_all(runs: List[Run], out: Path, workers: int) -> None:
    """Train and measure the runs that are not finished."""

    def flags(run: Run) -> List[str]:
        found = [str(data_of(out, run.people)), "--user-dir", str(PACKAGE), *run.flags()]
        if run.start:
            found += ["--init-from", str(half_of(folder_of(out, run.start), run.start))]
        return found

    def measure_and_tidy(run: Run) -> Dict[str, Any]:
        folder = folder_of(out, run)
        found = measure_run(run, folder, data_of(out, run.people))
        kept = {folder / LAST} | ({half_of(folder, run)} if run.arm == "plain" else set())
        for file in set(folder.glob("checkpoint*.pt")) - kept:
            file.unlink()
        return found

    def describe(result: Dict[str, Any]) -> str:
        return f"recall by name {100 * result['train']['by_name']['recall']:.1f} %"

    def is_ready(run: Run) -> bool:
        return not run.start or is_finished(out, run.start)

    train_and_measure(
        runs, out, workers, lambda run: run.own_updates, flags, measure_and_tidy, describe, is_ready
    )


def recalls_of(results: List[Dict[str, Any]]) -> Results:
    """Recall by name of results, by run."""
    return {Run(**result["run"]): result["train"]["by_name"]["recall"] for result in results}


def check(arm: str, out: Path) -> None:
    """Train the best run of an arm again, and what it starts from."""
    known = recalls_of(read_results(PUBLISHED))
    refuse_unknown_arm(arm, {run.arm for run in known})
    run = best(known, SIZES["full"], arm)
    train_all([run.start, run] if run.start else [run], out, workers=1)
    found, before = recalls_of(read_results(out))[run], known[run]
    print(f"{run.name}: recall by name {100 * found:.2f} %, in results.json {100 * before:.2f} %")


def main() -> None:
    """Train wave by wave."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    out = args.out.resolve()
    claim(out, args.size)
    if args.check:
        return check(args.check, out)
    for wave in WAVES:
        runs = wave(SIZES[args.size], recalls_of(read_results(out)))
        starts = [run.start for run in runs if run.start]
        train_all([*starts, *runs], out, args.workers)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None

#!/usr/bin/env python3
"""Run the study; finished runs are skipped. Each run ends with result.json in its folder."""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List

import torch
from arms import SIZES, WAVES, Results, Run, best

from pkm_fairseq.experiments.demo.evaluate import load, parameter_count
from pkm_fairseq.experiments.facts.people import prepare_people
from pkm_fairseq.experiments.facts.recall import measure, read_people
from pkm_fairseq.experiments.facts.training import epoch_of
from pkm_fairseq.experiments.runs.folders import PACKAGE, begin, finish
from pkm_fairseq.experiments.runs.logs import last_line, read_log
from pkm_fairseq.experiments.runs.processes import Child, Children
from pkm_fairseq.experiments.runs.progress import RunsProgress
from pkm_fairseq.experiments.runs.trainings import LAST, LOG, clear, run_all, start_training
from pkm_fairseq.memory.files import write_file

RESULT = "result.json"
PUBLISHED = Path(__file__).with_name("results.json")
FOLLOWED = 2000  # people whose recall is measured on earlier checkpoints


def half_of(folder: Path, run: Run) -> Path:
    """The checkpoint of a run after half of its updates."""
    return folder / f"checkpoint{run.updates // 2 // epoch_of(run.people)}.pt"


def data_of(out: Path, people: int) -> Path:
    """The data for this number of people, made if needed."""
    folder = out / f"people{people}"
    if begin(folder, str(people)):
        prepare_people(people, folder)
        finish(folder, str(people))
    return folder / "bin"


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
    waiting = [run for run in runs if not (out / "runs" / run.name / RESULT).exists()]
    waiting = list(dict.fromkeys(waiting))
    if not waiting:
        return

    def start(children: Children, run: Run, worker: int) -> Child:
        folder = out / "runs" / run.name
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        flags = [str(data_of(out, run.people)), "--user-dir", str(PACKAGE), *run.flags()]
        if run.start:
            flags += ["--init-from", str(half_of(out / "runs" / run.start.name, run.start))]
        return start_training(children, folder, flags, {"OMP_NUM_THREADS": "1"})

    def show(run: Run) -> None:
        logged = read_log(out / "runs" / run.name / LOG, "train_inner")
        if logged:
            updates = int(logged[-1]["num_updates"])
            progress.show(run.name, updates, run.own_updates, f"loss {logged[-1]['loss']:.2f}")

    def end(run: Run, status: int) -> None:
        folder = out / "runs" / run.name
        if status or not (folder / LAST).exists():
            raise SystemExit(f"{run.name} failed, see {folder / LOG}: {last_line(folder / LOG)}")
        result = {"run": vars(run), **measure_run(run, folder, data_of(out, run.people))}
        kept = {folder / LAST} | ({half_of(folder, run)} if run.arm == "plain" else set())
        for file in set(folder.glob("checkpoint*.pt")) - kept:
            file.unlink()
        write_file(folder / RESULT, json.dumps(result, indent=1) + "\n")
        progress.end(run.name, f"recall by name {100 * result['train']['by_name']['recall']:.1f} %")

    def is_ready(run: Run) -> bool:
        return not run.start or (out / "runs" / run.start.name / RESULT).exists()

    with RunsProgress(len(waiting), interval=120) as progress:
        run_all(waiting, workers, start, show, end, is_ready)


def read_results(out: Path) -> Results:
    """Recall by name of all finished runs."""
    return recalls_of([json.loads(file.read_text()) for file in out.glob(f"runs/*/{RESULT}")])


def recalls_of(results: List[Dict[str, Any]]) -> Results:
    """Recall by name of results, by run."""
    return {Run(**result["run"]): result["train"]["by_name"]["recall"] for result in results}


def check(arm: str, out: Path) -> None:
    """Train the best run of an arm again, and what it starts from."""
    known = recalls_of(json.loads(PUBLISHED.read_text()))
    if not any(run.arm == arm for run in known):
        arms = ", ".join(sorted({run.arm for run in known}))
        raise SystemExit(f"--check is {arm!r}, must be an arm of results.json: {arms}")
    run = best(known, SIZES["full"], arm)
    train_all([run.start, run] if run.start else [run], out, workers=1)
    found, before = read_results(out)[run], known[run]
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
    if args.check:
        return check(args.check, out)
    for wave in WAVES:
        runs = wave(SIZES[args.size], read_results(out))
        starts = [run.start for run in runs if run.start]
        train_all([*starts, *runs], out, args.workers)


if __name__ == "__main__":
    main()

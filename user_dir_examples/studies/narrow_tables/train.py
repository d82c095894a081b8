#!/usr/bin/env python3
"""Run the study; finished runs are skipped. Each run ends with result.json in its folder."""

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any, Dict, List

import torch
from arms import SEEDS, SIZES, Run, half_epochs, runs_in_order

from pkm_fairseq.experiments.demo.evaluate import evaluate, load, masked_batches
from pkm_fairseq.experiments.facts.people import prepare_people
from pkm_fairseq.experiments.facts.recall import measure, read_people
from pkm_fairseq.experiments.runs.folders import PACKAGE, make_once
from pkm_fairseq.experiments.runs.study import claim, folder_of, is_finished, train_and_measure
from pkm_fairseq.experiments.runs.trainings import LAST


def measured(run: Run, folder: Path, data: Path) -> Dict[str, Any]:
    """The perplexity of the test text, or the recall by name."""
    loaded = load(folder / LAST, data)
    if run.task == "text":
        found = evaluate(loaded.model, masked_batches(loaded.task), loaded.task)
        return {"perplexity": round(found.ppl, 5)}
    people = read_people(data, "train", loaded.task.source_dictionary)
    return {"recall": measure(loaded.model, loaded.task.mask_idx, people)["by_name"]["recall"]}


def train_all(text: Path, out: Path, name: str, workers: int) -> None:
    """Train and measure the runs of a size that are not finished."""
    size = SIZES[name]
    people = size.facts.people
    facts = make_once(out / f"people{people}", str(people), partial(prepare_people, people))
    data = {"text": text, "facts": facts / "bin"}

    def flags(run: Run) -> List[str]:
        found = [str(data[run.task]), "--user-dir", str(PACKAGE), *run.flags(size)]
        if run.start:
            half = folder_of(out, run.start) / f"checkpoint{half_epochs(size)}.pt"
            found += ["--init-from", str(half)]
        return found

    def describe(result: Dict[str, Any]) -> str:
        if "perplexity" in result:
            return f"perplexity {result['perplexity']:.3f}"
        return f"recall by name {100 * result['recall']:.1f} %"

    def is_ready(run: Run) -> bool:
        return not run.start or is_finished(out, run.start)

    train_and_measure(
        runs_in_order(SEEDS[name]),
        out,
        workers,
        lambda run: run.updates(size),
        flags,
        lambda run: measured(run, folder_of(out, run), data[run.task]),
        describe,
        is_ready,
    )


def main() -> None:
    """Train all runs in their order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the demo's data-bin")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq tells of each dictionary
    out = args.out.resolve()
    claim(out, args.size)
    train_all(args.data.resolve(), out, args.size, args.workers)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None

#!/usr/bin/env python3
"""Run the study; finished runs are skipped. Each run ends with result.json in its folder."""

import argparse
import json
import logging
import lzma
import os
import re
from pathlib import Path
from typing import Any, Dict, List

import torch
from arms import ARMS, SIZES, Run, Size, run_of, runs_in_order

from pkm_fairseq.experiments.data.prepare import (
    SPLITS,
    binarise,
    load_sentencepiece,
    train_sentencepiece,
    write_lines,
)
from pkm_fairseq.experiments.demo.evaluate import ablations, evaluate, load, masked_batches
from pkm_fairseq.experiments.runs.folders import PACKAGE, begin, finish, key_of, key_of_files
from pkm_fairseq.experiments.runs.study import (
    RESULT,
    claim,
    folder_of,
    is_finished,
    read_results,
    refuse_unknown_arm,
    train_and_measure,
)
from pkm_fairseq.experiments.runs.trainings import LAST
from pkm_fairseq.memory.observe.log import read_usage_log

PUBLISHED = Path(__file__).with_name("results.json")
SAMPLE = 10  # sentencepiece is trained on every tenth line
CUT = re.compile(r"(?<=[.!?;,:])\s+")  # after punctuation
HALF = "half"  # what --check takes beside the arms
SUMMARY = ("layer", "draws_per_slot", "top1_usage", "topk_usage", "top1_ceiling", "kl_weighted",
           "effective_neighbours")  # fmt: skip


def prepare(books: Path, out: Path, size: Size) -> Path:
    """The data for fairseq, made if needed."""
    files = [books / f"{split}.txt.xz" for split in SPLITS]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise SystemExit(f"no file {missing[0]}")
    folder, key = out / "data", key_of(size.vocabulary, CUT.pattern, key_of_files(*files))
    if begin(folder, key):
        texts = {split: read_book(file) for split, file in zip(SPLITS, files, strict=True)}
        model = folder / "spm.model"
        model.write_bytes(train_sentencepiece(texts["train"][::SAMPLE], size.vocabulary))
        tokenizer = load_sentencepiece(model)
        for split, lines in texts.items():
            encoded = (" ".join(tokenizer.encode(line, out_type=str)) for line in lines)
            write_lines(folder / f"{split}.pieces", encoded)
        pieces = {split: folder / f"{split}.pieces" for split in SPLITS}
        binarise(pieces, folder / "bin", workers=os.cpu_count() or 1)
        finish(folder, key)
    return folder / "bin"


def read_book(file: Path) -> List[str]:
    """The text of a file, cut into parts of sentences."""
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return [part for line in lines if line.strip() for part in CUT.split(line.strip())]


def half_of(folder: Path, run: Run) -> Path:
    """The checkpoint of a run after half of its updates."""
    (file,) = folder.glob(f"checkpoint_*_{run.updates // 2}.pt")
    return file


def measure(run: Run, folder: Path, data: Path) -> Dict[str, Any]:
    """Perplexity and usage on the test books, plain's at its half, and usage on the way."""
    loaded = load(folder / LAST, data)
    batches = masked_batches(loaded.task)
    result = evaluate(loaded.model, batches, loaded.task)
    found: Dict[str, Any] = {"perplexity": round(result.ppl, 4)}
    if run.arm == "plain" and not run.stops_at_half:
        half = load(half_of(folder, run), data).model
        found["half"] = round(evaluate(half, batches, loaded.task).ppl, 4)
    if run.n_keys:
        (usage,) = result.memory
        found["usage"] = summary(usage)
        found["ablated"] = {
            kind: round(perplexity, 4)
            for kind, perplexity in ablations(loaded.model, batches, loaded.task)["all"].items()
        }
        found["way"] = way(folder / "memory_usage.jsonl", run.updates - run.own_updates)
    return found


def summary(usage: Dict[str, Any]) -> Dict[str, float]:
    """The main numbers of a count of usage."""
    return {name: round(usage[name], 5) for name in SUMMARY if name in usage}


def way(file: Path, updates_before: int) -> List[Dict[str, Any]]:
    """Usage and age of first choices in training, at the updates of the whole schedule."""
    _, counts = read_usage_log(file)
    found = []
    for count in counts:
        if count["split"] == "train":
            (layer,) = count["layers"]
            first = layer["staleness"]["top1"]
            stale = {"older_than_1000": first["outdated"]["1000"], "never": first["never"]}
            moved = {"values_moved": round(layer["staleness"]["moved"]["p50"], 4)}
            at = {"updates": count["update"] + updates_before}
            found.append({**at, **summary(layer), **stale, **moved})
    return found


def describe(result: Dict[str, Any]) -> str:
    """A result in one line."""
    usage = result.get("usage")
    top1 = f", top-1 usage {100 * usage['top1_usage']:.1f} %" if usage else ""
    return f"perplexity {result['perplexity']:.2f}{top1}"


def train_all(runs: List[Run], out: Path, data: Path, size: Size, workers: int) -> None:
    """Train and measure the runs that are not finished."""

    def flags(run: Run) -> List[str]:
        found = [str(data), "--user-dir", str(PACKAGE), *run.flags(size)]
        if run.start:
            found += ["--init-from", str(half_of(folder_of(out, run.start), run.start))]
        return found

    def measure_run(run: Run) -> Dict[str, Any]:
        return measure(run, folder_of(out, run), data)

    def is_ready(run: Run) -> bool:
        return not run.start or is_finished(out, run.start)

    train_and_measure(
        runs, out, workers, lambda run: run.own_updates, flags, measure_run, describe, is_ready
    )


def check(arm: str, books: Path, out: Path) -> None:
    """Train an arm again, and what it starts from, with the first seed and fewest slots."""
    size = SIZES["full"]
    first, few = size.seeds[0], size.n_keys[0]
    known = {Run(**result["run"]): result for result in read_results(PUBLISHED)}
    runs = {name: run_of(size, name, first, few) for name in ARMS}
    refuse_unknown_arm(arm, {HALF, *(name for name, run in runs.items() if run in known)})
    run, data = runs[arm], prepare(books, out, size)
    train_all([run.start, run] if run.start else [run], out, data, size, workers=1)
    found = json.loads((folder_of(out, run) / RESULT).read_text())
    for where, result in (("here", found), ("in results.json", known[run])):
        print(f"{run.name}, {where}: {describe(result)}")


def check_half(books: Path, out: Path) -> None:
    """Train plain again up to its half, where arms with INIT start, with the first seed."""
    size = SIZES["full"]
    run = Run("plain", size.seeds[0], size.updates, stops_at_half=True)
    train_all([run], out, prepare(books, out, size), size, workers=1)
    found = json.loads((folder_of(out, run) / RESULT).read_text())
    print(f"{run.name}, here: {describe(found)}")
    for result in read_results(PUBLISHED):
        if "half" in result:
            seed, half = result["run"]["seed"], result["half"]
            print(f"plain's half, in results.json, seed {seed}: perplexity {half:.2f}")


def main() -> None:
    """Prepare the text, and train all runs in their order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("books", type=Path, help="folder with {train,valid,test}.txt.xz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--check",
        metavar="ARM",
        help="train only this arm, with the first seed and fewest slots, and compare the result; "
        f"{HALF}: only the first half of plain, which takes the least time",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq tells of each dictionary
    size, out, books = SIZES[args.size], args.out.resolve(), args.books.resolve()
    if args.check and (args.seeds or args.size != "full"):
        parser.error("--check has its own seed and size: leave out --seeds and --size")
    claim(out, args.size)
    if args.check:
        return check_half(books, out) if args.check == HALF else check(args.check, books, out)
    data = prepare(books, out, size)
    runs = [run for run in runs_in_order(size) if run.seed in (args.seeds or size.seeds)]
    train_all(runs, out, data, size, args.workers)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None

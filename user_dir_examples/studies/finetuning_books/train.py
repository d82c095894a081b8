#!/usr/bin/env python3
"""Run the study; finished runs are skipped. Each run ends with result.json in its folder."""

import argparse
import logging
import lzma
import subprocess
import sys
from argparse import Namespace
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List

import torch
from arms import HERE, LOW_RANK, PARTS, SIZES, Run, Size, runs_of
from fairseq.utils import import_user_module

from pkm_fairseq.experiments.data.prepare import binarise, load_sentencepiece, write_lines
from pkm_fairseq.experiments.demo.evaluate import Loaded, evaluate, load, masked_batches
from pkm_fairseq.experiments.runs.folders import key_of_files, make_once
from pkm_fairseq.experiments.runs.study import claim, folder_of, rows_per_update, train_and_measure
from pkm_fairseq.experiments.runs.trainings import LAST

NEW = "Immanuel Kant — Critique of Pure Reason"
SPLITS = {"old": "test", "new": "valid"}  # of each text, the split that is evaluated
TOKENS = {"old": 200_000, "new": 100_000}  # that reads of slots are counted on
USAGE = HERE.parents[2] / "scripts" / "memory_usage.py"


def read_book(folder: Path, title: str) -> List[str]:
    """The lines of a book."""
    titles = (folder / "train.titles.txt").read_text(encoding="utf-8").splitlines()
    with lzma.open(folder / "train.txt.xz", "rt", encoding="utf-8") as file:
        books = file.read().strip("\n").split("\n\n")
    if len(books) != len(titles) or title not in titles:
        raise SystemExit(f"{folder}: {len(books)} books, {len(titles)} titles, or none is {title}")
    return books[titles.index(title)].splitlines()


class Study:
    """The files of the study.

    Args:
        demo: the folder that the demo wrote.
        books: the folder with train.txt.xz and its titles.
        out: the folder to fill.
        size: of the study.
    """

    def __init__(self, demo: Path, books: Path, out: Path, size: Size) -> None:
        self.demo, self.books, self.out, self.size = demo, books, out, size
        self.data = {"old": demo / "data" / "bin", "new": self._new_text()}

    def _new_text(self) -> Path:
        """The new book in the tokens of the demo; its last tenth is for validation."""

        def make(folder: Path) -> None:
            lines = read_book(self.books, NEW)
            tokenizer = load_sentencepiece(self.demo / "data" / "spm.model")
            pieces = [" ".join(line) for line in tokenizer.encode(lines, out_type=str)]
            border = len(lines) * 9 // 10
            files = {}
            for split, part in (("train", pieces[:border]), ("valid", pieces[border:])):
                files[split] = folder / f"{split}.pieces"
                write_lines(files[split], part)
            binarise(files, folder / "bin", self.demo / "data" / "bin" / "dict.txt")

        key = key_of_files(self.books / "train.txt.xz", self.demo / "data" / "spm.model")
        return make_once(self.out / "new", key, make) / "bin"

    def start(self, arm: str) -> Path:
        """A model of the demo."""
        return self.demo / "arms" / arm / LAST

    @cached_property
    def counts(self) -> Dict[str, Path]:
        """How often both texts read each slot of the start, counted if needed."""
        files = {}
        for text, data in self.data.items():
            files[text] = file = self.out / f"counts.{text}.pt"
            if not file.exists():
                command = [sys.executable, str(USAGE), "--checkpoint", str(self.start("resm_init"))]
                command += ["--data", str(data), "--split", "train", "--tokens", str(TOKENS[text])]
                command += ["--save-counts", str(file)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return files

    @cached_property
    def held_out(self) -> Dict[str, Any]:
        """Batches of both texts; the task of the start masks the same tokens for all models."""
        tasks = {text: load(self.start("resm_init"), data).task for text, data in self.data.items()}
        return {text: masked_batches(task, SPLITS[text]) for text, task in tasks.items()}

    @cached_property
    def starts(self) -> Dict[str, Dict[str, float]]:
        """Perplexities of the models that are finetuned."""
        return {arm: self.perplexities(self.start(arm)) for arm in ("resm_init", "plain")}

    def perplexities(self, checkpoint: Path) -> Dict[str, float]:
        """Perplexity of both texts."""
        found = {}
        for text, batches in self.held_out.items():
            loaded: Loaded = load(checkpoint, self.data[text])
            found[text] = round(evaluate(loaded.model, batches, loaded.task).ppl, 4)
        return found

    def flags(self, run: Run) -> List[str]:
        """Options of fairseq-train for a run."""
        flags = [str(self.data["new"]), "--user-dir", str(LOW_RANK)]
        flags += ["--finetune-from-model", str(self.start(run.start))]
        return [*flags, *run.flags(self.size, self.counts if run.kind == "slots" else {})]

    def measure(self, run: Run) -> Dict[str, Any]:
        """Perplexity before and after, and how many rows an update read and moved."""
        folder = folder_of(self.out, run)
        perplexities = {"start": self.starts[run.start], **self.perplexities(folder / LAST)}
        return {**perplexities, **rows_per_update(folder)}


def main() -> None:
    """Train and measure the runs that are not finished."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="the folder that the demo wrote")
    parser.add_argument("books", type=Path, help="the folder with train.txt.xz and its titles")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=[*PARTS], help="only these")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq tells of each dictionary
    import_user_module(Namespace(user_dir=str(LOW_RANK)))
    size, out = SIZES[args.size], args.out.resolve()
    claim(out, args.size)
    study = Study(args.demo.resolve(), args.books.resolve(), out, size)

    def describe(result: Dict[str, Any]) -> str:
        return f"perplexity of old text {result['old']:.2f}, of new {result['new']:.2f}"

    train_and_measure(
        [run for part in args.parts for run in runs_of(size, part)],
        out,
        args.workers,
        lambda run: size.updates,
        study.flags,
        study.measure,
        describe,
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None

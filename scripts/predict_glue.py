#!/usr/bin/env python3
"""Predictions of finetuned models: the files for GLUE's server, or of your own sentences.

--zip FILE predicts the test sets. --stdin reads an example a line, the two sentences of a pair
separated by a tab, and prints for each its label and probability, or its score.
"""

import argparse
import sys
from pathlib import Path
from typing import Dict, List

from _script import run

from pkm_fairseq.experiments.glue.predict import (
    Finetuned,
    best_checkpoint,
    load_finetuned,
    predict_lines,
    predict_tests,
)
from pkm_fairseq.experiments.glue.submission import missing_files, write_zip
from pkm_fairseq.experiments.glue.tasks import TASKS, TaskSpec, load_task_spec, task_names
from pkm_fairseq.experiments.glue.tokenizers import saved_tokenizer


def main() -> None:
    """Predict."""
    args = parse()
    specs = chosen_tasks(args)
    if args.stdin:
        finetuned = load(args, specs[0])
        tokenizer = saved_tokenizer(args.data / "tokenizer")
        print(*predict_lines(finetuned, sys.stdin.buffer, tokenizer), sep="\n")
        return
    contents: Dict[str, str] = {}
    for spec in specs:
        contents.update(predict_tests(load(args, spec), args.data / spec.name))
    write_zip(args.zip, contents)
    print(f"{', '.join(contents)} in {args.zip}")
    missing = missing_files(contents)
    if missing and any(spec.name in TASKS for spec in specs):
        print(f"GLUE's server wants besides: {', '.join(missing)}")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, metavar="FILE", help="finetuned on one task")
    model.add_argument(
        "--runs", type=Path, metavar="DIR", help="an arm's folder of finetuned tasks: best seeds"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="made by prepare_glue.py"
    )
    parser.add_argument(
        "--tasks",
        "--task",
        nargs="+",
        metavar="TASK",
        help="default: all of --runs; with --checkpoint: its one task",
    )
    parser.add_argument("--task-spec", type=Path, metavar="FILE", help="yaml: a task of your own")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--zip", type=Path, metavar="FILE", help="write the submission here")
    output.add_argument("--stdin", action="store_true", help="predict sentences of standard input")
    return parser.parse_args()


def chosen_tasks(args: argparse.Namespace) -> List[TaskSpec]:
    """The tasks of the options."""
    specs = task_names(args.tasks) if args.tasks else []
    specs += [load_task_spec(args.task_spec)] if args.task_spec else []
    if not specs and args.runs:
        specs = [spec for name, spec in TASKS.items() if (args.runs / name).is_dir()]
        if not specs:
            raise ValueError(f"--runs {args.runs} has no folder of a task: {', '.join(TASKS)}")
    if (args.checkpoint or args.stdin) and len(specs) != 1:
        option = "--stdin" if args.stdin else "--checkpoint"
        raise ValueError(f"{option} is for one task, not {len(specs)}: name it with --tasks")
    return specs


def load(args: argparse.Namespace, spec: TaskSpec) -> Finetuned:
    """The model of a task."""
    checkpoint = args.checkpoint or best_checkpoint(args.runs / spec.name, spec)
    return load_finetuned(checkpoint, args.data / spec.name, spec)


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
"""Predict with finetuned models: the files for GLUE's server, or your own sentences.

--zip FILE predicts the test sets. --stdin reads one example per line, with a tab between the two
sentences of a pair, and prints its label and probability, or its score. --ablate measures how much
the memories contribute: dev metrics with zeroed values, with values permuted among the slots, and
with only the first choice of each head.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List

from _script import check_output, run

from pkm_fairseq.experiments.glue.ablate import ablations, dev_metrics
from pkm_fairseq.experiments.glue.data import prepared_tasks
from pkm_fairseq.experiments.glue.predict import (
    Finetuned,
    best_checkpoint,
    load_finetuned,
    predict_lines,
    predict_tests,
)
from pkm_fairseq.experiments.glue.submission import missing_files, write_zip
from pkm_fairseq.experiments.glue.tasks import (
    TASKS,
    TOKENIZER,
    TaskSpec,
    load_task_spec,
    task_names,
)
from pkm_fairseq.experiments.glue.tokenizers import saved_tokenizer
from pkm_fairseq.memory.files import write_file


def main() -> None:
    """Predict."""
    args = parse()
    specs = chosen_tasks(args)
    if args.stdin:
        finetuned = load(args, specs[0])
        tokenizer = saved_tokenizer(args.data / TOKENIZER)
        print(*predict_lines(finetuned, sys.stdin.buffer, tokenizer), sep="\n")
        return
    if args.ablate:
        found = [ablate(args, spec) for spec in specs]
        if args.json:
            write_file(args.json, json.dumps(found, indent=2, allow_nan=False) + "\n")
        return
    contents: Dict[str, str] = {}
    for spec in specs:
        contents.update(predict_tests(load(args, spec), args.data / spec.name))
    write_zip(args.zip, contents)
    print(f"{', '.join(contents)} in {args.zip}")
    missing = missing_files(contents)
    if missing and any(spec.name in TASKS for spec in specs):
        print(f"GLUE's server also needs: {', '.join(missing)}")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="model finetuned on one task"
    )
    model.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help="an arm's folder of finetuned tasks; takes the best seeds",
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder made by prepare_glue.py"
    )
    parser.add_argument(
        "--tasks",
        "--task",
        nargs="+",
        metavar="TASK",
        help="default: all tasks of --runs; --checkpoint and --stdin need exactly one",
    )
    parser.add_argument("--task-spec", type=Path, metavar="FILE", help="yaml file of your own task")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument(
        "--zip", type=Path, metavar="FILE", help="write the submission to this file"
    )
    output.add_argument(
        "--stdin", action="store_true", help="predict sentences from standard input"
    )
    output.add_argument("--ablate", action="store_true", help="dev metrics with ablated memories")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results of --ablate")
    args = parser.parse_args()
    if args.json and not args.ablate:
        raise ValueError("--json has no effect without --ablate")
    check_output("--json", args.json)
    if args.zip and args.zip.is_dir():  # its folder may be new
        raise ValueError(f"--zip {args.zip} is a folder, must be a file")
    return args


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
        raise ValueError(f"{option} needs one task, not {len(specs)}: choose it with --tasks")
    return specs


def checkpoint_of(args: argparse.Namespace, spec: TaskSpec) -> Path:
    """The checkpoint of a task."""
    return args.checkpoint or best_checkpoint(args.runs / spec.name, spec)


def load(args: argparse.Namespace, spec: TaskSpec) -> Finetuned:
    """The model of a task."""
    return load_finetuned(checkpoint_of(args, spec), args.data / spec.name, spec)


def ablate(args: argparse.Namespace, spec: TaskSpec) -> Dict[str, Any]:
    """Print the dev metrics of a task's model, intact and with ablated memories."""
    checkpoint = checkpoint_of(args, spec)
    finetuned = load_finetuned(checkpoint, args.data / spec.name, spec)
    (task,) = prepared_tasks(args.data, [spec.name])
    whole, parts = dev_metrics(finetuned, task), ablations(finetuned, task)
    print(f"{spec.name}: {checkpoint}: {said(whole)}")
    if not parts:
        print("  no memory to ablate")
    for part, kinds in parts.items():
        name = "all memories" if part == "all" else f"memory of layer {part}"
        print(f"  {name} ablated: " + "; ".join(f"{kind} {said(x)}" for kind, x in kinds.items()))
    found = {"task": spec.name, "checkpoint": str(checkpoint), "dev": whole}
    return {**found, "ablations": parts.pop("all", None), "ablations_by_layer": parts}


def said(metrics: Dict[str, float]) -> str:
    """Metrics in words."""
    return ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
"""Turn GLUE's tasks into data for fairseq: read, check, tokenise, binarise.

The script reads the official download, one folder per task, and writes data for
fairseq-train --task pkm_sentence_prediction. It skips finished tasks.
"""

import argparse
from pathlib import Path

from _script import run

from pkm_fairseq.experiments.glue.prepare import prepare
from pkm_fairseq.experiments.glue.tasks import TASKS, load_task_spec, task_names
from pkm_fairseq.experiments.glue.tokenizers import Tokenizer


def main() -> None:
    """Prepare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--glue-data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"tasks among {' '.join(TASKS)} (default: all; with --task-spec: none)",
    )
    parser.add_argument(
        "--task-spec",
        type=Path,
        metavar="FILE",
        help="yaml file of your own task, see user_dir_examples/glue/task_spec_example.yaml",
    )
    parser.add_argument(
        "--dict", type=Path, required=True, metavar="FILE", help="the pretrained model's dict.txt"
    )
    parser.add_argument("--bpe", required=True, choices=["sentencepiece", "gpt2"])
    parser.add_argument("--sentencepiece-model", type=Path, metavar="FILE")
    parser.add_argument("--encoder-json", type=Path, metavar="FILE", help="for --bpe gpt2")
    parser.add_argument("--vocab-bpe", type=Path, metavar="FILE", help="for --bpe gpt2")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    specs = task_names(args.tasks) if args.tasks or not args.task_spec else []
    specs += [load_task_spec(args.task_spec)] if args.task_spec else []
    prepare(args.glue_data, args.out, specs, tokenizer_of(args), args.dict, args.workers)
    print(f"data of {', '.join(spec.name for spec in specs)} in {args.out}")


def tokenizer_of(args: argparse.Namespace) -> Tokenizer:
    """The tokenizer of the options."""
    given = {
        "sentencepiece": {"--sentencepiece-model": args.sentencepiece_model},
        "gpt2": {"--encoder-json": args.encoder_json, "--vocab-bpe": args.vocab_bpe},
    }
    for bpe, files in given.items():
        for option, file in files.items():
            if (bpe == args.bpe) != (file is not None):
                verb = "needs" if file is None else "does not take"
                raise ValueError(f"--bpe {args.bpe} {verb} {option}")
    return Tokenizer(args.bpe, tuple(given[args.bpe].values()))


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
"""Turn text into data for fairseq: split, train sentencepiece, encode, fairseq-preprocess.

The script holds out whole documents: 5 % of the text for test, 3 % for validation. Each file is a
document; fewer than 20 files are cut into at least 20 contiguous blocks. It writes into FOLDER:
spm.model, {train,valid,test}.txt, the same as .pieces, and bin/, which fairseq-train reads.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from _script import run

from pkm_fairseq.experiments.demo import pipeline
from pkm_fairseq.experiments.demo.presets import PRESETS


def main() -> None:
    """Prepare."""
    preset = PRESETS["default"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, nargs="+", metavar="FILE", help="UTF-8 text")
    parser.add_argument("--out", type=Path, default=Path("demo_out/data"), metavar="FOLDER")
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=preset.vocabulary,
        metavar="N",
        help="sentencepiece pieces (default: %(default)s)",
    )
    args = parser.parse_args()
    title = ", ".join(file.name for file in args.texts)
    pipeline.prepare(args.texts, title, args.out, replace(preset, vocabulary=args.vocabulary))
    print(f"data for fairseq-train in {args.out / 'bin'}")


if __name__ == "__main__":
    run(main)

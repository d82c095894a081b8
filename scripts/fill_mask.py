#!/usr/bin/env python3
"""Print the most probable pieces for <mask> in a sentence."""

import argparse
from pathlib import Path

from _script import run

from pkm_fairseq.experiments.data.prepare import load_sentencepiece
from pkm_fairseq.experiments.demo.evaluate import Words, fill_mask, load


def main() -> None:
    """Fill the mask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentence", help="text that contains <mask> once")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("demo_out/arms/resm_init/checkpoint_last.pt"),
        metavar="FILE",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("demo_out/data"),
        metavar="FOLDER",
        help="folder with spm.model and bin/dict.txt (default: %(default)s)",
    )
    parser.add_argument(
        "--words",
        action="store_true",
        help="pieces are words between spaces, as in the demo's facts; no spm.model is needed",
    )
    parser.add_argument(
        "--memory-values-file",
        type=Path,
        metavar="FILE",
        help="values of an exported model (default: values.pt beside it)",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    pieces = args.data / "spm.model"
    if not args.words and not pieces.is_file():
        raise ValueError(f"{pieces}: no such file: name its folder with --data, or give --words")
    tokenizer = Words() if args.words else load_sentencepiece(pieces)
    model = load(args.checkpoint, args.data / "bin", args.memory_values_file)
    for piece, probability in fill_mask(model, tokenizer, args.sentence, args.top):
        print(f"{100 * probability:5.1f} %  {piece.strip()}")


if __name__ == "__main__":
    run(main)

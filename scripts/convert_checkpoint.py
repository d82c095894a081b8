#!/usr/bin/env python3
"""Convert RoBERTa checkpoints, with or without memory, between fairseq and transformers.

The script then compares both models: logits must agree to 1e-5. With --text, both must also
tokenize the text into the same symbols.
"""

import argparse
from pathlib import Path

from _script import run

from pkm_fairseq.experiments.convert.convert import convert_to_fairseq, convert_to_transformers


def main() -> None:
    """Convert, compare and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", required=True, choices=("transformers", "fairseq"))
    parser.add_argument(
        "given", type=Path, metavar="IN", help="a checkpoint of fairseq or a folder of transformers"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--text", type=Path, metavar="FILE", help="also compare on this text")
    only = parser.add_argument_group("only --to transformers")
    only.add_argument(
        "--dict",
        type=Path,
        metavar="FILE",
        help="dict.txt or a data folder (default: beside the training data or the checkpoint)",
    )
    tokenizer = only.add_mutually_exclusive_group()
    tokenizer.add_argument("--sentencepiece-model", "--spm", type=Path, metavar="FILE")
    tokenizer.add_argument(
        "--gpt2-bpe", type=Path, metavar="FOLDER", help="folder with encoder.json and vocab.bpe"
    )
    args = parser.parse_args()
    if args.to == "transformers":
        how = args.dict, args.sentencepiece_model, args.gpt2_bpe, args.text
        said = convert_to_transformers(args.given, args.out, *how)
    else:
        if args.dict or args.sentencepiece_model or args.gpt2_bpe:
            raise ValueError("--to fairseq takes the tokenizer that is in IN")
        said = convert_to_fairseq(args.given, args.out, args.text)
    print("\n".join([*said, f"written: {args.out}"]))


if __name__ == "__main__":
    run(main, hint="; nothing was written")

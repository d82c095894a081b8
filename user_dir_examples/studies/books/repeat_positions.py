#!/usr/bin/env python3
"""Give the positions that a model was not trained on the embeddings of those that it was.

They are repeated in their order, as Longformer does with those of RoBERTa (Beltagy et al. 2020,
arXiv 2004.05150); the first one, which belongs to <s>, is not. So a model that was pretrained with
short sequences can be finetuned on long ones.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from pkm_fairseq.memory.files import whole_file
from pkm_fairseq.models.checkpoints import options_of, read_checkpoint

POSITIONS = "encoder.sentence_encoder.embed_positions.weight"
BEFORE = 2  # fairseq's rows of positions begin after that of <pad>, which is 1


def repeat(positions: Tensor, trained: int) -> None:
    """Overwrite the embeddings of positions that were not trained.

    Args:
        positions: (2 + positions, width), changed in place.
        trained: the number of trained positions, at least 2.
    """
    rows = positions[BEFORE:]
    beyond = torch.arange(trained, len(rows))
    rows[beyond] = rows[1 + (beyond - 1) % (trained - 1)]


def main() -> None:
    """Write each checkpoint with other positions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for NAME.pt")
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for named in args.checkpoints:
        name, _, file = named.partition("=")
        if not name or not file:
            raise ValueError(f"{named}: must be NAME=CHECKPOINT")
        stored = read_checkpoint(file, "checkpoint")
        if POSITIONS not in stored["model"]:
            raise ValueError(f"{file} holds no {POSITIONS}: it is no RoBERTa")
        repeat(stored["model"][POSITIONS], options_of(stored, "task")["tokens_per_sample"])
        with whole_file(args.out / f"{name}.pt") as out:
            torch.save(stored, out)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None

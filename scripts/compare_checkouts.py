#!/usr/bin/env python3
"""Train a few updates with two checkouts of the code, and compare their checkpoints.

Each checkout trains a model without memory, a PKM and a ResM with its own code, on one thread.
With --resume the first checkout trains the same number of updates first, and both checkouts resume
its checkpoint. Parameters, buffers, moments and step counts must be equal to the bit; else the exit
status is 1.
"""

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, Tuple

import torch
from _script import run

from pkm_fairseq.experiments.runs.processes import run_to_end
from pkm_fairseq.models.checkpoints import read_checkpoint

ARMS = {
    "plain": ("--arch", "resm_roberta_tiny", "--memory-layers", "[]"),
    "pkm": ("--arch", "pkm_roberta_tiny"),
    "resm": ("--arch", "resm_roberta_tiny"),
}

OPTIONS = (
    "--task pkm_masked_lm --criterion pkm_masked_lm --optimizer pkm_adam --lr 1e-3 "
    "--memory-value-lr 1e-3 --weight-decay 0.01 --clip-norm 1.0 --tokens-per-sample 32 "
    "--batch-size 16 --update-freq 2 --num-workers 0"
)


def train(checkout: Path, data: Path, arm: str, updates: int, folder: Path) -> Dict[str, Any]:
    """The checkpoint of a short training with the code of a checkout."""
    command = [sys.executable, "-m", "fairseq_cli.train", str(data.resolve())]
    command += ["--user-dir", str(checkout.resolve() / "pkm_fairseq"), "--cpu", *ARMS[arm]]
    command += OPTIONS.split()
    command += ["--max-update", str(updates), "--save-dir", str(folder), "--disable-validation"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout.resolve())}
    done = run_to_end(command, environment)
    file = folder / "checkpoint_last.pt"
    if done.returncode or not file.is_file():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{checkout} did not train {arm}: {last}")
    return read_checkpoint(str(file), "checkpoint")


def numbers(x: Any, name: str) -> Iterator[Tuple[str, Any]]:
    """Every tensor and number in a nested state, by the path to it."""
    if isinstance(x, dict):
        for key in x:
            yield from numbers(x[key], f"{name}.{key}")
    elif isinstance(x, (torch.Tensor, int, float)) and not isinstance(x, bool):
        yield name, torch.as_tensor(x)


def compare(one: Dict[str, Any], other: Dict[str, Any]) -> Tuple[int, float, str]:
    """The number of compared tensors, the largest difference, and its place."""
    largest, where, compared = 0.0, "", 0
    for part in ("model", "last_optimizer_state"):
        inner = [x[part] if part == "model" else x[part]["state"] for x in (one, other)]
        ours, theirs = (dict(numbers(x, part)) for x in inner)
        if missing := ours.keys() - theirs.keys():
            raise ValueError(f"the second checkout lacks {min(missing)}")
        for name in sorted(theirs.keys() - ours.keys()):
            print(f"only the second checkout has {name}")
        for name, x in ours.items():
            compared += 1
            difference = float((x.double() - theirs[name].double()).abs().max())
            if difference > largest:
                largest, where = difference, name
    return compared, largest, where


def main() -> None:
    """Compare the arms one by one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", type=Path, nargs=2, metavar="CHECKOUT")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder made by fairseq-preprocess"
    )
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument(
        "--resume", action="store_true", help="start from a checkpoint of the first checkout"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    is_equal = True
    for arm in args.arms:
        with TemporaryDirectory() as folder:
            folders = [Path(folder, str(i)) for i in range(len(args.checkouts))]
            updates = args.updates
            if args.resume:
                train(args.checkouts[0], args.data, arm, updates, folders[0])
                shutil.copytree(folders[0], folders[1])
                updates *= 2
            found = [
                train(checkout, args.data, arm, updates, place)
                for checkout, place in zip(args.checkouts, folders, strict=True)
            ]
        compared, largest, where = compare(*found)
        is_equal &= not largest
        verdict = "equal to the bit" if not largest else f"differ by up to {largest:.2g} in {where}"
        print(f"{arm}: {compared} tensors after {updates} updates: {verdict}", flush=True)
    sys.exit(0 if is_equal else 1)


if __name__ == "__main__":
    run(main)

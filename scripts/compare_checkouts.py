#!/usr/bin/env python3
"""Train a few updates with two checkouts of the code, and compare their checkpoints.

Each checkout trains a model without memory, a PKM and a ResM with its own code, on one thread.
With --resume the first checkout trains the same number of updates first, and both checkouts resume
its checkpoint. Parameters, buffers, moments and step counts must have equal names, dtypes, shapes
and bits; else the exit status is 1.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, List, Optional, Tuple

from _script import run

import torch

from pkm_fairseq.experiments.runs.processes import run_to_end
from pkm_fairseq.memory.delta import bits_of
from pkm_fairseq.models.checkpoints import read_checkpoint

ARMS = {
    "plain": ("--arch", "resm_roberta_tiny", "--memory-layers", "[]"),
    "pkm": ("--arch", "pkm_roberta_tiny"),
    "resm": ("--arch", "resm_roberta_tiny"),
}

SHOWN = 5  # differences to name

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
        # a float of Python is a double
        yield name, torch.as_tensor(x, dtype=torch.float64 if isinstance(x, float) else None)


def compare(one: Dict[str, Any], other: Dict[str, Any]) -> Tuple[int, List[str]]:
    """The number of compared tensors, and the differences in words, the largest first."""
    found: List[Tuple[float, str]] = []
    compared = 0
    for part in ("model", "last_optimizer_state"):
        inner = [x[part] if part == "model" else x[part]["state"] for x in (one, other)]
        ours, theirs = (dict(numbers(x, part)) for x in inner)
        for name in {**ours, **theirs}:
            compared += 1
            difference = difference_of(name, ours.get(name), theirs.get(name))
            if difference is not None:
                found.append(difference)
    return compared, [words for _, words in sorted(found, key=lambda x: x[0], reverse=True)]


def difference_of(
    name: str, x: Optional[torch.Tensor], y: Optional[torch.Tensor]
) -> Optional[Tuple[float, str]]:
    """The size of a difference, and the difference in words; None if all bits are equal."""
    if x is None or y is None:
        return math.inf, f"only the {'second' if x is None else 'first'} checkout has {name}"
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return math.inf, f"{name}: {shown(x)} and {shown(y)}"
    if torch.equal(bits_of(x), bits_of(y)):
        return None
    size = float((x.double() - y.double()).abs().max())
    return math.inf if math.isnan(size) else size, f"{name} by up to {size:.2g}"


def shown(x: torch.Tensor) -> str:
    """Dtype and shape."""
    return f"{x.dtype} {tuple(x.shape)}"


def verdict(differences: List[str]) -> str:
    """The differences in one line."""
    if not differences:
        return "equal to the bit"
    more = "; ..." if len(differences) > SHOWN else ""
    return f"NOT EQUAL in {len(differences)}: {'; '.join(differences[:SHOWN])}{more}"


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
        compared, differences = compare(*found)
        is_equal &= not differences
        told = f"{arm}: {compared} tensors after {updates} updates: {verdict(differences)}"
        print(told, flush=True)
    sys.exit(0 if is_equal else 1)


if __name__ == "__main__":
    run(main)

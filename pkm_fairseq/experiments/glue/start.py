"""Read the pretrained checkpoints for a finetuning, and their architecture as flags."""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY

from ...models.checkpoints import (
    architecture_of,
    compare_dictionary,
    has_memory,
    is_roberta,
    options_of,
    read_checkpoint,
)

# model options that finetuning sets, or passes in another way
NOT_CARRIED = {"init_from", "load_checkpoint_heads", "max_positions", "memory_freeze", "help"}


@dataclass(frozen=True)
class Arm:
    """A pretrained checkpoint to be finetuned.

    Attributes:
        name: name of its folder and row.
        file: the checkpoint.
        sha256: hash of the file.
        has_memory: whether its model has a memory.
        max_positions: the longest input, in tokens.
        flags: its architecture, as flags of fairseq-train.
    """

    name: str
    file: Path
    sha256: str
    has_memory: bool
    max_positions: int
    flags: Tuple[str, ...]


def read_arms(texts: Sequence[str], dictionary: Dictionary) -> List[Arm]:
    """Read the checkpoints of ``[ARM=]FILE`` texts; each must fit the dictionary.

    Args:
        texts: the default name of an arm is that of the file's folder.
        dictionary: the dictionary of the prepared data, with ``<mask>``.

    Raises:
        ValueError: a file is missing, not a checkpoint, not a RoBERTa, or has another dictionary,
            or two arms have the same name.
    """
    arms: List[Arm] = []
    for text in texts:
        name, equals, path = text.partition("=")
        file = Path(path if equals else text)
        name = name if equals else file.resolve().parent.name
        if not name or "/" in name or name.startswith(".") or name.endswith(".old"):
            raise ValueError(f"--checkpoint {text}: {name!r} cannot be the name of an arm")
        if name in (arm.name for arm in arms):
            raise ValueError(f"--checkpoint names arm {name} twice: rename one with OTHER=FILE")
        arms.append(_read_arm(name, file.resolve(), dictionary))
    return arms


def _read_arm(name: str, file: Path, dictionary: Dictionary) -> Arm:
    checkpoint = read_checkpoint(str(file), "--checkpoint")
    options, arch = options_of(checkpoint, "model"), architecture_of(checkpoint)
    if not is_roberta(checkpoint):
        raise ValueError(f"--checkpoint {file} is a model {arch!r}, must be a RoBERTa")
    if arch not in ARCH_MODEL_REGISTRY:  # from another user-dir, where it names sizes
        arch = "pkm_roberta" if has_memory(checkpoint) else "roberta"
    compare_dictionary(checkpoint, dictionary, f"--checkpoint {file}")
    return Arm(
        name,
        file,
        sha256_of(file),
        has_memory(checkpoint),
        int(options.get("max_positions") or options["tokens_per_sample"]),
        tuple(arch_flags(arch, options)),
    )


def arch_flags(arch: str, options: Dict[str, Any]) -> List[str]:
    """The options of an architecture as flags, so that users need not repeat them."""
    parser = argparse.ArgumentParser()
    ARCH_MODEL_REGISTRY[arch].add_args(parser)
    flags = ["--arch", arch]
    for action in parser._actions:
        value = options.get(action.dest)
        if action.dest in NOT_CARRIED or value is None or value == action.default:
            continue
        flag, text = action.option_strings[0], str(value)
        if action.nargs == 0:
            flags.append(flag)
        else:  # argparse would read a value that begins with a dash as a flag
            flags += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return flags


def sha256_of(file: Path) -> str:
    """SHA-256, in hex, of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

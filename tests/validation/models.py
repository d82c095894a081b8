"""Checkpoints, data and scripts that several tests use."""

import importlib.util
import sys
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.data import Dictionary

from pkm_fairseq.models.checkpoints import dictionary_sha256
from tests.helpers import build, model_args, small_dictionary, write_split

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
N_TOKENS = 440  # of the text in :func:`write_folder`


def load_script(file: Path) -> Any:
    """A script as a module."""
    if str(SCRIPTS) not in sys.path:  # what a script finds beside it
        sys.path.append(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_model(
    folder: Path,
    arch: str = "resm_roberta_tiny",
    dictionary: Optional[Dictionary] = None,
    **options: Any,
) -> Path:
    """Write the checkpoint of a new model as fairseq does."""
    dictionary = dictionary or small_dictionary()
    model = build(arch, dictionary, **options)
    checkpoint = {
        "args": None,
        "cfg": {"model": vars(model_args(arch, **options)), "task": {"data": str(folder)}},
        "model": model.state_dict(),
        "task_state": {"dictionary_sha256": dictionary_sha256(dictionary)},
    }
    torch.save(checkpoint, folder / f"{arch}.pt")
    return folder / f"{arch}.pt"


def write_folder(folder: Path) -> None:
    """Write a data-bin, the same as text.txt, and a checkpoint with memories in two layers."""
    dictionary = small_dictionary()
    generator = torch.Generator().manual_seed(0)
    lines = torch.randint(4, 19, (40, 9), generator=generator).tolist()
    write_split(folder, "valid", dictionary, [[*line, dictionary.eos()] for line in lines])
    # fairseq-preprocess writes a dictionary without the mask, which tasks add
    symbols = (folder / "dict.txt").read_text().splitlines()
    (folder / "dict.txt").write_text("\n".join(s for s in symbols if "<mask>" not in s) + "\n")
    words = [" ".join(dictionary[index] for index in line) for line in lines]
    (folder / "text.txt").write_text("\n".join(words) + "\n")
    save_model(folder, memory_layers=[1, 2], memory_v_dim=6)

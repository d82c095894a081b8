"""Export a checkpoint for inference: the model without its value tables, and a file of these."""

import os
import re
from pathlib import Path
from typing import Any, Dict, NamedTuple

import torch
from torch import Tensor

from ..compat.values_file import name_values_file
from ..memory.delta import VALUES, hash_of
from ..memory.files import whole_file
from ..memory.mapped import save_values
from .checkpoints import has_memory, options_of, read_checkpoint, refuse_other_models

MODEL, TABLES = "model.pt", "values.pt"
TABLE = re.compile(r"\.layers\.(\d+)\.memory\.values\.weight$")
FINGERPRINT = "fingerprint"
# of a training; extra_state holds averages of all parameters, tables among them
NOT_EXPORTED, AVERAGES = ("last_optimizer_state",), ("ema", "ema_fp32_params")


class Exported(NamedTuple):
    """An exported model.

    Attributes:
        model: its checkpoint.
        values: its values file.
        dtype: of the values.
        fingerprint: of the model, in both files.
        tables: shape of each table, by layer.
        bytes: of the values file.
    """

    model: Path
    values: Path
    dtype: str
    fingerprint: str
    tables: Dict[str, "tuple[int, ...]"]
    bytes: int


def export(checkpoint: Path, folder: Path, dtype: str) -> Exported:
    """Write ``model.pt`` and ``values.pt`` into a folder.

    The tables are read from the checkpoint through the page cache. Both files are whole or absent,
    and fit only each other, or those of another export of the same checkpoint.

    Args:
        checkpoint: a fairseq checkpoint of a model with memories.
        folder: where the files go; older exports there are replaced.
        dtype: of the values, as of ``save_values``.

    Raises:
        ValueError: the checkpoint is unreadable, has no tables, holds values of another kind than
            "table", or would be replaced; or a value is not finite.
        OSError: a file cannot be written.
    """
    model, values = folder / MODEL, folder / TABLES
    if any(file.exists() and os.path.samefile(file, checkpoint) for file in (model, values)):
        raise ValueError(f"{checkpoint} would be replaced: choose another folder than its own")
    stored = read_checkpoint(str(checkpoint), "CHECKPOINT", is_mapped=True, needs_tables=True)
    refuse_other_models(stored, str(checkpoint))
    tables = _tables(stored, checkpoint)
    state = stored["model"]
    mark = hash_of(state)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"checkpoint": str(checkpoint)}
    of_layers = {layer: state[name] for layer, name in tables.items()}
    save_values(values, of_layers, dtype, mark, about)
    with whole_file(model) as out:
        torch.save(_without_tables(stored, set(tables.values()), mark), out)
    shapes = {layer: tuple(table.shape) for layer, table in of_layers.items()}
    return Exported(model, values, dtype, mark, shapes, values.stat().st_size)


def _tables(stored: Dict[str, Any], checkpoint: Path) -> Dict[str, str]:
    """The names of the tables in a checkpoint's state, by memory layer."""
    state, kind = stored["model"], options_of(stored, "model").get("memory_values")
    if any(name.endswith(f".memory.values.{FINGERPRINT}") for name in state):
        raise ValueError(f"CHECKPOINT {checkpoint} was exported: its values are in a file already")
    if not has_memory(stored):
        raise ValueError(f"CHECKPOINT {checkpoint}: the model has no memory")
    tables = {match[1]: name for name in state if (match := TABLE.search(name))}
    others = [name for name in state if VALUES.search(name) and name not in tables.values()]
    if kind not in (None, "table") or others or not tables:
        raise ValueError(
            f"CHECKPOINT {checkpoint} has values of the kind {kind or 'unknown'}, must be table: "
            "no other kind can be read from a file"
        )
    return tables


def _without_tables(stored: Dict[str, Any], tables: "set[str]", mark: str) -> Dict[str, Any]:
    """A checkpoint for inference, whose memories have a fingerprint in place of their tables."""
    exported = {key: part for key, part in stored.items() if key not in NOT_EXPORTED}
    if isinstance(extra := exported.get("extra_state"), dict):
        exported["extra_state"] = {k: x for k, x in extra.items() if k not in AVERAGES}
    digest = torch.tensor(list(bytes.fromhex(mark)), dtype=torch.uint8)
    state: Dict[str, Tensor] = {}
    for name, tensor in exported["model"].items():
        if name in tables:
            state[name.removesuffix("weight") + FINGERPRINT] = digest
        else:
            state[name] = tensor
    exported["model"] = state
    name_values_file(exported, TABLES)
    return exported

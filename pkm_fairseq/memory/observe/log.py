"""``memory_usage.jsonl``: the memory usage of a training, one count a line."""

import json
import logging
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor

from ..archive import save_in_blocks
from ..files import whole_file, write_file
from ..hosts import HasMemories, tables_of_layers
from ..values import ValueTable

logger = logging.getLogger(__name__)

FILE = "memory_usage.jsonl"
INITIAL_VALUES = "memory_initial_values.pt"
FORMAT = 1


class UsageLog:
    """Appends to the log of a training; the training may have been interrupted.

    It drops a last line that a kill truncated, and lines of updates that will be repeated. A new
    training moves the log of an earlier one to ``*.old``.

    Args:
        file: the log; need not exist.
        header: shapes of the memories, from ``header_of``.
        updates: finished updates of the checkpoint from which the training resumes.

    Raises:
        ValueError: the file is not such a log, or logs memories of other shapes.
    """

    def __init__(self, file: Path, header: Dict[str, Any], updates: int) -> None:
        self.file = file
        known: List[Dict[str, Any]] = []
        if file.exists() and file.stat().st_size:
            theirs, known = read_usage_log(file)
            if theirs != header:
                raise ValueError(
                    f"{file} is the log of memories of other shapes, {_shapes(theirs)}; this run "
                    f"has {_shapes(header)}: choose another --save-dir, or move the log away"
                )
            if not updates and known:
                file.replace(file.with_name(f"{file.name}.old"))
                logger.info(f"{file} is the log of an earlier training: moved to {file.name}.old")
                known = []
        kept = [record for record in known if record["update"] <= updates]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, "".join(f"{json.dumps(line)}\n" for line in (header, *kept)))

    def append(self, record: Dict[str, Any]) -> None:
        """Add a line."""
        with self.file.open("a", encoding="utf-8") as log:
            log.write(f"{json.dumps(record)}\n")


def open_log(
    model: HasMemories, folder: Path, updates: int, writes: bool
) -> Tuple[Optional[UsageLog], Optional[str]]:
    """Open the log of a training, and save initial values if it is new.

    Every worker must call it, and must then learn of a problem from the one that writes.

    Args:
        model: the model that is trained.
        folder: gets the log and the initial values.
        updates: finished updates.
        writes: whether this worker writes.

    Returns:
        The log, None on the other workers; what is wrong, None if nothing is.
    """
    log, problem = None, None
    try:
        if writes:
            log = UsageLog(folder / FILE, header_of(model), updates)
    except (ValueError, OSError) as error:
        problem = str(error)
    try:
        if updates == 0:
            save_initial_values(model, folder if writes and not problem else None)
    except OSError as error:
        problem = str(error)
    return log, problem


def header_of(model: HasMemories) -> Dict[str, Any]:
    """The first line of a log: what all its counts have in common."""
    configs = {layer: x.memory.config for layer, x in sorted(model.memory_layers().items())}
    return {
        "format": FORMAT,
        "layers": {
            str(layer): {"n_slots": c.n_slots, "heads": c.heads, "knn": c.knn}
            for layer, c in configs.items()
        },
        "shared_values": any(c.share_values for c in configs.values()),
    }


def read_usage_log(file: Path) -> Tuple[Dict[str, Any], List[Dict[str, Any]]]:
    """Read a log; skip a last line that a kill truncated.

    Returns:
        The header, and the counts in the order of the file.

    Raises:
        ValueError: the file is missing or not such a log; the message names the line.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    *lines, truncated = file.read_bytes().split(b"\n")
    if truncated:
        logger.warning(f"{file}: line {len(lines) + 1} is truncated and was skipped")
    parsed = [_parse(file, number, line) for number, line in enumerate(lines, 1)]
    if not parsed or parsed[0].get("format") != FORMAT or "layers" not in parsed[0]:
        raise ValueError(f"{file}: line 1 is no header of format {FORMAT}: not a log of usage")
    header, *records = parsed
    for number, record in enumerate(records, 2):
        layers = [str(layer.get("layer")) for layer in record.get("layers", [])]
        known = [layer for layer in header["layers"] if layer in layers]  # not those without tokens
        is_count = layers == known and bool(layers) == bool(header["layers"])
        if not is_count or not isinstance(record.get("update"), int):
            raise ValueError(
                f"{file}: line {number} is no count of layers {', '.join(header['layers'])}"
            )
    return header, records


def save_initial_values(model: HasMemories, folder: Optional[Path]) -> None:
    """Save the initial values of a training, to measure later how far values have moved.

    If tables are split over workers, every worker must call it. The first one writes their rows as
    they come; no worker holds a whole table.

    Args:
        model: at the start of its training.
        folder: gets the file; None on the workers that do not write.

    Raises:
        OSError: the file cannot be written.
    """
    tables = tables_of_layers(model.memory_layers())
    rows = {
        table: table.shards.whole_rows(table.weight)
        for table in tables.values()  # one, if layers share it
        if table.shards is not None
    }
    try:
        if folder is not None:
            _write_initial_values(tables, rows, folder / INITIAL_VALUES)
    finally:  # the other workers send all rows
        for left in rows.values():
            for _ in left:
                pass


def _write_initial_values(
    tables: Dict[str, ValueTable], rows: Dict[ValueTable, Iterator[Tensor]], file: Path
) -> None:
    """Write whole tables by name; ``rows`` are those of tables that are split."""
    empty = {x: torch.empty(x.n_slots, x.v_dim, dtype=x.weight.dtype) for x in rows}
    content = {
        name: empty[table] if table in rows else table.weight.detach().cpu()
        for name, table in tables.items()
    }
    with whole_file(file) as out:
        if rows:
            save_in_blocks(out, content, [(empty[x], x_rows) for x, x_rows in rows.items()])
        else:
            torch.save(content, out)


def load_initial_values(folder: Path) -> Optional[Dict[str, Tensor]]:
    """The initial tables of a training, by name, mapped from disk; None if not saved."""
    file = folder / INITIAL_VALUES
    if not file.is_file():
        return None
    values: Dict[str, Tensor] = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    return values


def _parse(file: Path, number: int, line: bytes) -> Dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}: line {number} is no JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{file}: line {number} is no JSON object")
    return parsed


def _shapes(header: Dict[str, Any]) -> str:
    shapes = [
        f"layer {layer}: {shape['n_slots']} slots, {shape['heads']} heads, knn {shape['knn']}"
        for layer, shape in header["layers"].items()
    ]
    return "; ".join(shapes) + (", values shared" if header["shared_values"] else "")

"""Values in a file, read through the page cache: for inference with tables outside of memory."""

import mmap
import os
import warnings
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from . import kernels
from .archive import offset_of, read_without_data
from .files import whole_file
from .kernels import compute_dtype
from .parts import PARTS
from .values import read_rows

KIND, VERSION = "pkm_fairseq values", 1
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
LARGEST = 127  # of int8; -128 is not used
BLOCK = 8192  # rows, converted at once


class ValuesFile:
    """A file of value tables, mapped into memory for reading.

    Rows are in memory only as long as the system keeps them there. No table is ever allocated.
    Copies and pickles of this object open the file again.

    Args:
        file: from ``save_values``.

    Attributes:
        file: its absolute path.
        fingerprint: 64 hex digits that the model of these values has, too.
        dtype: "float32", "bfloat16" or "int8".
        about: plain data on the file's origin.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file.absolute()
        if not file.is_file():
            raise ValueError(f"values file {file}: no such file")
        content = self._checked(_content(file))
        self.fingerprint: str = content["fingerprint"]
        self.dtype: str = content["dtype"]
        self.about: Dict[str, Any] = content["about"]
        with file.open("rb") as opened:
            self._memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._rows = {layer: self._map(x) for layer, x in content["rows"].items()}
        # 4 bytes per slot, in memory: a look-up then reads one place of the file, not two
        self._scales = {layer: self._map(x).clone() for layer, x in content["scales"].items()}

    def __reduce__(self) -> Any:
        """Copy and pickle by reference; the file must still hold the same values."""
        return _reopened, (self.file, self.fingerprint, self.dtype)

    @property
    def layers(self) -> List[str]:
        """The memory layers whose tables the file holds."""
        return list(self._rows)

    def table(self, layer: str) -> "MappedTable":
        """The table of a memory layer.

        Raises:
            ValueError: the file holds no table of this layer.
        """
        if layer not in self._rows:
            raise ValueError(
                f"values file {self.file} holds tables of the layers {', '.join(self.layers)}, "
                f"none of layer {layer}"
            )
        return MappedTable(self, layer)

    def rows(self, layer: str) -> Tensor:
        """The rows of a table, (n_slots, v_dim), in the file; writing to them ends the process."""
        return self._rows[layer]

    def scales(self, layer: str) -> Optional[Tensor]:
        """One factor per row of a table in int8, (n_slots,), float32; None for other tables."""
        return self._scales.get(layer)

    def forget_pages(self) -> None:
        """Give the file's pages back to the system, so that the next reads come from the disk.

        For measurements. It needs Linux; pages that another process maps stay in memory.
        """
        self._memory.madvise(mmap.MADV_DONTNEED)
        with self.file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _checked(self, content: Any) -> Dict[str, Any]:
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"{self.file} holds no values: scripts/export_memory.py writes them")
        if content.get("version") != VERSION:
            raise ValueError(
                f"values file {self.file}: its version is {content.get('version')}, "
                f"must be {VERSION}"
            )
        if not _is_sound(content):
            raise ValueError(f"values file {self.file} contradicts itself: export it again")
        return content

    def _map(self, x: Tensor) -> Tensor:
        """A tensor of the file, without a copy."""
        start = offset_of(x)
        if start is None or start % x.itemsize or start + x.nbytes > len(self._memory):
            raise ValueError(f"values file {self.file} is damaged: export it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the tensor must not be written to
            flat = torch.frombuffer(self._memory, dtype=x.dtype, count=x.numel(), offset=start)
        return flat.view(x.shape)


def _reopened(file: Path, fingerprint: str, dtype: str) -> ValuesFile:
    found = ValuesFile(file)
    if (found.fingerprint, found.dtype) != (fingerprint, dtype):
        raise ValueError(
            f"values file {file} has been written anew since the model read it: it holds "
            f"{found.dtype} of {found.fingerprint[:8]}, must hold {dtype} of {fingerprint[:8]}"
        )
    return found


class MappedTable(nn.Module):
    """A value table that stays in its file; for inference on the CPU.

    A ``ProductKeyMemory`` takes it as its ``values``. Its state holds no rows, only the
    fingerprint of the file, which loading compares.

    Args:
        source: the file.
        layer: the memory layer whose table this is.
    """

    chooses_rows = False
    fingerprint: Tensor

    def __init__(self, source: ValuesFile, layer: str) -> None:
        super().__init__()
        self.source, self.layer = source, layer
        self.n_slots, self.v_dim = source.rows(layer).shape
        digest = torch.tensor(list(bytes.fromhex(source.fingerprint)), dtype=torch.uint8)
        self.register_buffer("fingerprint", digest)

    def tables(self) -> "Dict[str, MappedTable]":
        """The tables of these values by name; this single table has the empty name."""
        return {"": self}

    @property
    def weight(self) -> Tensor:
        """Refuse what needs the whole table in memory.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"values file {self.source.file}: a table in a file can be neither trained nor "
            "compared; use the checkpoint that was exported"
        )

    def read(self, slots: Tensor) -> Tensor:
        """The exact values of slots (R,), (R, v_dim), in float64."""
        rows, scales = self.source.rows(self.layer)[slots].double(), self.source.scales(self.layer)
        return rows if scales is None else rows * scales[slots].double()[:, None]

    def forward(self, slots: Tensor, weights: Tensor, tokens: Optional[Tensor] = None) -> Tensor:
        """The weighted sum of the given slots' values, as ``ValueTable.forward``.

        ``sum of weight * row``, and in int8 ``sum of (weight * scale) * row``, in float32. It is
        differentiable with respect to the weights.

        Raises:
            ValueError: shapes or dtypes do not fit, a slot is out of range, the model is on a
                device other than the CPU, or it is being trained.
        """
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                f"values file {self.source.file}: values in a file are for inference, call eval(); "
                "to train, use the checkpoint that was exported"
            )
        if slots.device.type != "cpu":
            raise ValueError(
                f"the model is on {slots.device}, must be on the CPU to read the values file "
                f"{self.source.file}"
            )
        slots, weights = slots.flatten(1), weights.flatten(1)  # (N, H * K)
        kernels.check_reads(slots, weights, self.n_slots)
        rows, scales = self.source.rows(self.layer), self.source.scales(self.layer)
        weights = weights.to(compute_dtype(rows.dtype))
        if scales is not None:
            weights = weights * scales[slots]
        return read_rows(rows, slots, weights)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Compare fingerprints.

        Raises:
            ValueError: the state is of another model, or holds a table itself.
        """
        if f"{prefix}weight" in state_dict or f"{prefix}{PARTS}" in state_dict:
            raise ValueError(
                "the checkpoint holds its tables itself: a values file belongs to the model.pt "
                "that scripts/export_memory.py writes with it"
            )
        given = state_dict.get(f"{prefix}fingerprint")
        if given is not None and not _equal(given, self.fingerprint):
            raise ValueError(
                f"values file {self.source.file} holds the values of another model "
                f"({_shown(self.fingerprint)}, this one needs {_shown(given)})"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def save_values(
    file: Path,
    tables: Mapping[str, Tensor],
    dtype: str,
    fingerprint: str,
    about: Mapping[str, Any],
) -> None:
    """Write value tables to a file that ``ValuesFile`` maps; the file is complete or absent.

    int8 rows have one factor each, ``scale = max(|row|) / 127``, so that a stored value is at most
    half a step from its own: ``|value - scale * int8| <= scale / 2``. Other dtypes round to
    nearest. Tables that are one tensor are stored once.

    Args:
        file: the new file.
        tables: (n_slots, v_dim), by memory layer.
        dtype: "float32", "bfloat16" or "int8".
        fingerprint: 64 hex digits that tell the model from others.
        about: plain data to keep.

    Raises:
        ValueError: there is no such dtype, or a value is not finite in it.
        OSError: the file cannot be written.
    """
    if dtype not in STORED:
        raise ValueError(f"dtype is {dtype!r}, must be one of {', '.join(STORED)}")
    stored: Dict[Any, Tuple[Tensor, Optional[Tensor]]] = {}
    for layer, table in tables.items():
        if _place(table) not in stored:
            stored[_place(table)] = _convert(table.detach(), STORED[dtype], layer)
    found = {layer: stored[_place(table)] for layer, table in tables.items()}
    content = {
        **{"kind": KIND, "version": VERSION, "fingerprint": fingerprint, "dtype": dtype},
        "about": dict(about),
        "rows": {layer: rows for layer, (rows, _) in found.items()},
        "scales": {layer: scales for layer, (_, scales) in found.items() if scales is not None},
    }
    with whole_file(file) as out:
        torch.save(content, out)


def _place(table: Tensor) -> Any:
    """What tensors have in common that are one."""
    return table.data_ptr(), table.shape, table.stride()


def quantise(rows: Tensor) -> Tuple[Tensor, Tensor]:
    """int8 rows, (R, V), and one factor per row, (R,), of finite rows (R, V)."""
    wide = rows.double()
    most = wide.abs().amax(dim=1)
    scales = (most / LARGEST).float()
    too_small = scales.double() * LARGEST < most  # rounded down
    scales = torch.where(too_small, scales.nextafter(scales.new_tensor(torch.inf)), scales)
    steps = torch.where(scales == 0, scales.new_tensor(1), scales).double()
    return (wide / steps[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def _convert(table: Tensor, dtype: torch.dtype, layer: str) -> Tuple[Tensor, Optional[Tensor]]:
    """A table's rows in a dtype, and their factors if it is int8; a table of this dtype itself."""
    is_stored = table.dtype == dtype and table.is_contiguous()
    rows = table if is_stored else torch.empty(table.shape, dtype=dtype)
    scales = torch.empty(len(table), dtype=torch.float32) if dtype == torch.int8 else None
    for start in range(0, len(table), BLOCK):
        part = slice(start, start + BLOCK)
        if scales is not None:
            rows[part], scales[part] = quantise(_finite(table[part], layer))
        elif is_stored:
            _finite(table[part], layer)
        else:
            rows[part] = _finite(table[part].to(dtype), layer)
    return rows, scales


def _finite(rows: Tensor, layer: str) -> Tensor:
    if not rows.isfinite().all():
        raise ValueError(f"the table of layer {layer} has values that are not finite")
    return rows


def _content(file: Path) -> Any:
    try:
        return read_without_data(file)
    except Exception as error:  # a damaged file can raise nearly anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"values file {file} is damaged, or no values file: export it again ({reason[:200]})"
        ) from None


def _is_sound(content: Dict[str, Any]) -> bool:
    """Whether a file's tables have the form that its dtype says."""
    rows, scales, mark = (content.get(key) for key in ("rows", "scales", "fingerprint"))
    dtype = STORED.get(str(content.get("dtype")))
    if not (isinstance(rows, dict) and isinstance(scales, dict) and isinstance(mark, str)):
        return False
    if dtype is None or len(mark) != 64 or not set(mark) <= set("0123456789abcdef"):
        return False
    if not rows or set(scales) != (set(rows) if dtype == torch.int8 else set()):
        return False
    if not isinstance(content.get("about"), dict):
        return False
    of_rows = all(_has_form(x, dtype, 2) for x in rows.values())
    return of_rows and all(
        _has_form(x, torch.float32, 1) and len(x) == len(rows[layer]) for layer, x in scales.items()
    )


def _has_form(x: Any, dtype: torch.dtype, dims: int) -> bool:
    is_tensor = isinstance(x, Tensor) and x.dtype == dtype and x.dim() == dims
    return is_tensor and x.is_contiguous() and x.numel() > 0


def _equal(given: Any, own: Tensor) -> bool:
    return given.dtype == own.dtype and torch.equal(given.cpu(), own.cpu())


def _shown(fingerprint: Tensor) -> str:
    """The first digits of a fingerprint."""
    return bytes(fingerprint.flatten().to(torch.uint8).tolist()).hex()[:12]

"""Change rows of tensors inside a file of torch.save; all other bytes stay the same."""

import io
import shutil
import struct
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .files import whole_file

# of a ZIP file: (mark, offset of the check sum behind it)
LOCAL, CENTRAL, DESCRIPTOR = (b"PK\x03\x04", 14), (b"PK\x01\x02", 16), (b"PK\x07\x08", 4)
HAS_DESCRIPTOR = 1 << 3  # a flag: the check sum stands behind the data
BLOCK = 1 << 20  # bytes, read at once

Rows = Mapping[str, Tuple[Tensor, Tensor]]  # name -> slots (R,), rows (R, V)


def write_rows(source: Path, target: Path, part: str, rows: Rows) -> None:
    """Copy a file of torch.save and replace some rows of its tables.

    Only these rows and the archive's check sums change. Writing the old rows back therefore
    restores the old file.

    Args:
        source: a file that holds a dictionary.
        target: the new file, renamed when it is complete; may be the source.
        part: the key of the inner dictionary, which holds tensors by name.
        rows: new rows by name of the table; tables must be contiguous.

    Raises:
        ValueError: the file is missing, has the format from before torch 1.6, or a table is not
            contiguous.
    """
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if not zipfile.is_zipfile(source):
        raise ValueError(
            f"{source} has the format from before torch 1.6: load it and save it again first"
        )
    tables = _places(source, part)
    with whole_file(target) as out:
        with source.open("rb") as file:
            shutil.copyfileobj(file, out, BLOCK)
        changes: List[Tuple[int, bytes]] = []
        for name, (slots, values) in rows.items():
            changes += _changes(name, *tables[name], slots, values)
        for at, content in changes:
            out.seek(at)
            out.write(content)
        out.flush()
        _renew_check_sums(source, Path(out.name), out, [at for at, _ in changes])


def save_in_blocks(
    out: BinaryIO, content: Any, blocks: Sequence[Tuple[Tensor, Iterable[Tensor]]]
) -> None:
    """Save as torch.save does, but take the data of some tensors from blocks, one after the other.

    So these tensors need not be in memory: they are ``torch.empty``, which uses no memory until it
    is written to.

    Args:
        out: a file, opened for writing by its name.
        content: nested dictionaries, lists and tuples of tensors and plain data.
        blocks: the tensors without data, each with its data: tensors of its dtype that follow each
            other in its memory.

    Raises:
        ValueError: a tensor is in another kind of object, where it cannot be found.
    """
    with torch.serialization.skip_data():
        torch.save(content, out)
    out.flush()
    file = Path(out.name)
    given = {x.data_ptr(): rows for x, rows in blocks}
    written: Dict[int, Any] = {}
    in_file = tensors_in(read_without_data(file))
    for own, stored in zip(tensors_in(content), in_file, strict=True):
        start: Optional[int] = stored.untyped_storage()._checkpoint_offset
        if own.numel() and start is not None and start not in written:
            written[start] = own
            out.seek(start)
            for part in given.get(own.data_ptr()) or [_storage_of(own)]:
                out.write(part.contiguous().view(torch.uint8).numpy().data)
    out.flush()
    with zipfile.ZipFile(file) as archive:
        records = [x for x in archive.infolist() if "/data/" in x.filename and x.file_size]
    if len(records) != len(written):
        raise ValueError(f"{file}: a tensor is in an object that is no dictionary, list or tuple")
    _renew_check_sums(file, file, out, list(written))


def tensors_in(content: Any) -> Iterator[Tensor]:
    """The tensors in nested dictionaries, lists and tuples, in their order."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(part)


def _storage_of(x: Tensor) -> Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def read_without_data(file: Path) -> Any:
    """The content of a file of torch.save; tensors have no data, but see ``offset_of``."""
    if _meta_has_offsets():
        return torch.load(file, map_location="meta", weights_only=True)
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds and 70 MB

    with FakeTensorMode():
        return torch.load(file, map_location="cpu", weights_only=True)


@cache
def _meta_has_offsets() -> bool:
    """Whether torch notes offsets when it loads to "meta"; older versions read the data there."""
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    return offset_of(torch.load(file, map_location="meta", weights_only=True)) is not None


def offset_of(x: Tensor) -> Optional[int]:
    """Where a tensor of ``read_without_data`` begins in the file, in bytes; None if nowhere."""
    start: Optional[int] = x.untyped_storage()._checkpoint_offset
    return None if start is None else start + int(x.storage_offset()) * x.element_size()


def _places(file: Path, part: str) -> Dict[str, Tuple[Tensor, int]]:
    """Each tensor, without data, and its offset in the file."""
    content = read_without_data(file)[part]
    starts = {name: offset_of(x) for name, x in content.items() if isinstance(x, Tensor)}
    return {name: (content[name], start) for name, start in starts.items() if start is not None}


def _changes(
    name: str, table: Tensor, start: int, slots: Tensor, rows: Tensor
) -> List[Tuple[int, bytes]]:
    """Offsets in the file, and the bytes to write there."""
    if not table.is_contiguous():
        raise ValueError(f"{name} is not contiguous in the file: load it and save it again first")
    width = table.shape[1] * table.element_size()
    content = rows.contiguous().view(torch.uint8).numpy()
    places = zip(slots.tolist(), content, strict=True)
    return [(start + slot * width, row.tobytes()) for slot, row in places]


def _renew_check_sums(source: Path, target: Path, out: BinaryIO, changed: List[int]) -> None:
    """Write new check sums for the changed records."""
    with zipfile.ZipFile(source) as archive:
        records, directory = archive.infolist(), archive.start_dir
    with target.open("rb") as file:
        for record, central in zip(records, _central_entries(file, directory), strict=True):
            data = _data_of(file, record.header_offset)
            end = data + record.compress_size
            if not any(data <= at < end for at in changed):
                continue
            check_sum = struct.pack("<L", _crc(file, data, end))
            places = [central + CENTRAL[1]]
            if record.flag_bits & HAS_DESCRIPTOR:
                file.seek(end)
                assert file.read(4) == DESCRIPTOR[0]
                places.append(end + DESCRIPTOR[1])
            else:
                places.append(record.header_offset + LOCAL[1])
            for place in places:
                out.seek(place)
                out.write(check_sum)


def _central_entries(file: BinaryIO, at: int) -> List[int]:
    """The offsets of the central directory's entries, in their order."""
    places: List[int] = []
    while True:
        file.seek(at)
        entry = file.read(46)
        if entry[:4] != CENTRAL[0]:
            return places
        places.append(at)
        at += 46 + sum(struct.unpack("<3H", entry[28:34]))  # name, extra, comment


def _data_of(file: BinaryIO, header: int) -> int:
    """The offset of a record's data, after its local header."""
    file.seek(header)
    entry = file.read(30)
    assert entry[:4] == LOCAL[0]
    name, extra = struct.unpack("<2H", entry[26:30])
    return header + 30 + int(name) + int(extra)


def _crc(file: BinaryIO, start: int, end: int) -> int:
    file.seek(start)
    crc, left = 0, end - start
    while left:
        block = file.read(min(BLOCK, left))
        crc, left = zlib.crc32(block, crc), left - len(block)
    return crc

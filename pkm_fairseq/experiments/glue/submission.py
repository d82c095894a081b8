"""Write the files for GLUE's server."""

import zipfile
from pathlib import Path
from typing import Dict, List, Sequence, Union

from ...memory.files import whole_file
from .tasks import TASKS, TaskSpec

DIAGNOSTIC = "AX.tsv"  # no task's folder contains its data


def label_text(prediction: Union[str, float], spec: TaskSpec) -> str:
    """A label unchanged, or a score clipped to its range, with 3 decimals."""
    if isinstance(prediction, str) or spec.label_range is None:
        return str(prediction)
    low, high = spec.label_range
    return f"{min(max(prediction, low), high):.3f}"


def prediction_file(
    indices: Sequence[str], predictions: Sequence[Union[str, float]], spec: TaskSpec
) -> str:
    """The contents of a task's file: a header, then one line per row."""
    rows = zip(indices, predictions, strict=True)
    lines = [f"{index}\t{label_text(prediction, spec)}\n" for index, prediction in rows]
    return "".join(["index\tprediction\n", *lines])


def write_zip(file: Path, contents: Dict[str, str]) -> None:
    """Write files into a zip atomically; the same contents give the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in contents.items():
            entry = zipfile.ZipInfo(name)  # of a fixed date
            entry.external_attr = 0o644 << 16  # readable once unpacked
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)


def missing_files(contents: Dict[str, str]) -> List[str]:
    """Further files that GLUE's server needs."""
    files = [file.submission for task in TASKS.values() for file in task.files.values()]
    return [name for name in [*files, DIAGNOSTIC] if name and name not in contents]

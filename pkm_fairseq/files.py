"""Files that are never seen half-written."""

from pathlib import Path


def write_file(file: Path, text: str) -> None:
    """Write a file under a temporary name, and rename it when it is whole."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)

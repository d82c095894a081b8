"""The image is built of what git keeps."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def lines(name: str) -> "set[str]":
    text = (ROOT / name).read_text(encoding="utf-8")
    return {line.removeprefix("**/").strip("/") for line in text.splitlines()}


def test_what_git_ignores_is_not_copied_into_the_image() -> None:
    assert lines(".gitignore") | {".git"} == lines(".dockerignore")

"""The documentation site loads nothing from the network."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_search_finds_its_worker_in_the_site() -> None:
    """Without a script of this name, material's offline plugin adds one from the network."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (script,) = re.findall(r"^  polyfills: \[([^\]]+)\]", text, re.MULTILINE)
    assert "iframe-worker" in script
    assert (ROOT / "docs" / script).is_file()

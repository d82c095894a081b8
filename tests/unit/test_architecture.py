"""docs/architecture.svg is what scripts/draw_architecture.py draws."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_picture_in_docs_is_what_the_script_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = runpy.run_path(str(ROOT / "scripts/draw_architecture.py"))
    drawn = script["picture"]()
    assert drawn == (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
    assert drawn == script["picture"]()  # the same bytes every time
    monkeypatch.setattr(sys, "argv", ["draw_architecture.py", "--out", str(tmp_path / "x.svg")])
    script["main"]()
    assert (tmp_path / "x.svg").read_text(encoding="utf-8") == drawn

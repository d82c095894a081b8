"""One version, wherever it is written."""

import re
from pathlib import Path

import pkm_fairseq

ROOT = Path(__file__).resolve().parents[2]


def test_the_version_is_the_same_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.findall(r"^## (\d\S+) \S (\S+)$", changelog, re.MULTILINE)[0]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert version == pkm_fairseq.__version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in cited

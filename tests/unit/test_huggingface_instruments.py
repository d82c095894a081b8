"""The instruments of the core work on models of transformers."""

import copy
from pathlib import Path

import pytest
import torch

from pkm_fairseq.huggingface import MemoryTrainer
from pkm_fairseq.memory import FinetuneConfig, finetune_values
from pkm_fairseq.memory.ablation import ablated
from pkm_fairseq.memory.hosts import new_usage, observing
from pkm_fairseq.memory.observe.capture import InputCapture
from tests.hf_models import SMALL, add_memories, batch, plain, with_memories
from tests.unit.test_huggingface_training import arguments, examples

ALL = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert")


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_faiss_finds_the_search_exact_and_a_fault(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = pytest.importorskip("pkm_fairseq.validation.compare")
    model = with_memories(model_type).eval()
    captures = {layer: InputCapture() for layer in model.memory_layers()}
    with observing(model, captures):
        model(**batch())
    n_tokens = int(batch()["attention_mask"].sum())
    for layer, block in model.memory_layers().items():
        tokens = captures[layer].inputs()
        assert len(tokens) == n_tokens
        assert validation.validate_memory(block.memory, tokens, layer).exact
        search = block.memory.search
        monkeypatch.setattr(block.memory, "search", lambda x, s=search: (s(x)[0] // 2, s(x)[1]))
        assert not validation.validate_memory(block.memory, tokens, layer).exact


@torch.no_grad()
def test_a_memory_that_is_zeroed_leaves_the_model_without() -> None:
    model = plain("roberta").eval()
    before = model(**batch()).logits
    add_memories(model, SMALL, [0, 2])
    assert not torch.equal(model(**batch()).logits, before)
    with ablated(model, "zero"):
        assert torch.equal(model(**batch()).logits, before)
    with ablated(model, "permuted"):
        assert not torch.equal(model(**batch()).logits, before)


@torch.no_grad()
def test_usage_is_counted() -> None:
    model = with_memories("electra").eval()
    usage = new_usage(model)
    with observing(model, usage):
        model(**batch())
    assert usage[2].summary()["tokens"] == int(batch()["attention_mask"].sum())


@pytest.mark.parametrize("part", ["values", "slots"])
def test_finetuning_moves_values_only_or_few_rows_of_them(part: str, tmp_path: Path) -> None:
    model = with_memories("bert")
    start = copy.deepcopy(model.state_dict())
    more = {"finetune_slots": "5", "finetune_score": "count"} if part == "slots" else {}
    memories = {index: block.memory for index, block in model.memory_layers().items()}
    finetune_values(model, memories, FinetuneConfig(finetune=part, **more))
    trainer = MemoryTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=examples())
    trainer.train()
    for name, tensor in model.state_dict().items():
        if name.endswith("memory.values.weight"):
            moved = int((tensor != start[name]).any(1).sum())
            assert moved == 5 if part == "slots" else moved > 5
        elif ".reads." not in name:
            assert torch.equal(tensor, start[name]), name

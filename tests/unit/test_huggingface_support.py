"""Every cell of the support tables in docs/huggingface.md."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch

from tests.hf_models import (
    SMALL,
    ZERO,
    add_memories,
    batch,
    configuration,
    outputs,
    plain,
    transformers,
    with_memories,
)

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs/huggingface.md").read_text(encoding="utf-8")
HEADS = (
    "",
    "MaskedLM",
    "PreTraining",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
    "NextSentencePrediction",
)


def cells(table: str) -> List[Tuple[str, str, str]]:
    """Row, column and content of each cell of a table of the document."""
    lines = DOC.split(f"<!-- table: {table} -->")[1].split("<!-- end -->")[0].strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        (row[0], column, cell)
        for row in rows
        for column, cell in zip(head[1:], row[1:], strict=True)
    ]


def heads_of(model_type: str) -> List[str]:
    """The heads that transformers has for an architecture, of those for encoders."""
    config = type(configuration(model_type))
    autos = {head: f"AutoModelFor{head}" if head else "AutoModel" for head in HEADS}
    return [h for h, name in autos.items() if config in getattr(transformers, name)._model_mapping]


# --- the columns ------------------------------------------------------------------------------


def bit_for_bit(model_type: str) -> None:
    model = plain(model_type).eval()
    before = model(**batch()).logits
    after = add_memories(model, ZERO, [0, 2])(**batch()).logits
    assert torch.equal(before, after)
    torch.nn.init.normal_(model.memory_layers()[2].memory.values.weight)
    assert not torch.equal(before, model(**batch()).logits)


def in_place_of_the_ffn(model_type: str) -> None:
    model, n_before = plain(model_type).eval(), plain(model_type).num_parameters()
    add_memories(model, ZERO, [0, 2], "replace")
    n_memory = sum(x.numel() for b in model.memory_layers().values() for x in b.memory.parameters())
    assert model.num_parameters() - n_memory < n_before
    loss = model(**batch(), labels=batch()["input_ids"]).loss
    loss.backward()
    for block in model.memory_layers().values():
        assert all(p.grad is not None for p in block.parameters())


def heads(model_type: str) -> None:
    found = heads_of(model_type)
    assert len(found) >= 5 and "MaskedLM" in found and "" in found
    for head in found:
        model = plain(model_type, head).eval()
        before = outputs(model, batch(head))
        after = outputs(add_memories(model, ZERO, [0, 2]), batch(head))
        assert all(map(torch.equal, before, after)), head
        assert len(model.memory_layers()) == 2


def padding(model_type: str) -> None:
    model, given = with_memories(model_type).train(), batch()
    real = given["attention_mask"] == 1
    other = {**given, "input_ids": given["input_ids"].masked_fill(~real, 7)}
    twins = model, copy.deepcopy(model)
    one, two = (twin(**x).logits for twin, x in zip(twins, (given, other), strict=True))
    assert torch.equal(one[real], two[real])
    for name, tensor in twins[0].state_dict().items():
        assert torch.equal(twins[1].state_dict()[name], tensor), name
    without = copy.deepcopy(model)(given["input_ids"]).logits
    assert not torch.equal(without[real], one[real])


def checkpointing(model_type: str) -> None:
    model, given = with_memories(model_type).train(), batch()
    found = []
    for twin in (model, copy.deepcopy(model)):
        if twin is not model:
            twin.activation_checkpointing_enable()
        twin(**given, labels=given["input_ids"]).loss.backward()
        found.append({n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.allclose(found[1][name], grad, rtol=0, atol=1e-6), name


def save_and_load(model_type: str, folder: Path) -> None:
    for head in heads_of(model_type):
        model = with_memories(model_type, head=head)
        model.save_pretrained(folder / head)
        auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
        loaded, info = auto.from_pretrained(folder / head, output_loading_info=True)
        assert type(loaded) is type(model) and not any(info.values())
        assert loaded.config.model_type == f"pkm_{model_type}"
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())


def shared_values(model_type: str, folder: Path) -> None:
    model = add_memories(plain(model_type), replace(SMALL, share_values=True), [0, 2])
    model.save_pretrained(folder)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    for one in (model, loaded):
        layers = one.memory_layers()
        assert layers[0].memory.values is layers[2].memory.values
        assert layers[0].memory.keys is not layers[2].memory.keys
    expected = model.memory_layers()[0].memory.values.weight
    assert torch.equal(loaded.memory_layers()[2].memory.values.weight, expected)


def eager_attention(model_type: str) -> None:
    model = plain(model_type, attn_implementation="eager").eval()
    before = outputs(model, batch(), output_attentions=True)
    after = outputs(add_memories(model, ZERO, [0, 2]), batch(), output_attentions=True)
    assert len(before) == 1 + 4 + 3  # logits, hidden states, attentions
    assert all(map(torch.equal, before, after))


def hidden_states(model_type: str) -> None:
    model = with_memories(model_type, head="").eval()
    found = model(**batch(), output_hidden_states=True).hidden_states
    assert len(found) == 4
    assert torch.equal(found[-1], model(**batch()).last_hidden_state)


COLUMNS: Dict[str, Callable[..., None]] = {
    "bit for bit": bit_for_bit,
    "replace": in_place_of_the_ffn,
    "heads": heads,
    "padding": padding,
    "checkpointing": checkpointing,
    "save, load": save_and_load,
    "shared values": shared_values,
    "eager attention": eager_attention,
    "hidden states": hidden_states,
}


def test_the_table_is_whole() -> None:
    found = cells("architectures")
    rows, columns = {row for row, _, _ in found}, {column for _, column, _ in found}
    assert rows == {"bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert"}
    assert columns == set(COLUMNS)
    assert {cell for _, _, cell in found} == {"yes"}


@pytest.mark.parametrize(("row", "column", "cell"), cells("architectures"))
def test_what_the_table_of_architectures_says_is_so(
    row: str, column: str, cell: str, tmp_path: Path
) -> None:
    check: Any = COLUMNS[column]
    check(row, *([tmp_path] if column in ("save, load", "shared values") else []))

"""Write the model card of a model with memory, with known facts only."""

from pathlib import Path
from typing import Any, List

import transformers

from ..memory import MemoryConfig, ValueTable
from ..memory.files import write_file

FILE = "README.md"
MARK = "<!-- written by pkm_fairseq; a card without this line is never written over -->"
LOAD = '.from_pretrained("this folder")'
USAGE = ("draws_per_slot", "top1_usage", "topk_usage", "top1_ceiling", "kl_weighted", "gini")


def model_card(model: Any) -> str:
    """The card, in markdown.

    Args:
        model: with memories. The card includes its attribute ``memory_usage``, the last count of
            ``MemoryUsageCallback``, if it exists.
    """
    config = model.config
    settings = MemoryConfig(**config.memory)
    layers = ", ".join(map(str, config.memory_layers))
    where = "beside" if config.memory_mode == "residual" else "in place of"
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "of these, values": f"{_values(model):,}",
        "memories": f"{where} the feed-forward of layers {layers} (0-based)",
        "slots": f"{settings.n_slots:,}" + (", shared by all layers" * settings.share_values),
        "read per token and layer": f"{settings.heads} heads x {settings.knn} slots",
        "values": f"{settings.values}, width {settings.value_width(config.hidden_size)}, "
        f"{settings.value_dtype}",
        "query": f"{settings.query}, {settings.heads} x {settings.k_dim}, "
        f"normalised over: {settings.query_norm}",
    }
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- product-key-memory",
        "---",
        "",
        MARK,
        "",
        f"# {type(model).__name__}",
        "",
        f"A {config.model_type.removeprefix('pkm_')} encoder with product-key memories "
        "(Lample et al. 2019; Kim & Jung 2020).",
        "",
        *_table(["fact", ""], [[k, v] for k, v in facts.items()]),
        "",
        "## Load",
        "",
        "With the package `pkm_fairseq` installed; `trust_remote_code` is not needed:",
        "",
        "```python",
        *_how_to_load(model),
        "```",
        "",
        "## Is the memory used?",
        "",
        *_usage(getattr(model, "memory_usage", None)),
        "",
    ]
    return "\n".join(lines)


def write_card(model: Any, folder: Path) -> None:
    """Write the card of a saved model, unless the folder has a card by someone else."""
    file = folder / FILE
    if not file.exists() or MARK.encode() in file.read_bytes():
        write_file(file, model_card(model))


def _values(model: Any) -> int:
    tables = {id(x.weight): x.weight for x in model.modules() if isinstance(x, ValueTable)}
    return sum(table.numel() for table in tables.values())


def _how_to_load(model: Any) -> List[str]:
    """Lines of Python that import the model's class, and load the model."""
    kind = type(model)
    auto = f"AutoModelFor{kind.__name__.rpartition('For')[2]}" if "For" in kind.__name__ else ""
    auto = auto if hasattr(transformers, auto) else "AutoModel"
    known: Any = getattr(transformers, auto)._model_mapping
    if type(model.config) in known and known[type(model.config)] is kind:
        lines = ["import pkm_fairseq.huggingface  # registers the class with transformers"]
        return [*lines, f"from transformers import {auto}", "", f"model = {auto}{LOAD}"]
    from .models import MemoryModel  # it imports this module

    if kind.__module__ != MemoryModel.__module__:  # not made by memory_class
        return [_import_of(kind), "", f"model = {kind.__name__}{LOAD}"]
    plain = kind.__bases__[1]
    lines = [_import_of(plain), "from pkm_fairseq.huggingface import memory_class"]
    return [*lines, "", f"model = memory_class({plain.__name__}){LOAD}"]


def _import_of(kind: type) -> str:
    """A line of Python that imports a class, or asks for its definition in a script."""
    name = kind.__name__
    if kind.__module__ == "__main__":
        return f"# {name}: define it as the script that saved this model does"
    return f"from {kind.__module__} import {name}"


def _usage(record: Any) -> List[str]:
    if record is None:
        return ["No usage was counted before this model was saved."]
    rows = [
        [str(layer["layer"]), *(f"{layer[key]:.4g}" for key in USAGE)] for layer in record["layers"]
    ]
    at = "" if record["update"] is None else f" at update {record['update']},"
    return [
        f"Counted{at} over {record['layers'][0]['tokens']:,} tokens of {record['split']!r}. "
        "Usage grows with the draws per slot (tokens x heads / slots).",
        "",
        *_table(["layer", *USAGE], rows),
    ]


def _table(head: List[str], rows: List[List[str]]) -> List[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]

"""Write the model card of a model with memory, with known facts only."""

from pathlib import Path
from typing import Any, Dict, List

from ..memory import MemoryConfig, ValueTable
from ..memory.files import write_file

FILE = "README.md"
MARK = "<!-- written by pkm_fairseq; a card without this line is never written over -->"
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
        "import pkm_fairseq.huggingface  # registers the class with transformers",
        "from transformers import " + _auto_of(model),
        "",
        f'model = {_auto_of(model)}.from_pretrained("this folder")',
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
    if not file.exists() or MARK in file.read_text(encoding="utf-8"):
        write_file(file, model_card(model))


def _values(model: Any) -> int:
    tables = {id(x.weight): x.weight for x in model.modules() if isinstance(x, ValueTable)}
    return sum(table.numel() for table in tables.values())


def _auto_of(model: Any) -> str:
    name = type(model).__name__
    return f"AutoModelFor{name.rpartition('For')[2]}" if "For" in name else "AutoModel"


def _usage(record: Any) -> List[str]:
    if record is None:
        return ["No usage was counted before this model was saved."]
    rows = [
        [str(layer["layer"]), *(f"{layer[key]:.4g}" for key in USAGE)] for layer in record["layers"]
    ]
    said: Dict[str, Any] = {"update": record["update"], "split": record["split"]}
    return [
        f"Counted at update {said['update']}, over {record['layers'][0]['tokens']:,} tokens of "
        f"{said['split']!r}. Usage grows with the draws per slot (tokens x heads / slots).",
        "",
        *_table(["layer", *USAGE], rows),
    ]


def _table(head: List[str], rows: List[List[str]]) -> List[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]

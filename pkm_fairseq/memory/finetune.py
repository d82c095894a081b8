"""Finetune only values, or only a few rows of them; freeze the rest of the model."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from torch import Tensor, nn

from .gradient import table_state
from .memory import ProductKeyMemory
from .observe.slot_counts import CountsFile, load_counts
from .option import OUR_CHOICE, declared_in, flag_of, option
from .rows import SCORES, RowBudget, RowChoice
from .values import ValueTable

LIN = "Lin et al. 2025"
PARTS = {
    "values": "all value tables, and any new head",
    "slots": "like values, but each update trains only the rows with the highest scores",
}
SCOPES = {
    "batch": "in each update, from the reads of its batch",
    "data": "once, from --memory-finetune-counts",
}
SLOTS, SCORE, SCOPE = "50%", "tf-idf", "batch"  # defaults


def _budget(name: str, value: Any) -> None:
    try:
        RowBudget.parse(value)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from None


@dataclass(frozen=True)
class FinetuneConfig:
    """Which parameters a finetuning trains.

    The arguments are the fields below. Each declares its meaning and the source of its default;
    ``docs/settings.md`` lists them.

    Raises:
        ValueError: a value is impossible, or has no effect; the message names it.
    """

    finetune: Optional[str] = option(
        None, "train only values and freeze the rest", f"as {LIN}", choices=PARTS
    )
    finetune_slots: Optional[str] = option(
        None,
        "rows of each table to train: a number, or a share of the rows that are read, e.g. 0.5 or "
        "50%",
        OUR_CHOICE,
        test=_budget,
        default_text=SLOTS,
    )
    finetune_score: Optional[str] = option(
        None, "score that ranks the rows", LIN, choices=SCORES, default_text=SCORE
    )
    finetune_scope: Optional[str] = option(
        None, "when the rows are chosen", LIN, choices=SCOPES, default_text=SCOPE
    )
    finetune_counts: Optional[str] = option(
        None, "slot counts on the new text, a file of memory_usage.py --save-counts", OUR_CHOICE
    )
    background: Optional[str] = option(
        None,
        "slot counts on background text, whose slots should not change; a file of "
        "memory_usage.py --save-counts",
        OUR_CHOICE,
    )

    def __post_init__(self) -> None:
        for name, declared in declared_in(self).items():
            declared.check(f"memory-{name.replace('_', '-')}", getattr(self, name))
        if self.finetune != "slots":
            self._refuse_options_of_slots()
            return
        if self.by_rarity and self.background is None:
            raise ValueError(
                "--memory-finetune slots scores by tf-idf, which needs --memory-background FILE: "
                "make it with memory_usage.py --save-counts, or use --memory-finetune-score count"
            )
        if not self.by_rarity and self.background is not None:
            raise ValueError(
                f"--memory-background {self.background} has no effect with "
                "--memory-finetune-score count"
            )
        if self.finetune_scope == "data" and self.finetune_counts is None:
            raise ValueError(
                "--memory-finetune-scope data needs --memory-finetune-counts FILE: make it from "
                "the new text with memory_usage.py --save-counts"
            )
        if self.finetune_scope != "data" and self.finetune_counts is not None:
            raise ValueError(
                f"--memory-finetune-counts {self.finetune_counts} has no effect without "
                "--memory-finetune-scope data"
            )

    @property
    def by_rarity(self) -> bool:
        """Whether slots are scored by TF-IDF."""
        return (self.finetune_score or SCORE) == "tf-idf"

    @property
    def budget(self) -> RowBudget:
        """The number of rows to train."""
        return RowBudget.parse(self.finetune_slots or SLOTS)

    def _refuse_options_of_slots(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "finetune" and value is not None:
                raise ValueError(
                    f"{flag_of(f'memory_{f.name}')} {value} has no effect without "
                    "--memory-finetune slots"
                )


def finetune_values(
    model: nn.Module, memories: Mapping[int, ProductKeyMemory], config: FinetuneConfig
) -> None:
    """Freeze everything except values, and choose the rows of values to train.

    From now on training, too, normalises queries by the running statistics, which do not change.
    Only ``MemoryAdam`` can restrict an update to some rows. Parts that are added later, such as a
    head, are trained. A head that is there already is frozen, too: for a new one, call
    ``head.requires_grad_(True)`` afterwards.

    Args:
        model: any module with memories.
        memories: its memories, by their layer's name in the files of counts.
        config: the settings; if ``finetune`` is None, the function does nothing.

    Raises:
        ValueError: there is no memory, or a file of counts is of other memories.
    """
    if config.finetune is None:
        return
    if not memories:
        raise ValueError(f"--memory-finetune {config.finetune}: no layer has a memory")
    choices = row_choices(memories, config) if config.finetune == "slots" else {}
    model.requires_grad_(False)
    for memory in memories.values():
        memory.freeze("all")
    for layers, tables in tables_by_layers(memories).items():
        for table in tables:
            table.weight.requires_grad_(True)
            table_state(table.weight).rows = choices.get(layers)


def row_choices(
    memories: Mapping[int, ProductKeyMemory], config: FinetuneConfig
) -> Dict[Tuple[int, ...], RowChoice]:
    """The choice of rows for each table, by the layers that read it; tables of one memory share it.

    Raises:
        ValueError: a file of counts is missing, invalid, or of other memories.
    """
    background = _counts("background", config)
    data = _counts("finetune_counts", config)
    choices = {}
    for layers, tables in tables_by_layers(memories).items():
        n_slots = tables[0].n_slots
        given = [
            None
            if file is None
            else file.of(layers, n_slots, f"{flag_of(f'memory_{name}')} {path}")
            for file, name, path in (
                (background, "background", config.background),
                (data, "finetune_counts", config.finetune_counts),
            )
        ]
        choices[layers] = RowChoice(config.budget, *given)
    return choices


def check_origins(origins: Mapping[int, Tensor], config: FinetuneConfig) -> None:
    """Check, after loading a model's parameters, that the slot counts are of this model.

    Args:
        origins: by layer, the ``origin`` of its memory in ``ReadTimes``: the training that created
            it; zeros if unknown.
        config: the settings, with the files of counts.

    Raises:
        ValueError: a file counts the reads of memories of another training.
    """
    for name in ("background", "finetune_counts"):
        file = _counts(name, config)
        theirs = {} if file is None else file.about.get("origins") or {}
        for layer, origin in theirs.items():
            ours = origins[layer].float().round().long().tolist() if layer in origins else []
            if any(ours) and ours != list(origin):
                raise ValueError(
                    f"{flag_of(f'memory_{name}')} {getattr(config, name)} counts the reads of "
                    f"{file.about.get('checkpoint') if file else None}, whose memory in layer "
                    f"{layer} is of another training: count with the checkpoint that you finetune"
                )


def _counts(name: str, config: FinetuneConfig) -> Optional[CountsFile]:
    path = getattr(config, name)
    return None if path is None else load_counts(Path(path), f"{flag_of(f'memory_{name}')} {path}")


def tables_by_layers(
    memories: Mapping[int, ProductKeyMemory],
) -> Dict[Tuple[int, ...], List[ValueTable]]:
    """The value tables, by the layers that read them; layers that share values form one key."""
    values: Dict[int, Any] = {id(memory.values): memory.values for memory in memories.values()}
    return {
        tuple(i for i, m in sorted(memories.items()) if id(m.values) == key): list(
            shared.tables().values()
        )
        for key, shared in values.items()
    }

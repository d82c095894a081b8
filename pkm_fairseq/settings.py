"""``python -m pkm_fairseq.settings [FILE ...]``: tables of all options, made from declarations.

Without a file it prints them. In files it replaces the text between ``<!-- table: NAME -->`` and
``<!-- end -->``. It maintains ``docs/settings.md`` and ``docs/pretraining.md``.
"""

import re
import sys
from pathlib import Path
from typing import Dict, List

from .criterions.sentence_prediction import PkmSentencePredictionConfig
from .memory import MemoryConfig
from .memory.finetune import FinetuneConfig
from .memory.option import OUR_CHOICE, Option, declared_in, flag_of
from .models.config import PkmRobertaConfig, default_by_size
from .optim.pkm_adam import PkmAdamConfig

TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# the options in docs/pretraining.md
FIRST = ["memory_layers", "memory_mode", "init_from", "memory_n_keys", "memory_heads", "memory_knn"]
FIRST += ["memory_query_norm", "memory_value_dtype", "memory_value_lr", "memory_usage_interval"]


def declared_options() -> Dict[str, Dict[str, Option]]:
    """All our options, by the part they belong to and the name of their field."""
    model = declared_in(PkmRobertaConfig)
    parts = {
        part: {f"memory_{name}": model[f"memory_{name}"] for name in declared_in(config)}
        for part, config in (("memory", MemoryConfig), ("finetuning", FinetuneConfig))
    }
    apart = {name for part in parts.values() for name in part}
    return {
        "model": {name: declared for name, declared in model.items() if name not in apart},
        **parts,
        "optimizer": declared_in(PkmAdamConfig),
        "criteria": declared_in(PkmSentencePredictionConfig),
    }


def tables() -> Dict[str, str]:
    """Every table in Markdown, by name, and ``sources``, the footnotes of all of them."""
    parts = declared_options()
    everything = {name: option for options in parts.values() for name, option in options.items()}
    sources = list(dict.fromkeys(option.source for option in everything.values()))
    sources = [source for source in sources if source != OUR_CHOICE]
    marks = {source: f"[^{number}]" for number, source in enumerate(sources, 1)}
    marks[OUR_CHOICE] = OUR_CHOICE
    found = {part: _table(options, marks) for part, options in parts.items()}
    found["sources"] = "".join(f"[^{n}]: {source}\n" for n, source in enumerate(sources, 1))
    words = {source: source for source in marks}
    found["first"] = _table({name: everything[name] for name in FIRST}, words)
    return found


def _table(options: Dict[str, Option], marks: Dict[str, str]) -> str:
    rows = [["flag", "default", "meaning", "source of the default"], ["---"] * 4]
    for name, option in options.items():
        default, source = default_by_size(name, option), marks[option.source]
        rows.append([f"`{flag_of(name)}`", default, option.meaning("`"), source])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def renewed(text: str) -> str:
    """The text with its tables renewed from the declarations.

    Raises:
        ValueError: a table has an unknown name.
    """
    known = tables()
    unknown = [match[2] for match in TABLE.finditer(text) if match[2] not in known]
    if unknown:
        raise ValueError(f"table is {unknown[0]}, must be one of {', '.join(known)}")
    return TABLE.sub(lambda match: match[1] + known[match[2]] + match[3], text)


def main(files: List[str]) -> None:
    """Print all tables, or renew the tables in files."""
    for file in map(Path, files):
        file.write_text(renewed(file.read_text(encoding="utf-8")), encoding="utf-8")
    if not files:
        for name, table in tables().items():
            print(f"{name}\n\n{table}")


if __name__ == "__main__":
    main(sys.argv[1:])

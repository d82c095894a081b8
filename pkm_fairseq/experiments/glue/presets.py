"""Hyper-parameters of finetuning: yaml files with fairseq's options, and overrides."""

from pathlib import Path
from typing import Any, Dict, List, Sequence

import yaml

PRESETS = Path(__file__).parent
PARTS = ("all", "memory", "tasks")
WARMUP_RATIO = "warmup_ratio"  # the only key that is not an option of fairseq-train
MEMORY_PREFIX = "memory_"
# options that the script sets itself
RESERVED = {
    "data",
    "user_dir",
    "save_dir",
    "seed",
    "restore_file",
    "init_from",
    "task",
    "criterion",
}
RESERVED |= {"arch", "num_classes", "regression_target", "finetune_from_model", "valid_subset"}
RESERVED |= {"glue_metrics", "glue_positive_label", "log_format", "classification_head_name"}
RESERVED |= {"best_checkpoint_metric", "maximize_best_checkpoint_metric", "max_positions"}
RESERVED |= {"distributed_world_size"}
# options that must keep their defaults: training on train, and dev scores on all of dev
RESERVED |= {"train_subset", "max_valid_steps", "disable_validation"}

Settings = Dict[str, Any]


def load_preset(name: str) -> Dict[str, Settings]:
    """Read a preset.

    Args:
        name: ``roberta``, ``small``, or a yaml file with the parts ``all``, ``memory`` (for arms
            with a memory) and ``tasks`` (by task).

    Raises:
        ValueError: it is missing, not yaml, or has another form.
    """
    file = PRESETS / f"{name}.yaml" if "/" not in name and "." not in name else Path(name)
    try:
        preset = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"preset {name}: no such file {file}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"preset {file} is not yaml: {' '.join(str(error).split())}") from None
    if not isinstance(preset, dict) or not set(preset) <= set(PARTS):
        raise ValueError(f"preset {file} may hold only the parts {', '.join(PARTS)}")
    where = f"preset {file}"
    tasks = _keys_and_values(preset.get("tasks") or {}, where)
    return {
        "all": _settings(preset.get("all") or {}, where),
        "memory": _settings(preset.get("memory") or {}, where),
        "tasks": {task: _settings(part, where) for task, part in tasks.items()},
    }


def _settings(part: Any, where: str) -> Settings:
    """The settings of a part of a preset; their keys may have dashes."""
    settings = {}
    for key, value in _keys_and_values(part, where).items():
        if not isinstance(key, str):
            raise ValueError(f"{where}: key {key} must be text, as in lr: 1e-5")
        if value is None:
            raise ValueError(f"{where}: {key} is empty, must have a value, as in lr: 1e-5")
        settings[_key(key)] = value
    _refuse_reserved(settings, where)
    return settings


def _keys_and_values(part: Any, where: str) -> Settings:
    if not isinstance(part, dict):
        raise ValueError(f"{where}: {part!r} must be keys and values, as in lr: 1e-5")
    return part


def parse_overrides(pairs: Sequence[str]) -> Settings:
    """The settings of ``--set``: ``["lr=1e-4"]``.

    Raises:
        ValueError: a text is not KEY=VALUE, or names an option that the script sets itself.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"--set {pair}: must be KEY=VALUE, as in lr=1e-5")
        settings[_key(key)] = value
    _refuse_reserved(settings, "--set")
    return settings


def check_further(flags: Sequence[str]) -> None:
    """Refuse further flags of fairseq-train that the script sets itself."""
    names = [_key(flag[2:].split("=")[0]) for flag in flags if flag.startswith("--")]
    _refuse_reserved(dict.fromkeys(names), "behind --")


def check_parsed(args: Any, own: Any) -> None:
    """Refuse settings that change an option of the script by another name, as ``--nval``.

    Args:
        args: the parsed flags.
        own: the same without the user's.
    """
    for key in sorted(RESERVED):
        if getattr(args, key, None) != getattr(own, key, None):
            raise ValueError(
                f"a setting changes {key}: this script sets {key} itself, leave it out"
            )


def _key(text: str) -> str:
    """The name of an option: ``batch-size`` is ``batch_size``."""
    return text.strip().replace("-", "_")


def _refuse_reserved(settings: Settings, where: str) -> None:
    for key in settings:
        if key in RESERVED:
            raise ValueError(f"{where}: this script sets {key} itself, leave it out")


def settings_of(
    preset: Dict[str, Settings], task: str, has_memory: bool, overrides: Settings
) -> Settings:
    """The settings of one arm on one task, in order of priority: overrides, task, memory, all.

    Overrides that begin with ``memory_`` apply only to arms with a memory.
    """
    settings = {**preset["all"], **(preset["memory"] if has_memory else {})}
    settings |= preset["tasks"].get(task, {})
    settings |= {
        key: value
        for key, value in overrides.items()
        if has_memory or not key.startswith(MEMORY_PREFIX)
    }
    return settings


def flags_of(settings: Settings) -> List[str]:
    """Flags of fairseq-train; true gives a bare flag, false gives none."""
    flags = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if str(value).lower() == "true":
            flags.append(flag)
        elif str(value).lower() != "false":
            flags += [flag, str(value)]
    return flags

"""Results of finetuning: medians over seeds, as JSON, Markdown and on the terminal."""

import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any, Dict, List, Sequence, Set

from rich.console import Console
from rich.table import Table

from ...memory.files import write_file
from ..runs.folders import is_finished, key_of
from .tasks import TASKS

BASELINE = "majority class"
SETTINGS = "settings.json"  # of the last finetuning of an arm on a task, in the task's folder
RESULT = "result.json"  # of a run, in its folder
NOTE = (
    "Dev scores in per cent: median over seeds [lowest-highest] of the checkpoints that were best "
    "on dev by each task's first metric. Average: over tasks, of the mean of each task's medians."
)


def summarise(values: Sequence[float]) -> Dict[str, Any]:
    """Median and extremes of one metric over seeds."""
    return {
        **{"median": median(values), "min": min(values), "max": max(values)},
        "seeds": list(values),
    }


def read_results(out: Path, arms: Sequence[str] = ()) -> Dict[str, Any]:
    """Combine all finished runs below a folder, whichever call of finetune_glue.py made them.

    Runs with other settings than their task's last finetuning are left out. So are tasks for which
    an arm started from another checkpoint, or a task had other data, than in the last finetuning.

    Args:
        out: folder with ``<arm>/<task>/settings.json`` and ``<arm>/<task>/seed<k>/``.
        arms: names of arms to list first, in this order.

    Returns:
        As ``collect``; tasks are in GLUE's order.
    """
    files = sorted(out.glob(f"*/*/{SETTINGS}"), key=lambda file: file.stat().st_mtime_ns)
    stored = {file.parent: json.loads(file.read_text(encoding="utf-8")) for file in files}
    stored = {folder: made for folder, made in stored.items() if "arm" in made}  # else too old
    last = {
        part: {made[part]["name"]: made[part] for made in stored.values()}
        for part in ("arm", "task")
    }
    results = []
    for folder, made in stored.items():
        arm, task = (last[part][made[part]["name"]] for part in ("arm", "task"))
        if (arm["sha256"], task["key"]) != (made["arm"]["sha256"], made["task"]["key"]):
            continue
        for file in folder.glob(f"seed*[0-9]/{RESULT}"):
            result = json.loads(file.read_text(encoding="utf-8"))
            if is_finished(file.parent, key_of(made["key"], result["seed"])):
                results.append(result)
    names = _in_order({result["arm"] for result in results}, arms)
    tasks = _in_order({result["task"] for result in results}, list(TASKS))
    about = {name: last["task"][name] for name in tasks}
    return collect(
        [last["arm"][name] for name in names],
        {name: {key: of[key] for key in ("n_train", "baseline")} for name, of in about.items()},
        results,
    )


def _in_order(names: Set[str], first: Sequence[str]) -> List[str]:
    return [*(name for name in first if name in names), *sorted(names - set(first))]


def collect(
    arms: Sequence[Dict[str, Any]],
    tasks: Dict[str, Dict[str, Any]],
    results: Sequence[Dict[str, Any]],
) -> Dict[str, Any]:
    """Combine the results of runs.

    Args:
        arms: ``name`` and further entries of each arm.
        tasks: by name ``n_train`` and ``baseline``, dev scores by metric.
        results: the ``result.json`` of each finished run.

    Returns:
        ``note``, ``tasks`` and ``arms``. Each arm has ``tasks``, and each of them ``dev`` by metric
        (see ``summarise``), ``seeds``, ``updates`` by seed, ``warmup_updates`` of the first seed,
        and ``memory``. Each arm also has ``average``, None if a task is missing.
    """
    rows = []
    for arm in arms:
        by_task = {}
        for task in tasks:
            runs = [r for r in results if (r["arm"], r["task"]) == (arm["name"], task)]
            if runs:
                by_task[task] = _of_seeds(sorted(runs, key=lambda run: run["seed"]))
        medians = [mean(d["median"] for d in t["dev"].values()) for t in by_task.values()]
        average = mean(medians) if len(medians) == len(tasks) else None
        rows.append({**arm, "average": average, "tasks": by_task})
    return {"note": NOTE, "tasks": tasks, "arms": rows}


def _of_seeds(runs: List[Dict[str, Any]]) -> Dict[str, Any]:
    metrics = runs[0]["dev"]
    return {
        "seeds": [run["seed"] for run in runs],
        "updates": [run["updates"] for run in runs],
        "warmup_updates": runs[0]["warmup_updates"],
        "dev": {name: summarise([run["dev"][name] for run in runs]) for name in metrics},
        "memory": [run["memory"] for run in runs] if runs[0]["memory"] else None,
    }


def memory_rows(results: Dict[str, Any]) -> List[List[str]]:
    """One row per arm, task and memory layer; numbers are medians over seeds."""
    rows = []
    for arm in results["arms"]:
        for task, found in arm["tasks"].items():
            for at, layer in enumerate((found["memory"] or [{"drift": []}])[0]["drift"]):
                seeds = found["memory"]
                rows.append([arm["name"], task, str(layer["layer"]), *_memory_cells(seeds, at)])
    return rows


MEMORY_COLUMNS = ("arm", "task", "layer", "tokens", "top-1 usage (ceiling)", "KL, nats")
MEMORY_COLUMNS += ("same top-1", "top-k overlap", "values moved")


def _memory_cells(seeds: List[Dict[str, Any]], at: int) -> List[str]:
    def of(part: str, key: str, text: str) -> str:
        values = [seed[part][at][key] for seed in seeds if seed[part][at][key] is not None]
        return format(median(values), text) if values else "-"

    return [
        of("before", "tokens", ",.0f"),
        f"{of('before', 'top1_usage', '.1%')} -> {of('after', 'top1_usage', '.1%')} "
        f"({of('before', 'top1_ceiling', '.1%')})",
        f"{of('before', 'kl_weighted', '.2f')} -> {of('after', 'kl_weighted', '.2f')}",
        of("drift", "top1_same", ".1%"),
        of("drift", "topk_jaccard", ".1%"),
        of("drift", "values_moved", ".2%"),
    ]


def _columns(results: Dict[str, Any]) -> List["tuple[str, str]"]:
    return [(task, m) for task, about in results["tasks"].items() for m in about["baseline"]]


def _cell(arm: Dict[str, Any], task: str, metric: str) -> str:
    if task not in arm["tasks"]:
        return "-"
    dev = arm["tasks"][task]["dev"][metric]
    if len(dev["seeds"]) == 1:
        return f"{dev['median']:.1f}"
    return f"{dev['median']:.1f} [{dev['min']:.1f}-{dev['max']:.1f}]"


def _average(arm: Dict[str, Any]) -> str:
    return "-" if arm["average"] is None else f"{arm['average']:.1f}"


def _range(numbers: Sequence[int]) -> str:
    """``1,072``, or ``804-1,072`` if they differ."""
    return "-".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


def to_markdown(results: Dict[str, Any]) -> str:
    """The results as Markdown tables, with arms as rows."""
    columns = _columns(results)
    heads = [f"{task} {metric}" for task, metric in columns]
    rows = [
        [arm["name"], *(_cell(arm, *column) for column in columns), _average(arm)]
        for arm in results["arms"]
    ]
    tasks = results["tasks"]
    rows.append([BASELINE, *(f"{tasks[t]['baseline'][m]:.1f}" for t, m in columns), ""])
    parts = ["# GLUE dev results", results["note"], _markdown(["arm", *heads, "average"], rows)]
    updates = [
        [arm["name"], task, f"{tasks[task]['n_train']:,}", _range(found["updates"]),
         f"{found['warmup_updates']:,}", ", ".join(map(str, found["seeds"]))]
        for arm in results["arms"] for task, found in arm["tasks"].items()
    ]  # fmt: skip
    parts += ["## Runs"]
    parts += [_markdown(["arm", "task", "examples", "updates", "warm-up", "seeds"], updates)]
    memory = memory_rows(results)
    if memory:
        parts += ["## Memory on dev, before -> after finetuning"]
        parts += [_markdown(list(MEMORY_COLUMNS), memory)]
    return "\n\n".join(parts) + "\n"


def _markdown(heads: List[str], rows: List[List[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_results(out: Path, results: Dict[str, Any]) -> None:
    """Write results.json and results.md."""
    write_file(out / "results.json", json.dumps(results, indent=2))
    write_file(out / "results.md", to_markdown(results))


def print_results(results: Dict[str, Any]) -> None:
    """Print the results, with arms as columns, since there are fewer arms than metrics."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(
        "task", "metric", title=r"GLUE dev, median \[lowest-highest] over seeds, per cent"
    )
    for name in (*(arm["name"] for arm in results["arms"]), BASELINE):
        table.add_column(name, justify="right")
    for task, metric in _columns(results):
        baseline = results["tasks"][task]["baseline"][metric]
        cells = [_cell(arm, task, metric) for arm in results["arms"]]
        table.add_row(task, metric, *(c.replace("[", r"\[") for c in cells), f"{baseline:.1f}")
    table.add_section()
    table.add_row("average", "", *map(_average, results["arms"]))
    console.print(table)
    memory = memory_rows(results)
    if memory:
        drift = Table(*MEMORY_COLUMNS, title="memory on dev, before -> after finetuning")
        for row in memory:
            drift.add_row(*row)
        console.print(drift)

"""Compare logs of memory usage in training."""

from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ..memory.observe.log import read_usage_log
from .draws import below
from .plots import COLOURS, Chart, chart, plain

STYLES = ("-", "--", ":", "-.")
TRAINING = "train"


class Log(NamedTuple):
    """The log of one training.

    Attributes:
        name: the arm.
        file: the log.
        header: shapes of its memories.
        records: counts, ascending in updates, the latest of each split and update.
        truncated: whether the last line was incomplete and was skipped.
    """

    name: str
    file: Path
    header: Dict[str, Any]
    records: List[Dict[str, Any]]
    truncated: bool


class Metric(NamedTuple):
    """A number in each layer's log, drawn over updates.

    Attributes:
        title: its name.
        path: the keys to it in the record of a layer.
        ceiling: key of the ceiling under uniform routing, drawn dotted.
        is_share: whether it is drawn in per cent.
        unit: unit of the vertical axis.
        meaning: how to read it.
    """

    title: str
    path: Tuple[str, ...]
    unit: str
    meaning: str
    ceiling: Optional[str] = None
    is_share: bool = False


EVENTS = (  # of a slot: name, key, words
    ("reads", "read", "was last read"),
    ("first choices", "top1", "was last a head's first choice"),
)
METRICS = (
    Metric("Top-1 usage", ("top1_usage",), "slots used",
           "Share of slots that were a head's first choice.", "top1_ceiling", True),
    Metric("Top-k usage", ("topk_usage",), "slots used",
           "Share of slots that received any weight.", "topk_ceiling", True),
    Metric("KL from uniform", ("kl_weighted",), "nats",
           "Divergence of the slots' weights from uniform; 0 is perfectly even."),
    Metric("Gini coefficient", ("gini",), "Gini",
           "Inequality of the slots' weights: 0 all equal, near 1 one slot has all."),
    Metric("Dead slots", ("dead_slots",), "slots", "Slots that received no weight in the count."),
    Metric("Weight of the first choice", ("top1_weight",), "mean weight",
           "Near 1, a head reads one slot; at 1/knn, it weighs all its slots equally."),
    Metric("Slots with weight", ("holds_10",), "slots",
           "Share of slots that hold at least 10 % of the weight that uniform routing would give "
           "each.", None, True),
    Metric("Neighbours in effect", ("effective_neighbours",), "neighbours",
           "exp of the entropy of a look-up. Near knn, a head weighs all its slots equally, and "
           "its first choice means little."),
    Metric("Entropy of a look-up", ("entropy",), "nats",
           "Mean entropy of a head's weights, at most log knn."),
    Metric("Sub-keys used, first half", ("subkey1_usage",), "sub-keys used",
           "Share of the heads' sub-keys of the first half that were read.", None, True),
    Metric("Sub-keys used, second half", ("subkey2_usage",), "sub-keys used",
           "Share of the heads' sub-keys of the second half that were read.", None, True),
    *(
        Metric(f"Staleness of {name}, {quantile}", ("staleness", event, key), "updates",
               f"Updates since a slot {since}; since the start if it never was.")
        for name, event, since in EVENTS
        for quantile, key in (("median", "p50"), ("90th percentile", "p90"),
                              ("99th percentile", "p99"))
    ),
    *(
        Metric(f"Outdated {name}, by more than {limit:,} updates",
               ("staleness", event, "outdated", str(limit)), "slots",
               f"Share of slots with more than {limit:,} updates since the slot {since}.",
               None, True)
        for name, event, since in EVENTS
        for limit in (10, 100, 1000, 10_000)
    ),
    Metric("Values moved, median", ("staleness", "moved", "p50"), "L2 distance",
           "Distance of a slot's value from its initial value."),
    Metric("Values moved, 99th percentile", ("staleness", "moved", "p99"), "L2 distance",
           "Distance of a slot's value from its initial value."),
)  # fmt: skip


def read_log(name: str, file: Path) -> Log:
    """Read a log and compare its counts with its header.

    Raises:
        ValueError: the file is not a log of memory usage, has no count, or contradicts its header.
    """
    header, records = read_usage_log(file)
    if not records:
        raise ValueError(f"{file} holds no count of memory usage yet")
    for number, record in enumerate(records, 2):
        _check_record(f"{file}: line {number}", header, record)
    latest = {(record["update"], str(record.get("split"))): record for record in records}
    truncated = not file.read_bytes().endswith(b"\n")
    ordered = sorted(latest.values(), key=lambda record: record["update"])
    return Log(name, file, header, ordered, truncated)


def logs_of_checkpoints(reports: Sequence[Dict[str, Any]], split: str) -> List[Log]:
    """Turn counts of checkpoints into logs, as if their trainings had logged them.

    Checkpoints belong to one training if their folder, shapes and origin are equal. A single
    checkpoint has no curve and is skipped.

    Args:
        reports: reports of checkpoints, from ``pkm_fairseq.analysis.examine.examine``.
        split: the split that they read.
    """
    logs = []
    for found in _trainings(reports):
        by_update = {report["updates"]: {**report, "update": report["updates"], "split": split}
                     for report in found}  # fmt: skip
        records = [by_update[update] for update in sorted(by_update)]
        if len(records) > 1:
            folder = _folder_of(found[0])
            logs.append(Log(f"{folder.name}, checkpoints", folder, _header_of(found[0]), records,
                            truncated=False))  # fmt: skip
    for name_of in (lambda log: str(log.file), _range_of):
        names = [log.name for log in logs]
        logs = [
            log._replace(name=name_of(log)) if names.count(log.name) > 1 else log for log in logs
        ]
    return logs


def _trainings(reports: Sequence[Dict[str, Any]]) -> Iterator[List[Dict[str, Any]]]:
    """The reports of each training.

    Version 0.1.0 stored no origin. Its checkpoints belong to the training of their folder; if the
    folder holds several, they are a group of their own.
    """
    folders: Dict[Tuple[Path, str], Dict[str, List[Dict[str, Any]]]] = {}
    for report in reports:
        if report["updates"] is not None:
            of_folder = folders.setdefault((_folder_of(report), str(_header_of(report))), {})
            of_folder.setdefault(str(report["origins"]), []).append(report)
    for of_folder in folders.values():
        if len(of_folder) == 2 and str(None) in of_folder:
            yield [report for found in of_folder.values() for report in found]
        else:
            yield from of_folder.values()


def _folder_of(report: Dict[str, Any]) -> Path:
    return Path(report["checkpoint"]).absolute().parent


def _range_of(log: Log) -> str:
    """The folder of a training, its first and its last checkpoint."""
    first, last = (Path(log.records[at]["checkpoint"]).name for at in (0, -1))
    return f"{log.file}, {first} to {last}"


def _header_of(report: Dict[str, Any]) -> Dict[str, Any]:
    layers = {
        str(layer["layer"]): {
            "n_slots": layer["n_slots"], "heads": len(layer["heads"]), "knn": layer["knn"]
        }
        for layer in report["layers"]
    }  # fmt: skip
    return {"layers": layers, "shared_values": report["shared"] is not None}


def shapes_of(log: Log) -> str:
    """A short description of a log's memories."""
    layers: Dict[str, List[str]] = {}
    for layer, shape in log.header["layers"].items():
        text = f"{shape['n_slots']:,} slots, {shape['heads']} heads, knn {shape['knn']}"
        layers.setdefault(text, []).append(layer)
    parts = [f"layer {', '.join(numbers)}: {text}" for text, numbers in layers.items()]
    shared = ", shared values" if log.header.get("shared_values") else ""
    return ("; ".join(parts) if len(parts) > 1 else next(iter(layers))) + shared


def series(log: Log, split: str, layer: str, path: Sequence[str]) -> Tuple[List[int], List[float]]:
    """Updates and the metric's values there, if known; layer "shared" is the shared table."""
    updates, numbers = [], []
    for record in log.records:
        found: Any = _layer(record, layer) if record["split"] == split else None
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            updates.append(record["update"])
            numbers.append(float(found))
    return updates, numbers


def splits_of(log: Log) -> List[str]:
    """The counted splits: validation first, training last."""
    return sorted({record["split"] for record in log.records}, key=lambda s: (s == TRAINING, s))


def layers_of(log: Log) -> List[str]:
    """The layers of a log, and "shared" if it counts a shared table."""
    shared = [record for record in log.records if record.get("shared")]
    return [*log.header["layers"], *(["shared"] if shared else [])]


def draw_curves(logs: Sequence[Log]) -> List[Chart]:
    """One chart for each metric that any log contains."""
    charts = []
    for metric in METRICS:
        known = [
            (log, split, layer)
            for log in logs
            for split in splits_of(log)
            for layer in layers_of(log)
            if series(log, split, layer, metric.path)[0]
        ]
        if known:
            alt = f"{metric.title} over updates. " + _latest(known, metric)
            charts.append(
                chart(
                    metric.title,
                    metric.meaning + _draws(known, metric),
                    alt,
                    lambda axes, m=metric, k=known: _draw(axes, m, k, logs),
                )
            )
    return charts


def _draws(known: List[Tuple[Log, str, str]], metric: Metric) -> str:
    """The draws per slot of the last counts, needed to interpret them."""
    if metric.path[0] == "staleness":
        return ""
    found: Dict[str, List[str]] = {}
    for log, split, layer in known:
        records = [record for record in log.records if record["split"] == split]
        *_, counted = filter(None, (_layer(record, layer) for record in records))
        draws = counted["tokens"] * len(counted["heads"]) / counted["n_slots"]
        found.setdefault(f"{draws:.3g}", []).append(f"{log.name} {split}")
    said = "; ".join(f"{draws}: {', '.join(dict.fromkeys(x))}" for draws, x in found.items())
    unequal = " Do not compare counts with different draws." if len(found) > 1 else ""
    return f" Draws per slot of the last counts: {said}.{unequal}"


def last_counts(log: Log) -> List[Dict[str, Any]]:
    """The last count of each split."""
    return [[r for r in log.records if r["split"] == split][-1] for split in splits_of(log)]


def _check_record(where: str, header: Dict[str, Any], record: Dict[str, Any]) -> None:
    if not isinstance(record.get("split"), str):
        raise ValueError(f"{where} does not name its split")
    for layer in record["layers"]:
        shape = header["layers"][str(layer["layer"])]
        said = (shape["n_slots"], shape["heads"])
        counted = (layer.get("n_slots"), len(layer.get("heads", [])))
        if counted != said:
            raise ValueError(
                f"{where} counts {counted[0]} slots and {counted[1]} heads in layer "
                f"{layer['layer']}, the header says {said[0]} and {said[1]}"
            )
    if record.get("shared") and not header.get("shared_values"):
        raise ValueError(f"{where} counts a shared table, the header says there is none")


def _layer(record: Dict[str, Any], layer: str) -> Optional[Dict[str, Any]]:
    if layer == "shared":
        return record.get("shared")
    return next((found for found in record["layers"] if str(found["layer"]) == layer), None)


def _draw(
    axes: Axes, metric: Metric, known: List[Tuple[Log, str, str]], logs: Sequence[Log]
) -> None:
    names = [log.name for log in logs]
    layers = sorted({layer for _, _, layer in known})
    splits = sorted({split for _, split, _ in known}, key=lambda s: (s == TRAINING, s))
    for log, split, layer in known:
        look = {
            "color": COLOURS[names.index(log.name) % len(COLOURS)],
            "linestyle": STYLES[layers.index(layer) % len(STYLES)],
            **_split_look(split, splits),
        }
        updates, numbers = series(log, split, layer, metric.path)
        if len(updates) == 1:  # no line
            look |= {"marker": look["marker"] or "."}
        axes.plot(updates, numbers, **look)
        if metric.ceiling:
            ceiling = series(log, split, layer, (metric.ceiling,))
            axes.plot(*ceiling, color="#9aa4ab", linewidth=1, linestyle=(0, (1, 1.5)))
    axes.set(xlabel="updates", ylabel=metric.unit)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0, low), 1.03 if metric.is_share else high * 1.05)
    if metric.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    below(axes, _legend(logs, known, layers, splits, metric))


def _split_look(split: str, splits: Sequence[str]) -> Dict[str, Any]:
    """Line styles: training thin and faint, validation bold, further subsets with marks."""
    if split == TRAINING:
        return {"linewidth": 1.2, "alpha": 0.45, "marker": None}
    marks = ("", "o", "s", "^", "v")
    mark = marks[list(splits).index(split) % len(marks)]
    return {"linewidth": 2, "marker": mark or None, "markersize": 4}


def _legend(
    logs: Sequence[Log],
    known: List[Tuple[Log, str, str]],
    layers: Sequence[str],
    splits: Sequence[str],
    metric: Metric,
) -> List[Line2D]:
    differ = len({shapes_of(log) for log in logs}) > 1
    present = {log.name for log, _, _ in known}
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)],
               label=plain(f"{log.name} ({shapes_of(log)})" if differ else log.name))
        for i, log in enumerate(logs) if log.name in present
    ]  # fmt: skip
    grey = "#39434a"
    if len(layers) > 1:
        handles += [
            Line2D([], [], color=grey, linestyle=STYLES[i % len(STYLES)],
                   label="shared table" if layer == "shared" else f"layer {layer}")
            for i, layer in enumerate(layers)
        ]  # fmt: skip
    handles += [
        Line2D([], [], color=grey, label=plain(f"split {split}"), **_split_look(split, splits))
        for split in splits
    ]
    if metric.ceiling:
        dotted = {"color": "#9aa4ab", "linewidth": 1, "linestyle": (0, (1, 1.5))}
        handles.append(Line2D([], [], label="ceiling of uniform routing", **dotted))
    return handles


def _latest(known: List[Tuple[Log, str, str]], metric: Metric) -> str:
    parts = []
    for log, split, layer in known:
        updates, numbers = series(log, split, layer, metric.path)
        where = "shared table" if layer == "shared" else f"layer {layer}"
        parts.append(f"{log.name}, {where}, {split}: {numbers[-1]:.4g} at update {updates[-1]:,}")
    return "; ".join(parts) + "."

"""GLUE's official metrics over a whole validation set, through fairseq's logging."""

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from fairseq.criterions import FairseqCriterion
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.utils import safe_getattr
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn

from ..models.labels import label_names

DIGITS = 2  # of the logged per cent
ROWS = "glue_rows"
MARK = "glue_metric_"

Metric = Callable[[np.ndarray, np.ndarray], float]

CLASS_METRICS: Dict[str, Metric] = {
    "accuracy": accuracy_score,
    "f1": lambda targets, predictions: f1_score(targets, predictions, zero_division=0),
    "mcc": lambda targets, predictions: _of_varying(matthews_corrcoef, targets, predictions),
}
SCORE_METRICS: Dict[str, Metric] = {
    "pearson": lambda targets, scores: _of_varying(lambda *x: pearsonr(*x)[0], targets, scores),
    "spearman": lambda targets, scores: _of_varying(lambda *x: spearmanr(*x)[0], targets, scores),
}
REPORTS = {  # fairseq's options, and what to use instead
    "report_mcc": "mcc",
    "report_acc_and_f1": "accuracy,f1",
    "report_pearson_and_spearman": "accuracy",
}


def score(metric: str, predictions: Any, targets: Any, positive: Any = 1) -> float:
    """One of GLUE's metrics, in per cent.

    A correlation (mcc, pearson, spearman) with a constant is 0.

    Args:
        metric: accuracy, f1, mcc (Matthews), pearson or spearman.
        predictions: labels (names or numbers), or scores from ``clip_scores``, (N,).
        targets: the true labels or scores, (N,).
        positive: the positive label of f1.

    Raises:
        ValueError: the metric is unknown, or the lengths differ or are 0.
    """
    known = {**CLASS_METRICS, **SCORE_METRICS}
    if metric not in known:
        raise ValueError(f"metric is {metric!r}, must be one of {', '.join(known)}")
    predictions, targets = np.asarray(predictions), np.asarray(targets)
    if not 0 < len(predictions) == len(targets):
        raise ValueError(
            f"{len(predictions)} predictions for {len(targets)} targets: must be equal and not 0"
        )
    if metric == "f1":
        predictions, targets = predictions == positive, targets == positive
    return 100 * float(known[metric](targets, predictions))


def clip_scores(scores: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Clip predicted scores to the range of the labels.

    A regression can predict outside this range. We clip both the dev predictions and the submitted
    ones. Clipping changes Pearson's correlation.
    """
    return scores.clamp(low, high)


def _of_varying(metric: Metric, targets: np.ndarray, predictions: np.ndarray) -> float:
    """A correlation; 0 if one side is constant and the correlation undefined."""
    if (targets == targets[0]).all() or (predictions == predictions[0]).all():
        return 0.0
    return metric(targets, predictions)


class GlueMetrics(FairseqCriterion):
    """Mixin for a sentence-prediction criterion: logs the metrics that ``glue_metrics`` names.

    The logging output of each validation batch holds the rows (id, prediction, target) of all
    workers. One of fairseq's meters collects them. The metrics use each row once, since workers
    that ran out of batches repeat rows. With f1, the rows hold whether a label is the positive one;
    this does not change the other metrics of two classes.
    """

    def __init__(self, cfg: Any, task: Any) -> None:  # fairseq reads these two names
        super().__init__(cfg, task)
        names = safe_getattr(cfg, "glue_metrics") or ""
        self._glue_metrics = _checked(names, cfg.regression_target, task)
        _check_reports(cfg, task)
        self._positive = None  # the class of f1's positive label
        if "f1" in self._glue_metrics:
            self._positive = _class_of(safe_getattr(cfg, "glue_positive_label", "1"), task)

    def forward(
        self, model: Any, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Compute the parent's loss; in validation also keep the predictions."""
        if model.training or not self._glue_metrics:
            return super().forward(model, sample, reduce)
        with _outputs_of(model.classification_heads[self.classification_head_name]) as outputs:
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
        predictions, targets = self._predicted(outputs[-1]), sample["target"].view(-1)
        if self._positive is not None:
            predictions, targets = predictions == self._positive, targets == self._positive
        rows = torch.stack([x.double() for x in (sample["id"], predictions, targets)], dim=1)
        logging_output[ROWS] = rows_of_workers(rows).cpu()  # (rows of all workers, 3)
        # fairseq may sum logging outputs over workers; this counts the summands
        logging_output.update({MARK + name: 1.0 for name in self._glue_metrics})
        if self.regression_target:
            self.check_numbers(targets.tolist(), "the data")
        return loss, sample_size, logging_output

    def check_numbers(self, numbers: Sequence[float], place: str) -> None:
        """Check the targets of a regression's validation set.

        Raises:
            ValueError: a target is outside the range to which predictions are clipped.
        """
        for number in numbers if self._glue_metrics else ():
            if not 0 <= number <= 1:
                raise ValueError(
                    f"{place}: {number:g} is not in 0..1: --glue-metrics needs regression targets "
                    "scaled to this range, as prepare_glue.py writes them"
                )

    def _predicted(self, logits: Tensor) -> Tensor:
        """Class ids or scores, (B,), of the head's output, (B, classes or 1)."""
        if self.regression_target:
            return clip_scores(logits.view(-1).float())
        return logits.argmax(dim=1)


def _checked(names: str, is_regression: bool, task: Any) -> List[str]:
    known = SCORE_METRICS if is_regression else CLASS_METRICS
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        if name not in known:
            kind = "with" if is_regression else "without"
            raise ValueError(
                f"--glue-metrics names {name}, must be one of {', '.join(known)} "
                f"{kind} --regression-target"
            )
    if is_regression and chosen and task.cfg.num_classes != 1:
        raise ValueError(
            f"--glue-metrics of a regression needs --num-classes 1, not {task.cfg.num_classes}"
        )
    if "f1" in chosen and task.cfg.num_classes != 2:
        raise ValueError(f"--glue-metrics f1 needs --num-classes 2, not {task.cfg.num_classes}")
    return chosen


def _check_reports(cfg: Any, task: Any) -> None:
    """Check labels for fairseq's own reports, which read the labels of classes as numbers."""
    for option, metrics_here in REPORTS.items():
        if not safe_getattr(cfg, option) or cfg.regression_target:
            continue
        for label in label_names(task.label_dictionary):
            if not label.lstrip("-").isdecimal():
                raise ValueError(
                    f"--{option.replace('_', '-')} needs labels that are whole numbers, but one "
                    f"is {label!r}: use --glue-metrics {metrics_here}"
                )


def _class_of(label: str, task: Any) -> int:
    """The class of a label. Label "1" need not be class 1: dictionaries sort by frequency."""
    dictionary = task.label_dictionary
    if label not in dictionary:
        raise ValueError(
            f"--glue-metrics f1 uses label {label!r}, but the label dictionary has "
            f"{', '.join(label_names(dictionary))}: name one with --glue-positive-label"
        )
    return int(dictionary.index(label)) - dictionary.nspecial


@contextmanager
def _outputs_of(module: nn.Module) -> Iterator[List[Tensor]]:
    outputs: List[Tensor] = []
    hook = module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def rows_of_workers(rows: Tensor) -> Tensor:
    """Rows of all data-parallel workers, (R, 3), in the order of workers; each must call this."""
    world = distributed_utils.get_data_parallel_world_size()
    if world == 1:
        return rows
    rank = distributed_utils.get_data_parallel_rank()
    group = distributed_utils.get_data_parallel_group()
    sizes = rows.new_zeros(world)
    sizes[rank] = len(rows)
    distributed_utils.all_reduce(sizes, group=group)
    longest = int(sizes.max())
    everyone = rows.new_zeros(world, longest, 3)
    everyone[rank, : len(rows)] = rows
    distributed_utils.all_reduce(everyone, group=group)
    return torch.cat([part[: int(n)] for part, n in zip(everyone, sizes, strict=True)])


def log_glue_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
    """Log the metrics of one validation step, or of a whole validation, in per cent.

    Call it before fairseq logs its accuracy, which is the same over the whole set. fairseq's
    accuracy then gets the same number of digits.
    """
    chosen = {key for log in logging_outputs for key in log if key.startswith(MARK)}
    if not chosen:
        return
    for log in logging_outputs:
        reports = max(float(log.get(key, 0)) for key in chosen)
        if reports:
            metrics.log_concat_tensor(f"_{ROWS}", log[ROWS].cpu() / reports)
    for name in sorted(key.removeprefix(MARK) for key in chosen):
        if name == "accuracy":
            metrics.log_scalar(name, 0.0, weight=0, round=DIGITS)
        else:
            metrics.log_derived(name, _derived(name))


def forget_rows() -> None:
    """Forget the rows of the validations before, which fairseq keeps in its meters for ever."""
    meter = metrics.get_meter("valid", f"_{ROWS}")
    if meter is not None:
        meter.reset()


def _derived(name: str) -> Callable[[Dict[str, Any]], float]:
    def of_all_rows(meters: Dict[str, Any]) -> float:
        rows = meters[f"_{ROWS}"].tensor.numpy()
        _, first = np.unique(rows[:, 0], return_index=True)  # by id: each example once
        return round(score(name, rows[first, 1], rows[first, 2]), DIGITS)

    return of_all_rows

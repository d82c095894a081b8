"""Measure how much memories contribute to a finetuned model: dev metrics with ablations."""

from typing import Dict

import numpy as np

from ...memory.ablation import measure_ablations
from ...memory.hosts import with_memories
from .data import PreparedTask, dev_name, targets_of
from .metrics import clip_scores, score
from .predict import Finetuned, examples_of


def dev_metrics(finetuned: Finetuned, task: PreparedTask) -> Dict[str, float]:
    """The task's metrics on dev, in per cent.

    Args:
        finetuned: the model.
        task: its prepared data.

    Returns:
        Metrics by name; those of ``valid1`` as ``valid1_accuracy``.
    """
    found = {}
    for split in task.dev_splits:
        targets = targets_of(task, split)
        examples = examples_of(finetuned, task.folder, split)
        outputs = finetuned.outputs(examples, f"{task.name} {split}")
        if task.is_regression:
            predictions, positive = clip_scores(outputs[:, 0]).numpy(), None
        else:
            predictions = np.array(finetuned.predictions(outputs))
            positive = task.positive
        for metric in task.metrics:
            found[dev_name(metric, split)] = score(metric, predictions, targets, positive)
    return found


def ablations(finetuned: Finetuned, task: PreparedTask) -> Dict[str, Dict[str, Dict[str, float]]]:
    """Dev metrics with ablated memories; empty for a model without memory.

    Args:
        finetuned: the model.
        task: its prepared data.

    Returns:
        As ``pkm_fairseq.memory.ablation.measure_ablations``.
    """
    host = with_memories(finetuned.model)
    return {} if host is None else measure_ablations(host, lambda: dev_metrics(finetuned, task))

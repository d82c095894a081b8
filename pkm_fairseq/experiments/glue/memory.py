"""Measure how finetuning changes a memory: usage on a task's dev set before and after, drift."""

from pathlib import Path
from typing import Any, Dict, Iterator, List

import torch
from fairseq.data import data_utils
from torch import Tensor

from ...analysis.drift import drift_of_models
from ...models.capture import load_model
from ...models.checkpoints import read_checkpoint
from ...models.roberta import PkmRobertaModel

BATCH_SIZE = 16
USAGE = ("tokens", "top1_usage", "top1_ceiling", "topk_usage", "topk_ceiling", "kl_weighted")
USAGE += ("gini", "dead_slots", "draws_per_slot")


def measure_memory(before: Path, after: Path, task: Any, n_tokens: int) -> Dict[str, Any]:
    """Compare the memories of two checkpoints on the first tokens of a task's dev set.

    Args:
        before: the pretrained checkpoint.
        after: the finetuned one.
        task: fairseq's task of the finetuning.
        n_tokens: number of tokens; rounded up to whole sentences for the usage.

    Returns:
        ``before`` and ``after``: usage of each memory layer; ``drift``: see
        ``pkm_fairseq.analysis.drift.drift_of_models``.
    """
    dictionary = task.source_dictionary
    models = [load_model(_without_heads(file), dictionary, str(file)) for file in (before, after)]
    sequences = list(_first(_dev_sequences(task), n_tokens))
    usage = [_usage(model, sequences, dictionary.pad()) for model in models]
    drift = drift_of_models(*models, sequences, dictionary.pad(), n_tokens)
    return {"before": usage[0], "after": usage[1], "drift": drift}


def _without_heads(file: Path) -> Dict[str, Any]:
    checkpoint = read_checkpoint(str(file), "checkpoint")
    checkpoint["model"] = {
        name: tensor
        for name, tensor in checkpoint["model"].items()
        if not name.startswith("classification_heads.")
    }
    return checkpoint


def _dev_sequences(task: Any) -> Iterator[Tensor]:
    dataset = task.load_dataset("valid")
    return (dataset[index]["net_input.src_tokens"] for index in range(len(dataset)))


def _first(sequences: Iterator[Tensor], n_tokens: int) -> Iterator[Tensor]:
    seen = 0
    for sequence in sequences:
        yield sequence
        seen += len(sequence)
        if seen >= n_tokens:
            return


@torch.no_grad()
def _usage(model: PkmRobertaModel, sequences: List[Tensor], pad: int) -> List[Dict[str, Any]]:
    with model.record_memory_usage() as usage:
        for at in range(0, len(sequences), BATCH_SIZE):
            batch = data_utils.collate_tokens(sequences[at : at + BATCH_SIZE], pad)  # (B, T)
            model(batch, features_only=True)
    summaries = {layer: counts.summary() for layer, counts in sorted(usage.items())}
    return [{"layer": layer, **{k: s[k] for k in USAGE}} for layer, s in summaries.items()]

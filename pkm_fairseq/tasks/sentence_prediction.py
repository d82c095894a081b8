"""The task ``pkm_sentence_prediction``: fairseq's, dictionary and labels remembered."""

import os
from dataclasses import dataclass
from typing import Any

from fairseq.tasks import register_task
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask

from ..compat.processes import forget_previous_training
from ..models.labels import label_names
from .common import (
    MemoryTrainStep,
    NamedSplitDataset,
    TellsEndOfValidation,
    remember_dictionary,
    require_dictionary,
    require_examples,
)


@dataclass
class PkmSentencePredictionConfig(SentencePredictionConfig):
    """Options of ``pkm_sentence_prediction``: those of sentence_prediction."""


@register_task("pkm_sentence_prediction", dataclass=PkmSentencePredictionConfig)
class PkmSentencePredictionTask(MemoryTrainStep, TellsEndOfValidation, SentencePredictionTask):
    """Classification or regression of sentences and sentence pairs."""

    def __init__(self, cfg: Any, data_dictionary: Any, label_dictionary: Any) -> None:
        super().__init__(cfg, data_dictionary, label_dictionary)
        remember_dictionary(self)
        if not cfg.regression_target:  # what the outputs of the head stand for
            self.state.merge_state_dict({"labels": label_names(label_dictionary)})

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "PkmSentencePredictionTask":
        """Load the dictionaries; stop with one line if one is missing."""
        forget_previous_training()
        if cfg.num_classes < 1:
            raise ValueError(f"--num-classes is {cfg.num_classes}, must be at least 1")
        require_dictionary(os.path.join(cfg.data, "input0"))
        if not cfg.regression_target:
            require_dictionary(os.path.join(cfg.data, "label"))
        return super().setup_task(cfg, **kwargs)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> Any:
        """Load a split; stop with one line if it is missing or empty."""
        folder = os.path.join(self.cfg.data, "input0")
        if not os.path.isfile(os.path.join(folder, f"{split}.idx")):
            raise ValueError(f"pkm_sentence_prediction: no split {split} in {folder}")
        require_examples(folder, split)
        dataset = super().load_dataset(split, combine=combine, **kwargs)
        self.datasets[split] = NamedSplitDataset(dataset, split)
        return self.datasets[split]

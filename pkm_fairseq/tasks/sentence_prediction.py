"""The task ``pkm_sentence_prediction``: fairseq's, plus a dictionary hash and the labels."""

import logging
import os
from dataclasses import dataclass
from typing import Any, Dict, List

from fairseq.tasks import register_task
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask

from ..compat.processes import forget_previous_training
from ..models.labels import label_names
from .common import (
    ComparesDictionaries,
    MemoryTrainStep,
    NamedSplitDataset,
    TellsEndOfValidation,
    remember_dictionary,
    require_dictionary,
    require_examples,
)
from .sentence_data import SentenceData

logger = logging.getLogger(__name__)


@dataclass
class PkmSentencePredictionConfig(SentencePredictionConfig):
    """Options of ``pkm_sentence_prediction``: those of sentence_prediction."""


@register_task("pkm_sentence_prediction", dataclass=PkmSentencePredictionConfig)
class PkmSentencePredictionTask(
    MemoryTrainStep, TellsEndOfValidation, ComparesDictionaries, SentencePredictionTask
):
    """Classification or regression of sentences and sentence pairs."""

    def __init__(self, cfg: Any, data_dictionary: Any, label_dictionary: Any) -> None:
        super().__init__(cfg, data_dictionary, label_dictionary)
        remember_dictionary(self)
        self._labels: List[str] = []  # of a loaded checkpoint
        if not cfg.regression_target:  # meanings of the head's outputs
            self.state.merge_state_dict({"labels": label_names(label_dictionary)})

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Take over the state in a checkpoint, which fairseq loads for evaluation."""
        super().load_state_dict(state_dict)
        self._labels = state_dict.get("labels") or []

    def check_labels(self) -> None:
        """Compare the labels of the data with those of a loaded checkpoint.

        Raises:
            ValueError: the checkpoint's head was trained on labels in another order.
        """
        if not self.cfg.regression_target:
            ours = label_names(self.label_dictionary)
            if any(a != b for a, b in zip(self._labels, ours, strict=False)):
                raise ValueError(self._in_another_order(self._labels))

    def check_checkpoint(self, checkpoint: Dict[str, Any], file: str) -> None:
        """Compare a checkpoint that a training loads.

        Raises:
            ValueError: it was trained with another dictionary, or has the same head for the same
                labels in another order.
        """
        super().check_checkpoint(checkpoint, file)
        if self.cfg.regression_target:
            return
        theirs = (checkpoint.get("task_state") or {}).get("labels") or []
        ours = label_names(self.label_dictionary)
        head = f"classification_heads.{self.cfg.classification_head_name}."
        has_head = any(name.startswith(head) for name in checkpoint["model"])
        # a head for other labels is a start like any other
        if has_head and theirs != ours and sorted(theirs) == sorted(ours):
            raise ValueError(f"{file}: {self._in_another_order(theirs)}")

    def _in_another_order(self, theirs: List[str]) -> str:
        ours = ", ".join(label_names(self.label_dictionary))
        return (
            f"the labels of {self.cfg.data} are {ours}, must be in the order that the checkpoint "
            f"was trained with: {', '.join(theirs)}"
        )

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "PkmSentencePredictionTask":
        """Load the dictionaries; stop with one line if one is missing."""
        forget_previous_training()
        if cfg.num_classes < 1:
            raise ValueError(f"--num-classes is {cfg.num_classes}, must be at least 1")
        require_dictionary(os.path.join(cfg.data, "input0"))
        if not cfg.regression_target:
            require_dictionary(os.path.join(cfg.data, "label"))
        task = super().setup_task(cfg, **kwargs)
        labels = [] if cfg.regression_target else label_names(task.label_dictionary)
        if 0 < len(labels) < cfg.num_classes:
            logger.warning(
                f"--num-classes is {cfg.num_classes}, but the data has {len(labels)} labels: "
                f"{', '.join(labels)}"
            )
        return task

    def check(self, split: str, combine: bool = False, needs_targets: bool = True) -> None:
        """Compare all parts of a split, see ``SentenceData.check``.

        Raises:
            ValueError: the parts do not fit together, or not to a loaded checkpoint.
        """
        self.check_labels()
        is_regression = self.cfg.regression_target
        labels = None if is_regression else self.label_dictionary
        data = SentenceData(self.cfg.data, self.source_dictionary, labels, self.cfg.num_classes)
        data.check(split, combine, needs_targets)
        check_numbers = getattr(self._criterion, "check_numbers", None)
        if is_regression and check_numbers is not None and split != "train":
            for place, numbers in data.numbers(split):
                check_numbers(numbers, place)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> Any:
        """Load a split; ValueError if it is empty or its parts do not fit together.

        Without a criterion (no training, no validation) labels may be missing.
        """
        require_examples(os.path.join(self.cfg.data, "input0"), split)
        self.check(split, combine, needs_targets=self._criterion is not None)
        dataset = super().load_dataset(split, combine=combine, **kwargs)
        self.datasets[split] = NamedSplitDataset(dataset, split)
        return self.datasets[split]

"""What both tasks share: a hash of the dictionary, named splits, clear errors."""

import os
from typing import Any, Dict, List

from fairseq.data import BaseWrapperDataset

from ..models.init_from import dictionary_sha256


class NamedSplitDataset(BaseWrapperDataset):
    """A data set whose batches name their split.

    The criteria tell validation subsets apart by it.
    """

    def __init__(self, dataset: Any, split: str) -> None:
        super().__init__(dataset)
        self.split = split

    def collater(self, samples: List[Any]) -> Dict[str, Any]:
        """Collate, and add the key "split"."""
        batch = self.dataset.collater(samples)
        return {**batch, "split": self.split} if batch else batch


class MarksFillers:
    """Mixin for a task: marks batches that only keep a worker busy which has run out of them.

    Nothing is learnt from them. The criteria tell them by the key "is_filler".
    """

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int,
        ignore_grad: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Do a training step, as the parent does."""
        sample = {**sample, "is_filler": True} if ignore_grad else sample
        return super().train_step(  # type: ignore[misc]
            sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs
        )


def remember_dictionary(task: Any) -> None:
    """Have the task's dictionary hash stored in its checkpoints, for ``--init-from``."""
    task.state.merge_state_dict({"dictionary_sha256": dictionary_sha256(task.source_dictionary)})


def require_dictionary(folder: str) -> None:
    """Stop with one line if a data-bin has no dictionary."""
    file = os.path.join(folder, "dict.txt")
    if not os.path.isfile(file):
        raise SystemExit(
            f"no dictionary at {file}: the data must be a folder that fairseq-preprocess made"
        )


def require_examples(folder: str, split: str) -> None:
    """Stop with one line if a split is there, but has no example."""
    file = os.path.join(folder, f"{split}.bin")
    if os.path.isfile(file) and not os.path.getsize(file):
        raise SystemExit(f"split {split} in {folder} is empty: it must hold at least one example")

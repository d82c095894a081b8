"""Code shared by both tasks: a hash of the dictionary, named splits, clear errors."""

import contextlib
import os
from typing import Any, Dict, List

from fairseq.data import BaseWrapperDataset
from fairseq.tasks import FairseqTask

from ..memory.hosts import merge_read_times, with_memories
from ..models.checkpoints import dictionary_sha256

DICTIONARY = "dictionary_sha256"  # in a task's state


class NamedSplitDataset(BaseWrapperDataset):
    """A data set whose batches name their split.

    The criteria use the name to distinguish validation subsets.
    """

    def __init__(self, dataset: Any, split: str) -> None:
        super().__init__(dataset)
        self.split = split

    def collater(self, samples: List[Any]) -> Dict[str, Any]:
        """Collate, and add the key "split"."""
        batch = self.dataset.collater(samples)
        return {**batch, "split": self.split} if batch else batch


class MemoryTrainStep(FairseqTask):
    """Mixin for a task: tells memories about dummy batches, and about other workers' reads.

    fairseq gives dummy batches to workers without batches, and ignores their loss. A memory's
    statistics skip them.
    """

    def train_step(
        self,
        sample: Any,
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Do forward and backward; ``ignore_grad`` marks a dummy batch."""
        step = super().train_step
        host = with_memories(model)
        with contextlib.nullcontext() if host is None else host.run.dummy_batch(ignore_grad):
            return step(sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs)

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """Finish an update and merge all workers' times of reads, before anything is saved."""
        super().optimizer_step(optimizer, model, update_num)
        host = with_memories(model)
        if host is not None:
            merge_read_times(host)


class TellsEndOfValidation(FairseqTask):
    """Mixin for a task: makes its criterion finish its counts before a checkpoint is saved.

    Otherwise a kill after the save would lose them: the resumed training does not repeat that
    validation.
    """

    _criterion: Any = None

    def build_criterion(self, *args: Any, **kwargs: Any) -> Any:
        """Build the criterion, and store it."""
        self._criterion = super().build_criterion(*args, **kwargs)
        return self._criterion

    def post_validate(self, model: Any, stats: Any, agg: Any) -> None:
        """Finish the counts; fairseq-train calls this at the end of each validation subset."""
        if hasattr(self._criterion, "finish_validation"):
            self._criterion.finish_validation()


class ComparesDictionaries(FairseqTask):
    """Mixin for a task: refuses a checkpoint that was trained with another dictionary."""

    def check_checkpoint(self, checkpoint: Dict[str, Any], file: str) -> None:
        """Compare a checkpoint that a training loads.

        Raises:
            ValueError: it was trained with another dictionary.
        """
        self._compare(checkpoint.get("task_state") or {}, file)

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Take over the state in a checkpoint, which fairseq loads for evaluation.

        Raises:
            ValueError: the checkpoint was trained with another dictionary.
        """
        self._compare(state_dict, "the checkpoint")
        super().load_state_dict(state_dict)

    def _compare(self, state: Dict[str, Any], name: str) -> None:
        theirs, ours = state.get(DICTIONARY), dictionary_sha256(self.source_dictionary)
        if theirs not in (None, ours):
            raise ValueError(
                f"{name} was trained with another dictionary (sha256 {theirs[:12]}, this one has "
                f"{ours[:12]}): the data must have the same dict.txt"
            )


def remember_dictionary(task: Any) -> None:
    """Store the hash of the task's dictionary in its checkpoints."""
    task.state.merge_state_dict({DICTIONARY: dictionary_sha256(task.source_dictionary)})


def require_dictionary(folder: str) -> None:
    """Stop with one line if a data-bin has no dictionary."""
    file = os.path.join(folder, "dict.txt")
    if not os.path.isfile(file):
        raise ValueError(
            f"no dictionary at {file}: the data must be a folder that fairseq-preprocess made"
        )


def require_examples(folder: str, split: str) -> None:
    """Stop with one line if a split exists but has no example."""
    file = os.path.join(folder, f"{split}.bin")
    if os.path.isfile(file) and not os.path.getsize(file):
        raise ValueError(f"split {split} in {folder} is empty: it must hold at least one example")

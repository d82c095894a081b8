"""The task ``pkm_masked_lm``: fairseq's masked_lm, plus a hash of its dictionary."""

from dataclasses import dataclass
from typing import Any

from fairseq import utils
from fairseq.tasks import register_task
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

from ..compat.processes import forget_previous_training
from .common import (
    ComparesDictionaries,
    MemoryTrainStep,
    NamedSplitDataset,
    TellsEndOfValidation,
    remember_dictionary,
    require_dictionary,
    require_examples,
)


@dataclass
class PkmMaskedLMConfig(MaskedLMConfig):
    """Options of ``pkm_masked_lm``: those of masked_lm."""


@register_task("pkm_masked_lm", dataclass=PkmMaskedLMConfig)
class PkmMaskedLMTask(MemoryTrainStep, TellsEndOfValidation, ComparesDictionaries, MaskedLMTask):
    """Masked language modelling."""

    def __init__(self, cfg: PkmMaskedLMConfig, dictionary: Any = None) -> None:
        super().__init__(cfg, dictionary)
        remember_dictionary(self)

    @classmethod
    def setup_task(cls, cfg: PkmMaskedLMConfig, **kwargs: Any) -> "PkmMaskedLMTask":
        """Load the dictionary; stop with one line if it is missing."""
        forget_previous_training()
        if cfg.d2v2_multi:
            raise ValueError(
                "pkm_masked_lm: --d2v2-multi makes batches for data2vec, which holds several "
                "models; leave it out"
            )
        return super().setup_task(cfg, **kwargs)

    @classmethod
    def load_dict(cls, cfg: PkmMaskedLMConfig) -> Any:
        """Load the dictionary of the first data folder."""
        require_dictionary(utils.split_paths(cfg.data)[0])
        return super().load_dict(cfg)

    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any
    ) -> None:
        """Load a split; stop with one line if it is missing or empty."""
        folders = utils.split_paths(self.cfg.data)
        require_examples(folders[(epoch - 1) % len(folders)], split)
        try:
            super().load_dataset(split, epoch=epoch, combine=combine, **kwargs)
        except FileNotFoundError as error:
            raise ValueError(f"pkm_masked_lm: {error}") from None
        self.datasets[split] = NamedSplitDataset(self.datasets[split], split)

"""The criterion ``pkm_masked_lm``: fairseq's masked_lm plus memory usage."""

from dataclasses import dataclass
from typing import Any, Dict, List

from fairseq.criterions import register_criterion
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss

from .usage import UsageConfig, UsageReports, log_usage


@dataclass
class PkmMaskedLmConfig(UsageConfig, MaskedLmConfig):
    """Options of ``pkm_masked_lm``: those of masked_lm, and those of memory usage."""


@register_criterion("pkm_masked_lm", dataclass=PkmMaskedLmConfig)
class PkmMaskedLmLoss(UsageReports, MaskedLmLoss):
    """The masked-LM loss of fairseq."""

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Aggregate logging outputs of all workers."""
        MaskedLmLoss.reduce_metrics(logging_outputs)
        log_usage(logging_outputs)

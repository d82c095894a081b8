"""The criterion ``pkm_sentence_prediction``: fairseq's, plus memory usage in validation."""

from dataclasses import dataclass
from typing import Any, Dict, List

from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import (
    SentencePredictionConfig,
    SentencePredictionCriterion,
)

from .usage import ValidationUsage, log_usage


@dataclass
class PkmSentencePredictionConfig(SentencePredictionConfig):
    """Options of ``pkm_sentence_prediction``: those of sentence_prediction."""


@register_criterion("pkm_sentence_prediction", dataclass=PkmSentencePredictionConfig)
class PkmSentencePrediction(ValidationUsage, SentencePredictionCriterion):
    """The sentence-level classification or regression loss of fairseq."""

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Aggregate logging outputs of all workers."""
        SentencePredictionCriterion.reduce_metrics(logging_outputs)
        log_usage(logging_outputs)

"""The criterion ``pkm_sentence_prediction``: fairseq's, plus GLUE's metrics and memory usage."""

from dataclasses import dataclass
from typing import Any, Dict, List

from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import (
    SentencePredictionConfig,
    SentencePredictionCriterion,
)

from ..memory.option import option
from .glue_metrics import GlueMetrics, forget_rows, log_glue_metrics
from .usage import UsageConfig, UsageReports, log_usage


@dataclass
class PkmSentencePredictionConfig(UsageConfig, SentencePredictionConfig):
    """Options of ``pkm_sentence_prediction``: those of sentence_prediction, and GLUE's metrics."""

    glue_metrics: str = option(
        "",
        "official metrics to log in validation, in percent over the whole set, comma-separated: "
        "accuracy, f1, mcc; with --regression-target pearson, spearman (predictions are clipped to "
        "0..1, the range of the labels)",
        "metrics of GLUE, Wang et al. 2018",
    )
    glue_positive_label: str = option(
        "1", "positive label of f1", "the label in GLUE's MRPC and QQP, Wang et al. 2018"
    )


@register_criterion("pkm_sentence_prediction", dataclass=PkmSentencePredictionConfig)
class PkmSentencePrediction(GlueMetrics, UsageReports, SentencePredictionCriterion):
    """The sentence-level classification or regression loss of fairseq."""

    def finish_validation(self, tells: bool = True) -> None:
        """Write unfinished counts, and forget the rows of GLUE's metrics."""
        super().finish_validation(tells)
        forget_rows()

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Aggregate logging outputs of all workers."""
        log_glue_metrics(logging_outputs)
        SentencePredictionCriterion.reduce_metrics(logging_outputs)
        log_usage(logging_outputs)

"""GLUE's official metrics, as the criterion ``pkm_sentence_prediction`` logs them."""

from ...criterions.glue_metrics import CLASS_METRICS, SCORE_METRICS, clip_scores, score

__all__ = ["CLASS_METRICS", "SCORE_METRICS", "clip_scores", "score"]

"""GLUE's official metrics, as the criterion ``pkm_sentence_prediction`` logs them."""

from ...criterions.glue_metrics import clip_scores, score

__all__ = ["clip_scores", "score"]

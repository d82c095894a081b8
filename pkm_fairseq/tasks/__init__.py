"""fairseq tasks that know of memories; importing this package registers them."""

from . import masked_lm, sentence_prediction  # noqa: F401

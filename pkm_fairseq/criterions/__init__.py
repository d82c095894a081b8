"""fairseq criteria that report memory usage; importing this package registers them."""

from . import masked_lm, sentence_prediction  # noqa: F401

"""fairseq models with memory; importing this package registers them."""

from . import roberta  # noqa: F401

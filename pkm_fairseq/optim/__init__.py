"""The memory-aware optimizer for fairseq; importing this package registers the whole plugin."""

from ..plugin import register

register()

"""fairseq models with memory; importing this package registers the whole plugin."""

from ..plugin import register

register()

"""fairseq tasks for models with memories; importing this package registers the whole plugin."""

from ..plugin import register

register()

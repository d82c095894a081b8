"""fairseq tasks that know of memories; importing this package registers the whole plugin."""

from ..plugin import register

register()

"""fairseq criteria that report memory usage; importing this package registers the whole plugin."""

from ..plugin import register

register()

"""Product-key memories for RoBERTa-style models: a torch core, and a fairseq plugin.

``pkm_fairseq.memory`` needs no fairseq; importing it neither imports nor changes fairseq. The
plugin is registered when fairseq loads this package with ``--user-dir``, or another user-dir that
imports it; when ``pkm_fairseq.models``, ``tasks``, ``criterions`` or ``optim`` is imported; and by
``register``.
"""

from . import plugin as _plugin
from .plugin import register

__all__ = ["register"]
__version__ = "0.1.0"

_plugin.check_name(__name__)
__path__ = _plugin.Places(__path__)
if _plugin.is_loading():
    register()

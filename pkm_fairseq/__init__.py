"""Product-key memories for RoBERTa-style models: a torch core, and a fairseq plugin.

``pkm_fairseq.memory`` needs no fairseq; importing it neither imports nor changes fairseq. Three
things register the plugin: loading this package, or a package that imports it, with ``--user-dir``;
importing ``pkm_fairseq.models``, ``tasks``, ``criterions`` or ``optim``; and calling ``register``.
"""

from . import plugin as _plugin
from .plugin import register

__all__ = ["register"]
__version__ = "0.2.0"

_plugin.check_name(__name__)
__path__ = _plugin.Places(__path__)
if _plugin.is_loading():
    register()

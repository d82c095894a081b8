"""Product-key memories for RoBERTa-style models: a fairseq plugin, and a torch core.

``pkm_fairseq.memory`` works without fairseq. Where fairseq is installed, importing this
package (``--user-dir``) registers the models, criteria, tasks and the optimizer with it.
"""

import importlib.util

__version__ = "0.1.0"

if importlib.util.find_spec("fairseq") is not None:
    from . import compat, criterions, models, optim, tasks  # noqa: F401  (importing registers)

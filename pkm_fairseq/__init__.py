"""Product-key memories for RoBERTa-style models: a fairseq plugin, and a torch core.

``pkm_fairseq.memory`` works without fairseq. Where fairseq is installed, importing this
package (``--user-dir``) registers the models, criteria, tasks and the optimizer with it.
"""

import importlib.util

if __name__ != "pkm_fairseq":  # numba's cache imports modules by the name they had once
    raise SystemExit(
        f"--user-dir: {__name__} is a link or copy of pkm_fairseq, must have that name as well"
    )

__version__ = "0.1.0"

if importlib.util.find_spec("fairseq") is not None:
    from . import compat, criterions, models, optim, tasks  # noqa: F401  (importing registers)

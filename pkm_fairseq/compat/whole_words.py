"""``--mask-whole-words`` of masked language modelling."""

from functools import wraps
from typing import Any, Callable

from fairseq.data.encoders import BPE_REGISTRY
from omegaconf import OmegaConf


def mask_words_of_the_bpe(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``MaskedLMTask.load_dataset``, which reads options that the task does not have."""

    @wraps(stock)
    def load_dataset(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.cfg.mask_whole_words:
            self.args = _bpe_of(self.cfg)
        return stock(self, *args, **kwargs)

    return load_dataset


def _bpe_of(cfg: Any) -> Any:
    """The options of ``--bpe``; they are not part of the task's options."""
    bpe = cfg._get_root().get("bpe") if OmegaConf.is_config(cfg) else None
    name = bpe and bpe._name
    known = sorted(n for n, c in BPE_REGISTRY.items() if hasattr(c, "is_beginning_of_word"))
    if name not in known:
        raise ValueError(
            f"--mask-whole-words needs a --bpe that marks where words begin, one of "
            f"{', '.join(known)}; it is {name}"
        )
    return bpe

"""The cures that fairseq needs on current torch and numpy; ``apply`` applies them."""

from .cures import CURES, STOCK, Cure, apply, find

__all__ = ["CURES", "STOCK", "Cure", "apply", "find"]

"""What fairseq does when a gradient is not finite: it looks for the module where that began."""

import logging
from functools import wraps
from typing import Any, Callable

logger = logging.getLogger(__name__)


def watch_all_outputs(stock: Callable[..., None]) -> Callable[..., None]:
    """Replace ``NanDetector.add_hooks``.

    Its kind of backward hook fails at an output that is a dictionary without tensors, as that of
    RoBERTa's encoder.
    """

    @wraps(stock)
    def add_hooks(self: Any, module: Any) -> None:
        if self.forward:
            self.fhooks.append(module.register_forward_hook(self.fhook_fn))
        if self.backward:
            self.bhooks.append(module.register_full_backward_hook(self.bhook_fn))

    return add_hooks


def keep_the_first_error(stock: Callable[..., None]) -> Callable[..., bool]:
    """Replace ``NanDetector.__exit__``: an error while it looks does not hide why it does."""

    @wraps(stock)
    def leave(self: Any, kind: Any, error: Any, trace: Any) -> bool:
        stock(self, kind, error, trace)
        if not isinstance(error, Exception):
            return False
        logger.warning(f"the search for the first NaN ended with {kind.__name__}: {error}")
        return True

    return leave

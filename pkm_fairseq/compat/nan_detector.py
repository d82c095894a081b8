"""fairseq's search for the first module with NaN, when a gradient is not finite."""

import logging
from functools import wraps
from typing import Any, Callable

logger = logging.getLogger(__name__)


def watch_all_outputs(stock: Callable[..., None]) -> Callable[..., None]:
    """Replace ``NanDetector.add_hooks``.

    Its backward hooks fail if a module's output is a dictionary without tensors, as that of
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
    """Replace ``NanDetector.__exit__``, so that an error in the search does not hide the first."""

    @wraps(stock)
    def leave(self: Any, kind: Any, error: Any, trace: Any) -> bool:
        stock(self, kind, error, trace)
        if not isinstance(error, Exception):
            return False
        logger.warning(f"the search for the first NaN ended with {kind.__name__}: {error}")
        return True

    return leave

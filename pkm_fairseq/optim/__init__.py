"""The memory-aware optimizer; importing this package registers it."""

from . import pkm_adam  # noqa: F401

"""Names registered with fairseq, on the command line."""

from functools import wraps
from typing import Any, Callable

from fairseq.registry import REGISTRIES
from hydra.core.config_store import ConfigStore

WITH_LEGACY_OPTIONS = ("criterion", "optimizer", "lr_scheduler")  # fairseq handles these itself


def give_each_name_a_configuration(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``override_module_args``, which prepares a command's options for hydra.

    Names that were registered without a dataclass, such as ``--bpe characters``, have no
    configuration there.
    """

    @wraps(stock)
    def override_module_args(args: Any) -> Any:
        for group in REGISTRIES.keys() - set(WITH_LEGACY_OPTIONS):
            name: Any = getattr(args, group, None)
            entry = REGISTRIES[group]
            if name in entry["registry"] and name not in entry["dataclass_registry"]:
                ConfigStore.instance().store(group=group, name=name, node={"_name": name})
        return stock(args)

    return override_module_args

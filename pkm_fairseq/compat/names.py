"""Load old checkpoints with unregistered names, such as another user-dir's architecture."""

from functools import wraps
from typing import Any, Callable, Dict

from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY


def keep_unknown_options(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Leave the options of such a checkpoint unchanged.

    fairseq converts them to its new form, and looks up every name for that. A training that starts
    from a checkpoint needs only its parameters, not its options.
    """

    @wraps(stock)
    def upgrade_state_dict(state: Dict[str, Any]) -> Dict[str, Any]:
        args = state.get("args")
        if args is None or are_known(args):
            return stock(state)  # type: ignore[no-any-return]
        state = stock({**state, "args": None})
        return {**state, "args": args}

    return upgrade_state_dict


def are_known(args: Any) -> bool:
    """Whether all names in an old checkpoint's options are registered."""
    registries = {part: made["registry"] for part, made in REGISTRIES.items()}
    registries |= {"arch": ARCH_MODEL_REGISTRY, "task": TASK_REGISTRY}
    names = {part: getattr(args, part, None) for part in registries}
    return all(name is None or name in registries[part] for part, name in names.items())

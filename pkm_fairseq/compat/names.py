"""Old checkpoints that name what is registered nowhere, such as another user-dir's architecture."""

from functools import wraps
from typing import Any, Callable, Dict

from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY


def keep_unknown_options(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Leave the options of such a checkpoint as they are.

    fairseq brings them into its new form, for which it looks every name up. A training that starts
    from a checkpoint takes its parameters and needs no options of it.
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
    """Whether all that an old checkpoint's options name is registered."""
    registries = {part: made["registry"] for part, made in REGISTRIES.items()}
    registries |= {"arch": ARCH_MODEL_REGISTRY, "task": TASK_REGISTRY}
    names = {part: getattr(args, part, None) for part in registries}
    return all(name is None or name in registries[part] for part, name in names.items())

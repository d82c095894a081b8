"""Find the values file of an exported model: its checkpoint names a file beside it."""

from argparse import Namespace
from functools import wraps
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional

from omegaconf import DictConfig, open_dict

OPTION = "memory_values_file"


def find_values_beside(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_checkpoint_to_cpu``, which every loading function of fairseq calls."""

    @wraps(stock)
    def load_checkpoint_to_cpu(
        path: str, arg_overrides: Optional[Dict[str, Any]] = None, *args: Any, **kwargs: Any
    ) -> Any:
        state = stock(path, arg_overrides, *args, **kwargs)
        place_values_file(state, path, (arg_overrides or {}).get(OPTION))
        return state

    return load_checkpoint_to_cpu


def place_values_file(checkpoint: Dict[str, Any], path: str, given: Optional[str] = None) -> None:
    """Give a checkpoint's options the path of its values file, in place.

    Args:
        checkpoint: the content of a checkpoint.
        path: its file.
        given: the user's values file; None takes the one that the checkpoint names, if any.

    Raises:
        ValueError: the checkpoint names a file that is not in its own folder.
    """
    for options in _options(checkpoint):
        named = _get(options)
        if given is not None:
            _set(options, given)
        elif named is not None:
            if str(named) != Path(str(named)).name:
                raise ValueError(f"{path} names the values file {named}, must name one beside it")
            _set(options, str(Path(path).parent / named))


def name_values_file(checkpoint: Dict[str, Any], name: str) -> None:
    """Store the name of a values file, which is to lie beside the checkpoint, in its options."""
    for options in _options(checkpoint):
        _set(options, name)


def _options(checkpoint: Dict[str, Any]) -> Iterator[Any]:
    """The model's options in a checkpoint of any version of fairseq."""
    cfg = checkpoint.get("cfg")
    is_mapping = isinstance(cfg, (dict, DictConfig))
    found = cfg.get("model") if is_mapping else getattr(cfg, "model", None)  # type: ignore[union-attr]
    return (x for x in (found, checkpoint.get("args")) if x is not None)


def _get(options: Any) -> Any:
    if isinstance(options, (dict, DictConfig)):
        return options.get(OPTION)
    return getattr(options, OPTION, None)


def _set(options: Any, value: str) -> None:
    if isinstance(options, DictConfig):
        with open_dict(options):
            options[OPTION] = value
    elif isinstance(options, dict):
        options[OPTION] = value
    elif isinstance(options, Namespace):
        setattr(options, OPTION, value)

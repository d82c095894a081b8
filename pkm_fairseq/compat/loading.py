"""What a training loads. ``Trainer.load_checkpoint`` reads the file, and shows it to nobody."""

from functools import wraps
from typing import Any, Callable, Dict

from fairseq import checkpoint_utils

See = Callable[[Any, Dict[str, Any], str], None]


def showing(see: See) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The replacement of ``Trainer.load_checkpoint`` that shows each checkpoint to a function.

    Args:
        see: called with the trainer, the checkpoint and its file, before anything is loaded.
    """

    def replace(stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def load_checkpoint(self: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
            load = checkpoint_utils.load_checkpoint_to_cpu

            def load_and_show(*given: Any, **more: Any) -> Any:
                state = load(*given, **more)
                see(self, state, str(filename))
                return state

            checkpoint_utils.load_checkpoint_to_cpu = load_and_show
            try:
                return stock(self, filename, *args, **kwargs)
            finally:
                checkpoint_utils.load_checkpoint_to_cpu = load

        return load_checkpoint

    return replace


@showing
def compare_with_the_checkpoint(trainer: Any, checkpoint: Dict[str, Any], file: str) -> None:
    """Let the task and the model refuse a checkpoint, with ``check_checkpoint``."""
    for part in (trainer.task, trainer._model):
        if hasattr(part, "check_checkpoint"):
            part.check_checkpoint(checkpoint, file)

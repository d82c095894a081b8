"""transformers' Trainer with the optimizer of memories."""

from functools import partial
from typing import Any, Dict, List

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from ..memory import MemoryAdam, ignore_tables_in_ddp, memory_param_groups
from ..memory.gradient import is_table
from .callback import MemoryUsageCallback
from .limits import check_optimizer, check_training

SCHEDULES = ("constant", "follow")


class MemoryTrainer(Trainer):
    """A Trainer that updates value tables lazily, and counts memory usage.

    It updates all other parameters like ``adamw_torch``. Data-parallel workers exchange gradients
    of tables as with ``MemoryAdam``.

    Args:
        model: with memories.
        args: as for Trainer.
        value_lr: learning rate of values (Lample et al. 2019: 1e-3).
        value_lr_schedule: "constant" (Lample et al. 2019), or "follow": the schedule of the other
            parameters scales it, too.
        exchange_as: as for ``MemoryAdam``.
        more: as for Trainer. A ``MemoryUsageCallback`` in ``callbacks`` replaces the default one.

    Raises:
        ValueError: the model has no memories, or the training cannot work with them.
    """

    optimizer: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        *positional: Any,
        value_lr: float = 1e-3,
        value_lr_schedule: str = "constant",
        exchange_as: str = "auto",
        **more: Any,
    ) -> None:
        if value_lr_schedule not in SCHEDULES:
            raise ValueError(
                f"value_lr_schedule is {value_lr_schedule!r}, must be one of {', '.join(SCHEDULES)}"
            )
        if model is None:
            raise ValueError("model is None: MemoryTrainer needs the model, not model_init")
        check_training(model, args)
        check_optimizer(args)
        self.value_lr, self.value_lr_schedule = value_lr, value_lr_schedule
        self.exchange_as = exchange_as
        super().__init__(model, args, *positional, **more)
        if self.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                f"optimizer_cls_and_kwargs is {self.optimizer_cls_and_kwargs}, must be None: "
                "MemoryTrainer makes a MemoryAdam; use transformers' own Trainer"
            )
        callbacks = self.callback_handler.callbacks
        given = [x for x in callbacks if isinstance(x, MemoryUsageCallback)]
        for callback in given:  # so that reporters see its numbers
            callbacks.remove(callback)
        (given[0] if given else MemoryUsageCallback()).add_to(self)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create a ``MemoryAdam``, unless an optimizer was given."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            self.optimizer = MemoryAdam(
                self._groups(trained),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                fused=True if self.args.optim == "adamw_torch_fused" else None,
                exchange_as=self.exchange_as,
            )
            ignore_tables_in_ddp(trained)
        return self.optimizer

    def _groups(self, model: nn.Module) -> List[Dict[str, Any]]:
        """Tables, and the rest with and without weight decay, grouped as in Trainer."""
        names = set(self.get_decay_parameter_names(model))
        decayed = {id(p) for name, p in model.named_parameters() if name in names}
        rates = self.args.learning_rate, self.value_lr
        groups: List[Dict[str, Any]] = []
        for group in memory_param_groups(model, *rates):
            if is_table(group["params"][0]):
                groups.append(group)
                continue
            for weight_decay, wanted in ((self.args.weight_decay, True), (0.0, False)):
                params = [p for p in group["params"] if (id(p) in decayed) == wanted]
                groups.append({**group, "params": params, "weight_decay": weight_decay})
        return [group for group in groups if group["params"]]

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip as Trainer does, with the same norm on all workers."""
        optimizer = getattr(
            self.optimizer, "optimizer", self.optimizer
        )  # inside accelerate's wrapper
        if isinstance(optimizer, MemoryAdam):
            optimizer.exchange_gradients()
        return super()._clip_grad_norm(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule as Trainer does; for values it is constant by default.

        Raises:
            ValueError: the schedule cannot treat groups differently.
        """
        is_given = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.value_lr_schedule == "constant" and not is_given:
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(
                    f"lr_scheduler_type {self.args.lr_scheduler_type.value} treats all groups "
                    "alike: give value_lr_schedule='follow'"
                )
            _hold_values(scheduler)
        return scheduler


def _hold_values(scheduler: LambdaLR) -> None:
    """Keep the learning rate of values constant under a schedule."""
    groups = scheduler.optimizer.param_groups
    for index, group in enumerate(groups):
        if is_table(group["params"][0]):
            scheduler.lr_lambdas[index] = partial(_one)  # a state of the schedule holds no partial
            group["lr"] = scheduler.base_lrs[index]
    scheduler._last_lr = [group["lr"] for group in groups]


def _one(update: int) -> float:
    return 1.0

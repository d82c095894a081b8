"""``pkm_adam``: fairseq's Adam, with lazy updates of value tables at their own learning rate."""

import inspect
import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Dict, Iterable, List, Optional, Union

import torch
from fairseq import utils
from fairseq.dataclass import FairseqDataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.optim import (
    FairseqOptimizer,
    FP16Optimizer,
    MemoryEfficientFP16Optimizer,
    register_optimizer,
)
from fairseq.optim.adam import Adam, FairseqAdam
from omegaconf import II
from torch import Tensor, nn

from ..memory.adam import MOMENT_DTYPES, VALUE_OPTIMIZERS, MemoryAdam
from ..memory.exchange import FORMS, average_all
from ..memory.gradient import (
    gradient_is_finite,
    is_table,
    squared_norm,
    table_state,
)
from ..memory.option import (
    KIM,
    LAMPLE,
    OUR_CHOICE,
    at_least,
    check_options,
    flag_of,
    option,
)
from ..memory.parts import new_name
from ..models.config import ParserWithChoices
from .mixed_precision import ValuesFP16Optimizer, ValuesMemoryEfficientFP16Optimizer

logger = logging.getLogger(__name__)

DEFAULT_VALUE_LR = 1e-3
SCHEDULES = {
    "constant": "it stays constant",
    "follow": "it changes in proportion to --lr under its schedule; decays, as in UltraMem, 2024",
}

CHECKPOINTS = {
    "whole": "in fairseq's file, as whole tables",
    "parts": "in a folder beside it; each worker writes and reads its own columns",
}
# incompatible with parts: fairseq's option and the reason
NOT_WITH_PARTS = {
    "no_save_optimizer_state": "fairseq then does not tell all workers when it saves",
    "write_checkpoints_asynchronously": "the folder would have to wait for the file",
    "store_ema": "the average of the values would be saved as a whole",
    "use_bmuf": "workers hold different values",
}


@dataclass
class PkmAdamConfig(FairseqDataclass):
    """Options of ``pkm_adam``."""

    adam_betas: Any = field(
        default=(0.9, 0.999), metadata={"help": "betas for Adam, for values too"}
    )
    adam_eps: float = field(default=1e-8, metadata={"help": "epsilon for Adam, for values too"})
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay; the memories' values have none"}
    )
    memory_value_lr: float = option(
        DEFAULT_VALUE_LR,
        "learning rate of the memories' values, independent of --lr",
        f"{LAMPLE}; {KIM} by a secondary source",
        test=at_least(0),
    )
    memory_value_lr_factor: Optional[float] = option(
        None,
        "learning rate of the memories' values as a multiple of --lr, instead of --memory-value-lr",
        OUR_CHOICE,
        test=at_least(0),
    )
    memory_value_lr_schedule: str = option(
        "constant",
        "schedule of the values' learning rate",
        LAMPLE,
        choices=SCHEDULES,
    )
    memory_value_optimizer: str = option(
        "adam", "update rule of the memories' values", LAMPLE, choices=VALUE_OPTIMIZERS
    )
    memory_moment_dtype: str = option(
        "float32",
        "dtype in which the moments of the memories' values are stored",
        OUR_CHOICE,
        choices=MOMENT_DTYPES,
    )
    memory_exchange: str = option(
        "auto",
        "how data-parallel workers exchange the gradient of the memories' values",
        OUR_CHOICE,
        choices=FORMS,
    )
    memory_value_clip_norm: float = option(
        0.0,
        "clip the joint gradient of all memories' values to this norm (--clip-norm clips the "
        "other parameters only); 0: no clipping",
        OUR_CHOICE,
        test=at_least(0),
    )
    memory_checkpoint: str = option(
        "whole",
        "where checkpoints store the memories' values and their moments",
        OUR_CHOICE,
        choices=CHECKPOINTS,
    )
    lr: List[float] = II("optimization.lr")
    save_dir: str = II("checkpoint.save_dir")
    no_save_optimizer_state: bool = II("checkpoint.no_save_optimizer_state")
    write_checkpoints_asynchronously: bool = II("checkpoint.write_checkpoints_asynchronously")
    store_ema: bool = II("ema.store_ema")
    use_bmuf: bool = II("optimization.use_bmuf")


@register_optimizer("pkm_adam", dataclass=PkmAdamConfig)
class PkmAdam(FairseqAdam):
    """Adam for models with product-key memories.

    It updates value tables lazily (the papers' sparse updates): a row moves if and only if its
    accumulated gradient has a non-zero element. Tables have their own learning rate, no weight
    decay, and one step count per table. --clip-norm does not include them (our choice: in a norm
    over the table, the few rows that were read would scale all other gradients). Their gradient is
    stored as factors; it has the size of a table only where workers exchange it so.

    Attributes:
        wrappers: wrappers for mixed precision, by the fairseq wrapper that they replace.
    """

    wrappers: ClassVar[Dict[type, type]] = {
        FP16Optimizer: ValuesFP16Optimizer,
        MemoryEfficientFP16Optimizer: ValuesMemoryEfficientFP16Optimizer,
    }

    def __init__(self, cfg: PkmAdamConfig, params: Iterable[nn.Parameter]) -> None:
        FairseqOptimizer.__init__(self, cfg)  # FairseqAdam's __init__ would build its own Adam
        params = list(params)
        self._values = [p for p in params if is_table(p)]
        rest = [p for p in params if not is_table(p)]
        if not self._values:
            logger.warning(
                "pkm_adam found no value table among the parameters: --memory-value-lr has no "
                "effect, and pkm_adam works as fairseq's adam"
            )
        check_options(PkmAdamConfig, cfg)
        self._check_bmuf()
        self._peak_lr = float(self.optimizer_config["lr"])
        self._check_value_lr()
        groups: List[Dict[str, Any]] = [{"params": rest}]  # first, since get_lr() reads its rate
        if self._values:
            groups.append({"params": self._values, "weight_decay": 0.0})
        self._optimizer = FairseqMemoryAdam(
            groups,
            **self.optimizer_config,
            value_optimizer=cfg.memory_value_optimizer,
            moment_dtype=cfg.memory_moment_dtype,
            exchange_as=cfg.memory_exchange,
            parts_beside=self._parts_beside(),
        )
        self._pin_values()
        self._optimizer.register_step_post_hook(lambda *_: self._log_rows())
        # schedulers that change the groups must not change values
        self._optimizer.register_step_pre_hook(lambda *_: self._pin_values())

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the options to fairseq's parser, with the choices of our options."""
        super().add_args(ParserWithChoices(parser, PkmAdamConfig))

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all parameters except values."""
        for group in self._dense_groups():
            group["lr"] = lr
        self._pin_values()

    def load_state_dict(
        self, state_dict: Dict[str, Any], optimizer_overrides: Optional[Dict[str, Any]] = None
    ) -> None:
        """Load as fairseq's adam does; the values' learning rate comes from this run's options."""
        super().load_state_dict(state_dict, optimizer_overrides)
        self._pin_values()

    def _pin_values(self) -> None:
        for group in self.param_groups:
            if _is_of_values(group):
                group["lr"], group["weight_decay"] = self._value_lr(), 0.0

    def _value_lr(self) -> float:
        """The current learning rate of values."""
        follows = self.cfg.memory_value_lr_schedule == "follow"
        now: float = self._dense_groups()[0]["lr"] if follows else self._peak_lr
        factor: Optional[float] = self.cfg.memory_value_lr_factor
        if factor is not None:
            return factor * now
        value_lr: float = self.cfg.memory_value_lr
        return value_lr * now / self._peak_lr if follows else value_lr

    def _check_value_lr(self) -> None:
        cfg = self.cfg
        if cfg.memory_value_lr_factor is not None and cfg.memory_value_lr != DEFAULT_VALUE_LR:
            raise ValueError(
                f"--memory-value-lr {cfg.memory_value_lr} and --memory-value-lr-factor "
                f"{cfg.memory_value_lr_factor} exclude each other"
            )
        if cfg.memory_value_lr_schedule == "follow" and not self._peak_lr > 0:
            raise ValueError(
                f"lr is {self._peak_lr}, must be above 0 with --memory-value-lr-schedule follow"
            )

    def _check_bmuf(self) -> None:
        """Refuse moments that fairseq's BMUF, which averages those of its own Adam, cannot average.

        Raises:
            ValueError: values have no such moments.
        """
        for name, odd in (("memory_moment_dtype", "float8"), ("memory_value_optimizer", "sgd")):
            if getattr(self.cfg, name) == odd and getattr(self.cfg, "use_bmuf", False) is True:
                raise ValueError(
                    f"--use-bmuf does not work with {flag_of(name)} {odd}: it averages moments of "
                    "all parameters, in float32 or bfloat16"
                )

    def _parts_beside(self) -> Optional[Path]:
        """The folder of the checkpoints, if values are saved in parts.

        Raises:
            ValueError: another option does not allow it.
        """
        cfg = self.cfg
        if cfg.memory_checkpoint != "parts":
            return None
        if not self._values:
            raise ValueError("--memory-checkpoint parts: no values are trained")
        for option_name, reason in NOT_WITH_PARTS.items():
            if getattr(cfg, option_name, False) is True:
                raise ValueError(
                    f"{flag_of(option_name)} does not work with --memory-checkpoint parts: {reason}"
                )
        return Path(cfg.save_dir)

    def _log_rows(self) -> None:
        """Log how many rows the update read and could change, if rows are chosen."""
        choices = {id(rows): rows for p in self._values if (rows := table_state(p).rows)}.values()
        if choices:
            for name in ("read", "chosen"):
                n_rows = sum(getattr(rows, f"n_{name}") for rows in choices)
                metrics.log_scalar(f"value_rows_{name}", n_rows, weight=0, round=0)

    def all_reduce_grads(self, module: nn.Module) -> None:
        """Average gradients over data-parallel workers; those of values apart."""
        own = {id(p) for p in module.parameters()}
        trained = [p for p in self._values if id(p) in own and p.requires_grad]
        for values in trained:  # else legacy_ddp would create and send a dense gradient of zeros
            values.requires_grad_(False)
        try:
            super().all_reduce_grads(module)
        finally:
            for values in trained:
                values.requires_grad_(True)
        if distributed_utils.get_data_parallel_world_size() > 1:
            average_all(trained, distributed_utils.get_data_parallel_group())

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        """Clip all gradients except those of values; clip values separately if the option is set.

        Returns:
            The norm without values; infinity if the gradient of any value is not finite, so that
            fairseq stops, or lowers the loss scale with --amp.
        """
        params = [p for group in self._dense_groups() for p in group["params"]]
        norm = utils.clip_grad_norm_(params, max_norm, aggregate_norm_fn)
        if all([gradient_is_finite(p) for p in self._values]):  # check all of them
            max_value_norm = self.cfg.memory_value_clip_norm
            if max_value_norm <= 0 or math.isfinite(self._clip_values(max_value_norm)):
                return norm
        return torch.full_like(norm, math.inf)

    def multiply_values(self, factor: Union[float, Tensor]) -> None:
        """Multiply the gradient of values only."""
        for p in self._values:
            if p.grad is not None:
                p.grad.mul_(factor)

    def multiply_rest(self, factor: Union[float, Tensor]) -> None:
        """Multiply all gradients except those of values."""
        params = [p for group in self._dense_groups() for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        if grads:
            if isinstance(factor, Tensor):
                factor = factor.to(grads[0].device)
            torch._foreach_mul_(grads, factor)

    def clear_values(self) -> None:
        """Clear the gradient of values only."""
        for p in self._values:
            p.grad = None

    def _clip_values(self, max_norm: float) -> float:
        norm = math.sqrt(sum(squared_norm(p) for p in self._values))
        metrics.log_scalar("value_gnorm", norm, weight=0, priority=401, round=3)
        if max_norm < norm < math.inf:
            self.multiply_values(max_norm / norm)
        return norm

    def _dense_groups(self) -> List[Dict[str, Any]]:
        return [g for g in self.param_groups if not _is_of_values(g)]


class FairseqMemoryAdam(MemoryAdam):
    """The core's optimizer with fairseq's formula, step counts and precision for the rest.

    ``PkmAdam`` exchanges the gradients of tables when fairseq exchanges the others.
    """

    # fairseq's wrapper would restore moments as in the file, on the CPU
    disable_mem_eff_fp16_loading_hack = True
    supports_memory_efficient_fp16 = True
    supports_flat_params = False  # a flat parameter has no rows
    _copied = (*MemoryAdam._copied, "_parts_beside")

    def __init__(self, params: Any, parts_beside: Optional[Path] = None, **settings: Any) -> None:
        super().__init__(params, **settings, exchange=False)
        self._parts_beside = parts_beside  # the folder of checkpoints with parts

    def consolidate_state_dict(self) -> None:
        """Prepare tables for saving, on every worker: assemble them, or write parts.

        After an error perhaps only one worker calls it, and no parts are written.
        """
        if self._parts_beside is None or sys.exc_info()[0] is not None:
            super().consolidate_state_dict()
            return
        updates = max(int(self.state.get(p, {}).get("step", 0)) for p in self._tables())
        self.save_parts(self._parts_beside / new_name(updates))

    def _update_rest(self) -> None:
        inspect.unwrap(Adam.step)(self)  # torch may have wrapped step in this optimizer's hooks

    def _new_step(self, param: Tensor) -> int:
        return 0

    def _keeps_precision(self, param: Tensor) -> bool:
        return True


def _is_of_values(group: Dict[str, Any]) -> bool:
    return any(map(is_table, group["params"]))

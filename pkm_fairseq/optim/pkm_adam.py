"""``pkm_adam``: fairseq's Adam, with lazy updates of value tables at their own learning rate."""

import logging
import math
import sys
from dataclasses import dataclass, field
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

from ..memory import kernels
from ..memory.gradient import ValueGradient
from ..memory.kernels import Entries, allocate, compute_dtype
from .mixed_precision import ValuesFP16Optimizer, ValuesMemoryEfficientFP16Optimizer

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class PkmAdamConfig(FairseqDataclass):
    """Options of ``pkm_adam``."""

    adam_betas: Any = field(
        default=(0.9, 0.999), metadata={"help": "betas for Adam, of values too"}
    )
    adam_eps: float = field(default=1e-8, metadata={"help": "epsilon for Adam, of values too"})
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay of everything but the memories' values"}
    )
    memory_value_lr: float = field(
        default=1e-3,
        metadata={
            "help": "learning rate of the memories' values, constant: --lr and its schedule do "
            "not touch it (default 1e-3: Lample et al. 2019; Kim & Jung 2020 by a secondary source)"
        },
    )
    memory_value_clip_norm: float = field(
        default=0.0,
        metadata={
            "help": "clip the gradient of all memories' values to this norm, apart from "
            "--clip-norm, which is for the rest (default: no clipping; our choice)"
        },
    )
    lr: List[float] = II("optimization.lr")


@register_optimizer("pkm_adam", dataclass=PkmAdamConfig)
class PkmAdam(FairseqAdam):
    """Adam for models with product-key memories.

    Value tables are updated lazily (the papers' sparse updates): a row moves if and only if its
    accumulated gradient has a non-zero element. They have a constant learning rate, no weight
    decay, one step count per table, and stand outside --clip-norm, which sees the rest (our choice:
    a norm over the table would let few rows that were read scale all others). Their gradient is
    kept as factors and never has the size of a table.

    Attributes:
        wrappers: what to build around this optimizer, for mixed precision, in place of fairseq's.
    """

    wrappers: ClassVar[Dict[type, type]] = {
        FP16Optimizer: ValuesFP16Optimizer,
        MemoryEfficientFP16Optimizer: ValuesMemoryEfficientFP16Optimizer,
    }

    def __init__(self, cfg: PkmAdamConfig, params: Iterable[nn.Parameter]) -> None:
        FairseqOptimizer.__init__(self, cfg)  # FairseqAdam's would build its own Adam
        params = list(params)
        self._values = [p for p in params if hasattr(p, "value_gradient")]
        rest = [p for p in params if not hasattr(p, "value_gradient")]
        if not self._values:
            logger.warning(
                "pkm_adam found no value table among the parameters: --memory-value-lr has no "
                "effect and it is fairseq's adam"
            )
        if cfg.memory_value_clip_norm < 0:
            raise SystemExit(
                f"pkm_adam: memory-value-clip-norm is {cfg.memory_value_clip_norm}, "
                "must be at least 0"
            )
        groups: List[Dict[str, Any]] = [{"params": rest}]  # first: get_lr() reads its rate
        if self._values:
            lr = cfg.memory_value_lr
            groups.append({"params": self._values, "lr": lr, "weight_decay": 0.0, "lazy": True})
        self._optimizer = LazyAdam(groups, **self.optimizer_config)
        # schedulers that reach into the groups do not reach values
        self._optimizer.register_step_pre_hook(lambda *_: self._pin_values())

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of everything but values, which keep theirs."""
        for group in self._dense_groups():
            group["lr"] = lr

    def load_state_dict(
        self, state_dict: Dict[str, Any], optimizer_overrides: Optional[Dict[str, Any]] = None
    ) -> None:
        """Load as fairseq's adam does; the values' learning rate is that of this run's options."""
        super().load_state_dict(state_dict, optimizer_overrides)
        self._pin_values()

    def _pin_values(self) -> None:
        for group in self.param_groups:
            if group.get("lazy"):
                group["lr"], group["weight_decay"] = self.cfg.memory_value_lr, 0.0

    def all_reduce_grads(self, module: nn.Module) -> None:
        """Average gradients over data-parallel workers; those of values as factors."""
        own = {id(p) for p in module.parameters()}
        tables = [p for p in self._values if id(p) in own and gradient_of(p).factored]
        trained = [p for p in tables if p.requires_grad]
        for values in trained:  # else legacy_ddp would make, and send, a dense gradient of zeros
            values.requires_grad_(False)
        try:
            super().all_reduce_grads(module)
        finally:
            for values in trained:
                values.requires_grad_(True)
        if distributed_utils.get_data_parallel_world_size() > 1:
            for values in trained:
                gradient_of(values).average(values, distributed_utils.get_data_parallel_group())

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        """Clip the gradient of everything but values, and values on their own if so asked.

        Returns:
            The norm of everything but values; infinity if the gradient of any value is not finite,
            so that fairseq stops, or lowers the loss scale with --amp.
        """
        params = [p for group in self._dense_groups() for p in group["params"]]
        norm = utils.clip_grad_norm_(params, max_norm, aggregate_norm_fn)
        if all([gradient_of(p).is_finite(p.grad) for p in self._values]):  # none is left out
            max_value_norm = self.cfg.memory_value_clip_norm
            if max_value_norm <= 0 or math.isfinite(self._clip_values(max_value_norm)):
                return norm
        for p in self._values:
            gradient_of(p).multiply(math.inf)  # so that torch's loss scaler skips the step
        return torch.full_like(norm, math.inf)

    def multiply_values(self, factor: Union[float, Tensor]) -> None:
        """Multiply the gradient of values only."""
        for p in self._values:
            gradient_of(p).multiply(factor)
            if p.grad is not None:
                p.grad.mul_(factor)

    def multiply_rest(self, factor: Union[float, Tensor]) -> None:
        """Multiply the gradient of everything but values."""
        params = [p for group in self._dense_groups() for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        if grads:
            on_device = isinstance(factor, Tensor)
            torch._foreach_mul_(grads, factor.to(grads[0].device) if on_device else factor)

    def clear_values(self) -> None:
        """Forget the gradient of values only."""
        for p in self._values:
            gradient_of(p).clear()
            p.grad = None

    def _clip_values(self, max_norm: float) -> float:
        norm = math.sqrt(sum(gradient_of(p).squared_norm(p) for p in self._values))
        metrics.log_scalar("value_gnorm", norm, weight=0, priority=401, round=3)
        if max_norm < norm < math.inf:
            self.multiply_values(max_norm / norm)
        return norm

    def _dense_groups(self) -> List[Dict[str, Any]]:
        return [g for g in self.param_groups if not (g.get("lazy") or g.get("scales"))]


class LazyAdam(Adam):
    """fairseq's Adam; of groups with ``lazy``, which hold value tables, it moves only rows read.

    Backward passes then keep the gradient of those tables as factors. Their scales (see
    :class:`~pkm_fairseq.memory.gradient.ValueGradient`) are a group of their own, so that whatever
    walks the gradients of this optimizer, as fairseq and loss scalers do, meets them. A model whose
    tables one optimizer of this kind has taken over must not be trained by another one, and is
    reset by the ``zero_grad`` of the optimizer, not by its own.
    """

    # fairseq's wrapper would put moments back as they were in the file, on the CPU
    disable_mem_eff_fp16_loading_hack = True

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._assembled: Dict[nn.Parameter, Dict[str, Tensor]] = {}  # moments to be saved
        tables = self._tables()
        if tables:
            scales = [gradient_of(p).keep_factors(p) for p in tables]
            self.add_param_group({"params": scales, "lr": 0.0, "weight_decay": 0.0, "scales": True})

    @property
    def supports_flat_params(self) -> bool:
        """A flat parameter has no rows."""
        return False

    def _tables(self) -> List[nn.Parameter]:
        return [p for group in self.param_groups if group.get("lazy") for p in group["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, factors too."""
        super().zero_grad(set_to_none)
        for param in self._tables():
            gradient_of(param).clear()

    def consolidate_state_dict(self) -> None:
        """Put tables that are split over workers together on the first one, to be saved there.

        fairseq calls it on every worker before it saves; after an error perhaps on one only, which
        must not wait for the others then.
        """
        tables = [p for p in self._tables() if gradient_of(p).shards is not None]
        self._assembled.clear()  # of a checkpoint that was not written
        for param in tables:
            gradient_of(param).assembled = None
        if tables and sys.exc_info()[0] is not None:
            logger.warning("after an error only this worker's columns of the values are saved")
            return
        for param in tables:
            shards, state = gradient_of(param).shards, self.state.get(param, {})
            gradient_of(param).assembled = shards.assemble(param)
            whole = {moment: shards.assemble(state[moment]) for moment in MOMENTS if state}
            if any(moment is not None for moment in whole.values()):
                self._assembled[param] = whole

    def state_dict(self) -> Dict[str, Any]:
        """What there is to save, with the whole of tables put together for it.

        The scales of gradients are not saved.
        """
        saved = super().state_dict()
        groups = [group for group in saved["param_groups"] if not group.get("scales")]
        places = [place for group in groups for place in group["params"]]
        params = [p for g in self.param_groups if not g.get("scales") for p in g["params"]]
        state = dict(saved["state"])
        for place, param in zip(places, params, strict=True):
            if param in self._assembled:
                state[place] = {**state[place], **self._assembled.pop(param)}
            if hasattr(param, "value_gradient"):
                gradient_of(param).assembled = None  # it was for this checkpoint
        return {**saved, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Load as torch does, which would cast moments to the precision of the parameters."""
        scales = [group for group in super().state_dict()["param_groups"] if group.get("scales")]
        groups = [*state_dict["param_groups"], *scales]
        places = [place for group in groups for place in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        state = dict(state_dict["state"])
        moments = {}
        for place, param in zip(places, params, strict=False):  # torch complains if they differ
            if place in state:
                moments[param] = self._own_moments(param, state[place])
                state[place] = {k: v for k, v in state[place].items() if k not in MOMENTS}
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})
        for param, saved in moments.items():
            self.state[param].update(saved)

    def _own_moments(self, param: nn.Parameter, saved: Dict[str, Any]) -> Dict[str, Tensor]:
        """Copies of the moments of a parameter, or of this worker's columns of a table."""
        moments = {}
        for moment in MOMENTS:
            whole = saved[moment]
            if hasattr(param, "value_gradient"):
                shards = gradient_of(param).shards
                if shards is not None:
                    whole = shards.own_columns(whole, param.shape[1] * shards.n_shards)
                moments[moment] = new_moment(param).copy_(whole)
            else:
                moments[moment] = whole.to(param.device, compute_dtype(param.dtype), copy=True)
        return moments

    def step(self, closure: Any = None) -> Any:
        """Perform one update; factors of gradients are used up by it."""
        loss = None if closure is None else closure()
        lazy = [(g, p, p.grad) for g in self.param_groups if g.get("lazy") for p in g["params"]]
        updates = []
        for group, param, grad in lazy:
            gradient = gradient_of(param)
            if gradient or grad is not None:
                updates.append((group, param, gradient.entries(grad)))
            gradient.clear()
            param.grad = None  # fairseq's Adam skips it, and the scale
        super().step()
        for update in updates:
            self._adam_rows(*update)
        for _, param, grad in lazy:
            param.grad = grad
        return loss

    def _adam_rows(self, group: Dict[str, Any], param: nn.Parameter, entries: Entries) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            for moment in MOMENTS:
                state[moment] = new_moment(param).zero_()
        state["step"] += 1
        beta1, beta2 = group["betas"]
        correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        moments = [state[moment] for moment in MOMENTS]
        step_size = group["lr"] * correction
        kernels.adam_rows(param, *moments, entries, step_size, group["betas"], group["eps"])


def gradient_of(values: nn.Parameter) -> ValueGradient:
    """The gradient of a value table, by its parameter."""
    gradient: ValueGradient = values.value_gradient  # type: ignore[attr-defined]
    return gradient


def new_moment(values: Tensor) -> Tensor:
    """Memory for a moment of a table, in at least float32."""
    return allocate(*values.shape, compute_dtype(values.dtype), values.device)

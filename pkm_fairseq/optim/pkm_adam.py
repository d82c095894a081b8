"""``pkm_adam``: fairseq's Adam, with lazy updates of value tables at their own learning rate."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Optional

import torch
from fairseq import utils
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import Adam, FairseqAdam
from omegaconf import II
from torch import Tensor, nn

logger = logging.getLogger(__name__)


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
    lr: List[float] = II("optimization.lr")


@register_optimizer("pkm_adam", dataclass=PkmAdamConfig)
class PkmAdam(FairseqAdam):
    """Adam for models with product-key memories.

    Value tables are updated lazily (the papers' sparse updates): a row moves if and only if its
    accumulated gradient has a non-zero element. They have a constant learning rate, no weight
    decay, one step count per table, and stand outside gradient clipping, which sees the rest
    (our choice: a norm over the table would let few rows that were read scale all others).
    """

    def __init__(self, cfg: PkmAdamConfig, params: Iterable[nn.Parameter]) -> None:
        FairseqOptimizer.__init__(self, cfg)  # FairseqAdam's would build its own Adam
        params = list(params)
        values = [p for p in params if getattr(p, "is_value_table", False)]
        rest = [p for p in params if not getattr(p, "is_value_table", False)]
        if not values:
            logger.warning(
                "pkm_adam found no value table among the parameters: --memory-value-lr has no "
                "effect and it is fairseq's adam"
            )
        groups: List[Dict[str, Any]] = [{"params": rest}]  # first: get_lr() reads its rate
        if values:
            groups.append(
                {"params": values, "lr": cfg.memory_value_lr, "weight_decay": 0.0, "lazy": True}
            )
        self._optimizer = LazyAdam(groups, **self.optimizer_config)

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

    def step(self, closure: Any = None, scale: float = 1.0, groups: Any = None) -> None:
        """Perform one update; schedulers that reach into the groups do not reach values."""
        self._pin_values()
        super().step(closure, scale, groups)

    def _pin_values(self) -> None:
        for group in self.param_groups:
            if group.get("lazy"):
                group["lr"], group["weight_decay"] = self.cfg.memory_value_lr, 0.0

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        """Clip the gradient of everything but values.

        Returns:
            Its norm; infinity if the gradient of any value is not finite, so that fairseq stops,
            or lowers the loss scale with --amp.
        """
        params = [p for group in self._dense_groups() for p in group["params"]]
        norm = utils.clip_grad_norm_(params, max_norm, aggregate_norm_fn)
        values = [p for group in self.param_groups if group.get("lazy") for p in group["params"]]
        extremes = [torch.stack(p.grad.aminmax()) for p in values if p.grad is not None]
        is_finite = all(bool(pair.isfinite().all()) for pair in extremes)
        return norm if is_finite else torch.full_like(norm, math.inf)

    def _dense_groups(self) -> List[Dict[str, Any]]:
        return [group for group in self.param_groups if not group.get("lazy")]


class LazyAdam(Adam):
    """fairseq's Adam; parameters of groups with ``lazy`` move only rows with a gradient."""

    @property
    def supports_flat_params(self) -> bool:
        """A flat parameter has no rows."""
        return False

    def step(self, closure: Any = None) -> Any:
        """Perform one update."""
        loss = None if closure is None else closure()
        lazy = [(g, p, p.grad) for g in self.param_groups if g.get("lazy") for p in g["params"]]
        for _, param, _ in lazy:
            param.grad = None  # fairseq's Adam skips it
        super().step()
        for group, param, grad in lazy:
            if grad is not None:
                self._update_rows(group, param, grad)
            param.grad = grad
        return loss

    @torch.no_grad()
    def _update_rows(self, group: Dict[str, Any], param: nn.Parameter, grad: Tensor) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        for moment in ("exp_avg", "exp_avg_sq"):  # loading casts them to the parameter's dtype
            state[moment] = state[moment].to(param.device, torch.float32)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        rows = (grad != 0).any(dim=1).nonzero().squeeze(1)  # (R,)
        g = grad[rows].float()  # (R, V)
        exp_avg = state["exp_avg"][rows].mul_(beta1).add_(g, alpha=1 - beta1)
        exp_avg_sq = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        delta = exp_avg / (exp_avg_sq.sqrt() + group["eps"]) * (group["lr"] * correction)
        state["exp_avg"][rows] = exp_avg
        state["exp_avg_sq"][rows] = exp_avg_sq
        param[rows] = (param[rows].float() - delta).to(param.dtype)

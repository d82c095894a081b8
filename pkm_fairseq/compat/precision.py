"""Mixed precision: the wrappers that fairseq's trainer builds around an optimizer."""

import logging
from functools import wraps
from typing import Any, Callable

import torch
from fairseq.optim import OPTIMIZER_REGISTRY, AMPOptimizer, FP16Optimizer

logger = logging.getLogger(__name__)


def ask_the_optimizer(stock: Any) -> Any:
    """Let an optimizer choose its wrapper; ``stock`` is a class method.

    fairseq's trainer always builds its own wrappers.
    """
    stock = stock.__func__

    @wraps(stock)
    def build_optimizer(cls: Any, cfg: Any, params: Any, **kwargs: Any) -> Any:
        optimizer = OPTIMIZER_REGISTRY.get(cfg.optimizer._name)
        wrapper = getattr(optimizer, "wrappers", {}).get(cls, cls)
        _check_device(wrapper, cfg)
        if wrapper is cls:
            return stock(cls, cfg, params, **kwargs)
        return wrapper.build_optimizer(cfg, params, **kwargs)

    return classmethod(build_optimizer)  # type: ignore[arg-type]


def _check_device(wrapper: Any, cfg: Any) -> None:
    """Warn or raise in one line if there is no CUDA device; fairseq does not."""
    common, on_cpu = cfg.common, cfg.common.cpu or not torch.cuda.is_available()
    if issubclass(wrapper, AMPOptimizer) and on_cpu:
        logger.warning("--amp does nothing on the CPU: this run trains in full precision")
    is_flat = not (common.fp16_no_flatten_grads or common.bf16)
    if issubclass(wrapper, FP16Optimizer) and is_flat and on_cpu:
        raise ValueError(
            "--fp16 needs CUDA: on the CPU use --fp16-no-flatten-grads too, or "
            "--memory-efficient-fp16"
        )


def skip_infinite_steps(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Skip a step whose norm is not finite, as fairseq's log claims.

    torch's scaler skips it only if a ``.grad`` is not finite.
    """

    @wraps(stock)
    def clip_grad_norm(self: Any, max_norm: float, aggregate_norm_fn: Any = None) -> Any:
        norm = stock(self, max_norm, aggregate_norm_fn)
        if not torch.isfinite(norm).all():
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                found.fill_(1.0)
        return norm

    return clip_grad_norm


def step_what_was_unscaled(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Step with the gradients that ``clip_grad_norm`` has already divided by the loss scale.

    fairseq gives torch's scaler different objects in the two places, so the scaler divides the same
    gradients twice.
    """

    @wraps(stock)
    def step(self: Any) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    return step

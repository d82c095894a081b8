"""fairseq's half-precision wrappers of an optimizer, adapted to ``pkm_adam``.

fairseq trains a model in half precision with one of two wrappers: ``FP16Optimizer`` (--fp16, bf16)
trains float32 copies of the parameters, ``MemoryEfficientFP16Optimizer`` the parameters themselves.
Values stay in float32 (see ``ValueTable.keeps_dtype``). They need no copy, and no division in half
precision, which would round small gradients to zero.
"""

from typing import Any, Dict, List, Optional

import torch
from fairseq import optim
from fairseq.optim import FP16Optimizer, MemoryEfficientFP16Optimizer
from torch import Tensor, nn

from ..errors import TrainingError
from ..memory.gradient import is_table


class _ValuesApart(optim.FairseqOptimizer):
    """A half-precision wrapper that treats values as in full precision.

    fairseq's wrappers apply all scale factors (loss scale, sample size, number of workers,
    --clip-norm) in the step. This wrapper scales value gradients in float32, before the norms are
    computed. --clip-norm does not apply to values.
    """

    _of_values: str  # the attribute that holds the wrapped optimizer
    _multiply_factor: Any

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        """Clip as the wrapped optimizer does, and adapt the loss scale.

        Raises:
            OverflowError: a gradient is not finite; fairseq catches it and skips the update.
            TrainingError: the same without CUDA, where fairseq cannot skip an update.
        """
        getattr(self, self._of_values).multiply_values(self._multiply_factor)
        try:
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)
        except OverflowError as error:
            if torch.cuda.is_available():
                raise
            raise TrainingError(
                f"fp16: a gradient is not finite, and fairseq cannot skip an update without CUDA "
                f"({error}): use a smaller --fp16-init-scale, bfloat16 or full precision"
            ) from None

    def _unscale_grads(self) -> None:
        getattr(self, self._of_values).multiply_rest(self._multiply_factor)
        self._multiply_factor = 1.0


class ValuesMemoryEfficientFP16Optimizer(_ValuesApart, MemoryEfficientFP16Optimizer):
    """fairseq's wrapper that trains the parameters themselves; values in float32."""

    _of_values = "wrapped_optimizer"


class ValuesFP16Optimizer(_ValuesApart, FP16Optimizer):
    """fairseq's wrapper that trains float32 copies; values are in float32 and need no copy.

    Its state holds the copies, so a resumed run continues as if it had not stopped. fairseq's
    wrapper recreates the copies from the rounded parameters.
    """

    _of_values = "fp32_optimizer"

    @classmethod
    def build_optimizer(cls, cfg: Any, params: List[nn.Parameter], **kwargs: Any) -> Any:
        """Build it as fairseq does, with copies of all parameters except values."""
        values = [p for p in params if is_table(p)]
        rest = [p for p in params if not is_table(p)]
        # as in fairseq: not for bfloat16; also not if only values are trained
        flatten = bool(rest) and not (cfg.common.fp16_no_flatten_grads or cfg.common.bf16)
        copies = cls.build_fp32_params(cfg.optimizer, rest, flatten=flatten)
        trained = [*(copies.values() if flatten else copies), *values]
        return cls(cfg, rest, optim.build_optimizer(cfg.optimizer, trained), copies, **kwargs)

    def zero_grad(self) -> None:
        """Clear all gradients."""
        super().zero_grad()
        self.fp32_optimizer.clear_values()

    def state_dict(self) -> Dict[str, Any]:
        """The state of the optimizer, the loss scale, and the copies."""
        return {**super().state_dict(), "fp32_params": [copy.detach() for copy in self._copies()]}

    def load_state_dict(
        self, state_dict: Dict[str, Any], optimizer_overrides: Optional[Dict[str, Any]] = None
    ) -> None:
        """Load a state from ``state_dict``.

        Raises:
            ValueError: the state has no copies, or only one of the two runs has flat ones.
        """
        if "fp32_params" not in state_dict:
            raise ValueError(
                "fp16 or bf16: the checkpoint was written by a run in full or memory-efficient "
                "precision, without float32 copies of the parameters: use its precision, or "
                "--reset-optimizer"
            )
        saved, copies = state_dict["fp32_params"], self._copies()
        if [x.shape for x in saved] != [x.shape for x in copies]:
            raise ValueError(
                "fp16: the checkpoint was written by a run with another setting of "
                "--fp16-no-flatten-grads: use that, or --reset-optimizer"
            )
        super().load_state_dict(state_dict, optimizer_overrides)
        for copy, tensor in zip(copies, saved, strict=True):
            copy.data.copy_(tensor)
        self._sync_fp32_params_to_fp16()

    def _copies(self) -> List[nn.Parameter]:
        return list(self.fp32_params.values() if self.has_flat_params else self.fp32_params)

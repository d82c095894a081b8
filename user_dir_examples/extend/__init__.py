"""A user-dir of your own on top of pkm_fairseq: an architecture, a criterion, a kind of output."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Tuple

import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.logging import metrics
from fairseq.models import register_model_architecture
from fairseq.utils import safe_getattr

from pkm_fairseq.criterions.masked_lm import PkmMaskedLmConfig, PkmMaskedLmLoss  # registers ours
from pkm_fairseq.models.roberta import tiny_architecture

from . import gate  # noqa: F401  registers an output


@register_model_architecture("pkm_roberta", "my_resm_tiny")
def my_resm_tiny(args: Any) -> None:
    """The tiny size with residual memories in two layers; what is not set here is tiny's."""
    args.memory_mode = safe_getattr(args, "memory_mode", "residual")
    args.memory_layers = safe_getattr(args, "memory_layers", [0, 2])
    tiny_architecture(args)


@dataclass
class MyMaskedLmConfig(PkmMaskedLmConfig):
    """Options of ``my_masked_lm``: those of pkm_masked_lm, and the penalty's weight."""

    key_penalty: float = field(default=0.1, metadata={"help": "weight of the sub-keys' penalty"})


def one_direction(keys: Any) -> Any:
    """How much the sub-keys (H, 2, S, D) of a half point in one direction, from 0 to 1."""
    return F.normalize(keys, dim=-1).mean(dim=2).square().sum(dim=-1).mean()


@register_criterion("my_masked_lm", dataclass=MyMaskedLmConfig)
class MyMaskedLmLoss(PkmMaskedLmLoss):
    """The loss of pkm_masked_lm, plus a penalty in training; the loss logged is without it."""

    def __init__(self, cfg: MyMaskedLmConfig, task: Any) -> None:
        super().__init__(cfg, task)
        self.weight = cfg.key_penalty

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Tuple:
        """Compute the loss, a sum over the masked tokens, as is the penalty."""
        loss, n_masked, log = super().forward(model, sample, reduce)
        if self.training:
            layers = model.memory_layers().values()
            penalty = n_masked * sum(one_direction(layer.memory.keys) for layer in layers)
            loss, log["key_penalty"] = loss + self.weight * penalty, float(penalty)
        return loss, n_masked, log

    @staticmethod
    def reduce_metrics(logs: List[Dict[str, Any]]) -> None:
        """Aggregate logging outputs of all workers, which fairseq may have summed up."""
        PkmMaskedLmLoss.reduce_metrics(logs)
        values = [log["key_penalty"] / log["sample_size"] for log in logs if "key_penalty" in log]
        if values:
            metrics.log_scalar("key_penalty", float(sum(values) / len(values)), round=4)

"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) for fairseq's RoBERTa.

A ``--user-dir`` that also loads pkm_fairseq. All weights are frozen. To each weight of attention
and FFN a product of two thin matrices is added, which are trained. We wrote it ourselves because
peft renames all weights, and fairseq could not load the start.
"""

from typing import Any, Dict

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pkm_fairseq import plugin

plugin.register()

from fairseq.models import register_model, register_model_architecture  # noqa: E402
from fairseq.models.roberta import RobertaModel  # noqa: E402
from fairseq.models.roberta import base_architecture as roberta  # noqa: E402

from pkm_fairseq.models.architectures import residual, tiny_architecture  # noqa: E402
from pkm_fairseq.models.config import PkmRobertaConfig  # noqa: E402
from pkm_fairseq.models.roberta import PkmRobertaModel  # noqa: E402

RANK = 16
ADAPTED = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ORIGINAL = "parametrizations.weight.original"  # torch's name of a weight that has an addition


class LowRank(nn.Module):
    """Adds a product of two thin matrices to a weight; at the start it adds 0."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(weight.shape[1], RANK, bias=False)
        self.up = nn.Linear(RANK, weight.shape[0], bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, of the weight's shape."""
        return weight + self.up.weight @ self.down.weight


class _Adapted:
    """A RoBERTa of which only the low-rank additions are trained."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        """Build the model, freeze it, and put additions on its weights."""
        model = super().build_model(args, task)  # type: ignore[misc]
        for param in model.parameters():
            param.requires_grad_(False)
        for layer in model.encoder.sentence_encoder.layers:
            for name, module in layer.named_modules():
                if name.split(".")[-1] in ADAPTED and not name.startswith("memory."):
                    addition = LowRank(module.weight)
                    parametrize.register_parametrization(module, "weight", addition)
        return model

    def upgrade_state_dict_named(self, state_dict: Dict[str, Any], name: str) -> None:
        """Accept a model without additions."""
        if name == "":
            for key, own in self.state_dict().items():  # type: ignore[attr-defined]
                plain = key.replace(ORIGINAL, "weight")
                if plain in state_dict and plain != key:
                    state_dict[key] = state_dict.pop(plain)
                elif ".parametrizations.weight.0." in key:
                    state_dict.setdefault(key, own)
        super().upgrade_state_dict_named(state_dict, name)  # type: ignore[misc]


@register_model("low_rank_roberta")
class LowRankRoberta(_Adapted, RobertaModel):
    """fairseq's RoBERTa with low-rank additions."""


@register_model("low_rank_pkm_roberta", dataclass=PkmRobertaConfig)
class LowRankPkmRoberta(_Adapted, PkmRobertaModel):
    """RoBERTa with memories, which are frozen, and low-rank additions."""


register_model_architecture("low_rank_roberta", "low_rank_roberta_any")(roberta)
register_model_architecture("low_rank_pkm_roberta", "low_rank_resm_roberta_tiny")(
    residual(tiny_architecture)
)

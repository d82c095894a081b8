"""fairseq-train, which keeps its start, its batches and its losses for another host to repeat.

Usage: recorded_training.py FILE ARGUMENT..., the arguments of fairseq-train.
"""

import sys
from typing import Any, Dict, List

import torch
from fairseq_cli import train
from omegaconf import OmegaConf

KEPT: Dict[str, Any] = {"batches": [], "losses": []}


class RecordedTrainer(train.Trainer):  # type: ignore[misc]
    """fairseq's trainer, which notes what it starts from and what it is given."""

    def __init__(self, cfg: Any, task: Any, model: Any, criterion: Any, *more: Any) -> None:
        super().__init__(cfg, task, model, criterion, *more)
        KEPT["state"] = {name: x.clone() for name, x in model.state_dict().items()}
        options = OmegaConf.to_container(OmegaConf.create(vars_of(model.args)))
        plain = (int, float, str, bool, list, type(None))
        KEPT["options"] = {k: v for k, v in options.items() if isinstance(v, plain)}
        forward = criterion.forward

        def noted(model: Any, sample: Dict[str, Any], reduce: bool = True) -> Any:
            loss, size, log = forward(model, sample, reduce)
            if model.training:
                KEPT["losses"].append(float(loss.detach()) / int(size))
            return loss, size, log

        criterion.forward = noted

    def train_step(self, samples: List[Any], raise_oom: bool = False) -> Any:
        """Do an update, and keep its batch."""
        (sample,) = samples
        kept = sample["net_input"]["src_tokens"].clone(), sample["target"].clone()
        KEPT["batches"].append(kept)
        return super().train_step(samples, raise_oom)


def vars_of(args: Any) -> Dict[str, Any]:
    return dict(args) if OmegaConf.is_config(args) else vars(args)


if __name__ == "__main__":
    train.Trainer = RecordedTrainer
    file, *arguments = sys.argv[1:]
    sys.argv = ["fairseq-train", *arguments]
    train.cli_main()
    torch.save(KEPT, file)

"""Data-parallel workers on the CPU."""

import os
import random
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel


def wrap_in_ddp(
    module: torch.nn.Module, device_ids: Any = None, output_device: Any = None, **settings: Any
) -> DistributedDataParallel:
    """Wrap a model in torch's DDP.

    fairseq's ``pytorch_ddp`` names a GPU for every model, which torch refuses for one on the CPU.
    """
    if next(module.parameters()).device.type == "cpu":
        device_ids = output_device = None
    return DistributedDataParallel(
        module, device_ids=device_ids, output_device=output_device, **settings
    )


distributed_fairseq_model.DistributedDataParallel = wrap_in_ddp


def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
    """Start the workers of a fairseq command.

    fairseq starts one per GPU. With ``--cpu`` it would start none and end with status 0, or, under
    torchrun, divide by the number of GPUs. Under fairseq-hydra-train this comes too late:
    it loads the plugin in the workers.
    """
    training = cfg.distributed_training
    world = training.distributed_world_size
    if not cfg.common.cpu or world == 1 or training.distributed_no_spawn:
        return _fairseq_call_main(cfg, main, **kwargs)
    if training.distributed_backend == "nccl":
        raise SystemExit(
            "--distributed-backend is nccl, which needs GPUs: with --cpu it must be gloo"
        )
    if torch.distributed.is_torchelastic_launched():
        training.distributed_init_method = "env://"
        training.distributed_world_size = int(os.environ["WORLD_SIZE"])
        training.distributed_rank = int(os.environ["RANK"])
        training.distributed_no_spawn = True
        return _fairseq_call_main(cfg, main, **kwargs)
    if training.distributed_init_method is None:
        port = training.distributed_port
        port = port if port > 0 else random.randint(10000, 60000)  # as fairseq does with GPUs
        training.distributed_init_method = f"tcp://localhost:{port}"
    training.distributed_rank = None  # each worker takes its number
    worker = distributed_utils.distributed_main
    return spawn(worker, args=(main, cfg, kwargs), nprocs=world)  # type: ignore[no-untyped-call]


_fairseq_call_main = distributed_utils.call_main
distributed_utils.call_main = call_main

"""Data-parallel workers on the CPU."""

import multiprocessing
import os
import random
from functools import wraps
from typing import Any, Callable, Dict

import torch
from fairseq.distributed import utils as distributed_utils
from torch.multiprocessing.spawn import spawn


def wrap_without_devices(stock: Any) -> Any:
    """Replace ``DistributedDataParallel`` for models on the CPU.

    fairseq's ``pytorch_ddp`` names a GPU for every model; torch refuses this for a CPU model.
    """

    def wrap_in_ddp(
        module: torch.nn.Module, device_ids: Any = None, output_device: Any = None, **settings: Any
    ) -> Any:
        if next(module.parameters()).device.type == "cpu":
            device_ids = output_device = None
        return stock(module, device_ids=device_ids, output_device=output_device, **settings)

    return wrap_in_ddp


def start_workers_on_the_cpu(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``call_main``, which starts the workers of a fairseq command.

    fairseq starts one worker per GPU. With ``--cpu`` it would start none and end with status 0, or,
    under torchrun, divide by the number of GPUs. For fairseq-hydra-train this replacement comes too
    late, since that command loads the plugin in the workers.
    """

    @wraps(stock)
    def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
        training = cfg.distributed_training
        is_one = training.distributed_world_size == 1 and not training.distributed_init_method
        if not cfg.common.cpu or is_one or training.distributed_no_spawn:
            return stock(cfg, main, **kwargs)
        if training.distributed_backend == "nccl":
            raise ValueError(
                "--distributed-backend is nccl, which needs GPUs: with --cpu it must be gloo"
            )
        if torch.distributed.is_torchelastic_launched():
            _take_torchruns_place(training)
            return stock(cfg, main, **kwargs)
        return _spawn(cfg, main, kwargs)

    return call_main


def _take_torchruns_place(training: Any) -> None:
    training.distributed_init_method = "env://"
    training.distributed_world_size = int(os.environ["WORLD_SIZE"])
    training.distributed_rank = int(os.environ["RANK"])
    training.distributed_no_spawn = True


def _spawn(cfg: Any, main: Any, kwargs: Dict[str, Any]) -> Any:
    training = cfg.distributed_training
    if training.distributed_init_method is None:
        port = training.distributed_port
        port = port if port > 0 else random.randint(10000, 60000)  # as fairseq does with GPUs
        training.distributed_init_method = f"tcp://localhost:{port}"
    training.distributed_rank = None  # each worker takes its own rank
    worker, world = distributed_utils.distributed_main, training.distributed_world_size
    try:
        return spawn(worker, args=(main, cfg, kwargs), nprocs=world)  # type: ignore[no-untyped-call]
    except KeyboardInterrupt:  # otherwise Python waits for them, and they wait for each other
        for process in multiprocessing.active_children():
            process.terminate()
        raise

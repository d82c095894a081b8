"""Adapt torch and numpy to fairseq's needs."""

import argparse
import collections
import types
from typing import Any

import numpy
import omegaconf
import torch
from fairseq.distributed import utils as distributed_utils
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

# Classes in a run's options, and in checkpoint parts that workers exchange: omegaconf's containers
# and the places of tensors. All of them are plain data.
PLAIN_DATA = (
    *(argparse.Namespace, omegaconf.DictConfig, omegaconf.ListConfig, ContainerMetadata, Metadata),
    *(AnyNode, collections.defaultdict, dict, list, int, Any, distributed_utils._TensorPlaceholder),
)


def allow_plain_data() -> None:
    """Let torch load the plain-data classes that fairseq stores; its protection stays on."""
    torch.serialization.add_safe_globals(list(PLAIN_DATA))


def restore_numpy_compat() -> None:
    """Give numpy the one name of np.compat that fairseq uses."""
    if not hasattr(numpy, "compat"):
        numpy.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]

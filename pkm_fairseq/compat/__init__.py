"""The cures fairseq needs on current torch and numpy; importing this package applies them."""

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

from . import checkpoints, precision, processes, workers  # noqa: F401  (importing applies)

# torch >= 2.6 loads checkpoints with weights_only=True and refuses classes it does not know.
# fairseq stores the options of a run in an argparse.Namespace, and data-parallel workers send each
# other a loaded checkpoint, with omegaconf's containers and the places of tensors. All of that is
# plain data.
PLAIN_DATA = (
    *(argparse.Namespace, omegaconf.DictConfig, omegaconf.ListConfig, ContainerMetadata, Metadata),
    *(AnyNode, collections.defaultdict, dict, list, int, Any, distributed_utils._TensorPlaceholder),
)
torch.serialization.add_safe_globals(list(PLAIN_DATA))

# numpy 2.0 removed np.compat; fairseq's TokenBlockDataset takes np.compat.long, which was int,
# for --sample-break-mode eos.
if not hasattr(numpy, "compat"):
    numpy.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]

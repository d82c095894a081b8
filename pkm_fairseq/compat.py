"""The few cures fairseq needs on current torch and numpy; importing this module applies them."""

import argparse
import types

import numpy
import torch

# torch >= 2.6 loads checkpoints with weights_only=True and refuses classes it does not know.
# fairseq stores the options of a run in an argparse.Namespace, which is plain data.
torch.serialization.add_safe_globals([argparse.Namespace])

# numpy 2.0 removed np.compat; fairseq's TokenBlockDataset takes np.compat.long, which was int,
# for --sample-break-mode eos.
if not hasattr(numpy, "compat"):
    numpy.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]

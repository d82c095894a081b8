"""The few cures fairseq needs on current torch; importing this module applies them."""

import argparse

import torch

# torch >= 2.6 loads checkpoints with weights_only=True and refuses classes it does not know.
# fairseq stores the options of a run in an argparse.Namespace, which is plain data.
torch.serialization.add_safe_globals([argparse.Namespace])

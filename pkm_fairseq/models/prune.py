"""``--encoder-layers-to-keep``: a model, and the checkpoints it loads, without some layers.

fairseq does the same in ``checkpoint_utils.prune_state_dict``, but again at every start, so that a
pruned run cannot be resumed; and only here are memory layers known.
"""

import logging
import re
from typing import Any, Dict, List, Optional

from fairseq.utils import safe_getattr
from torch import Tensor

logger = logging.getLogger(__name__)

LAYER = re.compile(r"^((?:encoder|decoder)\.sentence_encoder\.layers\.)(\d+)\.")


def take_layers_to_keep(args: Any) -> Optional[List[int]]:
    """Make the options those of the pruned model, whose layers are counted anew.

    The options name layers of the whole encoder, memory layers included; afterwards
    ``encoder_layers`` and ``memory_layers`` are those of the pruned one, and
    ``encoder_layers_to_keep`` is cleared, so that this run's checkpoints are not pruned again.

    Returns:
        The layers to keep, ascending; None if there is nothing to prune.

    Raises:
        ValueError: a layer does not exist, or is named twice.
    """
    said, args.encoder_layers_to_keep = safe_getattr(args, "encoder_layers_to_keep"), None
    if not said:
        return None
    kept = sorted(_layers(said, args.encoder_layers))
    for layer in sorted(set(args.memory_layers) - set(kept)):
        logger.warning(f"memory layer {layer} is not among --encoder-layers-to-keep {said}")
    args.memory_layers = [kept.index(layer) for layer in args.memory_layers if layer in kept]
    args.encoder_layers = len(kept)
    return kept


def _layers(said: str, n_layers: int) -> List[int]:
    names = [name.strip() for name in str(said).split(",")]
    for name in names:
        if not name.isdecimal() or int(name) >= n_layers:
            raise ValueError(
                f"encoder-layers-to-keep names layer {name or repr('')}, must be in "
                f"0..{n_layers - 1}: the encoder has {n_layers} layers, counted from 0"
            )
        if names.count(name) > 1:
            raise ValueError(f"encoder-layers-to-keep names layer {name} twice: {said}")
    return [int(name) for name in names]


def prune_state(state: Dict[str, Tensor], kept: List[int]) -> Dict[str, Tensor]:
    """The state of the layers that are kept, counted anew; the rest of the model as it is.

    Args:
        state: of a whole model; one with no more layers than are kept is pruned already.
        kept: indices of layers, ascending.

    Raises:
        ValueError: the state lacks a layer.
    """
    found = {int(match[2]) for match in map(LAYER.match, state) if match}
    if len(found) <= len(kept):
        return state
    for layer in kept:
        if layer not in found:
            raise ValueError(
                f"pkm_roberta: encoder-layers-to-keep names layer {layer}, "
                f"but the checkpoint has layers 0..{max(found)}"
            )
    logger.info(f"layers {', '.join(map(str, kept))} of the checkpoint are kept")
    pruned = {}
    for name, tensor in state.items():
        match = LAYER.match(name)
        if match is None:
            pruned[name] = tensor
        elif int(match[2]) in kept:
            pruned[f"{match[1]}{kept.index(int(match[2]))}{name[match.end(2) :]}"] = tensor
    return pruned

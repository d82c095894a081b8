"""``--encoder-layers-to-keep``: remove layers from a model, and from the checkpoints it loads.

fairseq's ``checkpoint_utils.prune_state_dict`` prunes again at every start, so a pruned run cannot
resume. It also does not know memory layers. This module replaces it.
"""

import logging
import re
from typing import Dict, List, Optional, Sequence

from torch import Tensor

logger = logging.getLogger(__name__)

LAYER = re.compile(r"^((?:encoder|decoder)\.sentence_encoder\.layers\.)(\d+)\.")


def layers_to_keep(said: Optional[str], n_layers: int) -> Optional[List[int]]:
    """The layers that ``--encoder-layers-to-keep`` names, ascending; None for no pruning.

    Args:
        said: the option's value.
        n_layers: layers of the whole encoder.

    Raises:
        ValueError: a layer does not exist, or is named twice.
    """
    if not said:
        return None
    names = [name.strip() for name in str(said).split(",")]
    for name in names:
        if not name.isdecimal() or int(name) >= n_layers:
            raise ValueError(
                f"encoder-layers-to-keep names layer {name or repr('')}, must be in "
                f"0..{n_layers - 1}: the encoder has {n_layers} layers, counted from 0"
            )
        if names.count(name) > 1:
            raise ValueError(f"encoder-layers-to-keep names layer {name} twice: {said}")
    return sorted(map(int, names))


def kept_memory_layers(memory_layers: List[int], kept: List[int]) -> List[int]:
    """The indices of memory layers among the kept layers."""
    for layer in sorted(set(memory_layers) - set(kept)):
        logger.warning(
            f"memory layer {layer} is not among --encoder-layers-to-keep {','.join(map(str, kept))}"
        )
    return [kept.index(layer) for layer in memory_layers if layer in kept]


def prune_state(state: Dict[str, Tensor], kept: Sequence[int]) -> Dict[str, Tensor]:
    """The state of the kept layers, renumbered; the rest of the model does not change.

    Args:
        state: the state of a whole model; one with no more layers than ``kept`` is already pruned.
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

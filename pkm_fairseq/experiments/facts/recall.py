"""Measure how many facts about the people of ``people.py`` a model recalls."""

import math
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from fairseq.data import Dictionary, data_utils
from torch import Tensor
from torch.nn import functional

from ...memory.ablation import ablated
from ...memory.hosts import new_usage, observing, with_memories
from ...memory.observe.usage import DRAWS
from .people import ATTRIBUTES, NAMES

BATCH_SIZE = 512
FIRST = 1 + len(NAMES)  # position of the first attribute, after <s> and the name
LENGTH = FIRST + len(ATTRIBUTES) + 1  # with </s>


def read_people(data: Path, split: str, dictionary: Dictionary) -> Tensor:
    """Token ids of the people of a split, (N, 8), each between ``<s>`` and ``</s>``.

    Raises:
        ValueError: the split is missing, or does not hold people.
    """
    lines = data_utils.load_indexed_dataset(str(data / split), dictionary)
    if lines is None:
        raise ValueError(f"{data} has no split {split}")
    words = [*NAMES, *ATTRIBUTES]
    if any(len(line) != len(words) + 1 for line in lines) or not all(
        dictionary[index].startswith(word)
        for word, index in zip(words, lines[0].tolist(), strict=False)
    ):
        raise ValueError(
            f"split {split} of {data} holds no people: a sentence must be "
            f"{' '.join(f'{word}<number>' for word in words)}"
        )
    people = torch.stack([line.long() for line in lines])
    return functional.pad(people, (1, 0), value=dictionary.bos())


def measure(model: Any, mask: int, people: Tensor, ablate: bool = False) -> Dict[str, Any]:
    """Measure recall and bits of people's attributes, and the usage of memories.

    Args:
        model: in eval mode.
        mask: index of the mask token.
        people: token ids, (N, 8).
        ablate: whether to measure also with all values read as zero.

    Returns:
        ``by_name`` (all four attributes masked) and ``with_others`` (one masked). Each has
        ``recall``, the share of attributes for which the most probable word of the whole dictionary
        is right, and ``bits``, the mean surprisal of the right word. With ``ablate`` also
        ``zeroed``, the same for values of zero. With memories also ``memory``, usage by layer over
        the tokens of ``with_others``.
    """
    host = with_memories(model)
    found: Dict[str, Any] = {"people": len(people), "by_name": _ask(model, mask, people, None)}
    if host is None:
        found["with_others"] = _ask_each(model, mask, people)
        return found
    usage = new_usage(host, DRAWS)
    with observing(host, usage):
        found["with_others"] = _ask_each(model, mask, people)
    found["memory"] = [{"layer": at, **counts.summary()} for at, counts in sorted(usage.items())]
    if ablate:
        with ablated(host, "zero"):
            found["zeroed"] = {
                "by_name": _ask(model, mask, people, None),
                "with_others": _ask_each(model, mask, people),
            }
    return found


def _ask_each(model: Any, mask: int, people: Tensor) -> Dict[str, float]:
    """The mean over attributes; each is masked alone, with the other three given."""
    answers = [_ask(model, mask, people, at) for at in range(len(ATTRIBUTES))]
    return {name: sum(answer[name] for answer in answers) / len(answers) for name in answers[0]}


@torch.no_grad()
def _ask(model: Any, mask: int, people: Tensor, attribute: Optional[int]) -> Dict[str, float]:
    """Mask one attribute, or all for None, and measure the model's answers."""
    asked = torch.zeros(LENGTH, dtype=torch.bool)
    asked[FIRST : LENGTH - 1] = attribute is None
    if attribute is not None:
        asked[FIRST + attribute] = True
    right, bits, count = 0, 0.0, 0
    for batch in people.split(BATCH_SIZE):
        masked = asked.expand_as(batch)
        tokens = batch.masked_fill(masked, mask)
        logits, _ = model(tokens, masked_tokens=masked)  # (masked, V)
        target = batch[masked]
        right += int(logits.argmax(dim=-1).eq(target).sum())
        bits += functional.cross_entropy(logits.double(), target, reduction="sum").item()
        count += len(target)
    return {"recall": right / count, "bits": bits / count / math.log(2)}

"""Evaluate checkpoints on the same masked tokens of held-out text."""

import math
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
from fairseq.data import data_utils
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.masked_lm import MaskedLMTask
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn import functional

from ...memory.ablation import measure_ablations
from ...memory.hosts import new_usage, observing, with_memories
from ...memory.observe.usage import DRAWS
from ...models.checkpoints import (
    compare_dictionary,
    load_dictionary,
    load_model_and_task,
    read_checkpoint,
    task_name,
)

BATCH_SIZE = 64
SENTENCES = 3  # of a held-out text, to fill


class Loaded(NamedTuple):
    """A checkpoint, ready to be evaluated."""

    model: Any
    task: MaskedLMTask


class Words:
    """A tokenizer that splits text at spaces."""

    def encode(self, text: str, out_type: type = str) -> List[str]:
        """The words of a text."""
        return text.split()


Tokenizer = Union[SentencePieceProcessor, Words]


class Result(NamedTuple):
    """A model's results on held-out text.

    Attributes:
        ppl: perplexity of the masked tokens.
        memory: usage of each memory layer, as ``MemoryUsage.summary`` plus ``layer``.
        mass: by layer, each slot's share of the accumulated weight, descending.
    """

    ppl: float
    memory: List[Dict[str, float]]
    mass: Dict[int, List[float]]


def load(checkpoint: Path, data: Path, values_file: Optional[Path] = None) -> Loaded:
    """Load a model for evaluation, with the task it was trained on.

    Args:
        checkpoint: of masked language modelling, with this plugin's task or fairseq's own.
        data: a folder that fairseq-preprocess made.
        values_file: the file of an exported model's values; None takes the one beside it.

    Raises:
        ValueError: the checkpoint or the dictionary is missing or unreadable, or they do not fit.
    """
    stored = read_checkpoint(str(checkpoint), "checkpoint")
    trained_on = task_name(stored)
    if not issubclass(TASK_REGISTRY.get(trained_on, object), MaskedLMTask):
        raise ValueError(f"{checkpoint} was trained on the task {trained_on}, must be masked_lm")
    dictionary = load_dictionary(str(data / "dict.txt"))
    compare_dictionary(stored, dictionary, str(checkpoint))
    more = {} if values_file is None else {"memory_values_file": str(values_file)}
    model, _, task = load_model_and_task(str(checkpoint), stored, data=str(data), **more)
    return Loaded(model.eval(), task)


def masked_batches(task: MaskedLMTask, split: str = "test") -> List[Dict[str, Any]]:
    """Batches of a split, masked with the task's seed: the masks are always the same.

    Raises:
        ValueError: the split is so small that no token is masked.
    """
    task.load_dataset(split, epoch=1)
    dataset = task.dataset(split)
    starts = range(0, len(dataset), BATCH_SIZE)
    batches = [
        dataset.collater([dataset[i] for i in range(at, min(at + BATCH_SIZE, len(dataset)))])
        for at in starts
    ]
    if not any(scored(batch["target"], task).any() for batch in batches):
        raise ValueError(f"split {split} is too small: no token of it is masked")
    return batches


def scored(target: Tensor, task: MaskedLMTask) -> Tensor:
    """Which positions count: masked tokens except <s>, because its position gives it away."""
    dictionary = task.source_dictionary
    return target.ne(dictionary.pad()) & target.ne(dictionary.bos())


@torch.no_grad()
def evaluate(model: Any, batches: List[Dict[str, Any]], task: MaskedLMTask) -> Result:
    """Perplexity on the masked tokens of held-out text, and memory usage over its tokens.

    Usage is counted over the first tokens, up to 100 draws per slot, or over all tokens if the text
    has fewer draws.

    Raises:
        ValueError: a sequence is too long for the model.
    """
    host = with_memories(model)
    if host is None:
        return Result(_perplexity(model, batches, task), [], {})
    usage = new_usage(host, DRAWS)
    with observing(host, usage):
        ppl = _perplexity(model, batches, task)
    memory = [{"layer": layer, **counts.summary()} for layer, counts in sorted(usage.items())]
    masses = {layer: counts.read_mass.sum(0) for layer, counts in usage.items()}
    shares = {layer: mass / mass.sum() for layer, mass in masses.items()}
    mass = {layer: share.sort(descending=True).values.tolist() for layer, share in shares.items()}
    return Result(ppl, memory, mass)


@torch.no_grad()
def ablations(
    model: Any, batches: List[Dict[str, Any]], task: MaskedLMTask
) -> Dict[str, Dict[str, float]]:
    """Perplexity with ablated memories, to measure how much they contribute to the model.

    Args:
        model: in eval mode.
        batches: from ``masked_batches``.
        task: of the batches.

    Returns:
        As from ``pkm_fairseq.memory.ablation.measure_ablations``. Empty without a memory.
    """
    host = with_memories(model)
    if host is None:
        return {}
    return measure_ablations(host, lambda: _perplexity(model, batches, task))


def _perplexity(model: Any, batches: List[Dict[str, Any]], task: MaskedLMTask) -> float:
    longest = max(batch["net_input"]["src_tokens"].shape[1] for batch in batches)
    if longest > model.max_positions():
        raise ValueError(
            f"a sequence has {longest} tokens, the model takes {model.max_positions()} at most"
        )
    total, count = 0.0, 0
    for batch in batches:
        masked = scored(batch["target"], task)  # (B, T)
        if not masked.any():
            continue
        logits, _ = model(**batch["net_input"], masked_tokens=masked)  # (masked, V)
        target = batch["target"][masked]
        total += functional.cross_entropy(logits.double(), target, reduction="sum").item()
        count += len(target)
    return math.exp(total / count)


def unigram_perplexity(data: Path, batches: List[Dict[str, Any]], task: MaskedLMTask) -> float:
    """Perplexity of the masked tokens under training frequencies with add-one smoothing.

    Raises:
        ValueError: the data have no training split.
    """
    dictionary = task.source_dictionary
    train = data_utils.load_indexed_dataset(str(data / "train"), dictionary)
    if train is None:
        raise ValueError(f"{data} has no split train, which a unigram model is counted on")
    counts = np.ones(len(dictionary))  # add one
    for line in train:
        counts += np.bincount(line.numpy(), minlength=len(dictionary))
    log_share = torch.from_numpy(np.log(counts / counts.sum()))
    targets = torch.cat([batch["target"][scored(batch["target"], task)] for batch in batches])
    return math.exp(-log_share[targets].mean().item())


def parameter_count(model: Any) -> int:
    """Number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def fill_mask(
    loaded: Loaded, tokenizer: Tokenizer, sentence: str, top: int = 5
) -> List[Tuple[str, float]]:
    """The most probable pieces at ``<mask>``, with their probabilities.

    Args:
        loaded: model and task.
        tokenizer: the sentencepiece model of the training text.
        sentence: contains ``<mask>`` once, for one piece.
        top: the number of pieces.

    Raises:
        ValueError: the sentence has no or several masks, or is too long.
    """
    tokens = encode_masked(loaded, tokenizer, sentence)  # (1, T)
    masked = tokens.eq(loaded.task.mask_idx)
    logits, _ = loaded.model(tokens, masked_tokens=masked)  # (1, V)
    probabilities = logits.softmax(dim=-1)[0]
    dictionary = loaded.task.source_dictionary
    probabilities[: dictionary.nspecial] = 0  # <s>, <pad>, </s>, <unk> are no answers
    if not 1 <= top <= len(probabilities):
        raise ValueError(f"top is {top}, must be in 1..{len(probabilities)}")
    best = probabilities.topk(top)
    return [
        (dictionary[index].replace("\u2581", " "), probability)
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def encode_masked(loaded: Loaded, tokenizer: Tokenizer, sentence: str) -> Tensor:
    """The token ids, (1, T), of a sentence with one ``<mask>``; errors as in ``fill_mask``."""
    before, mask, after = sentence.partition("<mask>")
    if not mask or "<mask>" in after:
        raise ValueError(f"sentence {sentence!r} must hold <mask> exactly once")
    pieces = [*tokenizer.encode(before, out_type=str), "<mask>", *_continue(tokenizer, after)]
    dictionary = loaded.task.source_dictionary
    unknown = [piece for piece in pieces if dictionary.index(piece) == dictionary.unk()]
    if 2 * len(unknown) > len(pieces):
        raise ValueError(
            f"{len(unknown)} of {len(pieces)} pieces are not in the dictionary: "
            "this is not the sentencepiece model of the training text"
        )
    ids = [dictionary.bos(), *(dictionary.index(piece) for piece in pieces), dictionary.eos()]
    if len(ids) > loaded.model.max_positions():
        raise ValueError(
            f"sentence {sentence!r} has {len(ids)} tokens with its ends, "
            f"must have at most {loaded.model.max_positions()}"
        )
    return torch.tensor([ids])


def _continue(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Pieces of text in the middle of a sentence; without a leading space no new word starts."""
    pieces = tokenizer.encode(text, out_type=str)
    if pieces and not text[:1].isspace():
        pieces[0] = pieces[0].removeprefix("\u2581")
    return (piece for piece in pieces if piece)


def held_out_sentences(
    text: Path, tokenizer: SentencePieceProcessor, longest: int
) -> List[Tuple[str, str]]:
    """Up to three sentences of a held-out text, each with one word masked, and that word.

    They are from different parts of the text.

    Args:
        text: lines of text.
        tokenizer: the sentencepiece model; the masked word is one of its pieces.
        longest: the most pieces of a sentence.
    """
    lines = text.read_text(encoding="utf-8").splitlines()
    found: List[Tuple[str, str]] = []
    for part in range(SENTENCES):
        begin, end = (at * len(lines) // SENTENCES for at in (part, part + 1))
        for line in lines[begin:end]:
            masked = _mask_a_word(tokenizer.encode(line, out_type=str), tokenizer)
            if masked and len(line.split()) >= 7 and len(tokenizer.encode(line)) <= longest:
                found.append(masked)
                break
    return found


def _mask_a_word(pieces: List[str], tokenizer: SentencePieceProcessor) -> Optional[Tuple[str, str]]:
    """A sentence with its longest word of one piece masked, and that word; None if it has none."""
    words = [  # whole words: the next piece does not start with a letter
        i
        for i in range(1, len(pieces) - 1)
        if re.fullmatch("\u2581[a-z]{4,}", pieces[i]) and not pieces[i + 1][0].isalpha()
    ]
    if not words or not re.fullmatch("\u2581[A-Z].*[.?!]", "".join(pieces)):
        return None
    at = max(words, key=lambda i: len(pieces[i]))
    before, after = tokenizer.decode(pieces[:at]), tokenizer.decode(pieces[at + 1 :])
    space = " " if pieces[at + 1].startswith("\u2581") else ""
    return f"{before} <mask>{space}{after}", pieces[at][1:]

"""Predict with finetuned models: test sets, and a user's own sentences."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from fairseq.data import Dictionary, data_utils
from torch import Tensor

from ...models.checkpoints import (
    compare_dictionary,
    load_dictionary,
    load_model_and_task,
    options_of,
    read_checkpoint,
)
from ...models.labels import label_names
from ..runs.progress import progress_bars
from .read import numbered_lines, split_line
from .results import SETTINGS
from .submission import label_text, prediction_file
from .tasks import TASKS, TaskSpec
from .tokenizers import Tokenizer, encode

BATCH_SIZE = 32
HEAD = re.compile(r"classification_heads\.([^.]+)\.out_proj\.weight")


class Example(NamedTuple):
    """Token ids in the format of the finetuning, and whether they were shortened."""

    tokens: Tensor  # (T,)
    is_shortened: bool


@dataclass
class Finetuned:
    """A finetuned model, ready to predict.

    Attributes:
        model: in eval mode.
        task: fairseq's task of the finetuning.
        head: the name of its classification head.
        spec: the GLUE task.
        labels: labels of the head's outputs, in order; empty for regression.
    """

    model: Any
    task: Any
    head: str
    spec: TaskSpec
    labels: Tuple[str, ...]

    def example(self, sentences: Sequence[Tensor]) -> Example:
        """Join one or two sentences, (T,) each with its end, as fairseq's sentence_prediction.

        Args:
            sentences: cut off at the end if too long, like ``--shorten-method truncate``.
        """
        cfg = self.task.cfg
        starts = [cfg.init_token, cfg.separator_token][: len(sentences)]
        parts = [
            part
            for start, sentence in zip(starts, sentences, strict=True)
            for part in ([] if start is None else [torch.tensor([start])]) + [sentence.long()]
        ]
        tokens, longest = torch.cat(parts), self.model.max_positions()
        return Example(tokens[:longest], len(tokens) > longest)

    @torch.no_grad()
    def outputs(self, examples: Sequence[Example], title: str) -> Tensor:
        """The head's outputs for examples, (N, classes) or (N, 1).

        Raises:
            ValueError: an output is not finite.
        """
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i].tokens), i))
        batches = [order[at : at + BATCH_SIZE] for at in range(0, len(order), BATCH_SIZE)]
        device, pad = next(self.model.parameters()).device, self.task.source_dictionary.pad()
        results: Dict[int, Tensor] = {}
        with progress_bars() as progress:
            for batch in progress.track(batches, description=title):
                tokens = data_utils.collate_tokens([examples[i].tokens for i in batch], pad)
                out, _ = self.model(
                    tokens.to(device), features_only=True, classification_head_name=self.head
                )  # (B, classes)
                results.update(zip(batch, out.float().cpu(), strict=True))
        made = torch.stack([results[i] for i in range(len(examples))])
        if not made.isfinite().all():
            raise ValueError(f"{title}: the model's outputs are not finite numbers")
        return made

    def predictions(self, outputs: Tensor) -> List[Union[str, float]]:
        """Labels, or scores in the task's own range, not clipped."""
        if self.spec.label_range is None:
            return [self.labels[best] for best in outputs.argmax(dim=-1).tolist()]
        low, high = self.spec.label_range
        return (low + outputs[:, 0].double() * (high - low)).tolist()


# --- loading ----------------------------------------------------------------------------------


def load_finetuned(checkpoint: Path, data: Path, spec: TaskSpec) -> Finetuned:
    """Load a finetuned model with its head.

    Args:
        checkpoint: a checkpoint of fairseq-train with (pkm_)sentence_prediction.
        data: a task's prepared folder.
        spec: the task.

    Raises:
        ValueError: a file is missing, or the checkpoint belongs to another task.
    """
    _check_prepared(data, spec)
    stored = read_checkpoint(str(checkpoint), "checkpoint")
    head = _head(stored["model"], checkpoint, spec)
    _check_task(stored, checkpoint, spec)
    labels = _labels(stored, checkpoint, data, spec)
    dictionary = load_dictionary(str(data / "input0" / "dict.txt"))
    compare_dictionary(stored, dictionary, str(checkpoint))
    model, _, task = load_model_and_task(str(checkpoint), stored, data=str(data))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Finetuned(model.to(device).eval(), task, head, spec, labels)


def _check_prepared(data: Path, spec: TaskSpec) -> None:
    file = data / "task.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; prepare {spec.name} with prepare_glue.py")
    own = {"labels": list(spec.labels), "is_pair": spec.is_pair}
    own["label_range"] = list(spec.label_range) if spec.label_range else None
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        made = {key: read[key] for key in own}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file} is not a file of prepare_glue.py: prepare the task again"
        ) from None
    for key, value in own.items():
        if made[key] != value:
            raise ValueError(
                f"{file} has {key} {made[key]}, the task has {value}: prepare it again"
            )


def _head(state: Dict[str, Tensor], checkpoint: Path, spec: TaskSpec) -> str:
    heads = {match[1]: len(state[match[0]]) for match in map(HEAD.fullmatch, state) if match}
    if not heads:
        raise ValueError(f"{checkpoint} has no classification head: it is not finetuned")
    if len(heads) > 1:
        raise ValueError(f"{checkpoint} has {len(heads)} heads ({', '.join(heads)}), must have one")
    ((head, n_classes),) = heads.items()
    expected = 1 if spec.is_regression else len(spec.labels)
    if n_classes != expected:
        raise ValueError(f"{checkpoint} has a head of {n_classes}, {spec.name} needs {expected}")
    return head


def _check_task(stored: Dict[str, Any], checkpoint: Path, spec: TaskSpec) -> None:
    """Check the folder name of the training data: for GLUE it is the name of the task."""
    finetuned_on = _training_data(stored).name
    if finetuned_on in TASKS and finetuned_on != spec.name:
        raise ValueError(f"{checkpoint} was finetuned on {finetuned_on}, not on {spec.name}")


def _training_data(stored: Dict[str, Any]) -> Path:
    return Path(options_of(stored, "task").get("data") or "")


def _labels(
    stored: Dict[str, Any], checkpoint: Path, data: Path, spec: TaskSpec
) -> Tuple[str, ...]:
    """The labels of the head's outputs, in order.

    The order is that of the training data's label dictionary, which fairseq-preprocess sorts by
    frequency. pkm_sentence_prediction stores it. For other checkpoints we read it from the training
    data if they still exist, else from the prepared data.
    """
    if spec.is_regression:
        return ()
    labels = (stored.get("task_state") or {}).get("labels")
    if labels is None:
        file = _training_data(stored) / "label" / "dict.txt"
        if not file.is_file():
            file = data / "label" / "dict.txt"
            print(
                f"warning: {checkpoint} does not store the order of its labels: using that of "
                f"{file}",
                file=sys.stderr,
            )
        labels = label_names(Dictionary.load(str(file)))
    if sorted(labels) != sorted(spec.labels):
        raise ValueError(
            f"{checkpoint} was finetuned on labels {', '.join(labels)}, {spec.name} has "
            f"{', '.join(spec.labels)}"
        )
    return tuple(labels)


def best_checkpoint(folder: Path, spec: TaskSpec) -> Path:
    """The checkpoint of the seed with the best first metric on dev.

    A folder may also hold seeds of an earlier finetuning with other settings: they do not count.

    Args:
        folder: folder of a finetuned task, with ``seed*[0-9]/result.json`` and ``settings.json``.
        spec: the task.

    Raises:
        ValueError: there is no finished seed with the settings of the last finetuning.
    """
    metric = spec.metrics[0]
    files = sorted(folder.glob("seed*[0-9]/result.json"))
    results = {file: json.loads(file.read_text()) for file in files}
    scores = {file: made["dev"].get(metric) for file, made in results.items()}
    scores = {file: score for file, score in scores.items() if score is not None}
    if not scores:
        raise ValueError(f"{folder}: no seed*/result.json with {metric} on dev")
    last = _last_settings(folder)
    found = {file: x for file, x in scores.items() if last in (None, results[file].get("settings"))}
    if not found:
        raise ValueError(
            f"{folder}: no finished seed has the settings of the last finetune_glue.py: "
            "run that again to finish it"
        )
    best, n_others = max(found, key=found.__getitem__), len(scores) - len(found)
    others = f"; left out, of other settings: {n_others}" if n_others else ""
    best_file = best.with_name("checkpoint_best.pt")
    print(
        f"{spec.name}: {best_file}, {metric} on dev {found[best]:.1f}, best of {len(found)}{others}"
    )
    return best_file


def _last_settings(folder: Path) -> Optional[str]:
    """The settings of the last finetuning on a task; None from versions that stored none."""
    file = folder / SETTINGS
    return json.loads(file.read_text())["key"] if file.is_file() else None


# --- predicting -------------------------------------------------------------------------------


def predict_tests(finetuned: Finetuned, data: Path) -> Dict[str, str]:
    """Predict the test sets of a task.

    Args:
        finetuned: the model.
        data: the task's prepared folder.

    Returns:
        File contents by file name for GLUE's server, in the order of the test file.

    Raises:
        ValueError: the task was prepared without a test file.
    """
    spec, contents = finetuned.spec, {}
    for split, file in spec.files.items():
        if not file.submission or not (data / f"{split}.index").is_file():
            continue
        indices = (data / f"{split}.index").read_text(encoding="utf-8").split("\n")[:-1]
        examples = examples_of(finetuned, data, split)
        if len(examples) != len(indices):
            raise ValueError(
                f"{data / split}.index has {len(indices)} lines for {len(examples)} examples: "
                "prepare the task again"
            )
        title = f"{spec.name} {split}"
        _warn_of_shortened(examples, title, finetuned)
        outputs = finetuned.outputs(examples, title)
        contents[file.submission] = prediction_file(indices, finetuned.predictions(outputs), spec)
    if not contents:
        raise ValueError(f"{data} was prepared without a test file")
    return contents


def examples_of(finetuned: Finetuned, data: Path, split: str) -> List[Example]:
    """The examples of a split of a task's prepared folder."""
    dictionary = finetuned.task.source_dictionary
    inputs = [
        data_utils.load_indexed_dataset(str(data / f"input{number}" / split), dictionary)
        for number in range(1 + finetuned.spec.is_pair)
    ]
    return [finetuned.example(list(sentences)) for sentences in zip(*inputs, strict=True)]


def predict_lines(finetuned: Finetuned, stream: BinaryIO, tokenizer: Tokenizer) -> List[str]:
    """Predict a user's own sentences.

    Args:
        finetuned: the model.
        stream: UTF-8, one example per line, with a tab between the two sentences of a pair.
        tokenizer: the tokenizer of the prepared data.

    Returns:
        For each line, the label and its probability separated by a tab, or the score.

    Raises:
        ValueError: a line is not UTF-8 or has the wrong number of sentences, or there are no lines.
    """
    spec, to_symbols = finetuned.spec, tokenizer.load()
    dictionary = finetuned.task.source_dictionary
    examples = []
    for number, line in numbered_lines(stream):
        try:
            texts = split_line(line, 1 + spec.is_pair)
        except ValueError as error:
            raise ValueError(f"line {number} of the input: {error}") from None
        ids = [torch.tensor(encode(to_symbols(text), dictionary)) for text in texts]
        examples.append(finetuned.example(ids))
    if not examples:
        raise ValueError("the input has no lines")
    _warn_of_shortened(examples, "the input", finetuned)
    outputs = finetuned.outputs(examples, spec.name)
    answers = [label_text(prediction, spec) for prediction in finetuned.predictions(outputs)]
    if spec.is_regression:
        return answers
    sure = outputs.softmax(dim=-1).max(dim=-1).values.tolist()
    return [f"{label}\t{share:.4f}" for label, share in zip(answers, sure, strict=True)]


def _warn_of_shortened(examples: Sequence[Example], title: str, finetuned: Finetuned) -> None:
    n_shortened = sum(example.is_shortened for example in examples)
    if n_shortened:
        print(
            f"warning: {title}: {n_shortened} of {len(examples)} inputs are longer than "
            f"{finetuned.model.max_positions()} tokens and were cut off at the end",
            file=sys.stderr,
        )

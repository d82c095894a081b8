"""Read checkpoints from any version of fairseq, and check that they fit before loading them."""

import hashlib
import logging
import os
import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.roberta import RobertaModel
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.masked_lm import MaskedLMTask
from fairseq.tasks.multilingual_masked_lm import MultiLingualMaskedLMTask
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from fairseq.tasks.sentence_ranking import SentenceRankingTask

from ..compat.values_file import place_values_file
from ..memory.parts import MERGE, has_parts, place_parts

logger = logging.getLogger(__name__)

# parameters that only a model with memory has
MEMORY_PARAMETER = re.compile(r"\.layers\.\d+\.memory\.")
EMBEDDING = "sentence_encoder.embed_tokens.weight"  # of the encoder; of the decoder in old versions
UNKNOWN_DICTIONARY = "dictionary: only its size was checked, the checkpoint's own was not found"
# a RoBERTa of any name is built from these sizes; all but the heads show in its parameters
SIZES = ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
# fairseq looks these up in old checkpoints, although an evaluation does not need them
STAND_INS = {"criterion": "masked_lm", "optimizer": "adam", "lr_scheduler": "fixed"}
# of RoBERTas; how fairseq's other tasks use a checkpoint's options is not checked
TASKS = (MaskedLMTask, MultiLingualMaskedLMTask, SentencePredictionTask, SentenceRankingTask)


def read_checkpoint(
    path: str,
    option: str = "--init-from",
    is_mapped: bool = False,
    needs_tables: bool = False,
) -> Dict[str, Any]:
    """Read a fairseq checkpoint; no code from the file is run.

    Args:
        path: the file.
        option: the command-line option that named it, for messages.
        is_mapped: whether tensors stay in the file until they are read, if its format allows it.
        needs_tables: whether the caller needs the value tables themselves. A checkpoint in parts
            (``memory/parts.py``) has references in their place, which models load.

    Raises:
        ValueError: the file is missing, unreadable or holds no model, its parts are incomplete, or
            tables are needed but in parts.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{option} {path}: no such file")
    try:
        is_mapped = is_mapped and zipfile.is_zipfile(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's text advises turning safety off
            reason = "it holds more than plain data, or is no checkpoint at all"
        raise ValueError(f"{option} {path}: not a readable checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{option} {path}: not a fairseq checkpoint, it holds no 'model'")
    if needs_tables and has_parts(checkpoint):
        raise ValueError(
            f"{option} {path}: its values are in a folder beside it: merge them into one file "
            f"first, with {MERGE}"
        )
    place_values_file(checkpoint, path)
    place_parts(checkpoint, Path(path))
    return checkpoint


def options_of(checkpoint: Dict[str, Any], part: str) -> Dict[str, Any]:
    """The options of a part, "model" or "task", in a checkpoint from any version of fairseq.

    Raises:
        ValueError: the options are neither a dictionary nor a namespace, fairseq's two formats.
    """
    return _plain(_plain(checkpoint.get("cfg")).get(part)) or _plain(checkpoint.get("args"))


def _plain(options: Any) -> Dict[str, Any]:
    if options is None or isinstance(options, (dict, Namespace)):
        return options if isinstance(options, dict) else vars(options or Namespace())
    raise ValueError(f"a checkpoint's options are a {type(options).__name__}, must be plain data")


def architecture_of(checkpoint: Dict[str, Any]) -> Optional[str]:
    """The name of the model's architecture; None if the checkpoint does not say."""
    options = options_of(checkpoint, "model")
    return options.get("arch") or options.get("_name")


# --- dictionaries -----------------------------------------------------------------------------


def check_dictionary(checkpoint: Dict[str, Any], dictionary: Dictionary, name: str) -> str:
    """Compare the checkpoint's dictionary with another one, as far as it is known.

    Args:
        checkpoint: from any version of fairseq.
        dictionary: with ``<mask>``.
        name: of the checkpoint, for messages.

    Returns:
        What was compared, for a log.

    Raises:
        ValueError: the dictionaries differ; the message says how.
    """
    rows = [len(tensor) for key, tensor in checkpoint["model"].items() if key.endswith(EMBEDDING)]
    if not rows:
        raise ValueError(f"{name} holds no {EMBEDDING}: it is no RoBERTa")
    if rows[0] != len(dictionary):
        raise ValueError(
            f"{name} was trained with another dictionary ({rows[0]} symbols, "
            f"this one has {len(dictionary)})"
        )
    ours = dictionary_sha256(dictionary)
    theirs = (checkpoint.get("task_state") or {}).get("dictionary_sha256")
    if theirs is not None:
        if theirs != ours:
            raise ValueError(
                f"{name} was trained with another dictionary (sha256 {theirs[:12]}, "
                f"this one has {ours[:12]})"
            )
        return "dictionary: equal by its stored hash"
    file = _file_beside_data(checkpoint)
    beside = None if file is None else load_dictionary(file)
    if beside is None or len(beside) != rows[0]:  # of another size: it was rebuilt since
        return UNKNOWN_DICTIONARY
    if dictionary_sha256(beside) != ours:
        raise ValueError(
            f"{name}: the dictionary beside its training data, {file}, "
            f"is another one of {len(beside)} symbols"
        )
    return "dictionary: equal to the one beside the checkpoint's training data"


def compare_dictionary(checkpoint: Dict[str, Any], dictionary: Dictionary, name: str) -> None:
    """Run ``check_dictionary``, and warn if only the size could be compared."""
    if check_dictionary(checkpoint, dictionary, name) == UNKNOWN_DICTIONARY:
        logger.warning(f"{name} stores no hash of its dictionary: only the size was compared")


def dictionary_sha256(dictionary: Dictionary) -> str:
    """SHA-256, in hex, of the symbols of a dictionary in their order."""
    return hashlib.sha256("\n".join(dictionary.symbols).encode("utf-8")).hexdigest()


def load_dictionary(file: str) -> Dictionary:
    """Load a dictionary from a file, and add ``<mask>``.

    Raises:
        ValueError: the file is missing, or is not a dictionary.
    """
    if not os.path.isfile(file):
        raise ValueError(f"no dictionary at {file}")
    try:
        dictionary = Dictionary.load(file)
    except Exception as error:  # fairseq raises Exception itself for a wrong encoding
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is no dictionary: {reason}") from None
    dictionary.add_symbol("<mask>")
    return dictionary


def data_folder(data: str) -> str:
    """The folder of a data-bin that holds text and dictionary: ``input0`` for sentence data."""
    nested = os.path.join(data, "input0")
    return nested if os.path.isfile(os.path.join(nested, "dict.txt")) else data


def dictionary_beside_data(checkpoint: Dict[str, Any]) -> Optional[Dictionary]:
    """The dictionary in the folder of the checkpoint's training data, if it can be found."""
    file = _file_beside_data(checkpoint)
    return None if file is None else load_dictionary(file)


def _file_beside_data(checkpoint: Dict[str, Any]) -> Optional[str]:
    data = options_of(checkpoint, "task").get("data")
    if not isinstance(data, str) or not data:
        return None
    folder = data.split(os.pathsep)[0]
    for part in ("", "input0"):  # masked_lm, sentence_prediction
        file = os.path.join(folder, part, "dict.txt")
        if os.path.isfile(file):
            return file
    return None


# --- models -----------------------------------------------------------------------------------


def load_model_and_task(
    path: str, checkpoint: Dict[str, Any], **overrides: Any
) -> Tuple[Any, Any, Any]:
    """Build the model and the task of a checkpoint, and load the checkpoint, as fairseq does.

    Args:
        path: the file.
        checkpoint: the file's content, from ``read_checkpoint``.
        overrides: fairseq's options to change, such as ``data``.

    Returns:
        The model, fairseq's options and the task.

    Raises:
        ValueError: model or task cannot be built, or the parameters do not fit.
    """
    with known_names(checkpoint, path) as names:
        try:
            models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
                [path], arg_overrides={**names, **overrides}
            )
        except (RuntimeError, KeyError, AssertionError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} cannot be loaded: {reason[:300]}") from None
    return models[0], cfg, task


def refuse_other_models(checkpoint: Dict[str, Any], path: str) -> None:
    """Refuse checkpoints that do not name a RoBERTa, before anything is built from them.

    A part may have several names, and fairseq's functions do not all use the same one. So this
    function checks each name.

    Raises:
        ValueError: a name belongs to a model or a task that is not RoBERTa's.
    """
    for name in _names(checkpoint, "model", "arch"):
        registered = ARCH_MODEL_REGISTRY.get(name, RobertaModel)
        if "${" in name or not issubclass(registered, RobertaModel):
            raise ValueError(f"{path} is a model {name!r}, must be a RoBERTa")
    for name in _names(checkpoint, "task", "task"):
        if not issubclass(TASK_REGISTRY.get(name, object), TASKS):
            raise ValueError(
                f"{path} is of the task {name!r}, must be one of RoBERTa's, such as masked_lm or "
                "sentence_prediction; a task of your own must be imported"
            )


def _names(checkpoint: Dict[str, Any], part: str, flag: str) -> Iterator[str]:
    """All names of a part in a checkpoint from any version of fairseq, converted to text."""
    options = _plain(_plain(checkpoint.get("cfg")).get(part))
    names = [options[key] for key in ("_name", flag) if options.get(key) is not None]
    if checkpoint.get("args") is not None:  # fairseq fills in a missing task there
        names.append(_plain(checkpoint["args"]).get(flag))
    return map(str, names)


@contextmanager
def known_names(checkpoint: Dict[str, Any], path: str) -> Iterator[Dict[str, str]]:
    """Register the names that fairseq needs to evaluate a checkpoint, while the context is open.

    An architecture is only a name for sizes, and checkpoints hold the sizes, too. So a RoBERTa
    whose architecture is not registered is built from its sizes.

    Yields:
        Options to change: stand-ins for parts that only a training needs.

    Raises:
        ValueError: the model is unknown, and its parameters and sizes are not a RoBERTa's; or
            model or task is not RoBERTa's.
    """
    refuse_other_models(checkpoint, path)
    shard = f"{path[:-3]}-shard0.pt"  # of fairseq's FSDP
    if os.path.exists(shard):
        raise ValueError(f"{path}: fairseq would load {shard} in its place, which must go")
    arch = architecture_of(checkpoint)
    args = checkpoint.get("args")
    names = {
        part: name
        for part, name in STAND_INS.items()
        if args is not None and getattr(args, part, name) not in REGISTRIES[part]["registry"]
    }
    if arch in ARCH_MODEL_REGISTRY:
        with _quiet_hydra():
            yield names
        return
    if not is_roberta(checkpoint):
        raise ValueError(f"{path} is a model {arch!r}, which is not known: import its user-dir")
    base = "pkm_roberta" if has_memory(checkpoint) else "roberta"
    logger.warning(f"{path}: {arch!r} is no known architecture; built as {base} from its sizes")
    registries = (ARCH_MODEL_REGISTRY, ARCH_CONFIG_REGISTRY)
    for registry in registries:
        registry[arch] = registry[base]
    try:
        with _quiet_hydra():
            yield names
    finally:
        for registry in registries:
            del registry[arch]


@contextmanager
def _quiet_hydra() -> Iterator[None]:
    """Hide the warnings of hydra's old interface, which fairseq uses to read old checkpoints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def has_memory(checkpoint: Dict[str, Any]) -> bool:
    """Whether a checkpoint's model has a memory."""
    return any(MEMORY_PARAMETER.search(name) for name in checkpoint["model"])


def is_roberta(checkpoint: Dict[str, Any]) -> bool:
    """Whether a model is fairseq's RoBERTa, judged by its name or its parameters and options."""
    registered = ARCH_MODEL_REGISTRY.get(architecture_of(checkpoint))
    if registered is not None:
        return issubclass(registered, RobertaModel)
    options, state = options_of(checkpoint, "model"), checkpoint["model"]
    heads = ("lm_head.dense.weight", "classification_heads.")
    return (
        any(key.endswith(EMBEDDING) for key in state)
        and any(head in key for key in state for head in heads)
        and all(options.get(f"encoder_{size}") is not None for size in SIZES)
    )


def task_name(checkpoint: Dict[str, Any]) -> Optional[str]:
    """The name of the task that a checkpoint was trained on; None if it does not say."""
    options = options_of(checkpoint, "task")
    return options.get("_name") or options.get("task")

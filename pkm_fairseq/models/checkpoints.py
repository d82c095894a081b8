"""What a checkpoint of any age holds, and whether it fits: compared before it is loaded."""

import hashlib
import logging
import os
import pickle
import re
import warnings
from argparse import Namespace
from contextlib import contextmanager
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

logger = logging.getLogger(__name__)

# parameters that only a model with memory has
MEMORY_PARAMETER = re.compile(r"\.layers\.\d+\.memory\.")
EMBEDDING = "sentence_encoder.embed_tokens.weight"  # encoder's; decoder's in old versions
UNKNOWN_DICTIONARY = "dictionary: only its size was checked, the checkpoint's own was not found"
# what a RoBERTa of any name is built from; all but the heads shows in its parameters
SIZES = ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
# what fairseq looks up in old checkpoints although an evaluation needs none of it
STAND_INS = {"criterion": "masked_lm", "optimizer": "adam", "lr_scheduler": "fixed"}
# of RoBERTas; what other tasks of fairseq do with a checkpoint's options nobody has looked at
TASKS = (MaskedLMTask, MultiLingualMaskedLMTask, SentencePredictionTask, SentenceRankingTask)


def read_checkpoint(path: str, option: str = "--init-from") -> Dict[str, Any]:
    """Read a fairseq checkpoint; no code from the file is run.

    Args:
        path: the file.
        option: the command-line option that named it, for messages.

    Raises:
        ValueError: the file is missing, unreadable or holds no model.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{option} {path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises can be nearly anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's text advises to switch safety off
            reason = "it holds more than plain data, or is no checkpoint at all"
        raise ValueError(f"{option} {path}: not a readable checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{option} {path}: not a fairseq checkpoint, it holds no 'model'")
    return checkpoint


def options_of(checkpoint: Dict[str, Any], part: str) -> Dict[str, Any]:
    """The options of a part, "model" or "task", that a checkpoint of any age holds.

    Raises:
        ValueError: they are no dictionary and no namespace, as which fairseq stores them.
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
        checkpoint: of any age.
        dictionary: with ``<mask>``.
        name: what messages call the checkpoint.

    Returns:
        What was compared, for a log.

    Raises:
        ValueError: they differ; the message says in what.
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
    if beside is None or len(beside) != rows[0]:  # of another size: made anew since
        return UNKNOWN_DICTIONARY
    if dictionary_sha256(beside) != ours:
        raise ValueError(
            f"{name}: the dictionary beside its training data, {file}, "
            f"is another one of {len(beside)} symbols"
        )
    return "dictionary: equal to the one beside the checkpoint's training data"


def compare_dictionary(checkpoint: Dict[str, Any], dictionary: Dictionary, name: str) -> None:
    """``check_dictionary``, and a warning where nothing but the size could be compared."""
    if check_dictionary(checkpoint, dictionary, name) == UNKNOWN_DICTIONARY:
        logger.warning(f"{name} stores no hash of its dictionary: only the size was compared")


def dictionary_sha256(dictionary: Dictionary) -> str:
    """SHA-256, in hex, of the symbols of a dictionary in their order."""
    return hashlib.sha256("\n".join(dictionary.symbols).encode("utf-8")).hexdigest()


def load_dictionary(file: str) -> Dictionary:
    """The dictionary in a file, with ``<mask>``.

    Raises:
        ValueError: there is no such file, or it is no dictionary.
    """
    if not os.path.isfile(file):
        raise ValueError(f"no dictionary at {file}")
    try:
        dictionary = Dictionary.load(file)
    except Exception as error:  # fairseq raises this very class for a wrong encoding
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is no dictionary: {reason}") from None
    dictionary.add_symbol("<mask>")
    return dictionary


def data_folder(data: str) -> str:
    """The folder of a data-bin that holds text and dictionary: ``input0`` of sentence data."""
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
    """Build the model and the task of a checkpoint, and load it, as fairseq does.

    Args:
        path: the file.
        checkpoint: what ``read_checkpoint`` read there.
        overrides: fairseq's options to change, such as ``data``.

    Returns:
        The model, fairseq's options and the task.

    Raises:
        ValueError: they cannot be built, or the parameters do not fit.
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
    """Refuse what is no RoBERTa by its names, before anything is built from it.

    A part may have several names, and fairseq's functions do not agree in which one they take. So
    each of them is looked at.

    Raises:
        ValueError: a name is of another model or another task than RoBERTa's.
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
    """The names that a checkpoint of any age has for a part; as text, whatever they are."""
    options = _plain(_plain(checkpoint.get("cfg")).get(part))
    names = [options[key] for key in ("_name", flag) if options.get(key) is not None]
    if checkpoint.get("args") is not None:  # fairseq makes up a task that is missing there
        names.append(_plain(checkpoint["args"]).get(flag))
    return map(str, names)


@contextmanager
def known_names(checkpoint: Dict[str, Any], path: str) -> Iterator[Dict[str, str]]:
    """Let fairseq find what an evaluation needs of a checkpoint, while the context is open.

    An architecture is a name for sizes, which checkpoints hold, too: a RoBERTa whose
    architecture is registered nowhere is built from its sizes.

    Yields:
        Options to change: stand-ins for what only a training needs.

    Raises:
        ValueError: the model is not known, and no RoBERTa by its parameters and sizes; or model
            or task are not RoBERTa's.
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
    """fairseq calls hydra's old interface to read old checkpoints: a screen of warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def has_memory(checkpoint: Dict[str, Any]) -> bool:
    """Whether a checkpoint is of a model with memory."""
    return any(MEMORY_PARAMETER.search(name) for name in checkpoint["model"])


def is_roberta(checkpoint: Dict[str, Any]) -> bool:
    """Whether a model is fairseq's RoBERTa, by what it is called or what it holds."""
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

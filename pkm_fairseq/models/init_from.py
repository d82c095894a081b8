"""INIT (Kim & Jung 2020): start from a checkpoint pretrained without memory, or with one."""

import logging
import os
import re
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.models.roberta import RobertaModel
from torch import Tensor, nn

from ..memory import ValueTable
from ..memory.option import flag_of
from ..memory.parts import PARTS
from ..memory.text import listed
from .checkpoints import MEMORY_PARAMETER, check_dictionary, options_of, read_checkpoint
from .plan import Plan

logger = logging.getLogger(__name__)

READ_TIMES = re.compile(r"\.layers\.\d+\.reads\.")  # belong to a training, not to a model
ORIGIN = ".reads.origin"  # the part that memories keep
FFN_PARAMETER = re.compile(r"(\.layers\.\d+\.)fc[12]\.(weight|bias)$")  # a memory may replace these
# options that change a model's output but no parameter's shape
SILENT = ("encoder_attention_heads", "activation_fn", "encoder_normalize_before")
# the same of a memory; its first versions had no such options, and computed with these
SILENT_OF_MEMORY = {
    "memory_score_activation": "softmax",
    "memory_learn_score_scale": False,
    "memory_score_scale": 1.0,
}


def apply_init_from(model: nn.Module, plan: Plan, args: Any, dictionary: Dictionary) -> None:
    """Load ``plan.init_from`` into the model if this is a fresh run.

    Args:
        model: the model just built.
        plan: the plan of the model.
        args: fairseq's model options, to compare with the checkpoint's.
        dictionary: the dictionary of the task.

    Raises:
        ValueError: the file is missing, is not a checkpoint, or does not fit.
    """
    path = plan.init_from
    if path is None:
        return
    last = os.path.join(plan.run.save_dir, f"checkpoint_last{plan.run.checkpoint_suffix}.pt")
    if os.path.exists(last):
        logger.info(f"--init-from {path} ignored: the run resumes from {last}")
        return
    checkpoint = read_checkpoint(path)
    dictionary_note = check_dictionary(checkpoint, dictionary, f"--init-from {path}")
    check_options(checkpoint, args, f"--init-from {path}")
    load_parameters(model, checkpoint["model"], path, dictionary_note)


def load_parameters(
    model: nn.Module, state: Dict[str, Tensor], path: str, dictionary_note: str
) -> None:
    """Load every matching parameter.

    Only a whole memory may be new. Only classification heads are dropped, and FFNs that a new
    memory replaces.

    Raises:
        ValueError: anything else differs; the message lists it.
    """
    heads = [name for name in state if name.startswith("classification_heads.")]
    state = {name: tensor for name, tensor in state.items() if name not in heads}
    RobertaModel.upgrade_state_dict_named(model, state, "")  # renames parameters of older versions
    origins = {name: tensor for name, tensor in state.items() if name.endswith(ORIGIN)}
    state = {name: tensor for name, tensor in state.items() if not READ_TIMES.search(name)}
    state = read_parts(model, state)
    fitting = own_columns(model, state)
    full = model.state_dict()
    full.update({name: tensor for name, tensor in origins.items() if name in full})
    own = {name: tensor for name, tensor in full.items() if not READ_TIMES.search(name)}
    missing = [name for name in own if name not in state]
    surplus = [name for name in state if name not in own]
    known = {_memory_of(name) for name in state}
    new = [name for name in missing if _memory_of(name) and _memory_of(name) not in known]
    dropped = heads + [
        name for name in surplus if _is_replaced_ffn(name, own) and _replacing(name) not in known
    ]
    problems = [f"{name} is missing" for name in missing if name not in new]
    problems += [f"{name} is not in the model" for name in surplus if name not in dropped]
    problems += [
        f"{name} and {other} differ, but are one tensor in the model"
        for name, other in _shared(own)
        if name in state and other in state and not torch.equal(state[name], state[other])
    ]
    problems += [
        f"{name} is {tuple(state[name].shape)}, must be {tuple(own[name].shape)}"
        for name in own
        if name in state and fitting[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(f"--init-from {path} does not fit the model: {_listed(problems)}")
    model.load_state_dict({**full, **{n: t for n, t in state.items() if n in own}}, strict=True)
    logger.info(
        f"--init-from {path}: loaded {len(own) - len(new)} tensors; "
        f"dropped {_listed(_modules(dropped))}; newly initialised {_listed(_modules(new))}; "
        f"{dictionary_note}"
    )


def read_parts(model: nn.Module, state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The state with the model's own tables, read in place, instead of references to parts."""
    state = dict(state)
    for name, table in _tables(model).items():
        reference = state.pop(f"{name}.{PARTS}", None)
        if reference is not None:
            table.read_parts(reference)
            state[f"{name}.weight"] = table.weight.detach()
    return state


def own_columns(model: nn.Module, state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The state with only this worker's columns of values, if tables are split over workers."""
    own = {
        f"{name}.weight": table.own_columns(state[f"{name}.weight"])
        for name, table in _tables(model).items()
        if f"{name}.weight" in state
    }
    return {**state, **own}


def _tables(model: nn.Module) -> Dict[str, ValueTable]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: table for name, table in modules if isinstance(table, ValueTable)}


def check_options(checkpoint: Dict[str, Any], args: Any, where: str) -> None:
    """Compare the options that change a model's output but no parameter's shape.

    A memory may read more or fewer slots than before; that is only logged.

    Args:
        checkpoint: from any version of fairseq.
        args: the model's options.
        where: the checkpoint, for messages.

    Raises:
        ValueError: another option differs.
    """
    theirs, names = options_of(checkpoint, "model"), list(SILENT)
    has_memory = any(MEMORY_PARAMETER.search(name) for name in checkpoint["model"])
    if has_memory and theirs:
        theirs = {**SILENT_OF_MEMORY, **theirs}
        names += SILENT_OF_MEMORY
        if args.memory_learn_score_scale:  # the checkpoint holds the scale
            names.remove("memory_score_scale")
    for name in names:
        before, now = theirs.get(name), getattr(args, name)
        if before is not None and before != now and str(before) != str(now):
            flag = flag_of(name)
            said = f"with {flag} {before}, not {now}"
            if isinstance(now, bool):  # a flag without a value
                said = f"with {flag}, not without" if before else f"without {flag}, not with"
            raise ValueError(f"{where}: trained {said}")
    knn = theirs.get("memory_knn")
    if has_memory and knn is not None and knn != args.memory_knn:
        logger.warning(f"{where}: trained with --memory-knn {knn}, now reads {args.memory_knn}")


def complete_state(model: nn.Module, state_dict: Dict[str, Tensor]) -> None:
    """Complete a state of an older version, or without memory, in place.

    fairseq's strict loading then accepts it. Missing times of reads start from zero. For a state
    without memory it drops the replaced FFNs, and the model keeps its initial memory. A state with
    any memory is still checked strictly.

    Raises:
        ValueError: a state with memory has an FFN where the model has only a memory.
    """
    own = model.state_dict()
    for name in own:
        if READ_TIMES.search(name):
            state_dict.setdefault(name, own[name])
    dropped = [name for name in state_dict if _is_replaced_ffn(name, own)]
    if any(MEMORY_PARAMETER.search(name) for name in state_dict):
        if dropped:  # torch would do it silently: the module's place is there, but empty
            raise ValueError(
                f"pkm_roberta: the checkpoint has {_listed(dropped)}, the model has only a memory "
                "there (--memory-mode replace)"
            )
        return
    new = [name for name in own if MEMORY_PARAMETER.search(name)]
    state_dict.update({name: own[name] for name in new})
    for name in dropped:
        del state_dict[name]
    if new:
        logger.info(
            f"the checkpoint holds no memory: dropped {_listed(_modules(dropped))}; "
            f"newly initialised {_listed(_modules(new))}"
        )


def _memory_of(name: str) -> Optional[str]:
    """The name prefix of a parameter's memory; None if it belongs to none."""
    match = MEMORY_PARAMETER.search(name)
    return name[: match.end()] if match else None


def _shared(own: Dict[str, Tensor]) -> Iterator[Tuple[str, str]]:
    """Pairs of names in a model's state that share one tensor."""
    first: Dict[int, str] = {}
    for name, tensor in own.items():
        other = first.setdefault(tensor.data_ptr(), name)
        if other != name and tensor.numel():
            yield other, name


def _is_replaced_ffn(name: str, own: Dict[str, Tensor]) -> bool:
    return name not in own and f"{_replacing(name)}keys" in own


def _replacing(name: str) -> Optional[str]:
    """The name prefix of the memory that would replace an FFN, from a parameter of the FFN."""
    match = FFN_PARAMETER.search(name)
    return None if match is None else f"{name[: match.end(1)]}memory."


def _listed(items: List[str]) -> str:
    return listed([item.removeprefix("encoder.sentence_encoder.") for item in items])


def _modules(names: List[str]) -> List[str]:
    """The memories and linear layers of the parameters, each once, as patterns."""
    return list(dict.fromkeys(re.sub(r"(\.memory|\.fc[12])\..*", r"\1.*", name) for name in names))

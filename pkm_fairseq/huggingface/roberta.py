"""Convert RoBERTa's parameters and options between fairseq and transformers."""

import re
from dataclasses import asdict, fields
from typing import Any, Dict, List, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, RobertaConfig, RobertaForMaskedLM

from ..memory import MemoryConfig
from ..memory.text import listed
from .add import add_memories

ENCODER = "encoder.sentence_encoder."
LM_HEAD = "encoder.lm_head."
# fairseq's and transformers' name of a module; those of a block below
MODULES = {
    f"{ENCODER}embed_tokens": "roberta.embeddings.word_embeddings",
    f"{ENCODER}embed_positions": "roberta.embeddings.position_embeddings",
    f"{ENCODER}layernorm_embedding": "roberta.embeddings.LayerNorm",
    f"{LM_HEAD}dense": "lm_head.dense",
    f"{LM_HEAD}layer_norm": "lm_head.layer_norm",
}
OF_A_BLOCK = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
TENSORS = {f"{LM_HEAD}weight": "lm_head.decoder.weight", f"{LM_HEAD}bias": "lm_head.bias"}
BLOCK = re.compile(rf"^{re.escape(ENCODER)}layers\.(\d+)\.(.*)$")
THEIR_BLOCK = re.compile(r"^roberta\.encoder\.layer\.(\d+)\.(.*)$")
TYPES = "roberta.embeddings.token_type_embeddings.weight"
POSITIONS = "roberta.embeddings.position_embeddings.weight"
# modules that only transformers has, and fairseq does not need
DERIVED = ("roberta.embeddings.position_ids", "roberta.embeddings.token_type_ids")
LAYER_NORM_EPS = 1e-5  # fairseq's


class Fairseq(NamedTuple):
    """A RoBERTa in fairseq's form.

    Attributes:
        options: the model's options, by fairseq's names.
        state: its parameters and buffers.
    """

    options: Dict[str, Any]
    state: Dict[str, Tensor]


def to_transformers(fairseq: Fairseq) -> Any:
    """Convert a RoBERTa of fairseq to an equivalent masked language model of transformers.

    Args:
        fairseq: a ``roberta`` or ``pkm_roberta``; its state has the names of current versions.

    Returns:
        The model, with memories if fairseq's has them, in float32 and eval mode.

    Raises:
        ValueError: transformers' RoBERTa lacks something; the message lists it.
    """
    options, state = fairseq
    _check_options(options)
    model = RobertaForMaskedLM(_their_config(options, state))
    if layers := options.get("memory_layers") or []:
        add_memories(model, memory_config(options), list(layers), options["memory_mode"])
    own = model.state_dict()
    given = {_their_name(name): tensor.float() for name, tensor in state.items()}
    given[TYPES] = torch.zeros_like(own[TYPES])  # fairseq has none
    given["lm_head.decoder.bias"] = given["lm_head.bias"]
    given.update({name: own[name] for name in own if name.endswith(DERIVED)})
    for name in own:  # an older version did not save times of reads
        if ".reads." in name:
            given.setdefault(name, own[name])
    _check_names(own, given, "transformers' RoBERTa")
    model.load_state_dict(given, strict=True)
    return model.eval()


def to_fairseq(model: Any) -> Fairseq:
    """Convert a masked language model of transformers to an equivalent RoBERTa of fairseq.

    fairseq has no token types; their embedding is added to the positions.

    Args:
        model: a RoBERTa or XLM-R for masked language modelling, with or without memories.

    Raises:
        ValueError: fairseq's RoBERTa lacks something; the message lists it.
    """
    config = model.config
    _check_config(config)
    theirs = {
        name: tensor.detach().float().clone()
        for name, tensor in model.state_dict().items()
        if not name.endswith(DERIVED) and name != "lm_head.decoder.bias"
    }
    if not config.tie_word_embeddings:  # then this is the bias that is used
        theirs["lm_head.bias"] = model.lm_head.decoder.bias.detach().float().clone()
    types = theirs.pop(TYPES)
    theirs[POSITIONS] = theirs[POSITIONS] + types[0]
    theirs[POSITIONS][config.pad_token_id] = 0  # as in fairseq; no token has this position
    state = {_our_name(name): tensor for name, tensor in theirs.items()}
    state[f"{ENCODER}version"] = torch.tensor([3.0])
    return Fairseq(_our_options(config), state)


def left_out(options: Dict[str, Any]) -> List[str]:
    """What transformers' RoBERTa has no option for, in lines of a report; outputs are equal."""
    return [
        f"{name} is {options[name]}: transformers' RoBERTa has none, so later training differs"
        for name in ("activation_dropout", "encoder_layerdrop")
        if options.get(name)
    ]


def load_masked_lm(folder: str) -> Any:
    """Load a complete masked language model of transformers.

    Raises:
        ValueError: the model is missing, or parameters are missing or left over; the message lists
            them.
    """
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    except OSError as error:
        raise ValueError(f"{folder}: {str(error).splitlines()[0]}") from None
    poolers = [
        name for name in info["unexpected_keys"] if ".pooler." in name
    ]  # belongs to the base model
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [
        f"{name} does not belong to one"
        for name in sorted(info["unexpected_keys"])
        if name not in poolers
    ]
    if problems:
        raise ValueError(f"{folder} holds no complete masked language model: {listed(problems)}")
    return model.float().eval()


def memory_config(options: Dict[str, Any]) -> MemoryConfig:
    """The settings of a memory from fairseq's options; defaults for options of newer versions."""
    names = [field.name for field in fields(MemoryConfig)]
    return MemoryConfig(
        **{name: options[f"memory_{name}"] for name in names if f"memory_{name}" in options}
    )


# --- names ------------------------------------------------------------------------------------


def _their_name(name: str) -> str:
    """transformers' name of a tensor of fairseq; unknown names do not change."""
    if name in TENSORS:
        return TENSORS[name]
    if match := BLOCK.match(name):
        index, inside = match.groups()
        return f"roberta.encoder.layer.{index}.{_renamed(inside, OF_A_BLOCK)}"
    return _renamed(name, MODULES)


def _our_name(name: str) -> str:
    """fairseq's name of a tensor of transformers; unknown names do not change."""
    tensors = {theirs: ours for ours, theirs in TENSORS.items()}
    if name in tensors:
        return tensors[name]
    if match := THEIR_BLOCK.match(name):
        index, inside = match.groups()
        renamed = _renamed(inside, {theirs: ours for ours, theirs in OF_A_BLOCK.items()})
        return f"{ENCODER}layers.{index}.{renamed}"
    return _renamed(name, {theirs: ours for ours, theirs in MODULES.items()})


def _renamed(name: str, modules: Dict[str, str]) -> str:
    module, _, tensor = name.rpartition(".")
    return f"{modules[module]}.{tensor}" if module in modules else name


def _check_names(own: Dict[str, Tensor], given: Dict[str, Tensor], what: str) -> None:
    problems = [f"{name} is missing" for name in own if name not in given]
    problems += [f"{name} is not known" for name in given if name not in own]
    problems += [
        f"{name} is {tuple(given[name].shape)}, must be {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit {what}: {listed(problems)}")


# --- options ----------------------------------------------------------------------------------


def _check_options(options: Dict[str, Any]) -> None:
    must = {
        "activation_fn": "gelu",
        "encoder_normalize_before": False,
        "layernorm_embedding": True,
        "encoder_learned_pos": True,
        "no_token_positional_embeddings": False,
        "no_scale_embedding": True,
        "adaptive_input": False,
        "quant_noise_scalar": 0,
    }
    problems = [
        f"{name} is {options[name]}, must be {value}"
        for name, value in must.items()
        if options.get(name) is not None and options[name] != value
    ]
    if problems:
        raise ValueError(f"transformers' RoBERTa is built differently: {listed(problems)}")


def _their_config(options: Dict[str, Any], state: Dict[str, Tensor]) -> Any:
    n_symbols, width = state[f"{ENCODER}embed_tokens.weight"].shape
    n_positions = len(state[f"{ENCODER}embed_positions.weight"])
    return RobertaConfig(
        vocab_size=n_symbols,
        hidden_size=width,
        num_hidden_layers=options["encoder_layers"],
        num_attention_heads=options["encoder_attention_heads"],
        intermediate_size=options["encoder_ffn_embed_dim"],
        hidden_dropout_prob=options.get("dropout", 0.1),
        attention_probs_dropout_prob=options.get("attention_dropout", 0.1),
        max_position_embeddings=n_positions,
        type_vocab_size=1,
        layer_norm_eps=LAYER_NORM_EPS,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=not options.get("untie_weights_roberta", False),
    )


def _check_config(config: Any) -> None:
    kinds = ("roberta", "xlm-roberta", "pkm_roberta", "pkm_xlm-roberta")
    if config.model_type not in kinds:
        raise ValueError(f"the model is of type {config.model_type}, must be one of {kinds}")
    must = {
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "is_decoder": False,
    }
    problems = [
        f"{name} is {getattr(config, name, None)}, must be {value}"
        for name, value in must.items()
        if getattr(config, name, None) != value
    ]
    if problems:
        raise ValueError(f"fairseq's RoBERTa is built differently: {listed(problems)}")


def _our_options(config: Any) -> Dict[str, Any]:
    options = {
        "arch": "roberta",
        "encoder_layers": config.num_hidden_layers,
        "encoder_embed_dim": config.hidden_size,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "encoder_attention_heads": config.num_attention_heads,
        "dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
        "activation_dropout": 0.0,
        "pooler_dropout": 0.0,
        "activation_fn": "gelu",
        "pooler_activation_fn": "tanh",
        "encoder_normalize_before": False,
        "layernorm_embedding": True,
        "untie_weights_roberta": not config.tie_word_embeddings,
        "max_positions": config.max_position_embeddings - config.pad_token_id - 1,
    }
    if getattr(config, "memory_layers", None):
        settings = asdict(MemoryConfig(**config.memory))
        options |= {f"memory_{name}": value for name, value in settings.items()}
        options |= {"arch": "pkm_roberta", "memory_mode": config.memory_mode}
        options["memory_layers"] = list(config.memory_layers)
    return options

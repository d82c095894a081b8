"""The model ``pkm_roberta``: fairseq's RoBERTa with product-key memories."""

from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Dict, Iterator, List, Optional

from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from fairseq.models.roberta import RobertaModel
from fairseq.models.roberta import base_architecture as roberta_base_architecture
from fairseq.utils import safe_getattr
from omegaconf import OmegaConf, open_dict

from ..memory import MemoryConfig, MemoryUsage, ValueTable
from ..memory.query import BatchQueryNorm
from .config import PkmRobertaConfig, memory_config
from .encoder import MemoryRobertaEncoder
from .encoder_layer import MEMORY_MODES, MemoryEncoderLayer
from .init_from import apply_init_from, complete_state


@register_model("pkm_roberta", dataclass=PkmRobertaConfig)
class PkmRobertaModel(RobertaModel):
    """RoBERTa with a product-key memory in some of its layers.

    Without memory layers it computes bit for bit what fairseq's ``roberta`` computes.
    """

    # RobertaModel.add_args knows nothing of the dataclass
    add_args = classmethod(BaseFairseqModel.add_args.__func__)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "PkmRobertaModel":
        """Build a model from fairseq's options, and load ``init_from`` on a fresh run.

        Raises:
            SystemExit: an option is impossible, with a message of one line.
        """
        try:
            with _writable(args):
                base_architecture(args)
                if safe_getattr(args, "max_positions") is None:
                    args.max_positions = task.max_positions()
                layers, mode, config = check_memory_options(args)
                encoder = MemoryRobertaEncoder(args, task.source_dictionary, layers, mode, config)
                model = cls(args, encoder)
            model._freeze_memory(safe_getattr(args, "memory_freeze"))
            model._keep_dtypes()
            model._keep_factored_gradients_out_of_ddp(args)
            apply_init_from(model, args, task.source_dictionary)
        except (ValueError, MemoryError) as error:
            raise SystemExit(f"pkm_roberta: {error}") from None
        return model

    def _freeze_memory(self, part: Any) -> None:
        if part is not None:  # hydra hands over an Enum
            for layer in self.memory_layers().values():
                layer.memory.freeze(str(part))

    def _keep_dtypes(self) -> None:
        """Have fairseq's half precision leave values, and statistics of the query, as they are."""
        for module in self.modules():
            if isinstance(module, (ValueTable, BatchQueryNorm)):
                module.keeps_dtype = True

    def _keep_factored_gradients_out_of_ddp(self, args: Any) -> None:
        """Tell torch's DDP, which wraps the model before there is an optimizer, what to skip.

        It would hand ``pkm_adam`` dense gradients of zeros. The attribute is DDP's own.
        """
        if _optimizer_name(args) == "pkm_adam":
            self._ddp_params_and_buffers_to_ignore = [
                f"{name}.weight"
                for name, module in self.named_modules(remove_duplicate=False)
                if isinstance(module, ValueTable)
            ]

    def memory_layers(self) -> Dict[int, MemoryEncoderLayer]:
        """The layers with a memory, by their index."""
        layers = self.encoder.sentence_encoder.layers  # by index: iterating may drop layers
        return {
            i: layers[i] for i in range(len(layers)) if isinstance(layers[i], MemoryEncoderLayer)
        }

    @contextmanager
    def record_memory_usage(
        self, usage: Optional[Dict[int, MemoryUsage]] = None
    ) -> Iterator[Dict[int, MemoryUsage]]:
        """Count what the memories look up while the context is open; padding is not counted.

        Args:
            usage: counters by layer to add to, as :meth:`new_memory_usage` makes them; None
                starts new ones.

        Yields:
            The counters, by layer index.
        """
        usage = self.new_memory_usage() if usage is None else usage
        layers = self.memory_layers()
        for index, layer in layers.items():
            layer.usage = usage[index]
        try:
            yield usage
        finally:
            for layer in layers.values():
                layer.usage = None

    def new_memory_usage(self) -> Dict[int, MemoryUsage]:
        """Counters at zero, one for each memory layer, by layer index."""
        configs = {index: layer.memory.config for index, layer in self.memory_layers().items()}
        return {index: MemoryUsage(c.n_slots, c.heads) for index, c in configs.items()}

    def upgrade_state_dict_named(self, state_dict: Dict[str, Any], name: str) -> None:
        """Take checkpoints of older versions, and memory-less ones, as the start of a run."""
        super().upgrade_state_dict_named(state_dict, name)
        if name == "":
            complete_state(self, state_dict)


def check_memory_options(args: Any) -> "tuple[List[int], str, MemoryConfig]":
    """The memory options, checked against each other and the rest of the model.

    Returns:
        Memory layers, mode and settings.

    Raises:
        ValueError: an option is impossible.
    """
    config, mode = memory_config(args), str(args.memory_mode)
    layers = [int(index) for index in args.memory_layers]
    if mode not in MEMORY_MODES:
        raise ValueError(f"memory-mode is {mode}, must be one of {', '.join(MEMORY_MODES)}")
    n_layers = args.encoder_layers
    if safe_getattr(args, "encoder_layers_to_keep"):
        n_layers = len(args.encoder_layers_to_keep.split(","))
    for index in layers:
        if not 0 <= index < n_layers:
            raise ValueError(
                f"memory-layers names layer {index}, must be in 0..{n_layers - 1}: "
                f"the encoder has {n_layers} layers, counted from 0"
            )
        if layers.count(index) > 1:
            raise ValueError(f"memory-layers names layer {index} twice, each may be named once")
    if layers:
        _check_unsupported(args, mode)
    return layers, mode, config


def _check_unsupported(args: Any, mode: str) -> None:
    for half in ("fp16", "bf16"):
        if safe_getattr(args, f"memory_efficient_{half}") and not safe_getattr(args, half):
            raise ValueError(
                f"common.memory_efficient_{half} alone has no effect in fairseq-hydra-train: set "
                f"common.{half}=true, too"
            )
    if safe_getattr(args, "tpu") and find_spec("torch_xla") is None:
        raise ValueError(
            "--bf16 and --memory-efficient-bf16 of fairseq-train are for TPUs (torch_xla is not "
            "installed): use fairseq-hydra-train with common.bf16=true"
        )
    if "pkm_adam" in _grouped_optimizer_names(args):
        raise ValueError(
            "optimizer composite does not work with pkm_adam in a group: use pkm_adam alone, "
            "which gives values a learning rate of their own"
        )
    for name, default in (("ffn_reg_scale_factor", 0.0), ("ffn_blocks_to_remove", -1)):
        if mode == "replace" and safe_getattr(args, name, default) != default:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} does not work with --memory-mode replace: there is no FFN")


def _optimizer_name(args: Any) -> Optional[str]:
    optimizer = safe_getattr(args, "optimizer")  # a config that has a name, or the name
    return safe_getattr(optimizer, "_name") if OmegaConf.is_config(optimizer) else optimizer


def _grouped_optimizer_names(args: Any) -> List[Optional[str]]:
    """The optimizers of fairseq's composite, which hydra alone can configure."""
    optimizer = safe_getattr(args, "optimizer")
    groups = (safe_getattr(optimizer, "groups") or {}) if OmegaConf.is_dict(optimizer) else {}
    return [safe_getattr(group.optimizer, "_name") for group in groups.values()]


@contextmanager
def _writable(args: Any) -> Iterator[None]:
    if not OmegaConf.is_config(args):
        yield
        return
    with open_dict(args):
        yield


@register_model_architecture("pkm_roberta", "pkm_roberta_base")
def base_architecture(args: Any) -> None:
    """RoBERTa-base, memories in place of the FFN in layers 3 and 7; sizes: Lample et al. 2019."""
    args.memory_layers = safe_getattr(args, "memory_layers", [3, 7])
    args.memory_mode = safe_getattr(args, "memory_mode", "replace")
    for name, default in vars(MemoryConfig()).items():
        setattr(args, f"memory_{name}", safe_getattr(args, f"memory_{name}", default))
    args.encoder_layerdrop = safe_getattr(args, "encoder_layerdrop", 0.0)
    roberta_base_architecture(args)


@register_model_architecture("pkm_roberta", "pkm_roberta_large")
def large_architecture(args: Any) -> None:
    """RoBERTa-large with memories at the same relative depth as the base size (our choice)."""
    args.encoder_layers = safe_getattr(args, "encoder_layers", 24)
    args.encoder_embed_dim = safe_getattr(args, "encoder_embed_dim", 1024)
    args.encoder_ffn_embed_dim = safe_getattr(args, "encoder_ffn_embed_dim", 4096)
    args.encoder_attention_heads = safe_getattr(args, "encoder_attention_heads", 16)
    args.memory_layers = safe_getattr(args, "memory_layers", [7, 15])
    base_architecture(args)


@register_model_architecture("pkm_roberta", "pkm_roberta_tiny")
def tiny_architecture(args: Any) -> None:
    """Small enough to learn on a laptop's CPU within minutes (our choice)."""
    args.encoder_layers = safe_getattr(args, "encoder_layers", 3)
    args.encoder_embed_dim = safe_getattr(args, "encoder_embed_dim", 128)
    args.encoder_ffn_embed_dim = safe_getattr(args, "encoder_ffn_embed_dim", 512)
    args.encoder_attention_heads = safe_getattr(args, "encoder_attention_heads", 4)
    args.memory_layers = safe_getattr(args, "memory_layers", [1])
    args.memory_n_keys = safe_getattr(args, "memory_n_keys", 64)
    args.memory_knn = safe_getattr(args, "memory_knn", 16)
    args.memory_k_dim = safe_getattr(args, "memory_k_dim", 64)
    base_architecture(args)


def _register_residual(size: str, architecture: Any) -> None:
    def residual(args: Any) -> None:
        args.memory_mode = safe_getattr(args, "memory_mode", "residual")
        architecture(args)

    residual.__doc__ = f"As pkm_roberta_{size}, the memory beside the FFN (Kim & Jung 2020)."
    register_model_architecture("pkm_roberta", f"resm_roberta_{size}")(residual)


_register_residual("tiny", tiny_architecture)
_register_residual("base", base_architecture)
_register_residual("large", large_architecture)

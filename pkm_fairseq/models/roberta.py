"""The model ``pkm_roberta``: fairseq's RoBERTa with product-key memories."""

import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

import torch
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from fairseq.models.roberta import RobertaHubInterface, RobertaModel
from fairseq.models.roberta import base_architecture as roberta_base_architecture
from fairseq.utils import safe_getattr
from omegaconf import OmegaConf, open_dict

from ..memory import MemoryConfig, MemoryUsage, RunState, ValueTable
from ..memory.hosts import merge_read_times, new_usage, observing, set_finished_updates
from .check_options import check_memory_options, optimizer_name
from .checkpoints import (
    compare_dictionary,
    data_folder,
    known_names,
    load_dictionary,
    read_checkpoint,
)
from .config import PkmRobertaConfig
from .encoder import MemoryRobertaEncoder
from .encoder_layer import MemoryEncoderLayer
from .init_from import apply_init_from, complete_state
from .prune import prune_state, take_layers_to_keep
from .sharding import take_shards


@register_model("pkm_roberta", dataclass=PkmRobertaConfig)
class PkmRobertaModel(RobertaModel):
    """RoBERTa with a product-key memory in some of its layers.

    Without memory layers it computes bit for bit what fairseq's ``roberta`` computes.
    """

    _layers_to_keep: Optional[List[int]] = None

    # RobertaModel.add_args knows nothing of the dataclass
    add_args = classmethod(BaseFairseqModel.add_args.__func__)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "PkmRobertaModel":
        """Build a model from fairseq's options, and load ``init_from`` on a fresh run.

        Raises:
            ValueError: an option is impossible, with a message of one line.
        """
        try:
            with _writable(args):
                base_architecture(args)
                if safe_getattr(args, "max_positions") is None:
                    args.max_positions = task.max_positions()
                if safe_getattr(args, "offload_activations"):
                    args.checkpoint_activations = True  # as fairseq's transformer
                kept = take_layers_to_keep(args)
                layers, mode, config = check_memory_options(args)
                shards = take_shards(args, optimizer_name(args))
                memory = (layers, mode, config, shards)
                encoder = MemoryRobertaEncoder(args, task.source_dictionary, *memory)
                model = cls(args, encoder)
            model._layers_to_keep = kept
            model._freeze_memory(safe_getattr(args, "memory_freeze"))
            model._keep_factored_gradients_out_of_ddp(args)
            apply_init_from(model, args, task.source_dictionary)
        except (ValueError, MemoryError) as error:
            raise ValueError(f"pkm_roberta: {error}") from None
        return model

    @classmethod
    def hub_models(cls) -> Dict[str, Any]:
        """Models that fairseq would download by name: none, RoBERTa's have no memory."""
        return {}

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        checkpoint_file: str = "model.pt",
        data_name_or_path: str = ".",
        bpe: str = "gpt2",
        **kwargs: Any,
    ) -> RobertaHubInterface:
        """Load a checkpoint behind fairseq's hub interface, with all its classification heads.

        Args:
            model_name_or_path: the folder of the checkpoint.
            checkpoint_file: its name there.
            data_name_or_path: the data folder, with the dictionary; one that begins with a dot is
                sought in the folder of the checkpoint.
            bpe: how text is cut into symbols of the dictionary, as ``--bpe`` of fairseq.
            kwargs: fairseq's options to change, such as ``sentencepiece_model``.

        Returns:
            The interface, in eval mode: in training mode a memory normalises queries by the batch
            at hand, and changes its statistics.

        Raises:
            ValueError: there is no such folder, checkpoint or data, the dictionary is another one
                than the checkpoint's, or ``user_dir`` is given, which is not needed where this
                class has been imported.
        """
        if "user_dir" in kwargs:
            raise ValueError("from_pretrained: leave user_dir away, the plugin is imported already")
        data = data_name_or_path
        data = os.path.join(model_name_or_path, data) if data.startswith(".") else data
        checkpoint = os.path.join(model_name_or_path, checkpoint_file)
        for path in (model_name_or_path, checkpoint, data):
            if not os.path.exists(path):
                raise ValueError(f"from_pretrained: {path} does not exist")
        stored = read_checkpoint(checkpoint, "from_pretrained:")
        dictionary = load_dictionary(os.path.join(data_folder(data), "dict.txt"))
        compare_dictionary(stored, dictionary, checkpoint)
        with known_names(stored, checkpoint) as names:
            hub = super().from_pretrained(
                model_name_or_path, checkpoint_file, data_name_or_path, bpe, **{**names, **kwargs}
            )
        return hub.eval()

    def _freeze_memory(self, part: Any) -> None:
        if part is not None:  # hydra hands over an Enum
            for layer in self.memory_layers().values():
                layer.memory.freeze(str(part))

    def _keep_factored_gradients_out_of_ddp(self, args: Any) -> None:
        """Tell torch's DDP, which wraps the model before there is an optimizer, what to skip.

        It would hand ``pkm_adam`` dense gradients of zeros. The attribute is DDP's own.
        """
        if optimizer_name(args) == "pkm_adam":
            self._ddp_params_and_buffers_to_ignore = [
                f"{name}.weight"
                for name, module in self.named_modules(remove_duplicate=False)
                if isinstance(module, ValueTable)
            ]

    @property
    def run(self) -> RunState:
        """The state of the run, which all memories read."""
        run: RunState = self.encoder.sentence_encoder.run
        return run

    def set_num_updates(self, num_updates: int) -> None:
        """Be told, by fairseq's training, how many updates are finished.

        Raises:
            ValueError: torchrun started several trainings that know nothing of each other.
        """
        world = int(os.environ.get("WORLD_SIZE", 1))
        is_told = world == 1 or torch.distributed.is_initialized()
        if torch.distributed.is_torchelastic_launched() and not is_told:
            raise ValueError(
                f"pkm_roberta: torchrun started {world} workers, but fairseq was told of 1: "
                f"give --distributed-world-size {world} (see docs/distributed.md)"
            )
        super().set_num_updates(num_updates)
        set_finished_updates(self, num_updates)

    def memory_layers(self) -> Dict[int, MemoryEncoderLayer]:
        """The layers with a memory, by their index."""
        layers = self.encoder.sentence_encoder.layers  # by index: iterating may drop layers
        return {
            i: layers[i] for i in range(len(layers)) if isinstance(layers[i], MemoryEncoderLayer)
        }

    def merge_read_times(self) -> None:
        """Let every worker know when any of them has read a slot; every worker must call it."""
        merge_read_times(self)

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
        with observing(self, usage):
            yield usage

    def new_memory_usage(self) -> Dict[int, MemoryUsage]:
        """Counters at zero, one for each memory layer, by layer index."""
        return new_usage(self)

    def load_state_dict(
        self,
        state_dict: Dict[str, Any],
        strict: bool = True,
        model_cfg: Any = None,
        args: Any = None,
    ) -> Any:
        """Load as fairseq does, pruned if the model was built with ``encoder_layers_to_keep``.

        Raises:
            ValueError: a layer to keep is not in the state, with a message of one line.
        """
        if self._layers_to_keep:
            state_dict = prune_state(state_dict, self._layers_to_keep)
        return super().load_state_dict(state_dict, strict)

    def upgrade_state_dict_named(self, state_dict: Dict[str, Any], name: str) -> None:
        """Take checkpoints of older versions, and memory-less ones, as the start of a run."""
        if name == "":
            # of a state without a version, as an EMA's, fairseq drops the last layer norm
            version = "sentence_encoder.version"
            state_dict.setdefault(f"encoder.{version}", self.encoder.get_buffer(version).clone())
        super().upgrade_state_dict_named(state_dict, name)
        if name == "":
            complete_state(self, state_dict)


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

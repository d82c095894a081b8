"""The model ``pkm_roberta``: fairseq's RoBERTa with product-key memories."""

import logging
import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from fairseq.models.roberta import RobertaHubInterface, RobertaModel
from omegaconf import OmegaConf, open_dict

from ..errors import TrainingError
from ..memory import (
    MappedTable,
    MemoryUsage,
    RunState,
    ignore_read_times_in_ddp,
    ignore_tables_in_ddp,
)
from ..memory.finetune import FinetuneConfig, check_origins, finetune_values
from ..memory.hosts import new_usage, observing, set_finished_updates
from .architectures import base_architecture, large_architecture, residual, tiny_architecture
from .check_options import check_plan
from .checkpoints import (
    compare_dictionary,
    data_folder,
    known_names,
    load_dictionary,
    read_checkpoint,
)
from .config import ParserWithChoices, PkmRobertaConfig
from .encoder import MemoryRobertaEncoder
from .encoder_layer import MemoryEncoderLayer
from .init_from import apply_init_from, check_options, complete_state
from .plan import Plan, complete_options, read_plan, write_back
from .prune import prune_state

logger = logging.getLogger(__name__)


@register_model("pkm_roberta", dataclass=PkmRobertaConfig)
class PkmRobertaModel(RobertaModel):
    """RoBERTa with a product-key memory in some of its layers.

    Without memory layers it gives the same results as fairseq's ``roberta``, bit for bit.
    """

    _layers_to_keep: Optional[Tuple[int, ...]] = None
    _finetunes: Optional[str] = None
    _unchecked: Optional[FinetuneConfig] = None  # names counts of slots

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the flags of the dataclass; RobertaModel's method does not know them."""
        with_choices = ParserWithChoices(parser, getattr(cls, "__dataclass"))
        BaseFairseqModel.add_args.__func__(cls, with_choices)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "PkmRobertaModel":
        """Build a model from fairseq's options, and load ``init_from`` on a fresh run.

        Raises:
            ValueError: an option is impossible, with a message of one line.
        """
        try:
            with _writable(args):
                complete_options(args, task)
                plan = read_plan(args)
                check_plan(plan)
                write_back(plan, args)
                model = cls(args, MemoryRobertaEncoder(args, task.source_dictionary, plan))
            model._layers_to_keep = plan.kept_layers
            model._freeze_memory(plan.freeze)
            model._freeze_all_but_values(plan)
            model._tell_ddp(plan)
            apply_init_from(model, plan, args, task.source_dictionary)
        except (ValueError, MemoryError) as error:
            raise ValueError(f"pkm_roberta: {error}") from None
        return model

    @classmethod
    def hub_models(cls) -> Dict[str, Any]:
        """Models that fairseq can download by name: none, since RoBERTa's have no memory."""
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
        """Load a checkpoint with fairseq's hub interface, with all its classification heads.

        Args:
            model_name_or_path: the folder of the checkpoint.
            checkpoint_file: the checkpoint's file name.
            data_name_or_path: the data folder, with the dictionary; a path that begins with a dot
                is relative to the folder of the checkpoint.
            bpe: the tokenizer, as ``--bpe`` of fairseq.
            kwargs: fairseq's options to change, such as ``sentencepiece_model``.

        Returns:
            The interface, in eval mode. In training mode a memory would normalise queries by the
            current batch, and change its statistics.

        Raises:
            ValueError: the folder, checkpoint or data do not exist, the dictionary or the order of
                labels differs from the checkpoint's, or ``user_dir`` is given (importing this class
                makes it unnecessary).
        """
        if "user_dir" in kwargs:
            raise ValueError("from_pretrained: leave out user_dir, the plugin is already imported")
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
        check_labels = getattr(hub.task, "check_labels", None)  # of a task of this plugin
        if check_labels is not None:
            check_labels()
        return hub.eval()

    def _freeze_memory(self, part: Optional[str]) -> None:
        if part is not None:
            for layer in self.memory_layers().values():
                layer.memory.freeze(part)

    def _freeze_all_but_values(self, plan: Plan) -> None:
        self._finetunes = part = plan.finetune.finetune
        memories = {index: layer.memory for index, layer in self.memory_layers().items()}
        finetune_values(self, memories, plan.finetune)
        if part is not None:
            self._unchecked = plan.finetune
            rows = f"{plan.finetune.budget} of the rows" if part == "slots" else "all rows"
            trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
            frozen = sum(p.numel() for p in self.parameters()) - trained
            logger.info(
                f"--memory-finetune {part}: {trained:,} parameters of values are trained, in each "
                f"update {rows} that are read; {frozen:,} are frozen"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as fairseq does; the first call checks that slot counts match the model.

        Raises:
            TrainingError: the counts are of another model. The check needs the loaded parameters,
                and fairseq loads them after building.
        """
        config, self._unchecked = self._unchecked, None
        if config is not None:
            layers = self.memory_layers().items()
            try:
                check_origins({index: layer.reads.origin for index, layer in layers}, config)
            except ValueError as error:
                raise TrainingError(f"pkm_roberta: {error}") from None
        return super().forward(*args, **kwargs)

    def train(self, mode: bool = True) -> "PkmRobertaModel":
        """Set the mode as torch does.

        Raises:
            TrainingError: of training mode, if the values are in a file.
        """
        memories = [layer.memory for layer in self.memory_layers().values()] if mode else []
        if any(isinstance(memory.values, MappedTable) for memory in memories):
            raise TrainingError(
                "pkm_roberta: --memory-values-file is for inference: train the checkpoint that was "
                "exported"
            )
        super().train(mode)
        return self

    def register_classification_head(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Add a head as fairseq does; it is always trained."""
        super().register_classification_head(name, *args, **kwargs)
        if self._finetunes is not None:
            logger.info(f"--memory-finetune {self._finetunes}: the head {name} is trained, too")

    def _tell_ddp(self, plan: Plan) -> None:
        """Tell torch's DDP what to skip; it wraps the model before an optimizer exists.

        Otherwise DDP would give ``pkm_adam`` dense gradients of zeros.
        """
        ignore_read_times_in_ddp(self)
        if plan.run.optimizer == "pkm_adam":
            ignore_tables_in_ddp(self)

    @property
    def run(self) -> RunState:
        """The state of the run, shared by all memories."""
        run: RunState = self.encoder.sentence_encoder.run
        return run

    def set_num_updates(self, num_updates: int) -> None:
        """Receive the number of finished updates from fairseq's training.

        Raises:
            TrainingError: torchrun started several independent trainings.
        """
        world = int(os.environ.get("WORLD_SIZE", 1))
        is_told = world == 1 or torch.distributed.is_initialized()
        if torch.distributed.is_torchelastic_launched() and not is_told:
            raise TrainingError(
                f"pkm_roberta: torchrun started {world} workers, but fairseq expects 1: "
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

    @contextmanager
    def record_memory_usage(
        self, usage: Optional[Dict[int, MemoryUsage]] = None
    ) -> Iterator[Dict[int, MemoryUsage]]:
        """Count the memories' look-ups while the context is open, without padding.

        Args:
            usage: counters by layer to add to, from ``new_memory_usage``; None starts new ones.

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
        """Load as fairseq does; prune if the model was built with ``encoder_layers_to_keep``.

        Raises:
            ValueError: the state lacks a layer to keep; the message has one line.
        """
        if self._layers_to_keep:
            state_dict = prune_state(state_dict, self._layers_to_keep)
        return super().load_state_dict(state_dict, strict)

    def upgrade_state_dict_named(self, state_dict: Dict[str, Any], name: str) -> None:
        """Accept checkpoints of older versions or without memory as the start of a run."""
        if name == "":
            # without a version, as in an EMA's state, fairseq drops the last layer norm
            version = "sentence_encoder.version"
            state_dict.setdefault(f"encoder.{version}", self.encoder.get_buffer(version).clone())
        with _whole_output_layers(state_dict):
            super().upgrade_state_dict_named(state_dict, name)
        if name == "":
            complete_state(self, state_dict)

    def check_checkpoint(self, checkpoint: Dict[str, Any], file: str) -> None:
        """Compare a checkpoint that a training loads.

        Raises:
            ValueError: it was trained with other options that change the output but no shape.
        """
        cfg = checkpoint.get("cfg")
        if OmegaConf.is_config(cfg):  # fairseq made it of a plain dictionary
            checkpoint = {**checkpoint, "cfg": OmegaConf.to_container(cfg, resolve=False)}
        try:
            check_options(checkpoint, self.args, file)
        except ValueError as error:
            raise ValueError(f"pkm_roberta: {error}") from None


@contextmanager
def _whole_output_layers(state_dict: Dict[str, Any]) -> Iterator[None]:
    """Give heads with spectral norm the weight that fairseq looks for, and take it away again.

    torch stores the weight of such a layer as ``weight_orig``; fairseq knows only ``weight``.
    """
    end = ".out_proj.weight"
    added = {
        name.removesuffix("_orig"): tensor
        for name, tensor in state_dict.items()
        if name.endswith(f"{end}_orig") and name.removesuffix("_orig") not in state_dict
    }
    state_dict.update(added)
    try:
        yield
    finally:
        for name in added:
            state_dict.pop(name, None)  # fairseq drops the heads that the model does not have


@contextmanager
def _writable(args: Any) -> Iterator[None]:
    if not OmegaConf.is_config(args):
        yield
        return
    with open_dict(args):
        yield


for _size, _architecture in (
    ("tiny", tiny_architecture),
    ("base", base_architecture),
    ("large", large_architecture),
):
    register_model_architecture("pkm_roberta", f"pkm_roberta_{_size}")(_architecture)
    register_model_architecture("pkm_roberta", f"resm_roberta_{_size}")(residual(_architecture))

"""The configurations in user_dir_examples are what fairseq-hydra-train takes, for every model."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from fairseq import optim, tasks
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.optim.lr_scheduler import build_lr_scheduler
from fairseq_cli import hydra_train
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import ConfigKeyError

from pkm_fairseq.glue.presets import load_preset
from pkm_fairseq.glue.tasks import TASKS
from pkm_fairseq.models.roberta import PkmRobertaModel
from pkm_fairseq.optim.pkm_adam import PkmAdam
from tests.helpers import small_dictionary, write_split

EXAMPLES = Path(__file__).resolve().parents[2] / "user_dir_examples"
FILES = sorted(EXAMPLES.glob("*/config/*.yaml"))
ARCHS = sorted(arch for arch, model in ARCH_MODEL_REGISTRY.items() if model is PkmRobertaModel)
LAYERS = {"tiny": (3, [1]), "base": (12, [3, 7]), "large": (24, [7, 15])}
# widths that every number of attention heads divides, and a small memory
NARROW = ["+model.encoder_embed_dim=48", "+model.encoder_ffn_embed_dim=8"]
SMALL_MEMORY = ["model.memory_n_keys=8", "model.memory_knn=4", "model.memory_k_dim=8"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """As much data as any task wants for a start."""
    labels = type(small_dictionary())()
    for name in "abc":
        labels.add_symbol(name)
    for folder in (tmp_path, tmp_path / "input0"):
        write_split(folder, "train", small_dictionary(), [[4, 5, 2]])
    write_split(tmp_path / "label", "train", labels, [[4]])
    return tmp_path


def composed(file: Path, data: Path, *overrides: str) -> DictConfig:
    """What fairseq-hydra-train hands to the training, by its own code."""
    given = [f"task.data='{data}'", f"checkpoint.save_dir='{data}'", *overrides]
    if file.parts[-3] == "glue":
        given.append("checkpoint.finetune_from_model=pretrained.pt")
    hydra_init(file.stem)
    with initialize_config_dir(str(file.parent), version_base="1.1"):
        cfg = compose(file.stem, given)
    handed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydra_train.distributed_utils, "call_main", lambda cfg, _: handed.append(cfg))
        hydra_train._hydra_main(cfg)
    (cfg,) = handed
    add_defaults(cfg)  # as the training does once the plugin is imported: refuses unknown options
    return cfg


def built(cfg: DictConfig) -> Any:
    """Task and model of a configuration."""
    task = tasks.setup_task(cfg.task)
    with open_dict(cfg.model):
        return task, task.build_model(cfg.model)


def size_of(arch: str) -> str:
    return arch.rpartition("_")[2] if arch.endswith(tuple(LAYERS)) else "base"


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parts[-3]}-{file.stem}")
def test_every_configuration_makes_a_training(file: Path, data: Path) -> None:
    is_plain = file.stem.startswith("plain")
    cfg = composed(file, data, *NARROW, *(SMALL_MEMORY if not is_plain else []))
    task, model = built(cfg)
    n_layers, memory_layers = LAYERS[size_of(cfg.model._name)]
    assert len(model.encoder.sentence_encoder.layers) == n_layers
    assert list(model.memory_layers()) == ([] if is_plain else memory_layers)
    mode = "replace" if file.stem.startswith("pkm") else "residual"
    assert {layer.mode for layer in model.memory_layers().values()} == (
        set() if is_plain else {mode}
    )
    criterion = task.build_criterion(cfg.criterion)
    if file.parts[-3] == "pretraining":
        assert isinstance(criterion, MaskedLmLoss)
    optimizer = optim.build_optimizer(cfg.optimizer, list(model.parameters()))
    assert isinstance(optimizer, PkmAdam) != is_plain
    scheduler = build_lr_scheduler(cfg.lr_scheduler, optimizer)
    assert scheduler.cfg.total_num_update == cfg.optimization.max_update > 0
    assert 0 < scheduler.cfg.warmup_updates < 0.11 * cfg.optimization.max_update
    assert cfg.model.max_positions in (
        cfg.task.get("tokens_per_sample"),
        cfg.task.get("max_positions"),
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_is_a_name_for_hydra(arch: str, data: Path) -> None:
    file = EXAMPLES / "pretraining/config/resm_tiny.yaml"
    _, model = built(composed(file, data, f"model._name={arch}", *NARROW, *SMALL_MEMORY))
    n_layers, memory_layers = LAYERS[size_of(arch)]
    assert len(model.encoder.sentence_encoder.layers) == n_layers
    mode = "residual" if arch.startswith("resm") else "replace"
    assert {i: layer.mode for i, layer in model.memory_layers().items()} == {
        layer: mode for layer in memory_layers
    }
    assert all(layer.memory.config.n_keys == 8 for layer in model.memory_layers().values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parts[-3]}-{file.stem}")
@pytest.mark.parametrize("part", ["common", "model", "task", "criterion", "optimizer"])
def test_a_mistyped_option_is_refused(file: Path, part: str, data: Path) -> None:
    with pytest.raises((ConfigKeyError, ConfigCompositionException), match="mistyped"):
        composed(file, data, f"+{part}.mistyped=1")


@pytest.mark.parametrize("name", TASKS)
def test_glue_by_hydra_and_by_script_have_the_same_settings(name: str, data: Path) -> None:
    cfg = composed(EXAMPLES / f"glue/config/{name}.yaml", data)
    preset = load_preset("roberta")
    expected = {**preset["all"], **preset["tasks"][name]}
    assert cfg.optimization.lr == [float(expected["lr"])]
    for part in (cfg.dataset, cfg.optimization, cfg.optimizer, cfg.model):
        for key in set(part) & (set(expected) - {"lr"}):
            assert str(part[key]) == str(expected[key]), key
    ratio = float(expected["warmup_ratio"]) * cfg.optimization.max_update
    assert cfg.lr_scheduler.warmup_updates == pytest.approx(ratio, rel=0.01)
    spec = TASKS[name]
    assert cfg.criterion.glue_metrics == ",".join(spec.metrics)
    assert cfg.checkpoint.best_checkpoint_metric == spec.metrics[0]
    assert cfg.criterion.regression_target == spec.is_regression
    assert cfg.task.num_classes == (1 if spec.is_regression else len(spec.labels))
    splits = [split for split in spec.files if split.startswith("valid")]
    assert cfg.dataset.valid_subset == ",".join(splits)
    batches = spec.files["train"].rows / cfg.dataset.batch_size
    assert cfg.optimization.max_update == pytest.approx(10 * batches, rel=0.02)


def test_every_shared_file_is_used_and_every_file_is_read() -> None:
    for folder in {file.parent for file in FILES}:
        used = set()
        for file in folder.glob("*.yaml"):
            defaults = yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]
            assert defaults[0] == "_self_", file  # fairseq's default values come with it
            used.update(defaults[1:])
        shared = {str(f.relative_to(folder).with_suffix("")) for f in folder.glob("*/*.yaml")}
        assert used == shared

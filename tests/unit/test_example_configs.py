"""The configurations in user_dir_examples are what fairseq-hydra-train takes, for every model."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, List, Tuple

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

from pkm_fairseq.experiments.glue.presets import load_preset
from pkm_fairseq.experiments.glue.tasks import TASKS
from pkm_fairseq.models.roberta import PkmRobertaModel
from pkm_fairseq.optim.pkm_adam import PkmAdam
from tests.helpers import small_dictionary, write_split

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "user_dir_examples"
FILES = sorted(EXAMPLES.glob("*/config/*.yaml"))
ARCHS = sorted(arch for arch, model in ARCH_MODEL_REGISTRY.items() if model is PkmRobertaModel)
LAYERS = {"tiny": (3, [1]), "base": (12, [3, 7]), "large": (24, [7, 15])}
REFUSALS = (ConfigKeyError, ConfigCompositionException)
# widths that every number of attention heads divides, and a small memory
NARROW = ["+model.encoder_embed_dim=48", "+model.encoder_ffn_embed_dim=8"]
SMALL_MEMORY = ["model.memory_n_keys=8", "model.memory_knn=4", "model.memory_k_dim=8"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """As much data as any task wants for a start."""
    labels = type(small_dictionary())()
    for name in "102":
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


def defaults_of(file: Path) -> List[str]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]


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


@pytest.mark.parametrize(
    "override",
    [f"+{part}.mistyped=1" for part in ("model", "task", "criterion", "optimizer")]
    + ["common.mistyped=1", "model.mistyped=1"],
)
def test_a_mistyped_option_is_refused(override: str, data: Path) -> None:
    with pytest.raises(REFUSALS, match="mistyped"):
        composed(EXAMPLES / "pretraining/config/resm_tiny.yaml", data, override)


SECTIONS = ["common", "task", "model", "criterion", "optimizer", "lr_scheduler", "dataset"]
SECTIONS += ["optimization", "distributed_training", "checkpoint"]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_mistyped_option_in_a_file_is_refused(section: str, data: Path, tmp_path: Path) -> None:
    """So every option in the files that make a training is one that fairseq or the plugin knows."""
    folder = shutil.copytree(EXAMPLES / "pretraining/config", tmp_path / "pretraining/config")
    (folder / "shared/wrong.yaml").write_text(f"# @package _global_\n{section}: {{mistyped: 1}}\n")
    file = folder / "pkm_base.yaml"
    file.write_text(
        file.read_text().replace("- shared/memory", "- shared/memory\n  - shared/wrong")
    )
    with pytest.raises(REFUSALS, match="mistyped"):
        composed(file, data)


def test_there_are_no_other_sections() -> None:
    for file in EXAMPLES.glob("*/config/**/*.yaml"):
        sections = set(yaml.safe_load(file.read_text(encoding="utf-8"))) - {"defaults", "hydra"}
        assert sections <= set(SECTIONS), file


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
    if name != "RTE":  # fairseq's number is larger
        assert cfg.optimization.max_update == pytest.approx(10 * batches, rel=0.02)


def test_every_shared_file_is_used_and_every_file_is_read() -> None:
    for folder in {file.parent for file in FILES}:
        used = set()
        for file in folder.glob("*.yaml"):
            defaults = defaults_of(file)
            assert defaults[0] == "_self_", file  # fairseq's default values come with it
            used.update(defaults[1:])
        shared = {str(f.relative_to(folder).with_suffix("")) for f in folder.glob("*/*.yaml")}
        assert used == shared


# --- what the READMEs tell a reader to type -----------------------------------------------------


def commands_of(example: Path) -> List[List[str]]:
    """The commands in the fenced blocks of an example's README, as words."""
    text = (example / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    programs = ("user_dir_examples/", "scripts/", ".venv/bin/", "OMP_NUM_THREADS=")
    found = [shlex.split(line) for line in lines if line.startswith(programs)]
    return [words[1:] if words[0].startswith("OMP") else words for words in found]


def hydra_run(words: List[str]) -> "Tuple[Path, List[str]]":
    """The configuration that a command names, and its overrides; of a sweep, the first job's."""
    if "--config-name" in words:
        folder, name = (
            words[words.index("--config-dir") + 1],
            words[words.index("--config-name") + 1],
        )
        file = ROOT / folder / f"{name}.yaml"
    else:
        file = ROOT / Path(words[0]).parent / "config" / f"{words[1]}.yaml"
    given = [word for word in words if re.match(r"\+?\w+\.[\w.]+=", word)]
    given = [word.split(",")[0] if "-m" in words else word for word in given]
    return file, [word for word in given if not word.startswith("task.data=")]


def example_folders() -> List[Path]:
    """The folders of examples, those of studies among them."""
    found = [*EXAMPLES.iterdir(), *(EXAMPLES / "studies").iterdir()]
    return [folder for folder in found if folder.is_dir() and folder.name != "studies"]


def test_the_examples_are_all_of_one_form() -> None:
    names = {folder.name for folder in example_folders()}
    assert {"pretraining", "four_arms", "glue", "extend", "finetuning_books"} <= names
    for folder in example_folders():
        given = [word for words in commands_of(folder) for word in words[:2]]
        scripts = [folder / "run.sh"] if (folder / "run.sh").exists() else [*folder.glob("*.py")]
        assert scripts
        for script in scripts:
            assert script.suffix == ".py" or os.access(script, os.X_OK)
        assert any(str(ROOT / word) in map(str, scripts) for word in given)


MISSING = [
    (
        ["pretraining", "resm_tiny", "no/data", "out"],
        "no folder no/data, which fairseq-pre",
    ),
    (["pretraining", "resm_tinny", ".", "out"], "config/resm_tinny.yaml"),
    (
        ["glue", "RTE", "no/data", "x.pt", "out"],
        "no folder no/data/RTE, which prepare_glue",
    ),
    (["glue", "RTE", "glue", "no/x.pt", "out"], "run.sh: no checkpoint no/x.pt"),
    (["glue", "NONE", "glue", "x.pt", "out"], "config/NONE.yaml"),
    (["extend", "no/data", "out"], "run.sh: no folder no/data, which fairseq-preprocess"),
    (["four_arms", "no/data", "out"], "run.sh: no folder no/data, which fairseq-preprocess"),
    (["four_arms"], "usage: run.sh DATA-BIN OUT"),
]


@pytest.mark.parametrize(("command", "message"), MISSING)
def test_what_is_missing_is_named(tmp_path: Path, command: List[str], message: str) -> None:
    (tmp_path / "glue/RTE").mkdir(parents=True)
    script = EXAMPLES / command[0] / "run.sh"
    done = subprocess.run(
        [script, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and message in line
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_readmes_exist(data: Path) -> None:
    source = "".join(f.read_text() for part in ("scripts", "pkm_fairseq") for f in sources(part))
    n_hydra = 0
    for words in [words for folder in example_folders() for words in commands_of(folder)]:
        program = words[1] if words[0] == ".venv/bin/python" else words[0]
        if program.startswith(".venv/bin/"):
            assert (Path(sys.executable).parent / Path(program).name).is_file(), program
        else:
            assert (ROOT / program).is_file(), program
        if program.startswith("scripts/"):
            assert not [w for w in words if w.startswith("--") and f'"{w}"' not in source], words
        if program.endswith(("pretraining/run.sh", "glue/run.sh", "hydra-train")):
            file, overrides = hydra_run(words)
            composed(file, data, *overrides)
            n_hydra += 1
    assert n_hydra >= 6


def sources(folder: str) -> List[Path]:
    return list((ROOT / folder).rglob("*.py"))

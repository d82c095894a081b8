"""A crafted checkpoint runs no code, whoever loads it, and is refused in one line."""

import ast
import runpy
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import fairseq
import pytest
import torch
from fairseq import checkpoint_utils, hub_utils
from omegaconf import DictConfig

from pkm_fairseq.compat import literals
from pkm_fairseq.experiments.data.prepare import train_sentencepiece
from pkm_fairseq.experiments.demo import evaluate
from pkm_fairseq.experiments.glue.predict import load_finetuned
from pkm_fairseq.experiments.glue.start import read_arms
from pkm_fairseq.experiments.glue.tasks import TASKS
from pkm_fairseq.models.capture import load_model
from pkm_fairseq.models.checkpoints import load_dictionary, load_model_and_task, read_checkpoint
from pkm_fairseq.models.roberta import PkmRobertaModel
from tests.helpers import build, model_args, small_dictionary, write_split
from tests.integration.runs import BIN, MASKED_LM, ROOT, TRAIN, USER_DIR, run_alike

SCRIPTS = ROOT / "scripts"
PLAIN, RESM = "roberta", "resm_roberta_tiny"
NOT_READ = "must be a Python literal"
LINES = ["w1 w2 w3 w4", "w5 w6 w7 w8"] * 8


class Crafted:
    """A folder with data, and checkpoints that would leave a mark in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.mark = folder, folder / "data", folder / "mark"
        self.code = f"open({str(self.mark)!r}, 'w')"
        self.dictionary = small_dictionary()
        sentences = [self.dictionary.encode_line(line).tolist() for line in LINES]
        for split in ("train", "valid", "test"):
            write_split(self.data, split, self.dictionary, sentences)
        words = self.dictionary.symbols[self.dictionary.nspecial : -1]
        (self.data / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))

    def write(
        self,
        arch: str = PLAIN,
        is_old: bool = False,
        model: Optional[Dict[str, Any]] = None,
        task: Any = None,
        **more: Any,
    ) -> Path:
        """A checkpoint of a new model, with options changed."""
        file = self.folder / "crafted.pt"
        options = vars(model_args(arch)) | {"_name": arch, **(model or {})}
        task = {"_name": "masked_lm", "data": str(self.data)} if task is None else task
        criterion = {"_name": "masked_lm", "regression_target": False}
        state = {
            "args": None,
            "cfg": {"model": Namespace(**options), "task": task, "criterion": criterion},
            "model": build(arch, self.dictionary).state_dict(),
            "optimizer_history": [
                {"criterion_name": "x", "optimizer_name": "x", "lr_scheduler_state": {}}
            ],
            "extra_state": {"epoch": 1, "val_loss": None, "train_iterator": {"epoch": 1}},
        }
        if is_old:
            task = task if isinstance(task, dict) else {}
            of_old = {"task": task.get("_name"), "criterion": "masked_lm", "data": str(self.data)}
            state["args"] = Namespace(**{**options, **of_old})
            del state["cfg"], state["args"]._name
        torch.save({**state, **more}, file)
        return file


@pytest.fixture
def crafted(tmp_path: Path) -> Crafted:
    return Crafted(tmp_path)


def in_attention(crafted: Crafted, arch: str, is_old: bool = False) -> Path:
    return crafted.write(arch, is_old, model={"encoder_xformers_att_config": crafted.code})


# --- options of a RoBERTa ---------------------------------------------------------------------


def by_hub(crafted: Crafted, file: Path) -> Any:
    PkmRobertaModel.from_pretrained(str(file.parent), file.name, str(crafted.data), bpe=None)


def by_fairseqs_hub(crafted: Crafted, file: Path) -> Any:
    hub_utils.from_pretrained(str(file.parent), file.name, str(crafted.data))


def by_fairseq(crafted: Crafted, file: Path) -> Any:
    checkpoint_utils.load_model_ensemble_and_task([str(file)])


def by_us(crafted: Crafted, file: Path) -> Any:
    load_model_and_task(str(file), read_checkpoint(str(file)), data=str(crafted.data))


def to_capture(crafted: Crafted, file: Path) -> Any:
    load_model(read_checkpoint(str(file)), load_dictionary(str(crafted.data / "dict.txt")))


def to_evaluate(crafted: Crafted, file: Path) -> Any:
    evaluate.load(file, crafted.data)


FUNCTIONS = [by_hub, by_fairseqs_hub, by_fairseq, by_us, to_capture, to_evaluate]


@pytest.mark.parametrize(
    ("function", "arch"),
    # what captures queries needs a memory
    [(f, arch) for f in FUNCTIONS for arch in ([RESM] if f is to_capture else [PLAIN, RESM])],
)
def test_an_option_of_the_attention_is_not_run(
    crafted: Crafted, function: Callable[..., Any], arch: str
) -> None:
    for is_old in (False, True):
        file = in_attention(crafted, arch, is_old)
        if is_old and arch == RESM and function is not to_capture:
            function(crafted, file)  # fairseq drops old options that a model does not declare
        else:
            with pytest.raises(ValueError, match=NOT_READ) as caught:
                function(crafted, file)
            assert "\n" not in str(caught.value)
        assert not crafted.mark.exists()


def test_a_literal_is_read(crafted: Crafted) -> None:
    """With a value that is none of xformers', which fairseq looks for."""
    file = crafted.write(model={"encoder_xformers_att_config": "None"})
    by_us(crafted, file)
    file = crafted.write(model={"encoder_xformers_att_config": "{'name': 'linformer'}"})
    with pytest.raises(ValueError, match=r"crafted.pt cannot be loaded: Please install xFormers"):
        by_us(crafted, file)


def script(name: str, monkeypatch: pytest.MonkeyPatch, *options: Any) -> Any:
    """Run a script in this process: how it ends."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / name), *map(str, options)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return end.value.code


def of_text(crafted: Crafted, file: Path) -> List[Any]:
    return ["--checkpoint", file, "--data", crafted.data]


def a_sentence(crafted: Crafted, file: Path) -> List[Any]:
    (crafted.folder / "spm.model").write_bytes(train_sentencepiece(LINES * 10, 20))
    shutil.copytree(crafted.data, crafted.folder / "bin")
    return ["w1 <mask>", "--checkpoint", file, "--data", crafted.folder]


def a_folder(crafted: Crafted, file: Path) -> List[Any]:
    return ["--to", "transformers", file, crafted.folder / "out", "--dict", crafted.data]


COMMANDS: Dict[str, Callable[[Crafted, Path], List[Any]]] = {
    "validate_faiss.py": of_text,
    "memory_usage.py": of_text,
    "evaluate_mlm.py": lambda crafted, file: [file, "--data", crafted.data],
    "fill_mask.py": a_sentence,
    "convert_checkpoint.py": a_folder,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_scripts_do_not_run_it(
    crafted: Crafted,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = COMMANDS[name](crafted, in_attention(crafted, RESM))
    said = script(name, monkeypatch, *options)
    if said == 2:  # validate_faiss.py says it itself
        said = capsys.readouterr().err.splitlines()[-1]
    assert NOT_READ in said and "\n" not in said
    assert not crafted.mark.exists()


def test_deltas_build_no_model(crafted: Crafted, monkeypatch: pytest.MonkeyPatch) -> None:
    file = in_attention(crafted, RESM)
    said = script(
        *("memory_delta.py", monkeypatch, "make", file, file, "--out", crafted.folder / "delta.pt")
    )
    assert "\n" not in said
    assert not crafted.mark.exists()


# --- fairseq's commands -----------------------------------------------------------------------

VALIDATE = ("--task", "masked_lm", "--batch-size", "8", "--cpu", "--user-dir", USER_DIR)


def test_validation_does_not_run_it(crafted: Crafted) -> None:
    file = in_attention(crafted, RESM)
    done = run_alike(BIN / "fairseq-validate", crafted.data, "--path", file, *VALIDATE)
    assert done.status == 1
    assert NOT_READ in done.output.splitlines()[-1]
    assert not crafted.mark.exists()


def test_validation_does_not_run_an_option_of_the_criterion(crafted: Crafted) -> None:
    file = crafted.write()
    content = torch.load(file, weights_only=True)
    content["cfg"]["criterion"] = {"_name": "ctc", "wer_args": crafted.code}
    torch.save(content, file)
    done = run_alike(BIN / "fairseq-validate", crafted.data, "--path", file, *VALIDATE)
    assert done.status == 1
    assert not crafted.mark.exists()


@pytest.mark.parametrize("option", ["--restore-file", "--finetune-from-model", "--init-from"])
def test_a_training_takes_its_parameters_only(crafted: Crafted, option: str) -> None:
    file = in_attention(crafted, RESM)
    options = ("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "dropout")
    options += ("encoder_attention_heads", "memory_layers", "memory_n_keys", "memory_heads")
    stored = vars(model_args(RESM))
    sizes = [
        part
        for name in (*options, "memory_knn", "memory_k_dim", "max_positions")
        for part in ("--" + name.replace("_", "-"), str(stored[name]))
    ]
    done = run_alike(
        *(BIN / "fairseq-train", crafted.data, *TRAIN, *MASKED_LM, "--arch", RESM, *sizes),
        *("--tokens-per-sample", "12", "--max-update", "1", "--disable-validation"),
        *("--save-dir", crafted.folder / "out", option, file),
        *(("--reset-optimizer",) if option == "--restore-file" else ()),
    )
    assert done.status == 0, done.output[-2000:]
    assert not crafted.mark.exists()


# --- GLUE ---------------------------------------------------------------------------------------


def test_a_finetuned_model_is_not_run(crafted: Crafted) -> None:
    task = {"_name": "sentence_prediction", "data": str(crafted.data), "num_classes": 2}
    model = {"encoder_xformers_att_config": crafted.code}
    file = crafted.write(task=task, model=model)
    content = torch.load(file, weights_only=True)
    head = "classification_heads.sentence_classification_head.out_proj.weight"
    content["model"][head] = torch.zeros(2, 16)
    content["task_state"] = {"labels": ["0", "1"]}
    torch.save(content, file)
    data = crafted.folder / "CoLA"
    for part in ("input0", "label"):
        shutil.copytree(crafted.data, data / part)
    (data / "label" / "dict.txt").write_text("0 1\n1 1\n")
    (data / "task.json").write_text('{"labels": ["0", "1"], "is_pair": false, "label_range": null}')
    with pytest.raises(ValueError, match=NOT_READ):
        load_finetuned(file, data, TASKS["CoLA"])
    assert not crafted.mark.exists()


def test_an_option_is_no_flag(crafted: Crafted) -> None:
    """fairseq-train imports what stands behind --user-dir, wherever it finds that."""
    file = crafted.write(model={"activation_fn": f"--user-dir={crafted.folder}"})
    (arm,) = read_arms([str(file)], crafted.dictionary)
    assert f"--activation-fn=--user-dir={crafted.folder}" in arm.flags
    assert not [flag for flag in arm.flags if flag.startswith("--user-dir")]


# --- other models -------------------------------------------------------------------------------

LOADERS = [by_hub, by_us]  # those that build what a checkpoint names
AUDIO = {"_name": "audio_pretraining", "data": "nowhere"}
MASKED = {"_name": "masked_lm"}
OTHERS: Dict[str, "tuple[Dict[str, Any], str]"] = {
    "model": ({"model": {"_name": "wav2vec2"}}, "is a model 'wav2vec2', must be a RoBERTa"),
    "architecture": ({"model": {"arch": "wav2vec2"}}, "'wav2vec2', must be a RoBERTa"),
    "old model": ({"is_old": True, "model": {"arch": "fconv"}}, "'fconv', must be a RoBERTa"),
    "reference": ({"model": {"_name": "${task.x}"}}, r"'\${task.x}', must be a RoBERTa"),
    "task": ({"task": AUDIO}, "of the task 'audio_pretraining', must be one of"),
    "second task": ({"task": {**MASKED, "task": "translation"}}, "of the task 'translation'"),
    "unknown task": ({"task": {"_name": "mine"}}, "of the task 'mine', must be one of"),
    "old task": ({"is_old": True, "task": AUDIO}, "of the task 'audio_pretraining'"),
    "no old task": ({"is_old": True, "task": {}}, "of the task 'None'"),
    "hidden task": ({"task": DictConfig(AUDIO)}, "options are a DictConfig, must be plain data"),
    "hidden options": ({"cfg": DictConfig({"task": AUDIO})}, "options are a DictConfig"),
    "second options": ({"args": Namespace(task="translation")}, "of the task 'translation'"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("function", LOADERS)
def test_what_is_no_roberta_is_refused_before_anything_is_built(
    crafted: Crafted, function: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: List[Any] = []
    monkeypatch.setattr(checkpoint_utils, "load_model_ensemble_and_task", built.append)
    given, message = OTHERS[kind]
    with pytest.raises(ValueError, match=message) as caught:
        function(crafted, crafted.write(**given))
    assert "\n" not in str(caught.value)
    assert not built


def test_another_file_in_its_place_is_refused(crafted: Crafted) -> None:
    file = crafted.write()
    shutil.copy(file, file.with_name("crafted-shard0.pt"))
    with pytest.raises(ValueError, match=r"would load .*crafted-shard0.pt in its place"):
        by_us(crafted, file)


@pytest.mark.parametrize("function", [by_fairseqs_hub, by_fairseq])
def test_fairseq_builds_other_models_of_literals_only(
    crafted: Crafted, function: Callable[..., Any]
) -> None:
    model = {"_name": "wav2vec2", "arch": "wav2vec2", "conv_feature_layers": crafted.code}
    task = {"_name": "audio_pretraining", "data": str(crafted.data)}
    file = crafted.write(task=task)
    content = torch.load(file, weights_only=True)
    content["cfg"]["model"] = model
    torch.save(content, file)
    with pytest.raises(ValueError, match=NOT_READ):
        function(crafted, file)
    assert not crafted.mark.exists()


def calls_eval(file: Path) -> bool:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return any(isinstance(node, ast.Name) and node.id == "eval" for node in nodes)


def test_every_module_of_fairseq_that_evaluates_reads_literals() -> None:
    """But for its examples, which only a user-dir imports."""
    root = Path(fairseq.__file__).parent
    files = [f for f in root.rglob("*.py") if f.relative_to(root).parts[0] != "examples"]
    found = [file.relative_to(root.parent).with_suffix("") for file in files if calls_eval(file)]
    names = [".".join(file.parts) for file in found]
    assert len(names) > 10 and "fairseq.utils" in names
    for name in names:
        assert vars(sys.modules[name])["eval"] is literals.read, name


def test_no_file_of_ours_loads_without_the_protection() -> None:
    for folder in ("pkm_fairseq", "scripts", "user_dir_examples"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert "weights_only=False" not in text, file
            assert text.count("torch.load(") == text.count("weights_only=True"), file

"""scripts/predict_glue.py on models that fairseq-train finetuned."""

import json
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, List

import pytest
import torch
from fairseq.data import data_utils
from sklearn.metrics import accuracy_score, f1_score

from pkm_fairseq.experiments.glue.predict import load_finetuned
from pkm_fairseq.experiments.glue.tasks import TASKS
from pkm_fairseq.models.labels import label_names
from pkm_fairseq.models.roberta import PkmRobertaModel
from tests.glue_data import write_glue, write_tokenizer

from .runs import BIN, MEMORY, MODEL, PATIENCE, ROOT, TRAIN, Run, load, run, run_well

CLASSES = {"RTE": 2, "SST-2": 2, "STS-B": 1, "MNLI": 3}
PLAIN = "STS-B"  # learned by a model without memory
EXAMPLE = ROOT / "user_dir_examples" / "glue" / "task_spec_example.yaml"


@pytest.mark.parametrize("names_labels_as_trained", [True, False])
def test_the_hub_interface_compares_the_order_of_labels(
    made: Path, names_labels_as_trained: bool
) -> None:
    file = checkpoint_of(made, "SST-2")
    data = made / ("preprocessed" if names_labels_as_trained else "data") / "SST-2"
    load = partial(PkmRobertaModel.from_pretrained, str(file.parent), file.name, bpe=None)
    if names_labels_as_trained:
        assert label_names(load(str(data)).task.label_dictionary) == ["1", "0"]
        return
    with pytest.raises(ValueError, match=r"are 0, 1, must be in the order .* trained with: 1, 0"):
        load(str(data))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tasks in data/, models that learned them in runs/<task>/seed0/.

    The labels that SST-2 is learned from are binarised by fairseq-preprocess: class 0 is "1".
    """
    folder = tmp_path_factory.mktemp("glue")
    write_glue(folder / "glue", [*CLASSES, "QNLI", "WNLI"], n_train=200)
    write_tokenizer(folder)
    run_well(
        *(sys.executable, ROOT / "scripts/prepare_glue.py", "--glue-data", folder / "glue"),
        *("--out", folder / "data", "--tasks", *CLASSES, "QNLI", "WNLI"),
        *("--dict", folder / "dict.txt", "--bpe", "sentencepiece"),
        *("--sentencepiece-model", folder / "spm.model"),
    )
    for name in ("RTE", "STS-B", "MNLI"):
        finetune(folder, folder / "data" / name, 4)
    metrics = ["--glue-metrics", "accuracy,f1", "--validate-interval", "100"]
    sst = finetune(folder, preprocessed(folder, "SST-2"), 120, *metrics)
    (folder / "sst.log").write_text(sst.output)
    return folder


def labels_of(file: Path) -> List[str]:
    """The last column of a file of the miniature SST-2."""
    return [line.rsplit("\t", 1)[1] for line in file.read_text().splitlines()[1:]]


def preprocessed(made: Path, name: str) -> Path:
    """A prepared task with labels binarised as fairseq's own recipe for GLUE does.

    Every fourth dev label is 1, so that a model that learned the task is not always right.
    """
    folder = made / "preprocessed" / name
    shutil.copytree(made / "data" / name / "input0", folder / "input0")
    for split in ("train", "dev"):
        labels = labels_of(made / "glue" / name / f"{split}.tsv")
        if split == "dev":
            labels[::4] = ["1"] * len(labels[::4])
        (made / f"{split}.label").write_text("\n".join(labels) + "\n")
    run_well(
        *(BIN / "fairseq-preprocess", "--only-source", "--destdir", folder / "label"),
        *("--trainpref", made / "train.label", "--validpref", made / "dev.label"),
    )
    return folder


def finetune(made: Path, data: Path, updates: int, *options: Any) -> Run:
    name = data.name
    save_dir = made / "runs" / name / "seed0"
    with_memory = ["--arch", "resm_roberta_tiny", *MEMORY]
    arch = ["--arch", "roberta", "--optimizer", "adam"] if name == PLAIN else with_memory
    regression = ["--regression-target", "--best-checkpoint-metric", "loss"]
    done = run_well(
        *(BIN / "fairseq-train", data, *TRAIN, *MODEL, *arch),
        *("--task", "pkm_sentence_prediction", "--criterion", "pkm_sentence_prediction"),
        *("--num-classes", CLASSES[name], "--save-dir", save_dir),
        *("--init-token", "0", "--separator-token", "2", "--max-positions", "64"),
        *("--shorten-method", "truncate", "--max-update", updates),
        *("--required-batch-size-multiple", "1"),
        *(regression if CLASSES[name] == 1 else []),
        *options,
    )
    metric = "pearson" if CLASSES[name] == 1 else "accuracy"
    (save_dir / "result.json").write_text(json.dumps({"dev": {metric: 50.0}}))
    return done


def checkpoint_of(made: Path, name: str) -> Path:
    return made / "runs" / name / "seed0" / "checkpoint_best.pt"


def predict(made: Path, *options: Any, checkpoint: Any = None) -> Run:
    chosen = ["--checkpoint", checkpoint] if checkpoint else []
    command = [sys.executable, ROOT / "scripts" / "predict_glue.py", "--data", made / "data"]
    return run(*command, *chosen, *options)


def rows_of(archive: Path, name: str) -> List[List[str]]:
    with zipfile.ZipFile(archive) as files:
        lines = files.read(name).decode().splitlines()
    return [line.split("\t") for line in lines]


def test_a_submission_of_all_runs(made: Path, tmp_path: Path) -> None:
    done = predict(made, "--runs", made / "runs", "--zip", tmp_path / "out" / "sub.zip")
    assert done.status == 0, done.output
    archive = tmp_path / "out" / "sub.zip"
    labels = {"RTE": {"entailment", "not_entailment"}, "SST-2": {"0", "1"}}
    labels["MNLI-m"] = labels["MNLI-mm"] = {"entailment", "neutral", "contradiction"}
    with zipfile.ZipFile(archive) as files:
        assert set(files.namelist()) == {f"{name}.tsv" for name in (*labels, "STS-B")}
    for name in (*labels, "STS-B"):
        header, *rows = rows_of(archive, f"{name}.tsv")
        assert header == ["index", "prediction"]
        assert [row[0] for row in rows] == [str(i) for i in range(20)]
        if name == "STS-B":
            assert all(0 <= float(row[1]) <= 5 and row[1][-4] == "." for row in rows)
        else:
            assert {row[1] for row in rows} <= labels[name]
    missing = "GLUE's server also needs: CoLA.tsv, MRPC.tsv, QQP.tsv, QNLI.tsv, WNLI.tsv, AX.tsv"
    assert missing in done.output
    again = predict(made, "--runs", made / "runs", "--zip", tmp_path / "again.zip")
    assert again.status == 0
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_what_was_learned_is_predicted(made: Path, tmp_path: Path) -> None:
    """The last word of these sentences tells the label."""
    options = ["--tasks", "SST-2", "--zip", tmp_path / "sub.zip"]
    done = predict(made, *options, checkpoint=checkpoint_of(made, "SST-2"))
    assert done.status == 0, done.output
    _, *rows = rows_of(tmp_path / "sub.zip", "SST-2.tsv")
    test = (made / "glue" / "SST-2" / "test.tsv").read_text().splitlines()[1:]
    right = [
        row[1] == str(int(line.endswith("good"))) for row, line in zip(rows, test, strict=True)
    ]
    assert sum(right) >= 18


def test_labels_are_compared_by_name(made: Path) -> None:
    """fairseq-preprocess made "1", the more frequent label, class 0."""
    labels = made / "preprocessed/SST-2/label/dict.txt"
    assert [line.split()[0] for line in labels.read_text().splitlines()[:2]] == ["1", "0"]
    checkpoint = checkpoint_of(made, "SST-2")
    assert load(checkpoint)["task_state"]["labels"] == ["1", "0"]
    finetuned = load_finetuned(checkpoint, made / "data/SST-2", TASKS["SST-2"])
    dictionary = finetuned.task.source_dictionary
    inputs = data_utils.load_indexed_dataset(str(made / "data/SST-2/input0/valid"), dictionary)
    examples = [finetuned.example([row]) for row in inputs]
    predicted = finetuned.predictions(finetuned.outputs(examples, "valid"))
    targets = (made / "dev.label").read_text().split()
    expected = 100 * f1_score(targets, predicted, pos_label="1")
    assert expected != pytest.approx(100 * f1_score(targets, predicted, pos_label="0"), abs=0.1)
    logged = Run(0, (made / "sst.log").read_text()).logged("valid")[-1]
    assert float(logged["valid_f1"]) == pytest.approx(expected, abs=0.01)
    assert float(logged["valid_accuracy"]) == 100 * accuracy_score(targets, predicted)


def test_a_checkpoint_that_does_not_name_its_labels(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its training data do, if they are still there; else an assumption is told."""
    stored = load(checkpoint_of(made, "SST-2"))
    del stored["task_state"]["labels"]
    torch.save(stored, tmp_path / "model.pt")
    load_sst = partial(load_finetuned, tmp_path / "model.pt", made / "data/SST-2", TASKS["SST-2"])
    assert load_sst().labels == ("1", "0")
    assert not capsys.readouterr().err
    stored["cfg"]["task"]["data"] = str(tmp_path / "gone" / "SST-2")
    torch.save(stored, tmp_path / "model.pt")
    assert load_sst().labels == ("0", "1")
    assert "does not store the order of its labels" in capsys.readouterr().err
    stored["task_state"]["labels"] = ["good", "bad"]
    torch.save(stored, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="was finetuned on labels good, bad, SST-2 has 0, 1"):
        load_sst()


def predicted_on_dev(made: Path, name: str) -> "tuple[List[Any], List[str]]":
    """What a model says of the prepared dev set, and the labels there, computed apart."""
    finetuned = load_finetuned(checkpoint_of(made, name), made / "data" / name, TASKS[name])
    dictionary = finetuned.task.source_dictionary
    file = str(made / "data" / name / "input0" / "valid")
    inputs = data_utils.load_indexed_dataset(file, dictionary)
    examples = [finetuned.example([row]) for row in inputs]
    predicted = finetuned.predictions(finetuned.outputs(examples, "valid"))
    return predicted, labels_of(made / "glue" / name / "dev.tsv")


def test_what_a_memory_is_worth_to_a_finetuned_model(made: Path, tmp_path: Path) -> None:
    def ablated(name: str, checkpoint: Path) -> "tuple[Any, str]":
        file = tmp_path / "found.json"
        options = ("--tasks", name, "--ablate", "--json", file)
        done = predict(made, *options, checkpoint=checkpoint)
        assert done.status == 0, done.output
        (found,) = json.loads(file.read_text())
        return found, done.output

    found, output = ablated("SST-2", checkpoint_of(made, "SST-2"))
    predicted, targets = predicted_on_dev(made, "SST-2")
    assert found["dev"] == {"accuracy": pytest.approx(100 * accuracy_score(targets, predicted))}
    assert set(found["ablations"]) == {"zero", "permuted", "top1"}
    assert found["ablations_by_layer"] == {"1": found["ablations"]}
    said = f"accuracy {found['dev']['accuracy']:.1f}\n  all memories ablated: zero accuracy"
    assert said in output
    without = load(checkpoint_of(made, "SST-2"))  # a table of zeros
    without["model"]["encoder.sentence_encoder.layers.1.memory.values.weight"].zero_()
    torch.save(without, tmp_path / "without.pt")
    assert ablated("SST-2", tmp_path / "without.pt")[0]["dev"] == found["ablations"]["zero"]
    plain, output = ablated(PLAIN, checkpoint_of(made, PLAIN))
    assert plain["ablations"] is None and "no memory to ablate" in output
    assert set(plain["dev"]) == {"pearson", "spearman"}


def from_stdin(made: Path, name: str, text: bytes) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, ROOT / "scripts/predict_glue.py", "--data", made / "data"]
    command += ["--checkpoint", checkpoint_of(made, name), "--stdin", "--task", name]
    return subprocess.run(
        list(map(str, command)), input=text, capture_output=True, timeout=PATIENCE
    )


def test_own_sentences(made: Path) -> None:
    done = from_stdin(made, "SST-2", b"a cat sees good\n" + b"old " * 90 + b"\nthe dog eats bad\n")
    assert done.returncode == 0, done.stderr
    answers = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert [answers[0][0], answers[2][0]] == ["1", "0"]
    assert all(0.5 <= float(share) <= 1 for _, share in answers)
    assert b"1 of 3 inputs are longer than 64 tokens and were cut off" in done.stderr
    done = from_stdin(made, "STS-B", b"a cat\tthe cat\n")
    assert done.returncode == 0, done.stderr
    assert 0 <= float(done.stdout) <= 5
    done = from_stdin(made, "RTE", b"a cat\tthe cat\na cat\n")
    assert done.returncode != 0
    assert done.stderr == b"predict_glue.py: line 2 of the input: 1 columns, must be 2: 'a cat'\n"


def failing(made: Path, *options: Any, zip_file: Path, checkpoint: Any = None) -> str:
    """The one line with which a command fails; there is no zip."""
    done = predict(made, *options, "--zip", zip_file, checkpoint=checkpoint)
    assert done.status != 0
    assert "Traceback" not in done.output
    assert not zip_file.parent.exists() or not list(zip_file.parent.glob("*.zip*"))
    line = done.output.strip().splitlines()[-1]
    assert line.startswith("predict_glue.py: ")
    return line


MISTAKES = {
    "no such task": ("rte", "RTE", "no task 'rte': the tasks are CoLA"),
    "not prepared": ("CoLA", "RTE", "CoLA/task.json: no such file; prepare CoLA"),
    "another task": ("QNLI", "RTE", "was finetuned on RTE, not on QNLI"),
    "another number of classes": ("MNLI", "RTE", "has a head of 2, MNLI needs 3"),
    "a score for classes": ("WNLI", "STS-B", "has a head of 1, WNLI needs 2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_checkpoint_of_another_task(mistake: str, made: Path, tmp_path: Path) -> None:
    asked, trained, message = MISTAKES[mistake]
    checkpoint = checkpoint_of(made, trained)
    options = ["--tasks", asked]
    line = failing(made, *options, zip_file=tmp_path / "sub.zip", checkpoint=checkpoint)
    assert message in line


@pytest.mark.parametrize("has_hash", [True, False])
def test_a_checkpoint_with_another_dictionary(has_hash: bool, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "data" / "RTE", tmp_path / "data" / "RTE")
    lines = (made / "dict.txt").read_text().splitlines()
    lines = lines[::-1] if has_hash else [*lines, "another 1"]
    for part in ("input0", "input1"):
        (tmp_path / "data/RTE" / part / "dict.txt").write_text("\n".join(lines) + "\n")
    checkpoint = load(checkpoint_of(made, "RTE"))
    if not has_hash:
        checkpoint["task_state"] = {}
    torch.save(checkpoint, tmp_path / "model.pt")
    line = failing(
        *(tmp_path, "--task", "RTE"),
        zip_file=tmp_path / "sub.zip",
        checkpoint=tmp_path / "model.pt",
    )
    assert "was trained with another dictionary" in line


@pytest.mark.parametrize("heads", [0, 2])
def test_a_checkpoint_without_a_head_or_with_two(heads: int, made: Path, tmp_path: Path) -> None:
    checkpoint = load(checkpoint_of(made, "RTE"))
    of_head = [name for name in checkpoint["model"] if name.startswith("classification_heads.")]
    for name in of_head:
        parameter = checkpoint["model"][name]
        if heads == 0:
            del checkpoint["model"][name]
        else:
            other = name.replace("sentence_classification_head", "another")
            checkpoint["model"][other] = parameter
    torch.save(checkpoint, tmp_path / "model.pt")
    zip_file, options = tmp_path / "sub.zip", ["--task", "RTE"]
    line = failing(made, *options, zip_file=zip_file, checkpoint=tmp_path / "model.pt")
    expected = "has no classification head" if heads == 0 else "has 2 heads"
    assert expected in line


def test_options_that_do_not_go_together(made: Path, tmp_path: Path) -> None:
    zip_file, checkpoint = tmp_path / "sub.zip", checkpoint_of(made, "RTE")
    line = failing(made, "--tasks", "RTE", "QNLI", zip_file=zip_file, checkpoint=checkpoint)
    assert "--checkpoint needs one task, not 2" in line
    line = failing(made, "--tasks", "RTE", zip_file=zip_file, checkpoint="none.pt")
    assert "none.pt: no such file" in line
    line = failing(made, "--runs", tmp_path, zip_file=zip_file)
    assert "has no folder of a task" in line
    line = failing(made, "--runs", made / "runs", "--tasks", "WNLI", zip_file=zip_file)
    assert "no seed*/result.json with accuracy on dev" in line

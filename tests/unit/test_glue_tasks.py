"""GLUE's tasks, and the description of a user's own."""

from pathlib import Path

import pytest
import yaml

from pkm_fairseq.experiments.glue.submission import missing_files
from pkm_fairseq.experiments.glue.tasks import TASKS, load_task_spec, task_names

EXAMPLE = Path(__file__).parents[2] / "user_dir_examples" / "glue" / "task_spec_example.yaml"
OWN = {
    "name": "mine",
    "sentences": ["text"],
    "label": "stars",
    "labels": [1, 2, 3],
    "metrics": ["accuracy"],
    "files": {"train": "a.tsv", "valid": "b.tsv"},
}


def written(tmp_path, **changes):
    keys = {**OWN, **changes}
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value != "drop"}))
    return file


def test_all_tasks_are_known_in_the_servers_names():
    names = "CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE WNLI"
    assert [task.name for task in task_names(None)] == names.split()
    asked = "CoLA SST-2 MRPC STS-B QQP MNLI-m MNLI-mm QNLI RTE WNLI AX"
    assert missing_files({}) == [f"{name}.tsv" for name in asked.split()]
    assert [name for name, task in TASKS.items() if not task.is_pair] == ["CoLA", "SST-2"]
    assert [name for name, task in TASKS.items() if task.is_regression] == ["STS-B"]


def test_tasks_are_chosen_by_name_and_once():
    assert [task.name for task in task_names(["RTE", "CoLA", "RTE"])] == ["RTE", "CoLA"]
    with pytest.raises(ValueError, match="no task 'rte': the tasks are CoLA, SST-2, MRPC"):
        task_names(["CoLA", "rte"])


def test_a_users_own_task(tmp_path):
    task = load_task_spec(written(tmp_path))
    assert (task.labels, task.label_range, task.is_pair) == (("1", "2", "3"), None, False)
    files = {"train": "a.tsv", "valid": "b.tsv", "test": "c.tsv", "test1": "d.tsv"}
    changes = dict(sentences=["a", "b"], labels="drop", label_range=[1, 5], metrics=["spearman"])
    task = load_task_spec(written(tmp_path, **changes, files=files, index="id"))
    assert (task.labels, task.label_range, task.is_pair) == ((), (1.0, 5.0), True)
    assert task.files["train"].columns.label == "stars"
    assert (task.files["test"].columns.label, task.files["test"].columns.index) == (None, "id")
    assert [task.files[test].submission for test in ("test", "test1")] == ["mine.tsv", "mine-1.tsv"]


def test_the_example_is_one():
    assert load_task_spec(EXAMPLE).labels == ("bad", "good")


MISTAKES = {
    "missing": ({"label": "drop", "files": "drop"}, "keys missing files, label"),
    "unknown": ({"lables": ["a"]}, "keys unknown lables"),
    "name of a folder elsewhere": ({"name": "../mine"}, "name is '../mine', must be letters"),
    "name of GLUE": ({"name": "RTE"}, "not a task of GLUE"),
    "name of the tokenizer's folder": ({"name": "tokenizer"}, "not a task of GLUE or tokenizer"),
    "both": ({"label_range": [0, 1]}, "either labels .* or label_range"),
    "neither": ({"labels": "drop"}, "either labels .* or label_range"),
    "one label": ({"labels": ["a"]}, "labels are a, must be two or more"),
    "label twice": ({"labels": ["a", "b", "a"]}, "labels are a, b, a, must be two or more"),
    "yes and no": ({"labels": [True, False]}, "labels holds True, must be text; put it in quotes"),
    "labels with tabs": ({"labels": ["a\tb", "c"]}, r"label 'a\\tb' may hold"),
    "labels of fairseq": ({"labels": ["<s>", "c"]}, "label '<s>' may hold"),
    "no list": ({"sentences": "text"}, "sentences is 'text', must be a list"),
    "three": ({"sentences": ["a", "b", "c"]}, "sentences are a, b, c, must be one or two"),
    "range": ({"labels": "drop", "label_range": [5, 0]}, r"label_range is \[5, 0\], must be"),
    "no range": ({"labels": "drop", "label_range": [0, "x"]}, "label_range is .*, must be"),
    "metric": ({"metrics": ["pearson"]}, "metric is 'pearson', must be one of accuracy"),
    "f1 of three": ({"metrics": ["f1"]}, "f1 needs two labels, not 3"),
    "no dev": ({"files": {"train": "a.tsv"}}, "must name the files of train and valid"),
    "no such split": (
        {"files": {"train": "a", "valid": "b", "dev": "c"}},
        "must name the files of train and valid",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_in_one_line(mistake, tmp_path):
    changes, message = MISTAKES[mistake]
    file = written(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_task_spec(file)
    assert str(error.value).startswith(f"task spec {file}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "just text", "", "a: \xff"])
def test_a_file_that_is_no_spec(text, tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"task spec {file}") as error:
        load_task_spec(file)
    assert "\n" not in str(error.value)


def test_a_missing_spec(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_task_spec(tmp_path / "none.yaml")

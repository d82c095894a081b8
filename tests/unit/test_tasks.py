"""The tasks: dictionary remembered, splits named, clear errors."""

from argparse import Namespace

import pytest
import torch
from fairseq.tasks.masked_lm import MaskedLMTask
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from omegaconf import OmegaConf

from pkm_fairseq.models.checkpoints import dictionary_sha256
from pkm_fairseq.tasks.common import NamedSplitDataset
from pkm_fairseq.tasks.masked_lm import PkmMaskedLMConfig, PkmMaskedLMTask
from pkm_fairseq.tasks.sentence_prediction import (
    PkmSentencePredictionConfig,
    PkmSentencePredictionTask,
)
from tests.helpers import build, small_dictionary, write_split

TASKS = {
    "pkm_masked_lm": (PkmMaskedLMTask, PkmMaskedLMConfig, MaskedLMTask),
    "pkm_sentence_prediction": (
        PkmSentencePredictionTask,
        PkmSentencePredictionConfig,
        SentencePredictionTask,
    ),
}
SENTENCES = [[4, 5, 6, 2], [7, 8, 2], [9, 10, 11, 12, 2]]


def plain_dictionary():
    """Without the mask, as fairseq-preprocess writes it."""
    dictionary = small_dictionary(0)
    other = type(dictionary)()
    for index in range(15):
        other.add_symbol(f"w{index}")
    return other


@pytest.fixture
def data(tmp_path):
    """A data-bin for either task."""
    dictionary = plain_dictionary()
    for split in ("train", "valid"):
        write_split(tmp_path / "pkm_masked_lm", split, dictionary, SENTENCES)
        folder = tmp_path / "pkm_sentence_prediction"
        write_split(folder / "input0", split, dictionary, SENTENCES)
        labels = type(dictionary)()
        for name in "ab":
            labels.add_symbol(name)
        write_split(folder / "label", split, labels, [[4, 2], [5, 2], [4, 2]])
    return tmp_path


def config_of(name, data, **options):
    more = dict(tokens_per_sample=6, sample_break_mode="complete")
    if name == "pkm_sentence_prediction":
        more = dict(num_classes=2, regression_target=False, classification_head_name="head")
    cfg = TASKS[name][1](data=str(data), seed=1)
    return OmegaConf.merge(OmegaConf.structured(cfg), {**more, **options})


def setup(name, data, cls=None, **options):
    return (cls or TASKS[name][0]).setup_task(config_of(name, data / name, **options))


def first_batch(task, split):
    dataset = task.dataset(split)
    return dataset.collater([dataset[index] for index in range(len(dataset))])


def same(ours, theirs):
    if isinstance(ours, dict):
        return set(ours) == set(theirs) and all(same(ours[k], theirs[k]) for k in ours)
    return torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_fairseqs_and_name_their_split(name, data):
    ours, theirs = setup(name, data), setup(name, data, TASKS[name][2])
    for split in ("train", "valid"):
        ours.load_dataset(split)
        theirs.load_dataset(split)
        batch = first_batch(ours, split)
        assert batch.pop("split") == split
        assert same(batch, first_batch(theirs, split))
        assert len(ours.dataset(split)) == len(theirs.dataset(split)) > 0
        assert list(ours.dataset(split).ordered_indices()) == list(
            theirs.dataset(split).ordered_indices()
        )


def test_an_empty_batch_stays_empty():
    class Nothing:
        def collater(self, samples):
            return {}

    assert NamedSplitDataset(Nothing(), "valid").collater([]) == {}


@pytest.mark.parametrize("name", TASKS)
def test_checkpoints_hold_the_hash_of_the_dictionary_the_model_sees_and_the_labels(name, data):
    task = setup(name, data)
    assert task.source_dictionary.symbols[-1] == "<mask>"
    expected = dictionary_sha256(task.source_dictionary)
    labels = {"labels": ["a", "b"]} if name == "pkm_sentence_prediction" else {}
    assert task.state_dict() == {"dictionary_sha256": expected, **labels}
    assert expected == dictionary_sha256(small_dictionary())


def test_both_tasks_see_the_same_dictionary(data):
    hashes = {setup(name, data).state_dict()["dictionary_sha256"] for name in TASKS}
    assert len(hashes) == 1


def test_init_takes_what_the_task_remembers(data, tmp_path):
    task = setup("pkm_masked_lm", data)
    plain = build("roberta", task.source_dictionary)
    path = tmp_path / "plain.pt"
    torch.save({"model": plain.state_dict(), "task_state": task.state_dict()}, path)
    build("resm_roberta_tiny", task.source_dictionary, init_from=str(path))
    other = plain_dictionary()
    other.symbols[7], other.symbols[8] = other.symbols[8], other.symbols[7]
    other.add_symbol("<mask>")
    with pytest.raises(ValueError, match="another dictionary"):
        build("resm_roberta_tiny", other, init_from=str(path))


@pytest.mark.parametrize("name", TASKS)
def test_loading_a_checkpoint_of_the_task_keeps_the_hash(name, data):
    task, other = setup(name, data), setup(name, data)
    other.load_state_dict(task.state_dict())
    assert other.state_dict() == task.state_dict()


def test_labels_in_another_order_than_a_checkpoints_are_refused(data):
    task = setup("pkm_sentence_prediction", data)
    stored = {**task.state_dict(), "labels": ["b", "a"]}
    task.load_state_dict(stored)
    with pytest.raises(
        ValueError, match=r"the labels of .* are a, b, must be in the order .*: b, a"
    ):
        task.load_dataset("valid")
    task.load_state_dict({**stored, "labels": ["a", "b", "c"]})  # the data has no row of the last
    task.load_dataset("valid")
    regression = setup("pkm_sentence_prediction", data, regression_target=True)
    regression.load_state_dict(stored)
    regression.check_labels()


# --- errors -----------------------------------------------------------------------------------


def stopped(function, *args, **kwargs):
    with pytest.raises(ValueError) as stop:
        function(*args, **kwargs)
    message = str(stop.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("missing", ["everything", "dictionary"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("pkm_masked_lm", ""),
        ("pkm_sentence_prediction", "input0"),
        ("pkm_sentence_prediction", "label"),
    ],
)
def test_data_without_a_dictionary_stops_with_one_line(name, folder, missing, data):
    file = data / name / folder / "dict.txt"
    file.unlink()
    if missing == "everything":
        file.parent.rename(file.parent.with_name("gone"))
    assert str(file) in stopped(setup, name, data)


def test_a_regression_needs_no_labels_dictionary(data):
    (data / "pkm_sentence_prediction" / "label" / "dict.txt").unlink()
    setup("pkm_sentence_prediction", data, regression_target=True, num_classes=1)


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_split_stops_with_one_line(name, data):
    message = stopped(setup(name, data).load_dataset, "test")
    assert name in message
    assert "test" in message


@pytest.mark.parametrize("name", TASKS)
def test_an_empty_split_stops_with_one_line(name, data):
    folders = {"pkm_masked_lm": [""], "pkm_sentence_prediction": ["input0", "label"]}[name]
    for folder in folders:
        write_split(data / name / folder, "test", plain_dictionary(), [])
    message = stopped(setup(name, data).load_dataset, "test")
    assert "test" in message
    assert "empty" in message


@pytest.mark.parametrize("num_classes", [0, -1])
def test_no_classes_stop_with_one_line(num_classes, data):
    message = stopped(setup, "pkm_sentence_prediction", data, num_classes=num_classes)
    assert "--num-classes" in message
    assert str(num_classes) in message


def test_namespaces_are_taken_as_options_too(data):
    cfg = config_of("pkm_masked_lm", data / "pkm_masked_lm")
    task = PkmMaskedLMTask.setup_task(Namespace(**OmegaConf.to_container(cfg, resolve=False)))
    assert len(task.source_dictionary) == len(small_dictionary())

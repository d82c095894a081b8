"""Sentence data: their parts are compared before anything is trained on them."""

import logging
from types import SimpleNamespace

import pytest
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from pkm_fairseq.tasks.sentence_prediction import (
    PkmSentencePredictionConfig,
    PkmSentencePredictionTask,
)
from tests.helpers import write_split

SENTENCES = [[4, 5, 6, 2], [7, 8, 2], [9, 10, 11, 12, 2], [5, 2]]
NAMES = ("negative", "neutral", "positive")


def dictionary_of(symbols):
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    return dictionary


WORDS = dictionary_of(f"w{i}" for i in range(15))
LABELS = dictionary_of(NAMES)


def labels(*names, dictionary=LABELS):
    """As fairseq-preprocess writes a label a line."""
    return [[*map(dictionary.index, name.split()), dictionary.eos()] for name in names]


@pytest.fixture
def data(tmp_path):
    """Pairs of sentences in three classes, and the same as numbers."""
    for split in ("train", "valid"):
        for part in ("input0", "input1"):
            write_split(tmp_path / part, split, WORDS, SENTENCES)
        ids = labels("positive", "negative", "neutral", "neutral")
        write_split(tmp_path / "label", split, LABELS, ids)
        (tmp_path / "label" / f"{split}.label").write_text("0.5\n1\n-2e-3\n 7 \n")
    return tmp_path


def task_of(data, criterion=None, **options):
    given = dict(num_classes=3, regression_target=False, classification_head_name="head", seed=1)
    cfg = OmegaConf.structured(PkmSentencePredictionConfig(data=str(data)))
    task = PkmSentencePredictionTask.setup_task(OmegaConf.merge(cfg, {**given, **options}))
    task._criterion = criterion
    return task


TRAINED = SimpleNamespace()  # stands for a criterion, with which targets are needed
NUMBERS = dict(regression_target=True, num_classes=1)


@pytest.mark.parametrize("options", [{}, NUMBERS])
def test_parts_that_fit_are_loaded(data, options):
    task = task_of(data, TRAINED, **options)
    for split in ("train", "valid"):
        assert len(task.load_dataset(split)) == 4


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_label_beyond_the_classes_is_named_with_its_place(data, split):
    task = task_of(data, TRAINED, num_classes=2)
    message = (
        rf"{data}/label/{split}, example 1: label 'positive' is number 3 of {data}/label/dict.txt, "
        "but --num-classes is 2"
    )
    with pytest.raises(ValueError, match=message):
        task.load_dataset(split)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (labels("neutral", "unheard"), r"example 2: its label is not in .*/label/dict.txt"),
        (
            labels("neutral", "neutral", "neutral positive"),
            "example 3: must be one label, has 2: 'neutral positive'",
        ),
        (labels("neutral", ""), "example 2: must be one label, has 0: ''"),
        ([*labels("neutral"), [99]], r"example 2: its label is not in .*/label/dict.txt"),
        (labels("neutral"), r"/label/valid has 1 examples, .*/input0/valid has 4"),
    ],
)
def test_what_is_no_label_is_named_with_its_place(data, ids, message):
    write_split(data / "label", "valid", LABELS, ids)
    task = task_of(data, TRAINED)
    task.load_dataset("train")
    with pytest.raises(ValueError, match=message):
        task.load_dataset("valid")


def test_labels_need_no_end(data):
    write_split(data / "label", "valid", LABELS, [[4], [5], [6], [6]])
    assert len(task_of(data, TRAINED).load_dataset("valid")) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\nthree\n4\n", r"label/valid.label:3: 'three' is not a finite number"),
        ("1\nnan\n3\n4\n", r"label/valid.label:2: 'nan' is not a finite number"),
        ("1\n2\n3\n-inf\n", r"label/valid.label:4: '-inf' is not a finite number"),
        ("1\n2\n\n4\n", r"label/valid.label:3: 0 numbers, but --num-classes is 1"),
        ("1 2\n2\n3\n4\n", r"label/valid.label:1: 2 numbers, but --num-classes is 1"),
        ("1\n2\n3\n", r"label/valid.label has 3 examples, .*/input0/valid has 4"),
        ("", r"label/valid.label has 0 examples, .*/input0/valid has 4"),
        (
            "1\n2\n\xff\n4\n",
            "label/valid.label:3: '\N{REPLACEMENT CHARACTER}' is not a finite number",
        ),
    ],
)
def test_what_is_no_number_is_named_with_its_line(data, text, message):
    (data / "label" / "valid.label").write_bytes(text.encode("latin-1"))
    task = task_of(data, TRAINED, **NUMBERS)
    task.load_dataset("train")
    with pytest.raises(ValueError, match=message):
        task.load_dataset("valid")


@pytest.mark.parametrize("options", [{}, NUMBERS])
def test_targets_that_are_missing_are_an_error_where_a_criterion_needs_them(data, options):
    for file in (data / "label").glob("valid.*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no (labels|numbers) of split valid: .*/label/valid"):
        task_of(data, TRAINED, **options).load_dataset("valid")
    assert len(task_of(data, **options).load_dataset("valid")) == 4  # to be predicted


def test_both_sentences_of_a_pair_are_there(data):
    write_split(data / "input1", "valid", WORDS, SENTENCES[:3])
    with pytest.raises(ValueError, match=r"input1/valid has 3 examples, .*input0/valid has 4"):
        task_of(data).load_dataset("valid")
    for file in (data / "input1").glob("valid.*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no split valid in .*/input1, but one in .*/input0"):
        task_of(data).load_dataset("valid")


def test_both_sentences_of_a_pair_have_one_dictionary(data):
    dictionary_of(reversed(WORDS.symbols[4:])).save(str(data / "input1" / "dict.txt"))
    with pytest.raises(ValueError, match=r"input1/dict.txt and .*input0/dict.txt differ, must be"):
        task_of(data).load_dataset("valid")
    counted = Dictionary()
    for symbol in WORDS.symbols[4:]:
        counted.add_symbol(symbol, n=7)
    counted.save(str(data / "input1" / "dict.txt"))  # counts make no difference
    assert len(task_of(data).load_dataset("valid")) == 4


def test_a_missing_split_is_named(data):
    with pytest.raises(ValueError, match=f"no split test in {data}/input0"):
        task_of(data).load_dataset("test")


def test_numbers_that_a_metric_cannot_take_are_named_before_the_training(data):
    def refuse(numbers, place):
        if max(numbers) > 1:
            raise ValueError(f"{place}: {numbers[0]:g}")

    task = task_of(data, SimpleNamespace(check_numbers=refuse), **NUMBERS)
    task.load_dataset("train")  # of which no metric is taken
    with pytest.raises(ValueError, match=r"label/valid.label:4: 7"):
        task.load_dataset("valid")


def test_classes_that_no_label_has_are_told(data, caplog):
    with caplog.at_level(logging.WARNING):
        task_of(data)
        assert not caplog.records
        task_of(data, num_classes=5)
    (record,) = caplog.records
    assert "--num-classes is 5, but the data has 3 labels: negative, neutral, positive" in (
        record.message
    )

"""Predictions: the inputs are those of the finetuning, the files are those of GLUE's server."""

import io
import json
import runpy
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from fairseq.data import data_utils
from omegaconf import OmegaConf

from pkm_fairseq.experiments.glue.predict import (
    Example,
    Finetuned,
    best_checkpoint,
    load_finetuned,
    predict_lines,
    predict_tests,
)
from pkm_fairseq.experiments.glue.prepare import prepare
from pkm_fairseq.experiments.glue.submission import (
    label_text,
    missing_files,
    prediction_file,
    write_zip,
)
from pkm_fairseq.experiments.glue.tasks import TASKS
from pkm_fairseq.experiments.glue.tokenizers import Tokenizer, load_dictionary, saved_tokenizer
from pkm_fairseq.tasks.sentence_prediction import (
    PkmSentencePredictionConfig,
    PkmSentencePredictionTask,
)
from tests.glue_data import write_glue, write_tokenizer
from tests.helpers import build

LONGEST = 28


# --- files --------------------------------------------------------------------------------------

TEXTS = {
    "CoLA": ["0", "1"],
    "SST-2": ["0", "1"],
    "MRPC": ["0", "1"],
    "QQP": ["0", "1"],
    "MNLI": ["entailment", "neutral", "contradiction"],
    "QNLI": ["entailment", "not_entailment"],
    "RTE": ["entailment", "not_entailment"],
    "WNLI": ["0", "1"],
}


@pytest.mark.parametrize("name", TEXTS)
def test_labels_are_the_servers_names(name):
    assert sorted(TASKS[name].labels) == sorted(TEXTS[name])
    assert [label_text(label, TASKS[name]) for label in TEXTS[name]] == TEXTS[name]


def test_scores_are_clipped_and_have_three_decimals():
    written = [label_text(score, TASKS["STS-B"]) for score in (-0.3, 0.0, 2.34567, 5.0, 7.1)]
    assert written == ["0.000", "0.000", "2.346", "5.000", "5.000"]


def test_a_file_has_a_header_and_the_files_own_indices():
    text = prediction_file(["7", "3"], ["not_entailment", "entailment"], TASKS["RTE"])
    assert text == "index\tprediction\n7\tnot_entailment\n3\tentailment\n"
    with pytest.raises(ValueError, match="shorter"):
        prediction_file(["7", "3"], ["entailment"], TASKS["RTE"])


def test_a_zip_is_whole_or_not_there_and_the_same_every_time(tmp_path, monkeypatch):
    contents = {"RTE.tsv": "a\n", "CoLA.tsv": "b\n"}
    for name in ("one.zip", "two.zip"):
        write_zip(tmp_path / "new" / name, contents)
    one, two = ((tmp_path / "new" / name) for name in ("one.zip", "two.zip"))
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == contents
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_zip(one, {"RTE.tsv": "changed"})
    assert one.read_bytes() == two.read_bytes()


def test_what_is_missing_is_known():
    files = dict.fromkeys(missing_files({}))
    assert missing_files(files) == []
    del files["MNLI-mm.tsv"], files["AX.tsv"]
    assert missing_files(files) == ["MNLI-mm.tsv", "AX.tsv"]


def test_a_folder_as_zip_is_refused_before_the_work(tmp_path, monkeypatch):
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    monkeypatch.syspath_prepend(scripts)
    script = runpy.run_path(str(scripts / "predict_glue.py"))
    command = ["predict_glue.py", "--data", "data", "--runs", "runs", "--zip"]
    for file in (tmp_path / "new" / "sub.zip", tmp_path / "sub.zip"):
        monkeypatch.setattr(sys, "argv", [*command, str(file)])
        assert script["parse"]().zip == file
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path)])
    with pytest.raises(ValueError, match=f"--zip {tmp_path} is a folder, must be a file"):
        script["parse"]()


# --- the best seed ------------------------------------------------------------------------------


def test_the_best_seed_by_the_first_metric(tmp_path, capsys):
    scores = {0: (70.0, 90.0), 1: (80.0, 60.0), 2: (75.0, 99.0)}
    for seed, (accuracy, f1) in scores.items():
        (tmp_path / f"seed{seed}").mkdir()
        result = {"dev": {"accuracy": accuracy, "f1": f1}}
        (tmp_path / f"seed{seed}" / "result.json").write_text(json.dumps(result))
    (tmp_path / "seed3").mkdir()  # not finished
    assert best_checkpoint(tmp_path, TASKS["MRPC"]) == tmp_path / "seed1" / "checkpoint_best.pt"
    assert "accuracy on dev 80.0, best of 3" in capsys.readouterr().out
    for folder, task in ((tmp_path / "none", "MRPC"), (tmp_path, "CoLA")):
        with pytest.raises(ValueError, match=r"no seed\*/result\.json with"):
            best_checkpoint(folder, TASKS[task])


def test_seeds_of_other_settings_are_left_out(tmp_path, capsys):
    """finetune_glue.py was run again with fewer seeds; seed 3 is of a version without settings."""
    made = {1: (60.0, "new"), 2: (90.0, "old"), 3: (80.0, None), 4: (50.0, "new")}
    for seed, (accuracy, settings) in made.items():
        (tmp_path / f"seed{seed}").mkdir()
        result = {"dev": {"accuracy": accuracy}, **({"settings": settings} if settings else {})}
        (tmp_path / f"seed{seed}" / "result.json").write_text(json.dumps(result))
    (tmp_path / "settings.json").write_text(json.dumps({"key": "new"}))
    assert best_checkpoint(tmp_path, TASKS["RTE"]) == tmp_path / "seed1" / "checkpoint_best.pt"
    printed = capsys.readouterr().out
    assert printed.endswith("accuracy on dev 60.0, best of 2; left out, of other settings: 2\n")
    (tmp_path / "settings.json").write_text(json.dumps({"key": "newer"}))
    message = "no finished seed has the settings of the last finetune_glue.py: run that again"
    with pytest.raises(ValueError, match=message):
        best_checkpoint(tmp_path, TASKS["RTE"])
    (tmp_path / "settings.json").unlink()  # as of earlier versions
    assert best_checkpoint(tmp_path, TASKS["RTE"]) == tmp_path / "seed2" / "checkpoint_best.pt"


@pytest.mark.parametrize("text", ["{}", "[]", "no json"])
def test_a_task_json_of_somebody_else_is_refused(text, tmp_path):
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(ValueError, match=r"task.json is not a file of prepare_glue.py"):
        load_finetuned(tmp_path / "none.pt", tmp_path, TASKS["RTE"])


# --- the model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared miniature tasks."""
    folder = tmp_path_factory.mktemp("glue")
    write_glue(folder / "glue", n_test=70)
    write_tokenizer(folder)
    tokenizer = Tokenizer("sentencepiece", (folder / "spm.model",))
    specs = [TASKS[name] for name in ("RTE", "SST-2", "STS-B", "MNLI")]
    prepare(folder / "glue", folder / "data", specs, tokenizer, folder / "dict.txt")
    return folder / "data"


def finetuned_on(data, name, **options):
    """A small model with random weights, and its task."""
    spec = TASKS[name]
    n_classes = len(spec.labels) or 1
    cfg = PkmSentencePredictionConfig(data=str(data / name), num_classes=n_classes)
    given = dict(init_token=0, separator_token=2, no_shuffle=True, shorten_method="truncate",
                 regression_target=spec.is_regression, classification_head_name="head", seed=1,
                 max_positions=LONGEST)  # fmt: skip
    cfg = OmegaConf.merge(OmegaConf.structured(cfg), {**given, **options})
    task = PkmSentencePredictionTask.setup_task(cfg)
    model = build("resm_roberta_tiny", task.source_dictionary, max_positions=LONGEST)
    torch.manual_seed(2)
    model.register_classification_head("head", num_classes=n_classes)
    for parameter in model.parameters():
        parameter.data *= 6  # so that predictions differ
    if n_classes == 1:
        model.classification_heads["head"].out_proj.weight.data *= 0.02
        model.classification_heads["head"].out_proj.bias.data.fill_(0.8)
    return Finetuned(model.eval(), task, "head", spec, tuple(task.state_dict().get("labels", ())))


@pytest.mark.parametrize("options", [{}, {"separator_token": None}, {"init_token": None}])
@pytest.mark.parametrize("name", ["RTE", "SST-2"])
def test_inputs_are_what_the_model_was_finetuned_on(name, options, data):
    finetuned = finetuned_on(data, name, **options)
    dataset = finetuned.task.load_dataset("test")
    dictionary = finetuned.task.source_dictionary
    parts = [
        data_utils.load_indexed_dataset(str(data / name / f"input{i}" / "test"), dictionary)
        for i in range(1 + finetuned.spec.is_pair)
    ]
    n_shortened = 0
    for row in range(len(dataset)):
        example = finetuned.example([part[row] for part in parts])
        assert example.tokens.tolist() == dataset[row]["net_input.src_tokens"].tolist()
        n_shortened += example.is_shortened
        special = (options.get("init_token", 0) is not None) + (
            finetuned.spec.is_pair and options.get("separator_token", 2) is not None
        )
        assert example.is_shortened == (sum(len(p[row]) for p in parts) + special > LONGEST)
    assert n_shortened > 0 if finetuned.spec.is_pair else n_shortened < len(dataset)


def one_by_one(finetuned, split, n_rows):
    """What the head makes of each row alone, through fairseq's own data set."""
    dataset = finetuned.task.load_dataset(split)
    tokens = [dataset[row]["net_input.src_tokens"][None] for row in range(n_rows)]
    with torch.no_grad():
        heads = [finetuned.model(t, classification_head_name="head")[0][0] for t in tokens]
    return torch.stack(heads)


def test_predictions_are_those_of_each_row_alone_in_the_files_order(data):
    finetuned = finetuned_on(data, "MNLI")
    files = predict_tests(finetuned, data / "MNLI")
    assert list(files) == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    for text, split in zip(files.values(), ("test", "test1"), strict=True):
        classes = one_by_one(finetuned, split, 70).argmax(dim=-1).tolist()
        assert len(set(classes)) > 1
        labels = [finetuned.spec.labels[label] for label in classes]
        rows = [f"{row}\t{label}\n" for row, label in enumerate(labels)]
        assert text == "".join(["index\tprediction\n", *rows])


def test_a_test_file_of_another_length_than_its_indices_is_refused(data):
    finetuned, file = finetuned_on(data, "RTE"), data / "RTE/test.index"
    whole = file.read_text()
    file.write_text(whole + "70\n")
    try:
        with pytest.raises(ValueError, match=r"test\.index has 71 lines for 70 examples: prepare"):
            predict_tests(finetuned, data / "RTE")
    finally:
        file.write_text(whole)


def test_scores_are_in_the_tasks_range(data):
    finetuned = finetuned_on(data, "STS-B")
    (text,) = predict_tests(finetuned, data / "STS-B").values()
    found = [float(line.split("\t")[1]) for line in text.splitlines()[1:]]
    expected = (5 * one_by_one(finetuned, "test", 70)[:, 0]).clamp(0, 5).tolist()
    assert found == pytest.approx(expected, abs=6e-4)
    assert len(set(found)) > 10


def test_own_sentences_get_a_label_and_its_probability(data):
    finetuned = finetuned_on(data, "RTE")
    tokenizer = saved_tokenizer(data / "tokenizer")
    dictionary = load_dictionary(data / "RTE/input0/dict.txt")
    pairs = [("a cat sees", "the dog good"), ("", "a"), ("old " * 40, "tree")]
    lines = "".join(f"{a}\t{b}\n" for a, b in pairs).encode()
    answers = predict_lines(finetuned, io.BytesIO(lines), tokenizer)
    encode = tokenizer.load()
    for (a, b), answer in zip(pairs, answers, strict=True):
        symbols = ["<s>", *encode(a), "</s>", "</s>", *encode(b), "</s>"][:LONGEST]
        tokens = torch.tensor([[dictionary.index(symbol) for symbol in symbols]])
        with torch.no_grad():
            chances = finetuned.model(tokens, classification_head_name="head")[0][0].softmax(-1)
        label, share = answer.split("\t")
        assert label == finetuned.spec.labels[int(chances.argmax())]
        assert float(share) == pytest.approx(float(chances.max()), abs=6e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the input has no lines"),
        (b"a\tb\nc\n", "line 2 of the input: 1 columns, must be 2: 'c'"),
        (b"a\tb\tc\n", "line 1 of the input: 3 columns, must be 2"),
        (b"a\tb\n\xff\tb\n", "line 2 of the input: not UTF-8"),
    ],
)
def test_input_that_cannot_be_read(text, message, data):
    with pytest.raises(ValueError, match=message):
        predict_lines(
            finetuned_on(data, "RTE"), io.BytesIO(text), saved_tokenizer(data / "tokenizer")
        )


def test_outputs_that_are_no_numbers_are_an_error(data):
    finetuned = finetuned_on(data, "RTE")
    with torch.no_grad():
        finetuned.model.classification_heads["head"].out_proj.bias[0] = float("nan")
    with pytest.raises(ValueError, match="outputs are not finite"):
        predict_tests(finetuned, data / "RTE")


def test_long_inputs_are_counted(data, capsys):
    finetuned = finetuned_on(data, "SST-2")
    lines = b"old " * 40 + b"\n" + b"cat\n"
    predict_lines(finetuned, io.BytesIO(lines), saved_tokenizer(data / "tokenizer"))
    assert capsys.readouterr().err == (
        f"warning: the input: 1 of 2 inputs are longer than {LONGEST} tokens "
        "and were cut off at the end\n"
    )


def test_batches_do_not_change_outputs(data):
    finetuned = finetuned_on(data, "RTE")
    lengths = [3, LONGEST, 5, 1, 9] * 9
    examples = [Example(torch.arange(4, 4 + length) % 12 + 4, False) for length in lengths]
    together = finetuned.outputs(examples, "all")
    alone = torch.cat([finetuned.outputs([example], "one") for example in examples])
    assert torch.allclose(together, alone, atol=1e-4)
    assert together.std(dim=0).min() > 0.1


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"bpe": "none"}'])
def test_a_tokenizer_of_somebody_else_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer.json is not a file of prepare_glue.py"):
        saved_tokenizer(tmp_path)

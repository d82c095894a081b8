"""Preparation: what fairseq's sentence_prediction then reads is what the files say."""

import json
import multiprocessing
import shutil
from dataclasses import replace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode, get_encoder
from omegaconf import OmegaConf

from pkm_fairseq.experiments.data.prepare import load_sentencepiece, train_sentencepiece
from pkm_fairseq.experiments.glue import prepare as module
from pkm_fairseq.experiments.glue.data import prepared_tasks
from pkm_fairseq.experiments.glue.prepare import prepare
from pkm_fairseq.experiments.glue.read import read_task
from pkm_fairseq.experiments.glue.tasks import TASKS
from pkm_fairseq.experiments.glue.tokenizers import Tokenizer, saved_tokenizer
from pkm_fairseq.tasks.sentence_prediction import (
    PkmSentencePredictionConfig,
    PkmSentencePredictionTask,
)
from tests.glue_data import texts, write_glue, write_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Miniature tasks, and a tokenizer with its dictionary."""
    folder = tmp_path_factory.mktemp("glue")
    write_glue(folder / "glue")
    write_tokenizer(folder)
    return folder


def tokenizer_of(made):
    return Tokenizer("sentencepiece", (made / "spm.model",))


def run(made, out, names, **options):
    given = {"tokenizer": tokenizer_of(made), "dictionary": made / "dict.txt", **options}
    glue = given.pop("glue", made / "glue")
    prepare(glue, out, [TASKS[name] for name in names], **given)
    return out


def as_fairseq_reads(folder, split, n_classes):
    """src_tokens and targets of a split, in the order of the file."""
    cfg = PkmSentencePredictionConfig(data=str(folder), num_classes=n_classes)
    options = dict(init_token=0, separator_token=2, no_shuffle=True, seed=1)
    options.update(regression_target=n_classes == 1, classification_head_name="head")
    task = PkmSentencePredictionTask.setup_task(OmegaConf.merge(OmegaConf.structured(cfg), options))
    dataset = task.load_dataset(split)
    rows = [dataset[index] for index in range(len(dataset))]
    tokens = [row["net_input.src_tokens"].tolist() for row in rows]
    targets = [row["target"] for row in rows] if "target" in rows[0] else None
    return tokens, targets if n_classes == 1 else targets and torch.cat(targets).tolist()


def expected_tokens(texts, made):
    """<s> a </s></s> b </s>, by hand."""
    dictionary = Dictionary.load(str(made / "dict.txt"))
    encode = load_sentencepiece(made / "spm.model").encode
    joined = "</s></s>".join(" ".join(encode(text, out_type=str)) for text in texts)
    symbols = f"<s> {joined.replace('</s>', ' </s> ')} </s>".split()
    return [dictionary.index(symbol) for symbol in symbols]


@pytest.mark.parametrize(("name", "workers"), [("MNLI", 1), ("CoLA", 2), ("STS-B", 2), ("QNLI", 1)])
def test_fairseq_reads_the_rows_and_classes_of_the_files(name, workers, made, tmp_path):
    spec, out = TASKS[name], run(made, tmp_path, [name], workers=workers)
    splits, _ = read_task(made / "glue" / name, spec)
    for split, rows in splits.items():
        tokens, targets = as_fairseq_reads(out / name, split, len(spec.labels) or 1)
        assert tokens == [expected_tokens(texts, made) for texts in rows.texts]
        if split.startswith("test"):
            assert targets is None
            assert (out / name / f"{split}.index").read_text().split() == rows.indices
        elif spec.is_regression:
            scaled = torch.tensor([target / 5 for target in rows.targets], dtype=torch.float64)
            read = torch.tensor([target for (target,) in targets], dtype=torch.float64)
            assert torch.allclose(read, scaled, rtol=0, atol=1e-6)
        else:
            assert targets == rows.targets


def test_classes_keep_the_tasks_order_whatever_is_frequent(made, tmp_path):
    glue = tmp_path / "glue"
    (glue / "RTE").mkdir(parents=True)
    header, labels = "index\tsentence1\tsentence2\tlabel\n", ["not_entailment"] * 7 + ["entailment"]
    text = header + "".join(f"{i}\ta\tb\t{label}\n" for i, label in enumerate(labels))
    (glue / "RTE" / "train.tsv").write_text(text)
    (glue / "RTE" / "dev.tsv").write_text(header + text[len(header) :].splitlines()[-1] + "\n")
    out = run(made, tmp_path / "out", ["RTE"], glue=glue)
    assert (out / "RTE/label/dict.txt").read_text() == "entailment 1\nnot_entailment 1\n"
    assert as_fairseq_reads(out / "RTE", "train", 2)[1] == [1] * 7 + [0]


def test_what_is_written_beside_the_data(made, tmp_path):
    out = run(made, tmp_path, ["MNLI", "STS-B"])
    told = json.loads((out / "MNLI/task.json").read_text())
    assert told["splits"] == {"train": 60, "valid": 20, "valid1": 20, "test": 20, "test1": 20}
    assert (told["name"], told["is_pair"], told["metrics"]) == ("MNLI", True, ["accuracy"])
    assert told["labels"] == ["entailment", "neutral", "contradiction"]
    told = json.loads((out / "STS-B/task.json").read_text())
    assert (told["labels"], told["label_range"]) == ([], [0, 5])
    for part in ("input0", "input1"):
        assert (out / "MNLI" / part / "dict.txt").read_bytes() == (made / "dict.txt").read_bytes()
    saved = saved_tokenizer(out / "tokenizer")
    assert saved.bpe == "sentencepiece"
    assert saved.files[0].read_bytes() == (made / "spm.model").read_bytes()


# --- again --------------------------------------------------------------------------------------


def written_at(out, name):
    return (out / name / "task.json").stat().st_mtime_ns


def test_a_finished_task_is_skipped_until_its_files_change(made, tmp_path, capsys):
    glue = write_glue(tmp_path / "glue", ["RTE", "WNLI"])
    out = run(made, tmp_path / "out", ["RTE", "WNLI"], glue=glue)
    before = written_at(out, "RTE"), written_at(out, "WNLI")
    run(made, out, ["RTE", "WNLI"], glue=glue)
    assert (written_at(out, "RTE"), written_at(out, "WNLI")) == before
    with (glue / "RTE" / "dev.tsv").open("a") as file:
        file.write("20\ta\tb\tentailment\n")
    capsys.readouterr()
    run(made, out, ["RTE", "WNLI"], glue=glue)
    printed = capsys.readouterr().out
    assert "RTE: files or settings changed, prepared again" in printed
    assert "WNLI: already prepared" in printed
    assert written_at(out, "WNLI") == before[1]
    assert len(as_fairseq_reads(out / "RTE", "valid", 2)[1]) == 21
    spec = replace(TASKS["WNLI"], labels=("1", "0"))
    prepare(glue, out, [spec], tokenizer_of(made), made / "dict.txt")
    assert written_at(out, "WNLI") != before[1]


def test_what_was_interrupted_is_done_anew(made, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_write_targets", interrupt)
        run(made, tmp_path, ["RTE"])
    assert not (tmp_path / "RTE").exists()
    (tmp_path / "RTE.part" / "stale").write_text("of the interrupted one")
    run(made, tmp_path, ["RTE"])
    assert not (tmp_path / "RTE.part").exists()
    assert not (tmp_path / "RTE" / "stale").exists()
    assert as_fairseq_reads(tmp_path / "RTE", "valid", 2)[1]


def test_a_kill_while_old_data_are_replaced_does_not_stop_the_next_run(made, tmp_path, monkeypatch):
    run(made, tmp_path, ["RTE"])
    other = write_glue(tmp_path / "other", ["RTE"], seed=1)

    def killed(folder, **_):
        if (folder / "task.json").exists():  # a kill in the middle of removing it
            (folder / "task.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path, ["RTE"], glue=other)
    monkeypatch.undo()
    run(made, tmp_path, ["RTE"], glue=other)
    left = {folder.name for folder in tmp_path.iterdir()}
    assert left <= {"RTE", "tokenizer", "other", "RTE.old"}
    assert [task.name for task in prepared_tasks(tmp_path)] == ["RTE"]


def test_what_an_interruption_left_is_no_prepared_task(made, tmp_path):
    run(made, tmp_path, ["RTE"])
    shutil.copytree(tmp_path / "RTE", tmp_path / "RTE.part")  # killed just before the renaming
    assert [task.name for task in prepared_tasks(tmp_path)] == ["RTE"]


def test_a_bad_file_leaves_nothing_half_written_and_the_old_data(made, tmp_path):
    glue = write_glue(tmp_path / "glue", ["RTE"])
    out = run(made, tmp_path / "out", ["RTE"], glue=glue)
    before = written_at(out, "RTE")
    (glue / "RTE" / "test.tsv").write_text("nonsense")
    with pytest.raises(ValueError, match="must have one column"):
        run(made, out, ["RTE"], glue=glue)
    assert written_at(out, "RTE") == before


def test_a_folder_not_of_our_making_is_left_alone(made, tmp_path):
    glue = write_glue(tmp_path / "glue", ["RTE"])
    with pytest.raises(ValueError, match=r"without task\.json: prepare_glue\.py did not make it"):
        run(made, glue, ["RTE"], glue=glue)
    assert (glue / "RTE" / "train.tsv").is_file()


def test_a_task_json_of_somebody_else_is_refused(made, tmp_path):
    (tmp_path / "RTE").mkdir()
    for text in ("{}", "[]", "no json"):
        (tmp_path / "RTE/task.json").write_text(text)
        with pytest.raises(ValueError, match=r"RTE/task.json is not a file of prepare_glue.py"):
            run(made, tmp_path, ["RTE"])
        assert (tmp_path / "RTE/task.json").read_text() == text


def test_a_refused_call_leaves_no_tokenizer(made, tmp_path):
    glue = write_glue(tmp_path / "glue", ["RTE"])
    with pytest.raises(ValueError, match="WNLI: no such folder"):
        run(made, tmp_path / "out", ["RTE", "WNLI"], glue=glue)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_in_the_same_folder_is_refused(made, tmp_path):
    run(made, tmp_path / "out", ["RTE"])
    other = tmp_path / "spm.model"
    other.write_bytes(train_sentencepiece(texts(seed=1)[:50], 30))
    with pytest.raises(ValueError, match="holds another tokenizer"):
        run(made, tmp_path / "out", ["WNLI"], tokenizer=Tokenizer("sentencepiece", (other,)))


# --- tokenizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_known", [0, 1000])
def test_a_dictionary_of_another_tokenizer_is_a_warning(n_known, made, tmp_path, capsys):
    lines = [*(made / "dict.txt").read_text().splitlines()[:n_known], "x 1", "y 1"]
    (tmp_path / "dict.txt").write_text("".join(f"{line}\n" for line in lines))
    run(made, tmp_path / "out", ["RTE"], dictionary=tmp_path / "dict.txt")
    assert ("symbols are not in the dictionary" in capsys.readouterr().out) == (n_known == 0)


def gpt2_files(folder):
    """A byte-level BPE that merges "t h" and "th e", as GPT-2's files are laid out."""
    symbols = [*bytes_to_unicode().values(), "th", "the"]
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    (folder / "dict.txt").write_text("".join(f"{i} 1\n" for i in reversed(range(len(symbols)))))
    return folder / "encoder.json", folder / "vocab.bpe"


def test_gpt2s_byte_pairs(made, tmp_path):
    files = gpt2_files(tmp_path / "bpe")
    dictionary = tmp_path / "bpe/dict.txt"
    out = run(
        made,
        *(tmp_path / "out", ["SST-2"]),
        tokenizer=Tokenizer("gpt2", files),
        dictionary=dictionary,
        workers=2,
    )
    encoder, symbols = get_encoder(*map(str, files)), Dictionary.load(str(dictionary))
    rows = read_task(made / "glue/SST-2", TASKS["SST-2"])[0]["train"]
    tokens, _ = as_fairseq_reads(out / "SST-2", "train", 2)
    for (text,), found in zip(rows.texts, tokens, strict=True):
        assert found[0] == symbols.bos() and found[-1] == symbols.eos()
        assert symbols.unk() not in found
        assert encoder.decode([int(symbols[i]) for i in found[1:-1]]) == text
    assert any(symbols.index("257") in row for row in tokens)  # "the"
    saved = saved_tokenizer(out / "tokenizer")
    assert saved.load()(" the ") == ["257"]  # outer blanks are no part of the sentence


def test_a_symbol_that_gpt2s_file_lacks(made, tmp_path):
    files = gpt2_files(tmp_path / "bpe")
    files[0].write_text(json.dumps({"a": 0}))
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"encoder\.json has no '"):
            run(
                made,
                *(tmp_path / f"out{workers}", ["SST-2"]),
                tokenizer=Tokenizer("gpt2", files),
                workers=workers,
            )
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("text", ["", "[1, 2]", "no json"])
@pytest.mark.parametrize("bpe", ["sentencepiece", "gpt2"])
def test_files_that_are_no_tokenizer(bpe, text, made, tmp_path):
    (tmp_path / "a").write_text(text)
    (tmp_path / "b").write_text("")
    files = tuple(tmp_path / name for name in ("a", "b")[: 1 + (bpe == "gpt2")])
    with pytest.raises(ValueError, match=f"no {bpe} tokenizer in ") as error:
        run(made, tmp_path / "out", ["RTE"], tokenizer=Tokenizer(bpe, files))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        run(made, tmp_path / "out", ["RTE"], tokenizer=Tokenizer(bpe, (tmp_path / "none",)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [b"a 1\na 1\n", b"no count\n", b"\xff 1\n", None])
def test_files_that_are_no_dictionary(text, made, tmp_path):
    if text is not None:
        (tmp_path / "dict.txt").write_bytes(text)
    with pytest.raises(ValueError, match=f"dictionary {tmp_path / 'dict.txt'}") as error:
        run(made, tmp_path / "out", ["RTE"], dictionary=tmp_path / "dict.txt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()

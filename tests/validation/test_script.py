"""scripts/validate_faiss.py: verdicts, reports, and one clear line with status 2 for any error."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary

from pkm_fairseq.memory import memory as memory_module
from pkm_fairseq.models import capture as capture_module
from pkm_fairseq.models.capture import capture_inputs, load_model, pack
from tests.helpers import build, small_dictionary

from .models import N_TOKENS, SCRIPTS, load_script, save_model

SCRIPT = SCRIPTS / "validate_faiss.py"


def run(capsys: pytest.CaptureFixture[str], *options: Any) -> "tuple[int, str, str]":
    """Run the script in this process: status, stdout, stderr."""
    capsys.readouterr()
    status = load_script(SCRIPT).main([str(option) for option in options])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def good(folder: Path, *options: Any) -> List[Any]:
    checkpoint = ["--checkpoint", folder / "resm_roberta_tiny.pt"]
    return [*checkpoint, "--data", folder, "--queries", "60", *options]


def test_an_exact_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "report.json", tmp_path / "plot.png"
    status, out, err = run(
        *(capsys, *good(folder), "--json", file, "--plot", plot),
        *("--dtype", "bfloat16", "--dtype", "float16"),
    )
    assert status == 0
    verdict = out.splitlines()[-1]
    assert verdict.startswith("EXACT: 480 float32 queries, recall@k 1,")
    assert "; memory layers judged: 1, 2 (all) (" in verdict
    assert "bfloat16" in out and "float16" in out
    assert "100%" in err
    assert plot.read_bytes().startswith(b"\x89PNG")
    report = json.loads(file.read_text())
    assert report["exact"] is True
    assert (report["layers_judged"], report["layers_left_out"]) == ([1, 2], [])
    assert (report["text"], report["split"]) == (str(folder), "valid")
    assert report["dtype"] == "float32"
    assert report["seconds"] > 0
    assert set(report["versions"]) == {"python", "torch", "numpy", "faiss", "pkm_fairseq"}
    where = [(part["layer"], part["source"]) for part in report["layers"]]
    assert where == [(1, "text"), (1, "random"), (2, "text"), (2, "random")]
    for part in report["layers"]:
        sizes = ("queries", "n_keys", "n_slots", "k_dim", "v_dim", "knn")
        assert [part[name] for name in sizes] == [60, 5, 25, 4, 6, 3]
        assert [head["head"] for head in part["heads"]] == [0, 1]
        assert [cost["dtype"] for cost in part["reduced"]] == ["bfloat16", "float16"]


@pytest.mark.parametrize(("judged", "left_out"), [(1, 2), (2, 1)])
def test_layers_that_were_not_judged_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], judged: int, left_out: int
) -> None:
    file = tmp_path / "report.json"
    status, out, _ = run(capsys, *good(folder, "--layers", judged, "--json", file))
    assert status == 0
    assert f"memory layers judged: {judged}; NOT judged: {left_out} (" in out.splitlines()[-1]
    report = json.loads(file.read_text())
    assert {part["layer"] for part in report["layers"]} == {judged}
    assert (report["layers_judged"], report["layers_left_out"]) == ([judged], [left_out])


def test_a_model_that_is_not_exact(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    topk = memory_module.product_topk
    monkeypatch.setattr(
        memory_module, "product_topk", lambda q, keys, knn: topk(q, keys.flip(1), knn)
    )
    file = tmp_path / "report.json"
    status, out, _ = run(capsys, *good(folder, "--json", file))
    assert status == 1
    assert out.splitlines()[-1].startswith("NOT EXACT: ")
    assert json.loads(file.read_text())["exact"] is False


def test_text_and_data_of_the_same_words_give_the_same_inputs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for source in (["--data", folder], ["--text", folder / "text.txt"]):
        file = tmp_path / "report.json"
        checkpoint = ["--checkpoint", folder / "resm_roberta_tiny.pt"]
        assert run(capsys, *checkpoint, *source, "-n", "300", "--json", file)[0] == 0
        reports.append(json.loads(file.read_text())["layers"])
    assert reports[0] == reports[1]


def test_text_through_sentencepiece_is_text_tokenised_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, symbols, dict_file = tmp_path / "raw.txt", tmp_path / "symbols.txt", tmp_path / "d.txt"
    raw.write_text("".join(f"w{i % 15}, w{i % 7} w{i % 4}!\n" for i in range(60)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(raw), model_prefix=str(tmp_path / "spm"), vocab_size=17, minloglevel=2
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    pieces = [processor.encode(line, out_type=str) for line in raw.read_text().splitlines()]
    symbols.write_text("".join(" ".join(line) + "\n" for line in pieces))
    dictionary = Dictionary()
    for piece in sorted({piece for line in pieces for piece in line}):
        dictionary.add_symbol(piece)
    dictionary.save(str(dict_file))
    dictionary.add_symbol("<mask>")
    checkpoint = save_model(tmp_path, dictionary=dictionary)
    reports = []
    for source in ([symbols], [raw, "--sentencepiece-model", tmp_path / "spm.model"]):
        options = ["--checkpoint", checkpoint, "--dict", dict_file, "-n", "200", "--text", *source]
        assert run(capsys, *options, "--json", tmp_path / "report.json")[0] == 0
        reports.append(json.loads((tmp_path / "report.json").read_text())["layers"])
    assert reports[0] == reports[1]


# --- what is captured -------------------------------------------------------------------------


def test_the_inputs_of_real_tokens_are_captured_without_padding() -> None:
    dictionary = small_dictionary()
    model = build("resm_roberta_tiny", dictionary, memory_layers=[0, 2]).eval()
    sequences = [torch.randint(4, 19, (length,)) for length in (5, 11, 2, 8)]
    captured = capture_inputs(model, sequences, dictionary.pad(), 26)
    assert {index: tuple(x.shape) for index, x in captured.items()} == {0: (26, 16), 2: (26, 16)}
    one_by_one = [
        capture_inputs(model, [sequence], dictionary.pad(), len(sequence))[2]
        for sequence in sequences
    ]
    apart = (torch.cat(one_by_one)[:, None] - captured[2]).abs().amax(2)  # (26, 26)
    assert (apart.amin(0) < 1e-4).all() and (apart.amin(1) < 1e-4).all()
    with pytest.raises(ValueError, match="--queries is 27, must be at most 26"):
        capture_inputs(model, sequences, dictionary.pad(), 27)
    assert all(x.memory.observers == [x.reads] for x in model.memory_layers().values())


def test_a_finetuned_model_loads_without_its_classifier(tmp_path: Path) -> None:
    checkpoint = torch.load(save_model(tmp_path), weights_only=True)
    own = set(checkpoint["model"])
    model = build("resm_roberta_tiny")
    model.register_classification_head("sentence_classification_head", num_classes=2)
    checkpoint["model"] = model.state_dict()
    assert set(checkpoint["model"]) > own
    loaded = load_model(checkpoint, small_dictionary())
    assert set(loaded.state_dict()) == own


def test_options_that_were_not_given_are_those_of_the_architecture(tmp_path: Path) -> None:
    """A training with the bare ``--arch pkm_roberta`` stores them as None."""
    path = save_model(tmp_path, memory_layers=[1])
    checkpoint = torch.load(path, weights_only=False)
    options = checkpoint["cfg"]["model"]
    for name in ("memory_query_norm", "memory_query", "activation_fn", "dropout", "memory_v_dim"):
        options[name] = None
    loaded = load_model(checkpoint, small_dictionary())
    tokens = torch.randint(4, 19, (2, 9))
    whole = load_model(torch.load(path, weights_only=False), small_dictionary())
    with torch.no_grad():
        assert torch.equal(loaded(tokens)[0], whole(tokens)[0])


def test_lines_are_packed_without_losing_a_token() -> None:
    lines = [torch.arange(10 * n, 10 * n + length) for n, length in enumerate([3, 4, 9, 1, 2])]
    packed = list(pack(lines, 8, -1))
    assert [len(sequence) for sequence in packed] == [8, 8, 6]
    assert all(sequence[0] == -1 for sequence in packed)
    assert torch.equal(torch.cat([sequence[1:] for sequence in packed]), torch.cat(lines))


# --- bad input --------------------------------------------------------------------------------


class Evil:
    """What a checkpoint must not be able to run."""

    def __reduce__(self) -> Any:
        return print, ("code from the file was run",)


def edited(folder: Path, out: Path, edit: Callable[[Dict[str, Any]], None]) -> Path:
    checkpoint = torch.load(folder / "resm_roberta_tiny.pt", weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, out / "edited.pt")
    return out / "edited.pt"


def without_numbers(checkpoint: Dict[str, Any]) -> None:
    for name, tensor in checkpoint["model"].items():
        if name.endswith("memory.keys"):
            tensor.fill_(float("nan"))


def write(out: Path, name: str, content: bytes) -> Path:
    (out / name).write_bytes(content)
    return out / name


def with_model(file: Path, folder: Path) -> List[Any]:
    return ["--checkpoint", file, "--data", folder]


MISTAKES: Dict[str, "tuple[Callable[[Path, Path], List[Any]], str]"] = {
    "no file": (lambda f, out: with_model(out / "no.pt", f), "no.pt: no such file"),
    "no checkpoint": (
        lambda f, out: with_model(write(out, "x.pt", b"text"), f),
        "x.pt: not a readable checkpoint",
    ),
    "code in the checkpoint": (
        lambda f, out: with_model(
            write(out, "x.pt", pickle.dumps({"model": Evil()}, protocol=2)), f
        ),
        "x.pt: not a readable checkpoint",
    ),
    "no memory": (
        lambda f, out: with_model(save_model(out, "roberta"), f),
        "roberta.pt: the model has no memory",
    ),
    "a layer without memory": (
        lambda f, out: good(f, "--layers", "1,0"),
        "--layers names layer 0, which has no memory; layers with one: 1, 2",
    ),
    "more queries than the text gives": (
        lambda f, out: good(f, "--queries", "5000"),
        f"--queries is 5000, must be at most {N_TOKENS}",
    ),
    "no queries": (lambda f, out: good(f, "--queries", "0"), "--queries is 0, must be at least 1"),
    "knn larger than the index": (
        lambda f, out: with_model(
            edited(f, out, lambda c: c["cfg"]["model"].update(memory_knn=26)), f
        ),
        "knn is 26, must be at most n_keys, which is 5",
    ),
    "a parameter missing": (
        lambda f, out: with_model(
            edited(f, out, lambda c: c["model"].pop("encoder.lm_head.bias")), f
        ),
        "edited.pt does not fit its options: Error(s) in loading state_dict for PkmRobertaModel: "
        'Missing key(s) in state_dict: "encoder.lm_head.bias"',
    ),
    "no options": (
        lambda f, out: with_model(edited(f, out, lambda c: c.pop("cfg")), f),
        "edited.pt holds no options of a pkm_roberta model",
    ),
    "keys that are no numbers": (
        lambda f, out: [
            *("--checkpoint", edited(f, out, without_numbers), "--data", f, "--queries", "60")
        ],
        "20 of 20 sub-keys are not finite",
    ),
    "another dictionary": (
        lambda f, out: [*good(f)[:2], "--data", write(out, "dict.txt", b"w0 1\nw1 1\n").parent],
        "was trained with another dictionary (20 symbols, this one has 7)",
    ),
    "another order of the dictionary": (
        lambda f, out: [
            *(*good(f)[:2], "--data"),
            write(
                *(out, "dict.txt"),
                b"\n".join(reversed((f / "dict.txt").read_bytes().split(b"\n")[:-1])),
            ).parent,
        ],
        "was trained with another dictionary",
    ),
    "no data": (lambda f, out: [*good(f)[:2], "--data", out / "no"], "no dictionary at"),
    "no split": (lambda f, out: good(f, "--split", "test"), "has no split test"),
    "a split of a text": (
        lambda f, out: [*good(f)[:2], "--text", f / "text.txt", "--split", "valid"],
        "--split has no effect with --text",
    ),
    "a dictionary beside the one of the data": (
        lambda f, out: good(f, "--dict", f / "dict.txt"),
        "--dict has no effect with --data",
    ),
    "no text": (lambda f, out: [*good(f)[:2], "--text", out / "no"], "No such file"),
    "text that is not UTF-8": (
        lambda f, out: [*good(f)[:2], "--text", write(out, "bad.txt", b"w1 \xff\xfe")],
        "bad.txt is not UTF-8",
    ),
    "text of unknown words": (
        lambda f, out: [*good(f)[:2], "--text", write(out, "raw.txt", b"some words here")],
        "3 of 4 symbols are not in the dictionary; tokenize it",
    ),
    "empty text": (
        lambda f, out: [*good(f)[:2], "--text", write(out, "empty.txt", b"\n")],
        "--queries is 1000, must be at most 0",
    ),
    "no tokenizer": (
        lambda f, out: [*good(f)[:2], "--text", f / "text.txt", "--spm", out / "no.model"],
        "no.model: no such file",
    ),
    "no sentencepiece model": (
        lambda f, out: [*good(f)[:2], "--text", f / "text.txt", "--spm", f / "text.txt"],
        "text.txt: not a sentencepiece model",
    ),
    "no folder for the report": (
        lambda f, out: good(f, "--json", out / "no/report.json"),
        "no/report.json must be a file in a folder that exists",
    ),
    **{
        f"a folder for {option}": (
            lambda f, out, option=option: good(f, option, out),
            " must be a file in a folder that exists",
        )
        for option in ("--json", "--plot")
    },
    "a plot of no known kind": (
        lambda f, out: good(f, "--plot", out / "p.xyz"),
        "p.xyz, must end in .png, .svg, .pdf",
    ),
    "a plot of no kind": (lambda f, out: good(f, "--plot", out / "p"), "/p, must end in .png"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_status_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    options, message = MISTAKES[mistake]
    arguments = options(folder, tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert "code from the file was run" not in out + err
    assert "EXACT" not in out
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("validate_faiss: error: ")
    assert message in last


@pytest.mark.parametrize("name", ["", "no/report.json", "p.xyz"])
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_files_that_cannot_be_written_are_refused_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any,
    option: str, name: str
) -> None:  # fmt: skip
    def begin(*_: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(capture_module, "capture", begin)
    status, _, err = run(capsys, *good(folder, option, tmp_path / name))
    assert status == 2
    assert ("the work began" in err) == ((option, name) == ("--json", "p.xyz"))


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (RuntimeError("x"), 2, "RuntimeError: x"),
        (SystemExit("x"), 2, "validate_faiss: error: x"),
        (SystemExit(0), 2, "validate_faiss: error: 0"),
        (SystemExit(1), 2, "validate_faiss: error: 1"),
        (MemoryError(), 2, "MemoryError"),
        (AssertionError(), 2, "AssertionError"),
        (KeyboardInterrupt(), 130, "validate_faiss: interrupted"),
    ],
    ids=repr,
)
def test_nothing_that_crashes_looks_like_a_verdict(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any,
    error: BaseException, code: int, last: str
) -> None:  # fmt: skip
    def crash(*args: Any) -> None:
        raise error

    monkeypatch.setattr(memory_module.ProductKeyMemory, "search", crash)
    status, out, err = run(capsys, *good(folder))
    assert status == code
    assert "EXACT" not in out
    assert err.splitlines()[-1] == last
    assert ("Traceback" in err) != last.startswith("validate_faiss: ")


def command(*options: Any, code: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the script as a user does; ``code`` runs first in its process."""
    start = f"import runpy, sys\n{code}\nsys.argv[0] = {str(SCRIPT)!r}\n"
    start += f"sys.path.insert(0, {str(SCRIPTS)!r})\n"
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    argv = [sys.executable, "-c", start, *map(str, options)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_faiss_missing(folder: Path) -> None:
    done = command(*good(folder), code="sys.modules['faiss'] = None")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("validate_faiss: error: faiss cannot be imported")
    assert line.endswith("install it with: pip install faiss-cpu")


def test_torch_missing(folder: Path) -> None:
    assert command(*good(folder), code="sys.modules['torch'] = None").returncode == 2


@pytest.mark.parametrize("options", [[], ["--checkpoint", "x"], ["--layers", "a"]])
def test_a_wrong_command_line(options: List[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_script(SCRIPT).main(options)
    assert stopped.value.code == 2


def test_the_real_command(folder: Path) -> None:
    done = command(*good(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("EXACT")

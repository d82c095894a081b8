"""Miniature GLUE folders in the layout of the official download, for tests."""

import random
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from pkm_fairseq.experiments.data.prepare import load_sentencepiece, train_sentencepiece

WORDS = "the a cat dog bird sees likes eats old red small big house tree runs and"
GOOD, BAD = "good", "bad"  # the last word of a sentence tells the label

# columns of files with labels (without the label), and of test files
MNLI = (
    "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|"
    "sentence1_parse|sentence2_parse|sentence1|sentence2"
)
STS_B = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"
MRPC = "#1 ID|#2 ID|#1 String|#2 String"
PAIR = "index|sentence1|sentence2"
COLUMNS = {
    "CoLA": ("", "index|sentence"),
    "SST-2": ("sentence", "index|sentence"),
    "MRPC": (MRPC, f"index|{MRPC}"),
    "STS-B": (STS_B, STS_B),
    "QQP": ("id|qid1|qid2|question1|question2", "id|question1|question2"),
    "MNLI": (MNLI, MNLI),
    "QNLI": ("index|question|sentence", "index|question|sentence"),
    "RTE": (PAIR, PAIR),
    "WNLI": (PAIR, PAIR),
}
LABEL_COLUMN = {"STS-B": "score", "QQP": "is_duplicate", "MNLI": "gold_label"}
SENTENCE_COLUMNS = {"sentence", "sentence1", "question1", "question", "#1 String"}
SECOND_COLUMNS = {"sentence2", "question2", "#2 String"}


def write_glue(
    folder: Path,
    tasks: Optional[Sequence[str]] = None,
    n_train: int = 60,
    n_dev: int = 20,
    n_test: int = 20,
    seed: int = 0,
) -> Path:
    """Write miniature tasks; the word that ends an example tells its label."""
    for task in tasks or COLUMNS:
        rng = random.Random(f"{task} {seed}")
        here = folder / task
        here.mkdir(parents=True)
        both = ["_matched", "_mismatched"] if task == "MNLI" else [""]
        write_tsv(here / "train.tsv", _rows(task, "train", n_train, rng))
        for suffix in both:
            write_tsv(here / f"dev{suffix}.tsv", _rows(task, "dev", n_dev, rng))
            write_tsv(here / f"test{suffix}.tsv", _rows(task, "test", n_test, rng))
    return folder


def write_tsv(file: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write rows of columns, unquoted."""
    text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8", newline="")


def texts(n: int = 200, seed: int = 9) -> List[str]:
    """Sentences of the miniature tasks' words, to train a tokenizer on."""
    rng = random.Random(seed)
    return [_sentence(rng, rng.random()) for _ in range(n)]


def write_tokenizer(folder: Path, vocabulary: int = 60) -> Path:
    """Write spm.model, and dict.txt with its pieces, trained on the miniature tasks' words."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "spm.model"
    model.write_bytes(train_sentencepiece(texts(), vocabulary))
    tokenizer = load_sentencepiece(model)
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
    symbols = "".join(f"{piece} 1\n" for piece in pieces if not piece.startswith("<"))
    (folder / "dict.txt").write_text(symbols, encoding="utf-8")
    return folder


def _sentence(rng: random.Random, share: float) -> str:
    words = [rng.choice(WORDS.split()) for _ in range(rng.randint(3, 8))]
    return " ".join([*words, GOOD if share >= 0.5 else BAD])


def _rows(task: str, kind: str, n: int, rng: random.Random) -> List[List[str]]:
    labelled, test = (columns.split("|") for columns in COLUMNS[task])
    if task == "CoLA" and kind != "test":
        return [_cola_row(rng) for _ in range(n)]
    header = test if kind == "test" else labelled
    many = ["label1"] if kind == "train" else [f"label{i}" for i in range(1, 6)]
    more = many if task == "MNLI" and kind != "test" else []
    rows = []
    for index in range(n):
        share = rng.random()
        row = [_cell(column, index, share, rng) for column in header] + ["-"] * len(more)
        rows.append(row if kind == "test" else _labelled(task, row, _label(task, share)))
    names = header + more
    if kind != "test":
        column = LABEL_COLUMN.get(task, "Quality" if task == "MRPC" else "label")
        names = _labelled(task, names, column)
    return [names, *rows]


def _cola_row(rng: random.Random) -> List[str]:
    share = rng.random()
    return ["gj04", str(int(share >= 0.5)), "" if share >= 0.5 else "*", _sentence(rng, share)]


def _labelled(task: str, row: List[str], label: str) -> List[str]:
    return [label, *row] if task == "MRPC" else [*row, label]


def _label(task: str, share: float) -> str:
    if task == "STS-B":
        return f"{5 * share:.3f}"
    names: Dict[str, Sequence[str]] = {
        "MNLI": ("contradiction", "neutral", "entailment"),
        "QNLI": ("not_entailment", "entailment"),
        "RTE": ("not_entailment", "entailment"),
    }
    labels = names.get(task, ("0", "1"))
    return labels[min(int(share * len(labels)), len(labels) - 1)]


def _cell(column: str, index: int, share: float, rng: random.Random) -> str:
    if column in SENTENCE_COLUMNS or column in SECOND_COLUMNS:
        return _sentence(rng, share)
    return str(index) if column in {"index", "id"} else f"{column}-{index}"

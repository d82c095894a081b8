"""Reading GLUE's files: every row is read, or reported with its file and line."""

import re
from dataclasses import replace

import pytest

from pkm_fairseq.experiments.glue.read import read_file, read_task
from pkm_fairseq.experiments.glue.tasks import TASKS, SplitFile
from tests.glue_data import write_glue, write_tsv

# where sentences and label are by position, from 0: in labelled files, and in test files
POSITIONS = {
    "CoLA": ([3], 1, [1]),
    "SST-2": ([0], 1, [1]),
    "MRPC": ([3, 4], 0, [3, 4]),
    "STS-B": ([7, 8], 9, [7, 8]),
    "QQP": ([3, 4], 5, [1, 2]),
    "MNLI": ([8, 9], -1, [8, 9]),
    "QNLI": ([1, 2], 3, [1, 2]),
    "RTE": ([1, 2], 3, [1, 2]),
    "WNLI": ([1, 2], 3, [1, 2]),
}
HEADER = b"index\tsentence1\tsentence2\tlabel\n"
GOOD = b"0\ta\tb\tentailment\n"


def naive(file, header, *positions):
    """Columns of a file, by position."""
    rows = [line.split("\t") for line in file.read_text().splitlines()[header:]]
    return [tuple(row[at] for at in positions) for row in rows]


def rte(tmp_path, text, split="train"):
    """Read a file of RTE."""
    file = tmp_path / f"{split}.tsv"
    file.write_bytes(text)
    return read_file(file, TASKS["RTE"].files[split].columns, TASKS["RTE"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_blank_lines_at_the_end_are_no_rows(split, tmp_path):
    header, row = (HEADER, GOOD) if split == "train" else (b"index\ta\tb\n", b"0\ta\tb\n")
    header = header.replace(b"a\tb", b"sentence1\tsentence2")
    rows = rte(tmp_path, header + row + b"\n\r\n", split)
    assert (rows.texts, rows.left_out) == ([("a", "b")], [])


@pytest.mark.parametrize("name", TASKS)
def test_columns_and_labels_of_the_official_files(name, tmp_path):
    spec, folder = TASKS[name], write_glue(tmp_path, [name]) / name
    splits, _ = read_task(folder, spec)
    assert list(splits) == list(spec.files)
    texts, label, test_texts = POSITIONS[name]
    for split, rows in splits.items():
        file = folder / spec.files[split].name
        if split.startswith("test"):
            assert rows.texts == naive(file, 1, *test_texts)
            assert rows.indices == [str(i) for i in range(20)]
            assert not rows.targets
            continue
        header = name != "CoLA"
        assert rows.texts == naive(file, header, *texts)
        labels = [row[0] for row in naive(file, header, label)]
        if spec.is_regression:
            assert rows.targets == [float(score) for score in labels]
        else:
            assert [spec.labels[target] for target in rows.targets] == labels
            assert set(rows.targets) == set(range(len(spec.labels)))


def test_a_number_of_rows_that_is_not_glues_is_a_warning(tmp_path):
    _, notes = read_task(write_glue(tmp_path, ["MNLI"]) / "MNLI", TASKS["MNLI"])
    assert "MNLI train: 60 rows, GLUE's has 392,702" in notes
    assert "MNLI valid1: 20 rows, GLUE's has 9,832" in notes
    assert len(notes) == 5
    spec = TASKS["RTE"]
    sizes = dict(zip(("train", "valid", "test"), (60, 20, 20), strict=True))
    files = {split: replace(spec.files[split], rows=rows) for split, rows in sizes.items()}
    folder = write_glue(tmp_path / "exact", ["RTE"]) / "RTE"
    assert read_task(folder, replace(spec, files=files))[1] == []


def test_quotes_and_odd_line_separators_are_text(tmp_path):
    """A quote opens nothing, and only a line feed ends a line; BOM and CRLF are taken off."""
    odd = '"a \x0b\x1c\x85\u2028 "" b'
    rows = f'0\t{odd}\t"b\tentailment\r\n1\t c \td"\tnot_entailment\r\n2\te\tf\tentailment'
    text = b"\xef\xbb\xbf" + HEADER.replace(b"\n", b"\r\n") + rows.encode()
    read = rte(tmp_path, text)
    assert read.texts == [(odd, '"b'), (" c ", 'd"'), ("e", "f")]
    assert read.targets == [0, 1, 0]
    assert not read.left_out


BAD_ROWS = {
    "too few columns": (b"1\ta\tentailment", "3 columns, must be 4: '1"),
    "too many columns": (b"1\ta\tb\tc\tentailment", "5 columns, must be 4"),
    "empty line": (b"", "1 columns, must be 4: ''"),
    "unknown label": (b"1\ta\tb\tyes", "label is 'yes', must be one of entailment, not_entailment"),
    "label with a blank": (b"1\ta\tb\tentailment ", "label is 'entailment '"),
    "empty sentence": (b"1\ta\t \tentailment", "an empty sentence"),
    "not UTF-8": (b"1\ta\xff\tb\tentailment", "not UTF-8"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_malformed_row_is_left_out_and_reported_with_its_line(bad, tmp_path):
    row, message = BAD_ROWS[bad]
    read = rte(tmp_path, HEADER + GOOD + row + b"\n" + GOOD)
    assert read.texts == [("a", "b")] * 2
    assert read.targets == [0, 0]
    assert read.n_rows == 3
    (problem,) = read.left_out
    assert problem.startswith(f"{tmp_path / 'train.tsv'}:3: {message}")


@pytest.mark.parametrize(("n_good", "allowed"), [(100, 5), (7992, 8)])
def test_more_than_a_handful_stops_with_the_first_ones(n_good, allowed, tmp_path):
    bad = b"1\ta\tb\tyes\n"
    assert len(rte(tmp_path, HEADER + GOOD * n_good + bad * allowed).left_out) == allowed
    with pytest.raises(ValueError, match=f"{allowed + 1} of {n_good + allowed + 1} rows") as error:
        rte(tmp_path, HEADER + GOOD * n_good + bad * (allowed + 1))
    first = [f"train.tsv:{n_good + at}: label is 'yes'" for at in (2, 3, 4)]
    assert re.findall(r"train.tsv:\d+: label is 'yes'", str(error.value)) == first


@pytest.mark.parametrize("bad", [*(bad for bad in BAD_ROWS if "label" not in bad), "index twice"])
def test_a_test_file_never_loses_a_row(bad, tmp_path):
    row, message = BAD_ROWS.get(bad, (b"0\ta\tb\t-", "index 0 occurs twice"))
    cells = row.split(b"\t")
    unlabelled = b"\t".join(cells[:-1] if len(cells) > 1 else cells)
    text = b"index\tsentence1\tsentence2\n0\ta\tb\n" + unlabelled + b"\n2\ta\tb\n"
    if bad == "empty sentence":
        read = rte(tmp_path, text, "test")
        assert read.texts == [("a", "b"), ("a", " "), ("a", "b")]
        assert read.indices == ["0", "1", "2"]
        return
    with pytest.raises(ValueError, match=message.split(",")[0][2:]) as error:
        rte(tmp_path, text, "test")
    where = "test.tsv" if bad == "index twice" else "test.tsv:3"
    assert str(error.value).startswith(f"{tmp_path / where}: ")


@pytest.mark.parametrize("score", ["5.1", "-0.1", "nan", "inf", "", "two"])
def test_a_score_out_of_range_is_left_out(score, tmp_path):
    folder = write_glue(tmp_path, ["STS-B"]) / "STS-B"
    lines = (folder / "train.tsv").read_text().splitlines()
    cells = lines[7].split("\t")
    lines[7] = "\t".join([*cells[:-1], score])
    (folder / "train.tsv").write_text("\n".join(lines))
    splits, notes = read_task(folder, TASKS["STS-B"])
    assert len(splits["train"].texts) == len(splits["train"].targets) == 59
    (note,) = [note for note in notes if "left out" in note]
    assert f"train.tsv:8: score is '{score}', must be a number in 0..5" in note


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must have one column 'sentence1', its first line is ''"),
        (b"a\tb\n", r"must have one column 'sentence1', its first line is 'a\\tb'"),
        (HEADER.replace(b"label", b"index"), "must have one column 'label'"),
        (HEADER.replace(b"index", b"label"), "must have one column 'label'"),
        (HEADER, "holds no example"),
        (HEADER + b"bad\n" * 2, "2 of 2 rows are malformed"),
    ],
)
def test_a_file_that_is_not_the_tasks(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        rte(tmp_path, text)
    assert str(tmp_path / "train.tsv") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_test_file_is_a_note_and_others_an_error(tmp_path):
    folder = write_glue(tmp_path, ["CoLA"]) / "CoLA"
    (folder / "test.tsv").unlink()
    splits, notes = read_task(folder, TASKS["CoLA"])
    assert list(splits) == ["train", "valid"]
    assert "CoLA: no test.tsv, so no predictions for it" in notes
    (folder / "dev.tsv").unlink()
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'dev.tsv'}: no such file")):
        read_task(folder, TASKS["CoLA"])


def test_rows_without_an_index_column_are_counted(tmp_path):
    columns = replace(TASKS["RTE"].files["test"].columns, index=None)
    file = SplitFile("test.tsv", columns)
    (tmp_path / "test.tsv").write_text("sentence1\tsentence2\na\tb\nc\td\n")
    assert read_file(tmp_path / file.name, columns, TASKS["RTE"]).indices == ["0", "1"]


# --- MRPC as Microsoft serves it --------------------------------------------------------------


@pytest.mark.parametrize("has_ids", [True, False])
def test_mrpc_as_it_is_downloaded(has_ids, tmp_path):
    official = write_glue(tmp_path, ["MRPC"]) / "MRPC"
    header, *train = [
        line.split("\t") for line in (official / "train.tsv").read_text().splitlines()
    ]
    raw = tmp_path / "raw"
    raw.mkdir()
    write_tsv(raw / "msr_paraphrase_train.txt", [["\ufeff" + header[0], *header[1:]], *train])
    write_tsv(raw / "msr_paraphrase_test.txt", [header, *train[:9]])
    dev = train[1::7] if has_ids else train[-6:]
    if has_ids:
        write_tsv(raw / "dev_ids.tsv", [row[1:3] for row in dev])
    splits, notes = read_task(raw, TASKS["MRPC"])
    rest = [row for row in train if row not in dev]
    for split, rows in (("train", rest), ("valid", dev), ("test", train[:9])):
        assert splits[split].texts == [(row[3], row[4]) for row in rows]
    assert splits["valid"].targets == [int(row[0]) for row in dev]
    assert splits["test"].indices == [str(i) for i in range(9)]
    assert any("no dev_ids.tsv, so the last tenth" in note for note in notes) != has_ids


def raw_mrpc(folder, dev_ids=None):
    """Nineteen pairs and a malformed row, in line 12."""
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    rows = [[i % 2, i, 100 + i, "a", "b"] for i in range(20)]
    rows[10] = ["broken"]
    write_tsv(folder / "msr_paraphrase_train.txt", [header, *rows])
    if dev_ids:
        write_tsv(folder / "dev_ids.tsv", dev_ids)
    return folder


@pytest.mark.parametrize("dev_ids", [None, [[5, 105]]])
def test_a_malformed_pair_of_mrpc_is_in_one_split_only(dev_ids, tmp_path):
    splits, notes = read_task(raw_mrpc(tmp_path, dev_ids), TASKS["MRPC"])
    assert sum(rows.n_rows for rows in splits.values()) == 20
    (note,) = [note for note in notes if "row left out" in note]
    assert "msr_paraphrase_train.txt:12: 1 columns, must be 5: 'broken'" in note


def test_a_list_of_dev_pairs_that_names_none_or_all_is_refused(tmp_path):
    folder = raw_mrpc(tmp_path, [[9999, 1]])
    with pytest.raises(ValueError, match=r"no pair of .*dev_ids.tsv is in msr_paraphrase_train"):
        read_task(folder, TASKS["MRPC"])
    write_tsv(folder / "dev_ids.tsv", [[i, 100 + i] for i in range(20)])
    with pytest.raises(ValueError, match=r"msr_paraphrase_train.txt leaves no pair for train"):
        read_task(folder, TASKS["MRPC"])

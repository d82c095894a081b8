"""Deltas: the rows of values that a finetuning moved, put in and taken out to the bit."""

import itertools
import logging
import runpy
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pkm_fairseq.analysis.moved import overlap
from pkm_fairseq.memory.archive import write_rows
from pkm_fairseq.memory.delta import check_applied, combine, load_delta, make_delta
from pkm_fairseq.memory.observe.slot_counts import CountsFile, SlotCounts, save_counts
from tests.helpers import small_dictionary
from tests.unit.test_glue_finetune import save

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "memory_delta.py"
VALUES = "encoder.sentence_encoder.layers.1.memory.values.weight"
N_SLOTS = 25


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint, as fairseq saves it."""
    file = tmp_path_factory.mktemp("delta") / "base.pt"
    save(file)
    return file


def finetuned(base, file, rows, change=0.5, **others):
    """A copy of a checkpoint with other values in some rows."""
    checkpoint = torch.load(base, weights_only=True)
    model = checkpoint["model"] = {name: x.clone() for name, x in checkpoint["model"].items()}
    if rows:
        model[VALUES][rows] += change
        model[VALUES.replace("memory.values.weight", "reads.last_read")][rows] = 7.0
    model.update(others)
    torch.save(checkpoint, file)
    return file


@pytest.fixture
def delta_of(base, tmp_path, script):
    """Makes the delta of a finetuning that moved some rows."""

    def make(rows, change=0.5):
        made = tmp_path / f"{'-'.join(map(str, rows))}.delta"
        after = finetuned(base, tmp_path / f"{made.stem}.pt", rows, change)
        assert script("make", base, after, "--out", made)[0] == 0
        return made, after

    return make


@pytest.fixture
def script(monkeypatch, capfd):
    """Runs the script in this process: its status, and what it printed."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(logging, "disable", lambda level: None)  # it would last
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*options):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, options)])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            print(end.code, file=sys.stderr)
        printed = capfd.readouterr()
        return status, printed.out + printed.err

    return run


def values_of(file):
    return torch.load(file, weights_only=True)["model"][VALUES]


def test_a_delta_holds_the_moved_rows_and_no_more(base, delta_of):
    file, after = delta_of([3, 11])
    delta = load_delta(file)
    assert list(delta.tables) == [VALUES]
    rows = delta.tables[VALUES]
    assert rows.slots.tolist() == [3, 11]
    assert torch.equal(rows.before, values_of(base)[[3, 11]])
    assert torch.equal(rows.after, values_of(after)[[3, 11]])
    assert delta.about["finetuned"] == str(after)
    assert file.stat().st_size < base.stat().st_size / 3


def test_apply_gives_the_finetuned_values_and_revert_the_bytes_of_the_base(
    base, delta_of, script, tmp_path
):
    delta, after = delta_of([0, 7, 24])
    applied, reverted = tmp_path / "applied.pt", tmp_path / "reverted.pt"
    assert script("apply", base, delta, "--out", applied)[0] == 0
    assert torch.equal(values_of(applied), values_of(after))
    was, now = (torch.load(file, weights_only=True) for file in (base, applied))
    for name, tensor in was["model"].items():
        assert name == VALUES or torch.equal(now["model"][name], tensor)
    assert zipfile.ZipFile(applied).testzip() is None  # check sums are right
    assert applied.read_bytes() != base.read_bytes()
    assert script("revert", applied, delta, "--out", reverted)[0] == 0
    assert reverted.read_bytes() == base.read_bytes()
    # in place, too; and of the checkpoint of the finetuning itself, whose read times stay
    assert script("revert", applied, delta, "--out", applied)[0] == 0
    assert applied.read_bytes() == base.read_bytes()
    assert script("revert", after, delta, "--out", reverted)[0] == 0
    assert torch.equal(values_of(reverted), values_of(base))


def test_deltas_of_other_rows_stack_and_of_the_same_rows_add_up_if_so_asked(
    base, delta_of, script, tmp_path
):
    one, other, third = delta_of([1, 2])[0], delta_of([3])[0], delta_of([2, 4], 0.25)[0]
    out, back = tmp_path / "out.pt", tmp_path / "back.pt"
    assert script("apply", base, one, other, "--out", out)[0] == 0
    expected = values_of(base).clone()
    expected[[1, 2, 3]] += 0.5
    assert torch.equal(values_of(out), expected)
    status, said = script("apply", base, one, third, "--out", back)
    assert status == 1 and "two deltas both change 1 rows of" in said and "such as 2" in said
    assert not back.exists()
    assert script("apply", base, one, other, third, "--sum", "--out", out)[0] == 0
    expected[[2, 4]] += 0.25
    torch.testing.assert_close(values_of(out), expected, rtol=0, atol=1e-6)
    exact = [1, 3, 4]  # moved by one delta alone
    assert torch.equal(values_of(out)[exact], expected[exact])
    assert script("revert", out, third, one, other, "--sum", "--out", back)[0] == 0
    assert back.read_bytes() == base.read_bytes()


def test_what_does_not_belong_together_is_refused_in_one_line(base, delta_of, script, tmp_path):
    delta, after = delta_of([5, 6])
    other = finetuned(base, tmp_path / "other.pt", [9])
    keys = VALUES.replace("values.weight", "keys")
    torn = finetuned(base, tmp_path / "torn.pt", [9], **{keys: torch.zeros(2, 2, 5, 2)})
    wide = finetuned(base, tmp_path / "wide.pt", [9], **{keys: torch.zeros(3)})
    new = finetuned(base, tmp_path / "new.pt", [9], **{"x.weight": torch.zeros(3)})
    unversioned = tmp_path / "unversioned"
    torch.save({"kind": "pkm_fairseq delta"}, unversioned)
    out = tmp_path / "out"
    for options, said in (
        (["apply", other, delta], ") is not the delta's base ("),
        (["apply", after, delta], ") is not the delta's base ("),
        (["revert", base, delta], f"row 5 of {VALUES} differs from the delta's row"),
        (["revert", other, delta], f"row 5 of {VALUES} differs from the delta's row"),
        (["make", base, base], "no value differs"),
        (["make", base, torn], f"{keys} differs: a delta holds only rows of values"),
        (["make", base, wide], f"{keys} is torch.float32 (3,) in the finetuned model, must be"),
        (["make", base, new], "x.weight is in one of the two models only"),
        (["make", base, tmp_path / "none.pt"], "none.pt: no such file"),
        (["apply", base, base], f"{base} holds no delta"),
        (["apply", base, unversioned], f"{unversioned}: its version is None, must be 1"),
        (["apply", base, tmp_path / "none"], "none: no such file"),
    ):
        status, printed = script(*options, "--out", out)
        lines = [line for line in printed.splitlines() if line.strip()]
        assert status == 1 and len(lines) == 1 and said in lines[0], (options, printed)
        assert not out.exists()
    extra = finetuned(base, tmp_path / "extra.pt", [5, 6, 9])
    status, said = script("revert", extra, delta, "--out", out)  # something else has moved, too
    assert status == 1 and ") is not the delta's base (" in said


def test_heads_are_no_part_of_a_delta_and_that_is_said(base, script, tmp_path):
    head = {"classification_heads.new.dense.weight": torch.zeros(2)}
    after = finetuned(base, tmp_path / "after.pt", [4], **head)
    status, said = script("make", base, after, "--out", tmp_path / "delta")
    assert status == 0 and "1 tensors of classification heads are left out" in said
    assert list(load_delta(tmp_path / "delta").tables) == [VALUES]


def test_deltas_are_listed(base, delta_of, script):
    one, other = delta_of([1, 2])[0], delta_of([3])[0]
    status, said = script("list", one, other)
    assert status == 0 and load_delta(one).base[:12] in said
    norm = (2 * 16 * 0.5**2) ** 0.5
    assert f"{norm:.4g}" in said


def test_a_table_that_layers_share_counts_once(script, tmp_path):
    options = {"memory_layers": [0, 2], "memory_share_values": True}
    base = save(tmp_path / "base.pt", **options)
    names = [VALUES.replace("layers.1", f"layers.{layer}") for layer in (0, 2)]
    state = torch.load(base, weights_only=True)["model"]
    moved = state[names[0]].clone()
    moved[[3, 11]] += 0.5
    after = finetuned(base, tmp_path / "after.pt", [], **dict.fromkeys(names, moved))
    out, applied = tmp_path / "delta", tmp_path / "applied.pt"
    status, said = script("make", base, after, "--out", out)
    assert status == 0 and "delta: layers 0, 2: 2 rows," in said
    tables = load_delta(out).tables
    assert [tables[name].after.data_ptr() for name in names] == [
        tables[names[0]].after.data_ptr()
    ] * 2
    status, said = script("list", out)
    assert status == 0 and "0, 2" in said
    status, said = script("apply", base, out, "--out", applied)
    assert status == 0 and "applied.pt: layers 0, 2: 2 rows written" in said
    written = torch.load(applied, weights_only=True)["model"]
    assert all(torch.equal(written[name], moved) for name in names)


def test_tables_apart_are_not_taken_for_one(tmp_path, script):
    base = save(tmp_path / "base.pt", memory_layers=[0, 2])
    names = [VALUES.replace("layers.1", f"layers.{layer}") for layer in (0, 2)]
    state = torch.load(base, weights_only=True)["model"]
    moved = {name: state[name].clone() for name in names}
    moved[names[0]][3] += 0.5
    moved[names[1]][3] += 0.25
    after = finetuned(base, tmp_path / "after.pt", [], **moved)
    status, said = script("make", base, after, "--out", tmp_path / "delta")
    assert status == 0 and "layer 0: 1 rows; layer 2: 1 rows" in said


def test_deltas_of_other_bases_are_not_combined():
    state = {"values.weight": torch.zeros(3, 2)}
    moved = {"values.weight": torch.eye(3)[:, :2]}
    one = make_delta(state, moved, {})
    assert one.tables["values.weight"].slots.tolist() == [0, 1]
    with pytest.raises(ValueError, match="deltas have different bases"):
        combine([one, one._replace(base="0" * 64)])


def test_changes_add_up_in_one_order_and_rows_of_one_delta_alone_are_its_own():
    state = {"values.weight": torch.randn(40, 8)}
    deltas = []
    for first in (0, 10, 15):
        moved = state["values.weight"].clone()
        moved[first : first + 20] = torch.randn(20, 8) * 1000.0 ** torch.randn(20, 8)
        deltas.append(make_delta(state, {"values.weight": moved}, {}))
    whole = [
        combine(order, adds_up=True)["values.weight"] for order in itertools.permutations(deltas)
    ]
    for rows in whole:
        assert rows.slots.tolist() == list(range(35))
        assert torch.equal(rows.before, state["values.weight"][:35])
        assert torch.equal(rows.after, whole[0].after)
    assert torch.equal(whole[0].after[:10], deltas[0].tables["values.weight"].after[:10])
    changes = torch.zeros(40, 8, dtype=torch.float64)
    for delta in deltas:
        rows = delta.tables["values.weight"]
        changes[rows.slots] += rows.after.double() - rows.before.double()
    expected = state["values.weight"].double() + changes
    size = 1 + sum(d.tables["values.weight"].after.abs().max() for d in deltas)
    assert float((whole[0].after.double() - expected[:35]).abs().max()) < float(size) * 1e-6


def test_the_sum_of_several_changes_is_rounded_once():
    state = {"values.weight": torch.full((4, 2), 1 - 2**-8, dtype=torch.bfloat16)}
    moved = state["values.weight"].clone()
    moved[1] += 2**-8  # a third step would round to an even 1
    deltas = [make_delta(state, {"values.weight": moved}, {"number": i}) for i in range(3)]
    rows = combine(deltas, adds_up=True)["values.weight"]
    assert rows.after.tolist() == [[1 + 2**-7, 1 + 2**-7]]


def test_minus_zero_and_nan_are_values_like_others():
    state = {"values.weight": torch.tensor([[0.0], [float("nan")], [1.0]])}
    moved = {"values.weight": torch.tensor([[-0.0], [float("nan")], [1.0]])}
    assert make_delta(state, moved, {}).tables["values.weight"].slots.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_written_into_views_and_half_precision(tmp_path, dtype):
    storage = torch.arange(40.0).to(dtype)
    content = {"model": {"a": storage[8:32].view(6, 4), "b": storage}}
    file, out = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(content, file)
    rows = torch.full((2, 4), -1.0, dtype=dtype)
    write_rows(file, out, "model", {"a": (torch.tensor([1, 5]), rows)})
    expected = storage.clone()
    expected[[*range(12, 16), *range(28, 32)]] = -1.0
    written = torch.load(out, weights_only=True)["model"]
    assert torch.equal(written["b"], expected)
    assert torch.equal(written["a"], expected[8:32].view(6, 4))


def test_a_state_in_another_dtype_is_not_the_base_with_the_delta():
    before = {"a.memory.values.weight": torch.ones(4, 2, dtype=torch.bfloat16)}
    after = {name: table.clone() for name, table in before.items()}
    after["a.memory.values.weight"][1] = 2
    delta = make_delta(before, after, {})
    check_applied(after, delta.tables, delta.base)
    wider = {name: table.float() for name, table in after.items()}
    with pytest.raises(ValueError, match=r"is torch\.float32, must be torch\.bfloat16 as in the"):
        check_applied(wider, delta.tables, delta.base)


def test_files_that_cannot_be_changed_in_place_are_refused(tmp_path):
    rows = {"a": (torch.tensor([0]), torch.zeros(1, 2))}
    old, turned = tmp_path / "old.pt", tmp_path / "turned.pt"
    torch.save({"model": {}}, old, _use_new_zipfile_serialization=False)
    torch.save({"model": {"a": torch.ones(2, 3).t()}}, turned)
    for file, said in (
        (old, "has the format from before torch 1.6"),
        (turned, "a is not contiguous"),
    ):
        with pytest.raises(ValueError, match=said):
            write_rows(file, tmp_path / "out", "model", rows)
    assert not (tmp_path / "out").exists()


# --- what moved -------------------------------------------------------------------------------


def test_overlap_with_the_slots_that_old_text_needs():
    counts = SlotCounts(4)
    counts.update(torch.tensor([0] * 6 + [1] * 3 + [2]))
    found = overlap(counts, [1, 3])
    assert found.pop("old_reads") == pytest.approx(0.3)
    assert found == {"needed": 2, "moved_and_needed": 1, "expected": 1.0}


def test_the_report_says_what_moved_and_who_reads_it(base, delta_of, script, tmp_path):
    dictionary = small_dictionary()
    file, after = delta_of([2, 3])
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5\nw6 w7 w1 w1 w2\n" * 8)
    dictionary.save(str(tmp_path / "dict.txt"))
    counts = SlotCounts(N_SLOTS)
    counts.update(torch.tensor([2] * 9 + [8]))
    save_counts(tmp_path / "old.pt", CountsFile({(1,): counts}, {}))
    status, said = script(
        "report", file, "--checkpoint", after, "--text", tmp_path / "text.txt",
        "--dict", tmp_path / "dict.txt", "--background", tmp_path / "old.pt",
        "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert status == 0, said
    assert "layer 1: 2 of 25 rows moved, norm of the change 2.828, farthest 2" in said
    assert "90 % of the old text's reads are of 1 slots; 1 of these moved" in said
    assert "moved slots take 90.0 % of its reads" in said


def test_the_report_is_of_the_checkpoint_that_holds_the_deltas_rows(
    base, delta_of, script, tmp_path
):
    dictionary = small_dictionary()
    (delta, after), further, late = delta_of([2, 3]), delta_of([5])[0], delta_of([20, 21])[0]
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5\n" * 8)
    dictionary.save(str(tmp_path / "dict.txt"))
    out, both, half = tmp_path / "report.json", tmp_path / "both.pt", tmp_path / "half.pt"
    options = ["--text", tmp_path / "text.txt", "--dict", tmp_path / "dict.txt", "--json", out]
    checkpoint = torch.load(after, weights_only=True)
    checkpoint["model"][VALUES] = checkpoint["model"][VALUES].half()
    torch.save(checkpoint, half)
    seed, layers, slots = (tmp_path / f"{name}.pt" for name in ("seed", "layers", "slots"))
    save(seed, seed=1)
    save(layers, memory_layers=[0])
    save(slots, memory_n_keys=4)  # 16 slots
    no_table = f"the model has no table {VALUES} that fits the delta"
    no_row = f"row 2 of {VALUES} is not the delta's"
    for made, file, said in (
        (delta, base, no_row),
        (delta, seed, no_row),
        (delta, slots, no_row),
        (late, slots, no_table),
        (delta, layers, no_table),
        (delta, half, no_row),
    ):
        status, printed = script("report", made, "--checkpoint", file, *options)
        lines = [line for line in printed.splitlines() if line.strip()]
        assert status == 1 and len(lines) == 1, (file, printed)
        assert f"--checkpoint {file}: {said}" in lines[0]
        assert not out.exists()
    assert script("apply", base, delta, further, "--out", both)[0] == 0
    for made in (delta, further):  # a checkpoint may hold several
        status, said = script("report", made, "--checkpoint", both, *options)
        assert status == 0, said

"""Values in a file: what is read, what is refused, and that no table is in memory."""

import copy
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pkm_fairseq.memory import (
    Experts,
    MappedTable,
    MemoryConfig,
    ProductKeyMemory,
    ValuesFile,
    save_values,
)
from pkm_fairseq.memory import kernels as memory_kernels
from pkm_fairseq.memory.archive import offset_of, read_without_data
from pkm_fairseq.memory.kernels.backends import choose_anew
from pkm_fairseq.memory.mapped import LARGEST, STORED, quantise
from pkm_fairseq.validation.parts import READS

CONFIG = MemoryConfig(n_keys=16, heads=2, knn=4, k_dim=8)
WIDTH, MARK, OTHER = 24, "0a" * 32, "0b" * 32
PLAIN = ("float32", "bfloat16")


@pytest.fixture
def memory():
    torch.manual_seed(0)
    return ProductKeyMemory(WIDTH, CONFIG).eval()


@pytest.fixture(params=["torch", "numba"])
def backend(request, monkeypatch):
    monkeypatch.setenv("PKM_BACKEND", request.param)
    choose_anew()
    yield request.param
    monkeypatch.undo()
    choose_anew()


def written(folder, table, dtype, mark=MARK):
    file = folder / f"{dtype}.pt"
    save_values(file, {"1": table}, dtype, mark, {"from": "a test"})
    return file


def mapped(memory, file, layer="1"):
    """The same memory with its values in a file."""
    found = ProductKeyMemory(WIDTH, memory.config, values=ValuesFile(file).table(layer))
    state = {name: x for name, x in memory.state_dict().items() if not name.startswith("values.")}
    state["values.fingerprint"] = torch.tensor(list(bytes.fromhex(MARK)), dtype=torch.uint8)
    found.load_state_dict(state)
    return found.eval()


def with_values(memory, values):
    """A copy of a memory with other values, in memory."""
    found = copy.deepcopy(memory)
    with torch.no_grad():
        found.values.weight.copy_(values)
    return found


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PLAIN)
def test_the_read_has_the_bits_of_a_table_in_memory(memory, backend, dtype, tmp_path):
    stored = memory.values.weight.detach().to(STORED[dtype])
    config = MemoryConfig(n_keys=16, heads=2, knn=4, k_dim=8, value_dtype=dtype)
    here = ProductKeyMemory(WIDTH, config).eval()
    here.load_state_dict(memory.state_dict())
    assert torch.equal(here.values.weight, stored)
    there = mapped(memory, written(tmp_path, memory.values.weight, dtype))
    x, padding = torch.randn(3, 7, WIDTH), torch.rand(3, 7) < 0.3
    with torch.no_grad():
        got, look_up = there(x, padding, return_lookup=True)
        assert torch.equal(got, here(x, padding))
        assert torch.equal(look_up.slots, here(x, padding, return_lookup=True)[1].slots)


@pytest.mark.parametrize(
    "kind",
    [
        {"query": "mlp"},
        {"score_activation": "relu"},
        {"learn_score_scale": True, "score_scale": 2.0},
        {"output": "swilu"},
        {"v_dim": 40},
        {"query_norm": "layer"},
    ],
    ids=str,
)
def test_other_kinds_read_the_same_bits(kind, tmp_path):
    torch.manual_seed(0)
    here = ProductKeyMemory(WIDTH, replace(CONFIG, **kind)).eval()
    there = mapped(here, written(tmp_path, here.values.weight, "float32"))
    x = torch.randn(20, WIDTH)
    with torch.no_grad():
        assert torch.equal(there(x), here(x))


def test_an_int8_read_is_that_of_the_rounded_values(memory, backend, tmp_path):
    there = mapped(memory, written(tmp_path, memory.values.weight, "int8"))
    rows, scales = quantise(memory.values.weight.detach())
    here = with_values(memory, rows.float() * scales[:, None])
    x = torch.randn(50, WIDTH)
    with torch.no_grad():
        assert torch.allclose(there(x), here(x), rtol=0, atol=1e-6)
        off = (there(x) - memory(x)).abs().amax()
        slots, weights = memory.search(x)
        bound = (weights * scales[slots] / 2).sum((1, 2)).amax()  # half a step of each row
    assert 0 < off <= bound * (1 + 1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-38, 1e-44, 1e38])
def test_an_int8_value_is_at_most_half_a_step_away(size):
    torch.manual_seed(1)
    table = torch.randn(200, 33).clamp(-3, 3) * size
    table[0] = 0
    table[1, 1:] = 0  # one large value
    rows, scales = quantise(table)
    assert rows.dtype == torch.int8 and scales.dtype == torch.float32
    assert rows.abs().amax() <= LARGEST
    exact, step = table.double(), scales.double()[:, None]
    assert ((exact - rows.double() * step).abs() <= step / 2 * (1 + 1e-12)).all()
    assert (rows[0] == 0).all() and scales[0] == 0


@pytest.mark.parametrize("dtype", STORED)
def test_weights_get_their_gradient(memory, dtype, tmp_path):
    there = mapped(memory, written(tmp_path, memory.values.weight, dtype))
    here = with_values(memory, there.values.read(torch.arange(CONFIG.n_slots)).float())
    x = torch.randn(9, WIDTH)
    gradients = []
    for m in (there, here):
        given = x.clone().requires_grad_()
        m(given).square().sum().backward()
        gradients.append((given.grad, m.keys.grad))
    for got, right in zip(*gradients, strict=True):
        assert right.abs().amax() > 0
        assert torch.allclose(got, right, rtol=1e-4, atol=1e-6)


def test_a_memory_in_half_precision_reads_the_same_file(memory, tmp_path):
    there = mapped(memory, written(tmp_path, memory.values.weight, "float32"))
    scale = there(torch.ones(2, WIDTH)).abs().amax()
    half = there.bfloat16()
    assert half.values.source.rows("1").dtype == torch.float32
    assert half(torch.ones(2, WIDTH).bfloat16()).dtype == torch.bfloat16
    assert (half(torch.ones(2, WIDTH).bfloat16()) - scale).isfinite().all()


def test_validation_reads_exact_values(memory, tmp_path):
    assert MappedTable in READS
    table = ValuesFile(written(tmp_path, memory.values.weight, "float32")).table("1")
    slots = torch.tensor([3, 200, 3])
    assert torch.equal(table.read(slots), memory.values.weight.detach()[slots].double())


# --- what is in memory ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED)
def test_shared_tables_are_stored_once(dtype, tmp_path):
    table = torch.randn(256, WIDTH)
    save_values(tmp_path / "one.pt", {"1": table}, dtype, MARK, {})
    save_values(tmp_path / "both.pt", {"1": table, "3": table}, dtype, MARK, {})
    more = (tmp_path / "both.pt").stat().st_size - (tmp_path / "one.pt").stat().st_size
    file = ValuesFile(tmp_path / "both.pt")
    assert more < 1000 < file.rows("1").nbytes
    assert file.layers == ["1", "3"]
    assert torch.equal(file.rows("1"), file.rows("3"))


@pytest.mark.parametrize("dtype", STORED)
def test_parts_of_a_table_are_tables_of_their_own(dtype, tmp_path):
    table = torch.randn(16, WIDTH)
    parts = {"1": table, "3": table[:, :4], "5": table[:8]}
    save_values(tmp_path / "parts.pt", parts, dtype, MARK, {})
    file = ValuesFile(tmp_path / "parts.pt")
    assert {layer: file.rows(layer).shape for layer in parts} == {
        layer: part.shape for layer, part in parts.items()
    }


def test_a_file_is_the_same_under_another_default_dtype(tmp_path):
    table = torch.randn(16, WIDTH)
    torch.set_default_dtype(torch.float64)
    try:
        save_values(tmp_path / "values.pt", {"1": table}, "int8", MARK, {})
    finally:
        torch.set_default_dtype(torch.float32)
    assert ValuesFile(tmp_path / "values.pt").scales("1").dtype == torch.float32


def test_a_copy_does_not_read_the_values_of_another_model(memory, tmp_path):
    there = mapped(memory, written(tmp_path, memory.values.weight, "float32"))
    stored = pickle.dumps(there)
    written(tmp_path, torch.randn_like(memory.values.weight), "float32", "ab" * 32)
    for copied in (lambda: pickle.loads(stored), lambda: copy.deepcopy(there)):
        with pytest.raises(ValueError, match="written anew since the model read it") as refused:
            copied()
        assert "\n" not in str(refused.value)


def test_copies_read_the_file_and_hold_no_rows(memory, tmp_path):
    there = mapped(memory, written(tmp_path, memory.values.weight, "int8"))
    x = torch.randn(5, WIDTH)
    assert len(pickle.dumps(there.values)) < 2000 < memory.values.weight.nbytes
    with torch.no_grad():
        for other in (copy.deepcopy(there), pickle.loads(pickle.dumps(there))):
            assert torch.equal(other(x), there(x))
    assert list(there.values.state_dict()) == ["fingerprint"]
    assert not list(there.values.parameters())


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory, ValuesFile

def used():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)["VmData"].split()[0])

ProductKeyMemory(64, MemoryConfig(n_keys=8, heads=2, knn=4, k_dim=8)).eval()(torch.ones(2, 64))
limit = used() + int(sys.argv[1])  # of memory that is not a file's
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
table = ValuesFile(Path(sys.argv[2])).table("1") if len(sys.argv) > 2 else None
memory = ProductKeyMemory(64, MemoryConfig(n_keys=512, heads=2, knn=4, k_dim=8), values=table)
if table is not None:
    state = {name: x.clone() for name, x in memory.state_dict().items()}
    memory.load_state_dict(state)
with torch.no_grad():
    print(len(memory.eval()(torch.randn(100, 64))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_table_in_a_file_is_never_in_memory(tmp_path):
    table = torch.randn(512 * 512, 64)  # 64 MiB
    file = written(tmp_path, table, "float32")

    def started(*args):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", LIMITED, str(table.nbytes // 5), *args]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    refused = started()
    assert "MemoryError: a table of 262,144 slots" in refused.stderr  # the limit works
    read = started(str(file))
    assert (read.returncode, read.stdout) == (0, "100\n"), read.stderr


# --- what is refused --------------------------------------------------------------------------


def test_training_is_refused(memory, tmp_path):
    there = mapped(memory, written(tmp_path, memory.values.weight, "float32"))
    there.train()
    with pytest.raises(ValueError, match=r"values in a file are for inference, call eval\(\)"):
        there(torch.randn(4, WIDTH))


def test_values_of_another_model_are_refused(memory, tmp_path):
    file = written(tmp_path, memory.values.weight, "float32", OTHER)
    with pytest.raises(ValueError, match=r"of another model \(0b0b0b0b0b0b, this one needs 0a0a0a"):
        mapped(memory, file)


def test_a_state_and_a_memory_that_do_not_fit_are_refused(memory, tmp_path):
    there = mapped(memory, written(tmp_path, memory.values.weight, "float32"))
    with pytest.raises(ValueError, match="the checkpoint holds its tables itself"):
        there.load_state_dict(memory.state_dict())
    with pytest.raises(ValueError, match="values are in a file, which --memory-values-file must"):
        memory.load_state_dict(there.state_dict())


def test_tables_of_another_shape_kind_or_layer_are_refused(memory, tmp_path):
    file = ValuesFile(written(tmp_path, memory.values.weight, "float32"))
    with pytest.raises(ValueError, match="holds tables of the layers 1, none of layer 2"):
        file.table("2")
    other = MemoryConfig(n_keys=8, heads=2, knn=4, k_dim=8)
    with pytest.raises(ValueError, match=r"shape \(256, 24\), must be \(64, 24\)"):
        ProductKeyMemory(WIDTH, other, values=file.table("1"))
    experts = MemoryConfig(n_keys=16, heads=2, knn=4, k_dim=8, values="experts")
    with pytest.raises(ValueError, match=f"a MappedTable, must be a {Experts.__name__}"):
        ProductKeyMemory(WIDTH, experts, values=file.table("1"))


def test_a_slot_out_of_range_is_refused(memory, tmp_path):
    for dtype in STORED:
        table = ValuesFile(written(tmp_path, memory.values.weight, dtype)).table("1")
        slots, weights = torch.tensor([[[256]]]), torch.ones(1, 1, 1)
        with pytest.raises(ValueError, match="slot 256 is out of range"):
            table.eval()(slots, weights)


def test_only_the_cpu_reads(memory, tmp_path):
    table = ValuesFile(written(tmp_path, memory.values.weight, "float32")).table("1").eval()
    slots = torch.zeros(1, 1, 1, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="the model is on meta, must be on the CPU"):
        table(slots, torch.ones(1, 1, 1, device="meta"))


def test_an_update_of_int8_is_refused():
    table = torch.zeros(4, 8, dtype=torch.int8)
    entries = memory_kernels.Entries(
        torch.tensor([1]), torch.ones(1), torch.tensor([0]), torch.ones(1, 8)
    )
    with pytest.raises(ValueError, match=r"dtype torch.int8, must be \(n_slots, v_dim\)"):
        memory_kernels.adam_rows(table, table, table, entries, 0.1, (0.9, 0.99), 1e-8)


@pytest.mark.parametrize("dtype", STORED)
def test_values_that_are_not_finite_are_refused(dtype, tmp_path):
    table = torch.ones(20_000, 2)
    table[19_000, 1] = float("nan")
    with pytest.raises(ValueError, match="the table of layer 1 has values that are not finite"):
        written(tmp_path, table, dtype)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="dtype is 'int4', must be one of float32, bfloat16, int8"):
        written(tmp_path, table, "int4")


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(memory, share, tmp_path):
    file = written(tmp_path, memory.values.weight, "int8")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=f"values file {file} is damaged, or no values file"):
        ValuesFile(file)


def test_other_files_are_refused(memory, tmp_path):
    with pytest.raises(ValueError, match=r"values file .*none\.pt: no such file"):
        ValuesFile(tmp_path / "none.pt")
    torch.save({"model": memory.state_dict()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds no values"):
        ValuesFile(tmp_path / "model.pt")


class Marks:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "its version is 2, must be 1"),
        ({"fingerprint": "x"}, "contradicts itself"),
        ({"fingerprint": None}, "contradicts itself"),
        ({"dtype": "float32"}, "contradicts itself"),
        ({"dtype": "float64"}, "contradicts itself"),
        ({"rows": {}}, "contradicts itself"),
        ({"rows": [1]}, "contradicts itself"),
        ({"scales": {}}, "contradicts itself"),
        ({"scales": {"1": torch.ones(3)}}, "contradicts itself"),
        ({"rows": {"1": torch.ones(256, 24, dtype=torch.int8).t()}}, "contradicts itself"),
        ({"about": 1}, "contradicts itself"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(memory, change, said, tmp_path):
    file = written(tmp_path, memory.values.weight, "int8")
    torch.save({**torch.load(file, weights_only=True), **change}, file)
    with pytest.raises(ValueError, match=said) as caught:
        ValuesFile(file)
    assert "\n" not in str(caught.value)


def test_a_file_runs_no_code(memory, tmp_path):
    file = written(tmp_path, memory.values.weight, "int8")
    content = torch.load(file, weights_only=True)
    torch.save({**content, "about": {"x": Marks(tmp_path / "mark")}}, file)
    with pytest.raises(ValueError, match="is damaged, or no values file"):
        ValuesFile(file)
    assert not (tmp_path / "mark").exists()


def test_a_table_that_reaches_beyond_its_file_is_refused(memory, tmp_path):
    """torch does not compare the tensors with their records; reading on would end the process."""
    file, cut = written(tmp_path, memory.values.weight, "float32"), tmp_path / "cut.pt"
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(cut, "w") as out:
        for record in whole.infolist():
            data = whole.read(record)
            out.writestr(record.filename, data[:4000] if "/data/" in record.filename else data)
    start = offset_of(read_without_data(cut)["rows"]["1"])
    assert start is not None and cut.stat().st_size < start + memory.values.weight.nbytes
    with pytest.raises(ValueError, match=f"values file {cut} is damaged: export it again"):
        ValuesFile(cut)


def test_a_full_disk_leaves_the_older_file(memory, tmp_path):
    file = written(tmp_path, torch.ones(4, 2), "float32")
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"float32\.pt"):
            written(tmp_path, memory.values.weight, "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]

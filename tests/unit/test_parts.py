"""Tables in a folder, written and read by any number of workers."""

import errno
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pkm_fairseq.memory import ColumnShards, ValueTable
from pkm_fairseq.memory import parts as parts_module
from pkm_fairseq.memory.adam import MOMENTS, MemoryAdam
from pkm_fairseq.memory.archive import save_in_blocks
from pkm_fairseq.memory.kernels import Float8Table
from pkm_fairseq.memory.parts import (
    TEMPORARY,
    Block,
    PartsFolder,
    has_parts,
    place_parts,
    reference_to,
    remove_unused_parts,
    write_parts,
)

from ..workers import on_workers

N_SLOTS, V_DIM, ROWS = 36, 12, 7
NAME, FILE = "values_1_0a0b0c0d", "checkpoint.pt"
WAYS = [(1, None), (2, None), (2, 2), (4, 2), (4, 4)]  # workers, and those that share a table


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "ROWS", ROWS)


def whole() -> "List[Tensor]":
    """Values and moments of a whole table."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(N_SLOTS, V_DIM, generator=generator) for _ in range(3)]


def table_of(n_shards: Optional[int], dtype: torch.dtype) -> "tuple[ValueTable, MemoryAdam]":
    shards = None if n_shards is None else ColumnShards(n_shards)
    table = ValueTable(N_SLOTS, V_DIM, "zero", dtype=dtype, shards=shards)
    moment_dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return table, MemoryAdam(table.parameters(), lr=0.1, moment_dtype=moment_dtype)


def own(x: Tensor, table: ValueTable) -> Tensor:
    return x if table.shards is None else table.shards.own_columns(x, V_DIM)


def filled(n_shards: Optional[int], dtype: torch.dtype) -> "tuple[ValueTable, MemoryAdam]":
    table, adam = table_of(n_shards, dtype)
    values, *moments = (own(x, table) for x in whole())
    with torch.no_grad():
        table.weight.copy_(values)
    moments = {n: x.to(dtype).clone() for n, x in zip(MOMENTS, moments, strict=True)}
    adam.state[table.weight] = {"step": torch.tensor(5.0), **moments}
    return table, adam


def save(rank: int, out: Path, n_shards: Optional[int], dtype: torch.dtype) -> Any:
    parts_module.ROWS = ROWS
    table, adam = filled(n_shards, dtype)
    adam.save_parts(out / NAME)
    if rank == 0:
        torch.save({"model": table.state_dict(), "optimizer": adam.state_dict()}, out / FILE)
    assert has_parts(table.state_dict()) is False  # it was for this checkpoint only
    return None


def load(rank: int, out: Path, n_shards: Optional[int], dtype: torch.dtype) -> Any:
    table, adam = table_of(n_shards, dtype)
    state = torch.load(out / FILE)
    place_parts(state, out / FILE)
    table.load_state_dict(state["model"])
    adam.load_state_dict(state["optimizer"])
    saved = adam.state[table.weight]
    assert int(saved["step"]) == 5 and set(saved) == {"step", *MOMENTS}
    assert all(saved[moment].dtype == dtype for moment in MOMENTS)
    found = [table.weight.detach(), *(saved[moment] for moment in MOMENTS)]
    expected = [own(x, table).to(dtype) for x in whole()]
    return [torch.equal(x, y) for x, y in zip(found, expected, strict=True)]


def together(world: int, folder: Path, task: Any, *args: Any) -> List[Any]:
    folder.mkdir()
    return on_workers(world, folder, task, *args) if world > 1 else [task(0, *args)]


@pytest.mark.parametrize(("world", "n_shards"), WAYS)
def test_any_number_of_workers_reads_what_others_wrote(
    tmp_path: Path, world: int, n_shards: Optional[int]
) -> None:
    dtype = torch.bfloat16 if n_shards == 4 else torch.float32
    out = tmp_path / "out"
    out.mkdir()
    together(world, tmp_path / "save", save, out, n_shards, dtype)
    assert {x.name for x in out.iterdir()} == {NAME, FILE}
    files = {x.name for x in (out / NAME).iterdir()}
    assert files == {".metadata", *(f"__{rank}_0.distcp" for rank in range(world))}
    tables = PartsFolder(out / NAME)._tables
    assert set(tables) == {"0.values", "0.exp_avg", "0.exp_avg_sq"}
    width = V_DIM // (n_shards or 1)
    assert all(
        c.sizes[0] <= ROWS and c.sizes[1] == width for x in tables.values() for c in x.chunks
    )
    for other, shards in ((1, None), (4, 4), (2, 2)):
        if (other, shards) != (world, n_shards) or world == 1:
            name = f"load{other}{shards}"
            found = together(other, tmp_path / name, load, out, shards, dtype)
            assert found == [[True] * 3] * other, name


def test_moments_in_8_bits_are_in_the_folder_without_loss(tmp_path: Path) -> None:
    table = ValueTable(N_SLOTS, V_DIM, "zero")
    adam = MemoryAdam(table.parameters(), lr=0.1, moment_dtype="float8")
    slots = torch.arange(N_SLOTS // 2)[:, None]
    torch.manual_seed(0)
    table(slots, torch.rand(len(slots), 1)).backward(torch.randn(len(slots), V_DIM))
    adam.step()
    adam.save_parts(tmp_path / NAME)
    torch.save({"model": table.state_dict(), "optimizer": adam.state_dict()}, tmp_path / FILE)
    twin = ValueTable(N_SLOTS, V_DIM, "zero")
    other = MemoryAdam(twin.parameters(), lr=0.1, moment_dtype="float8")
    state = torch.load(tmp_path / FILE)
    place_parts(state, tmp_path / FILE)
    twin.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    assert torch.equal(twin.weight, table.weight) and twin.weight.count_nonzero()
    for moment in MOMENTS:
        ours, theirs = (o.state[t.weight][moment] for o, t in ((adam, table), (other, twin)))
        assert isinstance(theirs, Float8Table)
        assert torch.equal(theirs.decoded(), ours.decoded()) and ours.decoded().count_nonzero()


def fail_on_one(rank: int, out: Path, victim: int) -> Any:
    from pkm_fairseq.memory import dcp

    def fails(*args: Any) -> Any:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:  # as torch.save does
            raise RuntimeError("unexpected pos") from None

    if rank == victim:
        dcp.FileSystemWriter.write_data = fails
    _, adam = filled(2, torch.float32)
    try:
        adam.save_parts(out / NAME)
    except OSError as error:
        return str(error), has_parts(adam.state_dict())
    return None


@pytest.mark.parametrize("victim", [0, 1])
def test_if_one_worker_cannot_write_all_say_so(tmp_path: Path, victim: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    said = together(2, tmp_path / "workers", fail_on_one, out, victim)
    line = f"{out / NAME} was not saved: No space left on device; earlier checkpoints are intact"
    assert said == [(line, False)] * 2
    assert not list(out.iterdir())


def blocks(**tensors: Tensor) -> Dict[str, Block]:
    return {n: Block(x, (len(x), x.shape[1]), (0, 0)) for n, x in tensors.items()}


def test_what_a_kill_left_is_removed_and_other_folders_stay(tmp_path: Path) -> None:
    (tmp_path / TEMPORARY).mkdir()
    (tmp_path / TEMPORARY / "__9_0.distcp").write_text("left")
    write_parts(tmp_path / "values_1_a", blocks(a=torch.ones(3, 2)))
    write_parts(tmp_path / "values_1_b", blocks(a=torch.zeros(3, 2)))
    assert {x.name for x in tmp_path.iterdir()} == {"values_1_a", "values_1_b"}
    assert {x.name for x in (tmp_path / "values_1_a").iterdir()} == {".metadata", "__0_0.distcp"}
    x = torch.empty(2, 1, dtype=torch.float64)
    PartsFolder(tmp_path / "values_1_a").read("a", Block(x, (3, 2), (1, 1)))
    assert x.tolist() == [[1.0], [1.0]]


def test_a_table_of_another_name_or_shape_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path / NAME, blocks(a=torch.ones(3, 2)))
    folder, x = PartsFolder(tmp_path / NAME), torch.empty(3, 4)
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\), must be that of the model, \(3, "):
        folder.read("a", Block(x, (3, 4), (0, 0)))
    with pytest.raises(ValueError, match=f"{NAME} does not hold b$"):
        folder.read("b", Block(x, (3, 4), (0, 0)))
    assert folder.size("b") is None and folder.size("a") == (3, 2)


def test_a_table_with_a_hole_is_refused(tmp_path: Path) -> None:
    """A writer that leaves rows out; with one worker DCP does not check it."""
    write_parts(tmp_path / NAME, {"a": Block(torch.ones(2, 2), (3, 2), (0, 0))})
    with pytest.raises(ValueError, match="a cannot be read: of 6 numbers only 4 are there"):
        PartsFolder(tmp_path / NAME).read("a", Block(torch.empty(3, 2), (3, 2), (0, 0)))


def test_a_reference_does_not_outlive_the_next_update(tmp_path: Path) -> None:
    table, adam = filled(None, torch.float32)
    adam.save_parts(tmp_path / NAME)
    assert "weight" not in table.state_dict()  # and no state of the optimizer is made
    table(torch.tensor([[[0, 1]]]), torch.ones(1, 1, 2)).sum().backward()
    adam.step()
    assert table.state_dict()["weight"].data_ptr() == table.weight.data_ptr()


@pytest.mark.parametrize("made", ["optimizer model", "model", ""])
@pytest.mark.parametrize("how", ["load", "reset"])
def test_a_reference_does_not_outlive_other_values(tmp_path: Path, made: str, how: str) -> None:
    table, adam = filled(None, torch.float32)
    other = filled(None, torch.float32)[0].state_dict()
    adam.save_parts(tmp_path / NAME)
    for which in made.split():
        assert "weight" not in {"model": table, "optimizer": adam}[which].state_dict()
    if how == "load":
        table.load_state_dict(other)
    else:
        table.reset_parameters()
    assert table.state_dict()["weight"].data_ptr() == table.weight.data_ptr()


def test_values_without_moments_are_refused_by_adam(tmp_path: Path) -> None:
    table, adam = table_of(None, torch.float32)
    adam = MemoryAdam(table.parameters(), lr=0.1, value_optimizer="sgd")
    adam.state[table.weight] = {"step": torch.tensor(1.0)}
    adam.save_parts(tmp_path / NAME)
    state = {"model": table.state_dict(), "optimizer": adam.state_dict()}
    place_parts(state, tmp_path / FILE)
    again, other = table_of(None, torch.float32)
    again.load_state_dict(state["model"])
    with pytest.raises(ValueError, match="holds no exp_avg of values: it is of values under SGD"):
        other.load_state_dict(state["optimizer"])
    MemoryAdam(again.parameters(), lr=0.1, value_optimizer="sgd").load_state_dict(
        state["optimizer"]
    )


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "", ".."])
def test_a_folder_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    state = {"model": {"a.parts": reference_to(name, 0)}}
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="must name one beside it"):
        place_parts(state, tmp_path / "run" / FILE)


def test_metadata_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path / NAME, blocks(a=torch.ones(3, 2)))
    file = tmp_path / NAME / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../secret"
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"damaged .it names the file \.\./secret"):
        PartsFolder(tmp_path / NAME)


def test_folders_are_removed_if_no_checkpoint_names_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = "values_2_0000abcd"
    for name in (NAME, other, "values_of_mine"):
        (tmp_path / name).mkdir()
    torch.save({"model": {"x.parts": reference_to(NAME, 0)}}, tmp_path / "one.pt")
    torch.save({"model": {"x": torch.ones(2)}, "names": ["parts"]}, tmp_path / "two.pt")
    (tmp_path / "damaged.pt").write_bytes(b"x")
    remove_unused_parts(tmp_path)
    assert (tmp_path / other).is_dir()  # the damaged file might name it
    assert "damaged.pt is not readable" in caplog.text
    (tmp_path / "damaged.pt").unlink()
    remove_unused_parts(tmp_path)
    assert {x.name for x in tmp_path.iterdir() if x.is_dir()} == {NAME, "values_of_mine"}


def test_saving_in_blocks_is_saving(tmp_path: Path) -> None:
    table, other = torch.randn(20, 3), torch.arange(6).bfloat16()
    empty = torch.empty(20, 3)
    rest = {"n": 3, "list": [other, other[2:4]], "one": torch.tensor(2.5), "none": torch.empty(0)}
    with (tmp_path / "x.pt").open("wb") as out:
        content = {"a": empty, **rest, "again": (empty,)}
        save_in_blocks(out, content, [(empty, torch.split(table, 7))])
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(found["a"], table) and torch.equal(found["again"][0], table)
    assert found["a"].data_ptr() == found["again"][0].data_ptr()
    assert torch.equal(found["list"][1], other[2:4]) and found["one"] == 2.5
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    with (
        pytest.raises(ValueError, match="in an object that is no dictionary, list or tuple"),
        (tmp_path / "y.pt").open("wb") as out,
        torch.serialization.safe_globals([SimpleNamespace]),
    ):
        save_in_blocks(out, {"a": empty, "x": SimpleNamespace(x=other)}, [(empty, [table])])


def test_importing_the_core_does_not_import_what_takes_long() -> None:
    code = (
        "import sys, pkm_fairseq.memory; assert 'torch.distributed.checkpoint' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dist.is_available()

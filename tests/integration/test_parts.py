"""--memory-checkpoint parts: values and moments in a folder beside fairseq's file."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from fairseq.checkpoint_utils import load_model_ensemble

from pkm_fairseq.models.merge import merge
from pkm_fairseq.models.roberta import PkmRobertaModel
from tests.faults import differing

from .conftest import Shared
from .runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    MODEL,
    ROOT,
    TRAIN,
    USER_DIR,
    Run,
    load,
    run,
    run_alike,
    run_well,
    train_on_two_workers,
)
from .test_bad_input import last_line
from .test_sharding import resume

RESM = ["--arch", "resm_roberta_tiny", *MEMORY, "--memory-query-norm", "layer"]
RESM += ["--save-interval-updates", "3"]
PARTS = ["--memory-checkpoint", "parts"]
LAST = "checkpoint_last.pt"
MERGE = "scripts/merge_checkpoint.py"
KINDS = {
    "adam": [],
    "bfloat16": ["--memory-value-dtype", "bfloat16", "--memory-moment-dtype", "bfloat16"],
    "fp16": ["--memory-efficient-fp16", "--fp16-init-scale", "4"],
    "sgd": ["--memory-value-optimizer", "sgd"],
    "shared": ["--memory-layers", "0,1", "--memory-share-values"],
    "experts": ["--memory-values", "experts", "--memory-layers", "0,1"],
}
KINDS["experts"] += ["--memory-value-optimizer", "adam"]


def training(data: Path, out: Path, *options: Any) -> List[Any]:
    command = [BIN / "fairseq-train", data, *TRAIN, *MASKED_LM, *MODEL, *RESM]
    return [*command, "--save-dir", out, *options]


def train(data: Path, out: Path, *options: Any) -> Run:
    done = run_alike(*training(data, out, *options))
    assert done.status == 0, done.output[-3000:]
    return done


def folders(out: Path) -> List[str]:
    return sorted(x.name for x in out.iterdir() if x.is_dir())


def state_of(file: Path) -> Dict[str, Any]:
    """Model and optimizer of a checkpoint, merged if it is in parts."""
    if any(name.endswith(".parts") for name in load(file)["model"]):
        whole = file.with_name("merged")
        merge(file, whole)
        file = whole
    state = load(file)
    return {key: state[key] for key in ("model", "last_optimizer_state")}


def assert_equal(one: Path, other: Path) -> None:
    assert not differing(state_of(one / LAST), state_of(other / LAST))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_resume_to_the_bit_and_merge_to_the_whole_checkpoint(
    data_bin: Path, tmp_path: Path, kind: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(data_bin, whole, *KINDS[kind], "--max-update", "6")
    train(data_bin, parts, *KINDS[kind], *PARTS, "--max-update", "3")
    assert not differing(state_of(parts / LAST), state_of(whole / "checkpoint_1_3.pt"))
    tables = [x for x in load(parts / LAST)["model"].values() if x.shape[0] == 256 and x.dim() == 2]
    assert not tables and len(folders(parts)) == 1
    resumed = train(data_bin, parts, *KINDS[kind], *PARTS, "--max-update", "6")
    assert len(resumed.logged("train_inner")) == 3
    assert_equal(parts, whole)
    train(data_bin, parts, *KINDS[kind], "--max-update", "9")  # and without parts again
    train(data_bin, whole, *KINDS[kind], "--max-update", "9")
    assert_equal(parts, whole)


def start_again(start: Path, folder: Path, batches: int) -> Path:
    """A folder in which a training goes on from update 3 of another, with its parts."""
    resume(start, folder, batches)
    for parts in start.glob("values_*"):
        shutil.copytree(parts, folder / parts.name)
    return folder


def test_workers_write_their_own_columns_and_any_number_reads_them(
    data_bin: Path, tmp_path: Path
) -> None:
    options = [*RESM, "--batch-size", "4", "--dropout", "0", "--attention-dropout", "0"]
    split, six = [*options, "--memory-shards", "2"], ["--max-update", "6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on_two_workers(data_bin, whole, *split, *six)
    train_on_two_workers(data_bin, parts, *split, *PARTS, "--max-update", "3")
    assert not differing(state_of(parts / LAST), state_of(whole / "checkpoint_1_3.pt"))
    (folder,) = folders(parts)
    sizes = [file.stat().st_size for file in (parts / folder).glob("__*")]
    assert len(sizes) == 2 and min(sizes) > 256 * 16 * 4 * 3 and max(sizes) < 1.2 * min(sizes)
    initial = [load(x / "memory_initial_values.pt") for x in (whole, parts)]
    assert initial[0]["1"].shape == (256, 32) and not differing(*initial)

    again = [start_again(x, tmp_path / f"{x.name}_alone", 6) for x in (whole, parts)]
    for start in again:
        train(data_bin, start, *options, "--update-freq", "2", *six)
    assert_equal(*again)
    again = [start_again(x, tmp_path / f"{x.name}_unsplit", 3) for x in (whole, parts)]
    train_on_two_workers(data_bin, again[0], *options, *six)
    train_on_two_workers(data_bin, again[1], *options, *six, *PARTS)
    assert_equal(*again)
    # each of two workers with equal tables writes half of them
    sizes = [file.stat().st_size for file in (again[1] / folders(again[1])[-1]).glob("__*")]
    assert len(sizes) == 2
    train_on_two_workers(data_bin, parts, *split, *PARTS, *six)
    assert_equal(parts, whole)


def references(out: Path) -> Dict[str, str]:
    """The folder that each checkpoint names."""
    found = {}
    for file in out.glob("checkpoint*.pt"):
        (text,) = [x for name, x in load(file)["model"].items() if name.endswith(".parts")]
        found[file.name] = bytes(text.tolist()).decode().split("/")[0]
    return found


def test_folders_are_removed_with_the_last_checkpoint_that_needs_them(
    data_bin: Path, tmp_path: Path
) -> None:
    left = [tmp_path / name for name in ("values_1_0a0b0c0d", "saving_values.part")]
    for folder in left:
        folder.mkdir()
        (folder / "__0_0.distcp").write_text("of a kill")
    options = [*PARTS, "--max-update", "5", "--save-interval-updates", "1"]
    train(data_bin, tmp_path, *options, "--keep-interval-updates", "2")
    named = references(tmp_path)
    assert set(named) == {f"checkpoint_{x}.pt" for x in ("1_4", "1_5", "best", "last")}
    assert named["checkpoint_last.pt"] == named["checkpoint_1_5.pt"]
    assert set(folders(tmp_path)) == set(named.values()) and len(folders(tmp_path)) >= 2
    train(data_bin, tmp_path, "--max-update", "6", "--keep-interval-updates", "1")
    assert "checkpoint_1_4.pt" not in {x.name for x in tmp_path.glob("*.pt")}
    assert set(folders(tmp_path)) <= set(references_of_all(tmp_path))


def references_of_all(out: Path) -> List[str]:
    """As ``references``, of checkpoints among which some are whole."""
    texts = [
        x for f in out.glob("checkpoint*.pt") for n, x in load(f)["model"].items() if "parts" in n
    ]
    return [bytes(text.tolist()).decode().split("/")[0] for text in texts]


@pytest.fixture(scope="module")
def trained(data_bin: Path, shared: Shared) -> Path:
    """The folder of a training with parts, whose last checkpoint is also in one file."""

    def fill(out: Path) -> None:
        train(data_bin, out, *PARTS, "--max-update", "3")
        script = [sys.executable, ROOT / "scripts/merge_checkpoint.py"]
        said = run_well(*script, out / LAST, out / "whole.pt").output
        assert "256 values of width 32" in said and f"{out / 'whole.pt'}: " in said

    return shared("parts", fill)


def validate(data: Path, file: Path) -> Run:
    command = [BIN / "fairseq-validate", data, "--path", file, "--user-dir", USER_DIR, *MASKED_LM]
    return run_alike(*command, "--batch-size", "8", "--cpu", "--log-format", "json")


def test_models_are_loaded_from_parts(data_bin: Path, trained: Path, tmp_path: Path) -> None:
    losses = [validate(data_bin, trained / x).logged("valid")[-1] for x in (LAST, "whole.pt")]
    assert losses[0]["valid_loss"] == losses[1]["valid_loss"]
    ensembles = [
        load_model_ensemble([str(trained / x)], {"data": str(data_bin)})[0]
        for x in (LAST, "whole.pt")
    ]
    assert not differing(*(dict(model.state_dict()) for (model,) in ensembles))
    hubs = [
        PkmRobertaModel.from_pretrained(str(trained), x, str(data_bin), bpe=None)
        for x in (LAST, "whole.pt")
    ]
    assert not differing(*(dict(hub.model.state_dict()) for hub in hubs))
    for option in ("--init-from", "--finetune-from-model", "--restore-file"):
        out = [tmp_path / f"{option}{name}" for name in (LAST, "whole.pt")]
        for folder in out:
            start = trained / folder.name.removeprefix(option)
            train(data_bin, folder, option, start, "--max-update", "5")
        assert_equal(*out)
    for script in (
        ["evaluate_mlm.py", "--data", data_bin, "--split", "valid"],
        ["memory_usage.py", "--data", data_bin, "--checkpoint"],
    ):
        said = []
        for name in (LAST, "whole.pt"):
            out = tmp_path / "said.json"
            command = [sys.executable, ROOT / "scripts" / script[0], "--json", out, *script[1:]]
            run_well(*command, trained / name)
            said.append(json.loads(out.read_text().replace(name, "")))
        assert said[0] == said[1] and said[0]["checkpoints"]


def test_tools_that_need_the_tables_name_the_converter(trained: Path, tmp_path: Path) -> None:
    last, out = trained / LAST, tmp_path / "out"
    commands = [
        ["export_memory.py", last, out],
        ["convert_checkpoint.py", "--to", "transformers", last, out],
        ["memory_delta.py", "make", "--out", out, last, last],
    ]
    for script, *options in commands:
        done = run(sys.executable, ROOT / "scripts" / script, *options)
        assert done.status == 1
        assert last_line(done).endswith("merge them into one file first, with " + MERGE), done
        assert not out.exists()


def test_the_converter_says_what_it_cannot_merge(trained: Path, tmp_path: Path) -> None:
    script = [sys.executable, ROOT / MERGE]
    done = run(*script, trained / "whole.pt", tmp_path / "x.pt")
    assert done.status == 1 and last_line(done).endswith("are in the file itself already")
    done = run(*script, trained / LAST, trained / LAST)
    assert done.status == 1 and last_line(done).endswith("choose another file")
    done = run("bash", "-c", 'ulimit -f 50 && exec "$@"', "bash", *script, trained / LAST,
               tmp_path / "x.pt")  # fmt: skip
    assert done.status == 1 and "File too large" in last_line(done)
    assert not list(tmp_path.iterdir())


class Evil:
    """Unpickling it would write a file."""

    def __reduce__(self) -> Any:
        return exec, ("open('evil', 'w')",)


def lose(folder: Path) -> str:
    shutil.rmtree(folder)
    return f"its values are in the folder {folder}, which is missing"


def lose_part(folder: Path) -> str:
    (folder / "__0_0.distcp").unlink()
    return f"{folder / '__0_0.distcp'}: no such file; the folder is incomplete"


def truncate(folder: Path) -> str:
    part = folder / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-100])
    return f"{part} has {part.stat().st_size} bytes, must have {part.stat().st_size + 100}"


def lose_metadata(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return f"{folder / '.metadata'}: no such file"


def break_metadata(folder: Path) -> str:
    (folder / ".metadata").write_bytes(b"x")
    return f"{folder / '.metadata'} is damaged"


def poison(folder: Path) -> str:
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    return "it holds more than plain data: builtins.exec"


def overwrite(folder: Path) -> str:
    part = folder / "__0_0.distcp"
    part.write_bytes(bytes(part.stat().st_size))
    return f"{folder}: 0.values cannot be read"


DAMAGES = [lose, lose_part, truncate, lose_metadata, break_metadata, poison, overwrite]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_in_one_line(
    data_bin: Path, trained: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    expected = damage(out / folders(out)[0])
    files = {file: file.read_bytes() for file in out.glob("*.pt")}
    for done in (
        run_alike(*training(data_bin, out, *PARTS, "--max-update", "6"), cwd=tmp_path),
        validate(data_bin, out / LAST),
    ):
        assert done.status == 1 and "Traceback" not in done.output, done.output[-3000:]
        assert expected in last_line(done)
    assert {file: file.read_bytes() for file in out.glob("*.pt")} == files
    assert not (tmp_path / "evil").exists()


def test_no_worker_holds_a_whole_table(data_bin: Path, tmp_path: Path) -> None:
    """Of 453 MB that a table and its moments have, each of two workers holds 226."""
    script = [sys.executable, ROOT / "scripts/measure_checkpoint.py", "--data", data_bin]
    script += ["--n-keys", "384", "--folder", tmp_path / "x", "--json", tmp_path / "x.json"]
    said = run_well(*script).output
    assert "table and moments: 453 MB, of each worker 226" in said
    rows = json.loads((tmp_path / "x.json").read_text())["results"]
    more = {(x["stored"], x["phase"], x["worker"]): x["peak"] - x["before"] for x in rows}
    assert len(more) == 8 and more["whole", "saving", 0] > 450e6
    for worker in (0, 1):
        assert more["whole", "loading", worker] > 450e6
        assert more["parts", "saving", worker] < 70e6
        # of these, 151 MB are its own moments, which stay
        assert more["parts", "loading", worker] < 300e6
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").mkdir()
    refused = run(*script)
    assert refused.status == 1 and last_line(refused).endswith("exists: choose a new folder")

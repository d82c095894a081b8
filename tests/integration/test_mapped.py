"""Exported models: what scripts and fairseq make of them, and what faults leave."""

import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pkm_fairseq.experiments.demo.evaluate import evaluate, load, masked_batches
from pkm_fairseq.memory import MappedTable, ValuesFile
from pkm_fairseq.models.checkpoints import load_model_and_task, read_checkpoint
from pkm_fairseq.models.export import export
from pkm_fairseq.models.roberta import PkmRobertaModel
from tests.helpers import batch

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
    run,
    run_alike,
    run_well,
    train,
)
from .runs import load as load_file

SCRIPTS = ROOT / "scripts"
LAST = "checkpoint_last.pt"
DTYPES = ("float32", "bfloat16", "int8")


@pytest.fixture
def trained(resm_run: "tuple[Path, Run]") -> Path:
    return resm_run[0] / LAST


@pytest.fixture
def made(trained: Path, tmp_path: Path) -> Path:
    """A folder with the exported model, in float32."""
    export(trained, tmp_path / "made", "float32")
    return tmp_path / "made"


def logits(model: Any, dictionary: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch(dictionary, [5, 9, 7]))[0]


def validated(file: Path, data: Path, *options: Any) -> Run:
    command = [BIN / "fairseq-validate", data, "--user-dir", USER_DIR, *MASKED_LM[:4], "--cpu"]
    command += ["--path", file, "--batch-size", "8", "--num-workers", "0"]
    return run_alike(*command, "--log-format", "json", *options)


def losses(done: Run) -> Any:
    assert done.status == 0, done.output[-3000:]
    (line,) = done.logged("valid")
    return {key: number for key, number in line.items() if "loss" in key or "memory" in key}


# --- what works -------------------------------------------------------------------------------


def test_an_exported_model_has_the_bits_of_its_checkpoint(
    trained: Path, made: Path, data_bin: Path
) -> None:
    here, there = load(trained, data_bin), load(made / "model.pt", data_bin)
    assert isinstance(there.model.memory_layers()[1].memory.values, MappedTable)
    dictionary = here.task.source_dictionary
    assert torch.equal(logits(here.model, dictionary), logits(there.model, dictionary))
    state = load_file(made / "model.pt")
    assert not [name for name in state["model"] if name.endswith("values.weight")]
    assert "last_optimizer_state" not in state
    table = here.model.memory_layers()[1].memory.values.weight
    with zipfile.ZipFile(made / "model.pt") as archive:
        stored = [record.file_size for record in archive.infolist() if "/data/" in record.filename]
    assert sum(stored) <= sum(x.nbytes for x in state["model"].values())
    assert torch.equal(ValuesFile(made / "values.pt").rows("1"), table)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_script_exports_and_measures(
    trained: Path, data_bin: Path, dtype: str, tmp_path: Path
) -> None:
    command = [sys.executable, SCRIPTS / "export_memory.py", trained, tmp_path / "out"]
    done = run_well(*command, "--dtype", dtype, "--data", data_bin)
    report = json.loads((tmp_path / "out/export.json").read_text())
    assert (report["dtype"], report["tables"]) == (dtype, {"1": [256, 32]})
    assert report["bytes"] == (tmp_path / "out/values.pt").stat().st_size
    found = report["perplexity"]
    loaded = load(trained, data_bin)
    batches = masked_batches(loaded.task, "valid")
    assert found["before"] == evaluate(loaded.model, batches, loaded.task).ppl
    assert (found["after"] == found["before"]) == (dtype == "float32")
    assert found["after"] == pytest.approx(found["before"], rel=1e-3)
    last = done.output.splitlines()[-1]
    assert re.fullmatch(
        r"perplexity of [\d,]+ masked tokens of valid: .* before, .* after .*", last
    )
    printed = run_well(
        *(sys.executable, SCRIPTS / "evaluate_mlm.py", tmp_path / "out/model.pt"),
        *("--data", data_bin, "--split", "valid", "--ablate"),
    )
    assert f"model.pt: perplexity {found['after']:.2f}" in printed.output
    assert "all memories ablated: zero" in printed.output


def test_fairseq_validate_reads_an_exported_model(
    trained: Path, made: Path, data_bin: Path, tmp_path: Path
) -> None:
    expected = losses(validated(trained, data_bin))
    assert losses(validated(made / "model.pt", data_bin)) == expected
    moved = shutil.move(made / "values.pt", tmp_path / "elsewhere.pt")
    failed = validated(made / "model.pt", data_bin)
    assert failed.status == 1
    assert failed.output.splitlines()[-1].endswith(f"{made}/values.pt: no such file")
    override = str({"memory_values_file": str(moved)})
    assert losses(validated(made / "model.pt", data_bin, "--model-overrides", override)) == expected


def test_the_hub_interface_reads_an_exported_model(
    trained: Path, made: Path, data_bin: Path, tmp_path: Path
) -> None:
    loaded = [
        PkmRobertaModel.from_pretrained(str(file.parent), file.name, str(data_bin), bpe=None)
        for file in (trained, made / "model.pt")
    ]
    tokens = batch(loaded[0].task.source_dictionary, [6, 6])
    one, other = (hub.extract_features(tokens) for hub in loaded)
    assert torch.equal(one, other)
    assert other.requires_grad  # fairseq's interface switches no gradients off
    export(trained, tmp_path / "int8", "int8")
    given = {"memory_values_file": str(tmp_path / "int8/values.pt")}
    rounded = PkmRobertaModel.from_pretrained(
        str(made), "model.pt", str(data_bin), bpe=None, **given
    ).extract_features(tokens)
    assert not torch.equal(one, rounded) and torch.allclose(one, rounded, atol=0.01)


def test_scripts_read_an_exported_model(made: Path, data_bin: Path, tmp_path: Path) -> None:
    model = made / "model.pt"
    text = ["--data", data_bin, "--split", "valid"]
    exact = run_well(
        *(sys.executable, SCRIPTS / "validate_faiss.py", "--checkpoint", model),
        *(*text, "--queries", "50"),
    )
    assert exact.output.splitlines()[-1].startswith("EXACT: 200 float32 queries")
    usage = run_well(
        *(
            sys.executable,
            SCRIPTS / "memory_usage.py",
            "--checkpoint",
            model,
            *text,
            "--json",
            tmp_path / "u.json",
        )
    )
    assert usage.status == 0 and (tmp_path / "u.json").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/bin").symlink_to(data_bin)
    words = [sys.executable, SCRIPTS / "fill_mask.py", "w1 <mask> w3", "--words"]
    words += ["--data", tmp_path / "data", "--checkpoint", model]
    beside = run_well(*words).output
    shutil.move(made / "values.pt", tmp_path / "v.pt")
    assert run_well(*words, "--memory-values-file", tmp_path / "v.pt").output == beside
    failed = run(*words)
    assert failed.status == 1
    assert failed.output.splitlines()[-1].endswith(f"{made}/values.pt: no such file")


@pytest.mark.parametrize("shares", [["--memory-share-values"], []], ids=["shared", "apart"])
def test_shared_values_and_layers_to_keep(data_bin: Path, shares: Any, tmp_path: Path) -> None:
    shape = ["--encoder-layers", "3", "--memory-layers", "1,2", *shares]
    train(data_bin, tmp_path / "run", "--arch", "pkm_roberta_tiny", *MEMORY, *shape,
          "--max-update", "2")  # fmt: skip
    export(tmp_path / "run" / LAST, tmp_path / "made", "float32")
    file = ValuesFile(tmp_path / "made/values.pt")
    assert file.layers == ["1", "2"]
    assert (file.file.stat().st_size < 2 * file.rows("1").nbytes) == bool(shares)
    models = {}
    for name, keep in (("whole", {}), ("kept", {"encoder_layers_to_keep": "0,2"})):
        for path in (tmp_path / "run" / LAST, tmp_path / "made/model.pt"):
            stored = read_checkpoint(str(path))
            model, _, task = load_model_and_task(str(path), stored, data=str(data_bin), **keep)
            models.setdefault(name, []).append(logits(model, task.source_dictionary))
    assert torch.equal(*models["whole"]) and torch.equal(*models["kept"])
    assert not torch.equal(models["whole"][0], models["kept"][0])


# --- what is refused --------------------------------------------------------------------------


def test_training_is_refused_in_one_line(made: Path, data_bin: Path, tmp_path: Path) -> None:
    arch = ["--arch", "resm_roberta_tiny", *MEMORY, "--max-update", "2"]
    command = [BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, *MODEL, *arch]
    save_dir = ["--save-dir", tmp_path / "run"]
    values = ["--memory-values-file", made / "values.pt"]
    for criterion in ("masked_lm", "pkm_masked_lm"):
        failed = run_alike(*command, *save_dir, *values, "--criterion", criterion)
        assert failed.status == 1
        assert failed.output.splitlines()[-1] == (
            "pkm_roberta: --memory-values-file is for inference: train the checkpoint that was "
            "exported"
        )
        assert not list((tmp_path / "run").glob("*.pt"))
    failed = run_alike(*command, *save_dir, "--init-from", made / "model.pt")
    assert failed.status == 1
    assert "memory.values.weight is missing" in failed.output.splitlines()[-1]
    failed = run_alike(*command, *save_dir, "--restore-file", made / "model.pt")
    assert failed.status == 1
    assert "values are in a file" in failed.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory-values", "experts"], "does not work with --memory-values experts"),
        (["--memory-layers", "[]"], "no layer has a memory"),
        (["--memory-layers", "0"], "holds tables of the layers 1, none of layer 0"),
        (["--memory-n-keys", "8"], "must be (64, 32)"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    made: Path, data_bin: Path, tmp_path: Path, options: Any, said: str
) -> None:
    command = [BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, *MODEL, *MEMORY, *options]
    command += ["--arch", "resm_roberta_tiny", "--save-dir", tmp_path / "run"]
    failed = run_alike(*command, "--memory-values-file", made / "values.pt")
    assert failed.status == 1 and said in failed.output.splitlines()[-1]


def test_the_wrong_values_are_refused(
    trained: Path, stock_pkm_run: Path, made: Path, data_bin: Path, tmp_path: Path
) -> None:
    export(stock_pkm_run / LAST, tmp_path / "other", "int8")
    other = tmp_path / "other/values.pt"
    evaluating = [sys.executable, SCRIPTS / "evaluate_mlm.py", "--data", data_bin]
    evaluating += ["--split", "valid", "--memory-values-file", other]
    failed = run(*evaluating, made / "model.pt")
    assert failed.status == 1
    assert f"values file {other} holds the values of another model" in failed.output
    assert len(failed.output.splitlines()) == 1
    failed = run(*evaluating, trained)
    assert failed.status == 1 and "the checkpoint holds its tables itself" in failed.output
    failed = run(*evaluating, trained, made / "model.pt")
    assert failed.status == 1 and "is of one checkpoint" in failed.output
    shutil.copy(other, made / "values.pt")
    failed = validated(made / "model.pt", data_bin)
    assert failed.status == 1 and "another model" in failed.output.splitlines()[-1]


def test_what_cannot_be_exported_is_refused(
    trained: Path, plain_run: Path, made: Path, data_bin: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the model has no memory"):
        export(plain_run / LAST, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="was exported: its values are in a file already"):
        export(made / "model.pt", tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="would be replaced: choose another folder"):
        shutil.copy(trained, tmp_path / "model.pt")
        export(tmp_path / "model.pt", tmp_path, "int8")
    options = ["--arch", "pkm_roberta_tiny", *MEMORY, "--memory-values", "experts"]
    train(data_bin, tmp_path / "run", *options, "--max-update", "1")
    with pytest.raises(ValueError, match="values of the kind experts, must be table"):
        export(tmp_path / "run" / LAST, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_may_name_only_a_values_file_beside_it(made: Path, data_bin: Path) -> None:
    state = load_file(made / "model.pt")
    state["cfg"]["model"]["memory_values_file"] = "../made/values.pt"
    torch.save(state, made / "model.pt")
    with pytest.raises(ValueError, match=r"names the values file \.\./made/values.pt, must name"):
        load(made / "model.pt", data_bin)


# --- faults -----------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_in_one_line(made: Path, data_bin: Path) -> None:
    whole = (made / "values.pt").read_bytes()
    for share in (0.2, 0.99):
        (made / "values.pt").write_bytes(whole[: int(share * len(whole))])
        failed = validated(made / "model.pt", data_bin)
        assert failed.status == 1
        assert f"{made}/values.pt is damaged" in failed.output.splitlines()[-1]


def test_a_full_disk_leaves_the_older_export(trained: Path, made: Path, data_bin: Path) -> None:
    before = {file: file.read_bytes() for file in made.iterdir()}
    command = [sys.executable, SCRIPTS / "export_memory.py", trained, made]
    failed = run("bash", "-c", 'ulimit -f 20 && exec "$@"', "bash", *command)  # 20 kB
    assert failed.status == 1
    assert failed.output.splitlines()[-1].endswith(f"File too large: '{made}/values.pt'")
    assert {file: file.read_bytes() for file in made.iterdir()} == before


KILLED = """
import os, signal, sys
from pathlib import Path
from pkm_fairseq.memory import files
from pkm_fairseq.models.export import export

stop, replace = int(sys.argv[1]), Path.replace
names = []

def killed(self, target):
    names.append(target)
    if len(names) == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = killed
export(Path(sys.argv[2]), Path(sys.argv[3]), "int8")
"""


@pytest.mark.parametrize("stop", [1, 2])
def test_a_killed_export_leaves_nothing_half(
    trained: Path, made: Path, stock_pkm_run: Path, data_bin: Path, tmp_path: Path, stop: int
) -> None:
    """Killed before a file has its name: an older export is whole, or refused, never mixed up."""
    older = tmp_path / "older"
    export(stock_pkm_run / LAST, older, "float32")
    expected = losses(validated(older / "model.pt", data_bin))
    command = [sys.executable, "-c", KILLED, str(stop), str(trained), str(older)]
    done = subprocess.run(command, check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    after = validated(older / "model.pt", data_bin)
    if stop == 1:
        assert losses(after) == expected
    else:
        assert after.status == 1 and "another model" in after.output.splitlines()[-1]
    export(trained, older, "float32")
    assert losses(validated(older / "model.pt", data_bin)) == losses(validated(trained, data_bin))
    assert sorted(file.name for file in older.iterdir()) == ["model.pt", "values.pt"]


def test_a_killed_reader_leaves_the_files(made: Path, data_bin: Path, shared: Shared) -> None:
    before = {file: file.read_bytes() for file in made.iterdir()}
    code = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from pkm_fairseq.memory import ValuesFile\n"
        "table = ValuesFile(Path(sys.argv[1])).table('1').eval()\n"
        "table(torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(made / "values.pt")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert {file: file.read_bytes() for file in made.iterdir()} == before


def test_the_measurement_runs_and_deletes_its_files(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "measure_mapped.py", "--n-keys", "32", "--rounds", "2"]
    command += ["--tokens", "16", "--folder", tmp_path / "files", "--json", tmp_path / "m.json"]
    printed = run_well(*command).output
    rows = json.loads((tmp_path / "m.json").read_text())["results"]
    assert [row["table"] for row in rows] == ["in memory", *DTYPES]
    sizes = [row["bytes"] for row in rows[1:]]
    assert sizes[0] > 32 * 32 * 768 * 4 > sizes[1] > sizes[2]
    assert all(len(row["warm"]) == len(row["ratio"]) == 2 for row in rows)
    assert [len(row["cold"]) for row in rows] == [0, 2, 2, 2]
    assert printed.count("32² | ") == 4
    assert not list((tmp_path / "files").iterdir())
    failed = run(*command, "--rounds", "0")
    assert failed.status == 1 and "--rounds is 0, must be at least 1" in failed.output

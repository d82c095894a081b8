"""Steps of the demo: nothing finished is lost, and nothing stale is reused."""

import shutil
import sys

import pytest

from pkm_fairseq.experiments.demo import facts, kinds, pipeline, train
from pkm_fairseq.experiments.demo.presets import ARMS, PRESETS
from pkm_fairseq.experiments.runs import folders
from pkm_fairseq.experiments.runs.folders import begin, finish, is_finished
from tests.validation.models import SCRIPTS, load_script


def test_a_finished_step_is_reused_and_another_one_kept_aside(tmp_path, capsys):
    folder = tmp_path / "step"
    assert begin(folder, "one")
    (folder / "result").write_text("precious")
    assert not is_finished(folder, "one")
    finish(folder, "one")
    assert is_finished(folder, "one") and not begin(folder, "one")
    assert begin(folder, "two")
    assert list(folder.iterdir()) == [folder / "made_with.json"]
    assert (tmp_path / "step.old/result").read_text() == "precious"
    assert f"moved to {tmp_path / 'step.old'}" in capsys.readouterr().out


def test_missing_data_stops_before_any_arm_is_touched(tmp_path):
    arm = tmp_path / "arms/plain"
    begin(arm, "key")
    (arm / "checkpoint_last.pt").write_text("precious")
    with pytest.raises(ValueError, match=r"dict.txt: no such file; prepare the corpus first"):
        train.train_arms(PRESETS["quick"], tmp_path / "typo", tmp_path / "arms")
    assert (arm / "checkpoint_last.pt").read_text() == "precious"


CODE = ["compat", "memory", "models", "tasks"]
EXPERIMENTS = [f"experiments/{part}" for part in ("data", "demo", "runs")]


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A copy of the package's code, of which keys are made."""
    copy = tmp_path / "code"
    shutil.copytree(folders.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(folders, "PACKAGE", copy)
    return copy


@pytest.mark.parametrize("part", CODE)
def test_the_arms_are_trained_again_if_their_code_changed(code, part, tmp_path, monkeypatch):
    data, arms = tmp_path / "data/bin", tmp_path / "arms"
    data.mkdir(parents=True)
    for name in ("dict.txt", *(f"{split}.{x}" for split in train.SPLITS for x in ("bin", "idx"))):
        (data / name).touch()
    monkeypatch.setattr(train, "_train", lambda *_: None)
    for _ in range(2):
        train.train_arms(PRESETS["quick"], data.parent, arms)
    assert not (arms / "plain.old").exists()
    (code / part / "__init__.py").write_text("changed = True")
    train.train_arms(PRESETS["quick"], data.parent, arms)
    assert (arms / "plain.old").exists()


@pytest.mark.parametrize("part", [*CODE, *EXPERIMENTS])
def test_the_arms_are_evaluated_again_if_their_code_changed(code, part, tmp_path, monkeypatch):
    arms, data = tmp_path / "arms", tmp_path / "data"
    files = [arms / arm / train.LAST for arm in ARMS]
    files += [data / name for name in ("spm.model", "bin/train.bin", "bin/test.bin")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.setattr(pipeline, "_evaluate", lambda *_: {"found": 1})
    step = (PRESETS["quick"], data, arms, tmp_path / "evaluation")
    for _ in range(2):
        assert pipeline.evaluate_arms(*step) == {"found": 1}
    monkeypatch.setattr(pipeline, "_evaluate", lambda *_: {"found": 2})
    assert pipeline.evaluate_arms(*step) == {"found": 1}
    (code / part / "__init__.py").write_text("changed = True")
    assert pipeline.evaluate_arms(*step) == {"found": 2}


@pytest.mark.parametrize("part", [*CODE, *EXPERIMENTS, "criterions", "optim", "experiments/facts"])
def test_facts_are_learned_again_if_their_code_changed(code, part):
    before = facts._key(PRESETS["quick"])
    assert facts._key(PRESETS["quick"]) == before
    (code / part / "__init__.py").write_text("changed = True")
    assert facts._key(PRESETS["quick"]) != before


@pytest.mark.parametrize("exact", [True, False])
def test_a_search_that_is_not_exact_is_printed_and_gives_status_1(exact, monkeypatch, capsys):
    found = {"arm": "pkm", "exact": exact}
    report = {"validation": [found, {**found, "exact": True}], "arms": [], "facts": {}}
    report |= {"fill_mask": [], "masked_tokens": 0, "unigram_ppl": 1.0}
    monkeypatch.setattr(pipeline, "run_demo", lambda *_: report)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--validate-faiss"])
    main = load_script(SCRIPTS / "demo.py").main
    if exact:
        main()
    else:
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert ("NOT EXACT by FAISS" in printed) is not exact
    assert printed.splitlines()[-1].startswith("report: ")


# --- short trainings of several kinds -------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that makes code take the place of fairseq-train."""

    def use(code):
        command = tmp_path / "bin/fairseq-train"
        command.parent.mkdir()
        command.write_text(f"#!{sys.executable} -S\n{code}")
        command.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(command.with_name("python")))

    return use


def learned(folder):
    return list(kinds.learned(folder, folder / "out", "pkm", "quick", 3, [1], ["plain"]))


def test_kinds_start_anew_whatever_is_where_they_are_started(stand_in, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "checkpoints").mkdir(parents=True)
    (here / "checkpoints" / train.LAST).write_text("of another training")
    monkeypatch.chdir(here)
    stand_in("""
import json, os, sys
folder = dict(zip(sys.argv, sys.argv[1:])).get("--save-dir", "checkpoints")
names = ("num_updates", "ppl", "memory1_top1_usage", "memory1_topk_usage", "memory1_kl_weighted")
found = {f"valid_{name}": 3 + i + 10 * len(os.listdir(folder)) for i, name in enumerate(names)}
print("x | valid |", json.dumps(found))
""")
    assert learned(tmp_path) == [("plain", 1, (4, 5, 6, 7))]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["pkm_plain_1.log"]


def test_a_kind_that_fails_says_why(stand_in, tmp_path):
    stand_in("""raise SystemExit("much\\nValueError: the reason")""")
    log = tmp_path / "out/pkm_plain_1.log"
    with pytest.raises(ValueError) as failed:
        learned(tmp_path)
    assert str(failed.value) == f"a training failed, see {log}: ValueError: the reason"

"""The folder of a study: its size, and its results; folders of steps that must not be lost."""

import fcntl
import json

import pytest

from pkm_fairseq.experiments.runs.folders import begin, finish
from pkm_fairseq.experiments.runs.study import claim, collect_results


def test_a_folder_belongs_to_one_size(tmp_path):
    claim(tmp_path / "out", "toy")
    claim(tmp_path / "out", "toy")
    with pytest.raises(ValueError, match="out holds the study in size toy: choose another OUT for"):
        claim(tmp_path / "out", "full")
    claim(tmp_path / "other", "full")


def test_results_are_not_replaced_by_none(tmp_path):
    published = tmp_path / "results.json"
    published.write_text('[{"run": {}}]')
    assert collect_results(tmp_path) == []
    assert json.loads(published.read_text()) == [{"run": {}}]
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"run": {"seed": 1}}')
    assert collect_results(tmp_path) == [{"run": {"seed": 1}}]
    assert json.loads(published.read_text()) == [{"run": {"seed": 1}}]


def test_unfinished_steps_do_not_replace_a_finished_one(tmp_path):
    folder = tmp_path / "step"
    begin(folder, "one")
    (folder / "result").write_text("precious")
    finish(folder, "one")
    for key in ("two", "three", "four"):  # none of these finishes
        begin(folder, key)
        (folder / key).write_text("half")
    assert (tmp_path / "step.old/result").read_text() == "precious"
    assert (tmp_path / "step.unfinished/three").read_text() == "half"
    assert (folder / "four").exists() and not (folder / "three").exists()


@pytest.mark.parametrize("where", [".", "arm"])
def test_a_folder_with_a_running_training_is_not_moved(tmp_path, where):
    folder = tmp_path / "step"
    begin(folder, "one")
    (folder / where).mkdir(exist_ok=True)
    with (folder / where / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being trained by another process"):
            begin(folder, "two")
        assert begin(folder, "one")  # its own process goes on
    assert begin(folder, "two")

"""Steps of the demo: nothing finished is lost, and nothing stale is reused."""

import pytest

from pkm_fairseq.experiments.demo import train
from pkm_fairseq.experiments.demo.presets import PRESETS
from pkm_fairseq.experiments.runs.folders import begin, finish, is_finished


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

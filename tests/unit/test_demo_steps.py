"""Steps of the demo: nothing finished is lost, and nothing stale is reused."""

import pytest
import torch

from pkm_fairseq.demo import train
from pkm_fairseq.demo.presets import PRESETS
from pkm_fairseq.demo.steps import begin, finish, is_finished


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


def checkpoint(updates: int) -> dict:
    return {"model": {}, "optimizer_history": [{"num_updates": updates}]}


def test_a_half_written_last_checkpoint_gives_way_to_the_newest_whole_one(tmp_path, capsys):
    for updates in (20, 100):
        torch.save(checkpoint(updates), tmp_path / f"checkpoint_1_{updates}.pt")
    whole = (tmp_path / "checkpoint_1_100.pt").read_bytes()
    (tmp_path / "checkpoint_last.pt").write_bytes(whole[: len(whole) // 2])
    train._mend_last(tmp_path)
    assert train.updates_of(tmp_path / "checkpoint_last.pt") == 100
    assert "starting from the one before" in capsys.readouterr().out


def test_a_half_written_checkpoint_without_another_starts_the_arm_anew(tmp_path):
    (tmp_path / "checkpoint_last.pt").write_text("half")
    train._mend_last(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_last_checkpoint_stays(tmp_path):
    torch.save(checkpoint(7), tmp_path / "checkpoint_last.pt")
    torch.save(checkpoint(9), tmp_path / "checkpoint_1_9.pt")
    train._mend_last(tmp_path)
    assert train.updates_of(tmp_path / "checkpoint_last.pt") == 7

"""What scripts/kill_training.py would find, were there something to find."""

import json

import pytest
import torch

from pkm_fairseq.memory.observe.log import FILE, INITIAL_VALUES
from tests import faults
from tests.faults import Choices, differing

INTERVAL = 5
LOSSES = {"train_inner": {update: update / 10 for update in range(1, 101)}, "valid": {}}


def log_of(folder, updates, loaded=None, **different):
    """The log of a process that went on from a checkpoint."""
    lines = []
    if loaded is not None:
        lines += [f"INFO | Loaded checkpoint x/checkpoint_last.pt (epoch 1 @ {loaded} updates)"]
    for update in updates:
        loss = different.get(f"at{update}", LOSSES["train_inner"][update])
        logged = {"loss": str(loss), "num_updates": str(update)}
        lines += [f"INFO | train_inner | {json.dumps(logged)}"]
    (folder / "log").write_text("\n".join([*lines, ""]))
    return folder / "log"


def save(folder, **updates):
    for name, n in updates.items():
        state = {"model": {"w": torch.zeros(9)}, "optimizer_history": [{"num_updates": n}]}
        torch.save(state, folder / f"checkpoint_{name}.pt")


@pytest.fixture
def folders(tmp_path):
    for name in ("killed", "straight"):
        (tmp_path / name).mkdir()
        torch.save({"1": torch.zeros(4)}, tmp_path / name / INITIAL_VALUES)
    return tmp_path / "killed", tmp_path / "straight"


def examine(folders, resumed, updates, **log):
    file = log_of(folders[0].parent, updates, **log)
    return faults._examine(*folders, file, LOSSES, resumed, INTERVAL)


def test_a_process_that_kept_what_it_had_to_keep(folders):
    save(folders[0], **{"last": 20, "1_15": 15, "1_20": 20})
    (folders[0] / "saving0.part").write_text("half")
    found = examine(folders, 10, range(11, 24), loaded=10)
    assert found == {"reached": 23, "kept": 20, "done": 13}
    assert examine(folders, 20, [])["reached"] == 20  # killed while starting


def half_of_the_last(folder):
    file = folder / "checkpoint_last.pt"
    file.write_bytes(file.read_bytes()[:500])


FAULTS = {
    "half-written": (half_of_the_last, {}, "not a readable checkpoint"),
    "older than said": (lambda f: save(f, **{"1_20": 15}), {}, "1_20.pt has 15 updates"),
    "lost too much": (lambda f: save(f, last=15), {}, "had reached update 23, but .* has 15"),
    "gone back": (lambda f: save(f, last=5), {}, "but checkpoint_last.pt has 5"),
    "another loss": (None, {"at22": 2.25}, "loss after update 22 is 2.25, without kills 2.2"),
    "elsewhere": (None, {"loaded": 5}, "did not go on from update 10"),
    "skipped": (None, {"updates": range(12, 24)}, "did not go on from update 10"),
    "heap": (lambda f: [(f / f"{i}.tmp").touch() for i in "ab"], {}, "temporary files pile up"),
    "no log": (lambda f: (f / FILE).write_text("no log"), {}, "not a log of usage"),
    "values": (
        lambda f: torch.save({"1": torch.ones(4)}, f / INITIAL_VALUES),
        {},
        "are not those of the training",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(folders, fault):
    do, log, message = FAULTS[fault]
    save(folders[0], last=20)
    if do:
        do(folders[0])
    with pytest.raises(ValueError, match=message):
        examine(folders, 10, **{"updates": range(11, 24), "loaded": 10, **log})


def end(folder, weight=0.0, counts=(5, 10), split="valid"):
    state = {"model": {"w": torch.full((3,), weight)}, "last_optimizer_state": {"step": 1}}
    torch.save(state, folder / "checkpoint_last.pt")
    header = {"format": 1, "layers": {}, "shared_values": False}
    records = [{"update": update, "split": split, "layers": []} for update in counts]
    lines = "".join(f"{json.dumps(line)}\n" for line in (header, *records))
    (folder / FILE).write_text(lines)


def test_equal_ends(folders):
    for folder in folders:
        end(folder)
    assert faults._compare_ends(*folders) == {"tensors": 1, "validation_counts": 2}


def test_different_ends(folders):
    end(folders[1])
    end(folders[0], weight=1e-7)
    with pytest.raises(ValueError, match="differ in 1 tensors: /model/w"):
        faults._compare_ends(*reversed(folders))
    end(folders[0], counts=(5,))
    with pytest.raises(ValueError, match="counts of memory usage in validation differ"):
        faults._compare_ends(*reversed(folders))
    end(folders[0])
    (folders[0] / "saving0.part").touch()
    with pytest.raises(ValueError, match=r"holds saving0\.part"):
        faults._compare_ends(*reversed(folders))


def test_differences_are_named():
    one = {"a": [1, torch.zeros(2)], "b": {"c": torch.zeros(3)}}
    assert differing(one, one) == []
    other = {"a": [2, torch.zeros(2)], "b": {"c": torch.zeros(3, dtype=torch.float64)}}
    assert differing(one, other) == ["/a/0", "/b/c"]
    assert differing(one, {"a": one["a"]}) == [""]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kills": 0}, "0 kills, a checkpoint every 5 updates: both must be at least 1"),
        ({"updates": 49}, "49 updates are too few: .* at least 50"),
        ({"data": "nothing"}, r"nothing/dict\.txt: no such file"),
        ({"out": "."}, "is not empty: choose a new folder"),
    ],
)
def test_choices_that_cannot_be(tmp_path, wrong, message):
    (tmp_path / "dict.txt").touch()
    choices = dict(data=".", out="out", kills=1, seed=1, updates=50, interval=INTERVAL)
    choices |= wrong
    for name in ("data", "out"):
        choices[name] = tmp_path / choices[name]
    with pytest.raises(ValueError, match=message):
        Choices(**choices)


def test_every_kill_is_due_before_the_end(tmp_path):
    (tmp_path / "dict.txt").touch()
    choices = Choices(tmp_path, tmp_path / "out", 50, 1, 100, INTERVAL)
    plan = faults._plan(choices)
    moments, updates = zip(*plan, strict=True)
    assert plan == faults._plan(choices)
    assert len(plan) == 50 and set(moments) == set(faults.MOMENTS)
    assert list(updates) == sorted(updates) and updates[0] >= 1 and updates[-1] <= 75

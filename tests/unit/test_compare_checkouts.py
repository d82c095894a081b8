"""scripts/compare_checkouts.py: what counts as a difference of two checkpoints."""

import sys

import pytest
import torch

from tests.validation.models import SCRIPTS, load_script

NAN = float("nan")


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPTS / "compare_checkouts.py")


def checkpoint(state=None, **model):
    return {"model": model, "last_optimizer_state": {"state": state or {}}}


def moments(step=3, of=0):
    return {of: {"step": step, "exp_avg": torch.ones(2)}}


def test_the_same_bits_are_equal(script):
    w = torch.tensor([1.0, NAN, -0.0])
    mask, none = torch.tensor([True]), torch.zeros(0, 3)
    one = checkpoint(moments(), w=w, mask=mask, none=none, half=w.bfloat16(), n=torch.tensor(3))
    other = checkpoint(moments(), w=w.clone(), mask=mask, none=none, half=w.bfloat16(),
                       n=torch.tensor(3))  # fmt: skip
    assert script.compare(one, other) == (7, [])


@pytest.mark.parametrize(
    ("model", "state", "said"),
    [
        ({"w": torch.tensor([1.0, 3.5])}, None, "model.w by up to 1.5"),
        ({"w": torch.tensor([1.0, NAN])}, None, "model.w by up to nan"),
        ({"w": torch.tensor([1.0, 2.0]).bfloat16()}, None, "torch.float32 (2,) and torch.bfloat16"),
        ({"w": torch.tensor([[1.0, 2.0]])}, None, "torch.float32 (2,) and torch.float32 (1, 2)"),
        ({}, None, "only the first checkout has model.w"),
        ({"w": torch.tensor([1.0, 2.0]), "x": torch.ones(1)}, None,
         "only the second checkout has model.x"),
        ({"w": torch.tensor([1.0, 2.0])}, moments(of=1),
         "only the first checkout has last_optimizer_state.0.exp_avg"),
        ({"w": torch.tensor([1.0, 2.0])}, moments(step=3.0), "last_optimizer_state.0.step"),
        ({"w": torch.tensor([1.0, 2.0])}, moments(step=4), "optimizer_state.0.step by up to 1"),
    ],
)  # fmt: skip
def test_every_difference_counts(script, model, state, said):
    one = checkpoint(moments(), w=torch.tensor([1.0, 2.0]))
    found = script.compare(one, checkpoint(state or moments(), **model))[1]
    assert any(said in line for line in found), found


def test_floats_are_compared_in_double_precision_and_minus_zero_is_not_zero(script):
    one, other = (checkpoint({0: {"lr": lr}}) for lr in (0.1, 0.1 + 1e-12))
    assert script.compare(one, other)[1] == ["last_optimizer_state.0.lr by up to 1e-12"]
    one, other = (checkpoint(w=torch.tensor([zero])) for zero in (0.0, -0.0))
    assert script.compare(one, other)[1] == ["model.w by up to 0"]


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_difference_is_exit_status_1(script, monkeypatch, capsys, is_equal):
    found = {"old": checkpoint(w=torch.ones(1)), "new": checkpoint(w=torch.ones(1))}
    if not is_equal:
        found["new"]["model"].update(w=torch.tensor([NAN]), x=torch.ones(1))
    monkeypatch.setattr(script, "train", lambda checkout, *_: found[checkout.name])
    options = ["old", "new", "--data", "data", "--arms", "pkm", "--updates", "2"]
    monkeypatch.setattr(sys, "argv", ["compare_checkouts.py", *options])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == (0 if is_equal else 1)
    verdict = "equal to the bit" if is_equal else (
        "NOT EQUAL in 2: model.w by up to nan; only the second checkout has model.x"
    )  # fmt: skip
    assert capsys.readouterr().out == f"pkm: {2 - is_equal} tensors after 2 updates: {verdict}\n"

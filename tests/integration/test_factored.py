"""Factored gradients of values train as dense ones do, through the real fairseq-train."""

from pathlib import Path
from typing import Any, Dict

import pytest
import torch

from .runs import MEMORY, load, train

DENSE = ["--user-dir", Path(__file__).parent / "dense_reference", "--optimizer", "dense_pkm_adam"]
TWO = ["--memory-layers", "0,1"]
# Updates are up to 8e-3 in 8 steps; sums are rounded in another order. Biases before a
# normalisation have a gradient of rounding errors alone, and a small eps would turn those into
# updates of full size.
EPS = ["--adam-eps", "1e-5"]
ATOL = 1e-5

OPTIONS = {
    "plain": [],
    "accumulated and clipped": ["--update-freq", "2", "--clip-norm", "0.5"],
    "values clipped": ["--memory-value-clip-norm", "1e-3", "--clip-norm", "0.5"],
    "two tables": TWO,
    "one table for two layers": [*TWO, "--memory-share-values", "--update-freq", "2"],
    "wrapped by --amp": ["--amp", "--update-freq", "2"],
    "replacing, other width": ["--memory-mode", "replace", "--memory-v-dim", "24"],
}


def options_of(name: str) -> "list[str]":
    return ["--arch", "resm_roberta_tiny", *MEMORY, *EPS, *OPTIONS[name], "--max-update", "8"]


def tensors(state: Any, where: str = "") -> Dict[str, torch.Tensor]:
    """All floating tensors of a nested state, by their path."""
    if isinstance(state, torch.Tensor):
        return {where: state} if state.is_floating_point() else {}
    if not isinstance(state, (dict, list)):
        return {}
    parts = state.items() if isinstance(state, dict) else enumerate(state)
    return {k: v for key, part in parts for k, v in tensors(part, f"{where}.{key}").items()}


def assert_close_checkpoints(one: Path, other: Path) -> None:
    """Parameters differ by at most ATOL, moments by a thousandth of the largest of a tensor.

    Moments of gradients below 1e-8 are those of rounding errors.
    """
    one, other = (load(folder / "checkpoint_last.pt") for folder in (one, other))
    for part in ("model", "last_optimizer_state"):
        ours, theirs = tensors(one[part]), tensors(other[part])
        assert ours.keys() == theirs.keys() and ours
        for name, tensor in ours.items():
            noise = 1e-16 if name.endswith("exp_avg_sq") else 1e-8
            limit = ATOL if part == "model" else 1e-3 * float(tensor.abs().max()) + noise
            difference = float((tensor - theirs[name]).abs().max())
            assert difference <= limit, (name, difference, limit)


@pytest.mark.parametrize("name", OPTIONS)
def test_factored_and_dense_gradients_train_the_same_model(
    data_bin: Path, tmp_path: Path, name: str
) -> None:
    factored = train(data_bin, tmp_path / "factored", *options_of(name))
    dense = train(data_bin, tmp_path / "dense", *options_of(name), *DENSE)
    assert len(factored.logged("train_inner")) == 8
    for key in ("loss", "gnorm", *(["value_gnorm"] if name == "values clipped" else [])):
        logs = [[float(log[key]) for log in run.logged("train_inner")] for run in (factored, dense)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-3), key
    assert_close_checkpoints(tmp_path / "factored", tmp_path / "dense")


def test_clipping_of_values_changes_what_is_trained(data_bin: Path, tmp_path: Path) -> None:
    """Adam does not see a constant factor, but the limit cuts some updates more than others."""
    clipped = train(data_bin, tmp_path / "clipped", *options_of("values clipped"))
    train(data_bin, tmp_path / "free", *options_of("values clipped"), "--memory-value-clip-norm=0")
    assert all(float(log["value_gnorm"]) > 1e-3 for log in clipped.logged("train_inner"))
    with pytest.raises(AssertionError):
        assert_close_checkpoints(tmp_path / "clipped", tmp_path / "free")


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16", "float8"])
def test_values_in_bfloat16_train_and_resume(
    data_bin: Path, tmp_path: Path, moment_dtype: str
) -> None:
    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--memory-value-dtype", "bfloat16"]
    options += ["--memory-moment-dtype", moment_dtype]
    train(data_bin, tmp_path / "whole", *options, "--max-update", "6")
    train(data_bin, tmp_path / "parts", *options, "--max-update", "3")
    half = load(tmp_path / "parts/checkpoint_last.pt")
    train(data_bin, tmp_path / "parts", *options, "--max-update", "6")
    whole, parts = (load(tmp_path / run / "checkpoint_last.pt") for run in ("whole", "parts"))
    values = "encoder.sentence_encoder.layers.1.memory.values.weight"
    stored = whole["model"][values]  # fairseq writes float32 whatever the model has
    assert torch.equal(stored.bfloat16().float(), stored)
    assert not torch.equal(whole["model"][values], half["model"][values])
    ours, theirs = tensors(whole["last_optimizer_state"]), tensors(parts["last_optimizer_state"])
    for name, tensor in {**tensors(whole["model"]), **ours}.items():
        assert torch.equal(tensor, {**tensors(parts["model"]), **theirs}[name]), name
    moments = [tensor for tensor in ours.values() if tensor.shape == (256, 32)]
    assert len(moments) == 2 and all(tensor.dtype == torch.float32 for tensor in moments)
    in_bfloat16 = [torch.equal(tensor.bfloat16().float(), tensor) for tensor in moments]
    assert in_bfloat16 == [moment_dtype != "float32"] * 2
    with_4_bits = [(tensor.frexp()[0] * 16 % 1 == 0).all() for tensor in moments]  # of the mantissa
    assert with_4_bits == [moment_dtype == "float8"] * 2


def test_any_other_optimizer_trains_values_in_bfloat16(data_bin: Path, tmp_path: Path) -> None:
    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--memory-value-dtype", "bfloat16"]
    options += ["--optimizer", "adam", "--lr", "1e-2", "--save-interval-updates", "3"]
    train(data_bin, tmp_path, *options, "--max-update", "6")
    values = "encoder.sentence_encoder.layers.1.memory.values.weight"
    early, late = (
        load(tmp_path / f"checkpoint_{name}.pt")["model"][values] for name in ("1_3", "last")
    )
    assert not torch.equal(early, late)

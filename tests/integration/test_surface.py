"""What else fairseq offers, with memories: recomputed activations, dropped layers, EMA, the hub."""

import itertools
import shutil
from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from fairseq import checkpoint_utils, hub_utils
from fairseq.data import Dictionary
from torch import Tensor

from pkm_fairseq.experiments.data.prepare import load_sentencepiece, train_sentencepiece
from pkm_fairseq.models.roberta import PkmRobertaModel
from tests.helpers import write_split

from .runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    MODEL,
    ROOT,
    TRAIN,
    USER_DIR,
    Run,
    binarise,
    load,
    run_well,
    train,
    train_on_two_workers,
    values_of,
)
from .test_factored import EPS, assert_close_checkpoints
from .test_readme import blocks

RESM = ["--arch", "resm_roberta_tiny", *MEMORY]
LAST = "checkpoint_last.pt"
VALUES = "encoder.sentence_encoder.layers.{}.memory.values.weight"


def validate(data: Path, checkpoint: Path, *options: Any) -> Run:
    """Run fairseq-validate; it must succeed."""
    return run_well(
        *(BIN / "fairseq-validate", data, "--path", checkpoint, "--cpu", "--user-dir", USER_DIR),
        *("--task", "pkm_masked_lm", "--batch-size", "8", "--log-format", "json"),
        *("--num-workers", "0", *options),
    )


def assert_equal_tensors(one: Dict[str, Tensor], other: Dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# --- activations ------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["pkm_adam", "adam"])
def test_recomputed_activations_train_the_same_model(
    data_bin: Path, tmp_path: Path, optimizer: str
) -> None:
    options = [*RESM, *EPS, "--optimizer", optimizer, "--max-update", "6", "--update-freq", "2"]
    options += ["--memory-key-dropout", "0.2", "--store-ema", "--memory-usage-interval", "1"]
    options += ["--memory-usage-tokens", "256"]
    kept = train(data_bin, tmp_path / "kept", *options)
    again = train(data_bin, tmp_path / "again", *options, "--checkpoint-activations")
    assert len(values_of(again, "loss")) == 6
    for key in ("loss", "gnorm"):
        assert values_of(again, key) == pytest.approx(values_of(kept, key), rel=1e-3), key
    usage, same = (run.logged("train_inner")[-1] for run in (kept, again))
    keys = [key for key in usage if key.startswith("memory1_")]
    assert "memory1_top1_usage" in keys and all(same[key] == usage[key] for key in keys)
    assert_close_checkpoints(tmp_path / "kept", tmp_path / "again")


# --- layers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropped(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, Any]":
    """Two workers, each of which drops layers of its own choice, with and without a memory."""
    out = tmp_path_factory.mktemp("dropped")
    options = [*RESM, "--memory-layers", "0,2", "--encoder-layers", "3", "--max-update", "8"]
    options += ["--encoder-layerdrop", "0.5", "--memory-query-norm", "layer"]
    return out, train_on_two_workers(data_bin, out, *options)


def test_a_layer_may_be_dropped_by_one_worker_only(dropped: "tuple[Path, Any]") -> None:
    out, (first, _) = dropped  # fairseq stops if the workers' gradients differ
    assert len(values_of(first, "loss")) == 8
    state = load(out / LAST)["last_optimizer_state"]["state"]
    updates = [table["step"] for table in state.values() if table["exp_avg"].shape == (256, 32)]
    assert len(updates) == 2 and all(0 < n <= 8 for n in updates)
    assert min(updates) < 8  # no worker read it


def test_a_pruned_checkpoint_is_validated_finetuned_and_resumed(
    data_bin: Path, dropped: "tuple[Path, Any]", tmp_path: Path
) -> None:
    """Layers 1 and 2 remain, as layers 0 and 1; the memory of layer 2 is then in layer 1."""
    whole = load(dropped[0] / LAST)["model"]
    pruned = validate(
        *(data_bin, dropped[0] / LAST, "--valid-subset", "valid"),
        *("--model-overrides", "{'encoder_layers_to_keep': '1,2'}"),
    )
    (valid,) = pruned.logged("valid")
    assert "valid_memory1_tokens" in valid and "valid_memory0_tokens" not in valid
    options = [*RESM, "--memory-layers", "0,2", "--encoder-layers", "3"]
    options += ["--encoder-layers-to-keep", "1,2", "--memory-query-norm", "layer"]
    options += ["--finetune-from-model", dropped[0] / LAST, "--save-interval-updates", "1"]
    options += ["--lr", "1e-30", "--memory-value-lr", "0"]
    start = train(data_bin, tmp_path, *options, "--max-update", "1")
    assert start.logged("valid")[-1]["valid_loss"] == valid["valid_loss"]
    state = load(tmp_path / LAST)["model"]
    assert torch.equal(state[VALUES.format(1)], whole[VALUES.format(2)])
    assert VALUES.format(0) not in state and VALUES.format(2) not in state
    rest = train(data_bin, tmp_path, *options, "--max-update", "2")
    assert [log["num_updates"] for log in rest.logged("train_inner")] == ["2"]


# --- moving averages --------------------------------------------------------------------------

EMA = ["--store-ema", "--ema-decay", "0.5", "--ema-fp32", "--ema-update-freq", "2"]


@pytest.fixture(scope="module")
def averaged(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As resm_run, with a moving average and every update saved."""
    out = tmp_path_factory.mktemp("averaged")
    train(data_bin, out, *RESM, "--max-update", "12", *EMA, "--save-interval-updates", "1")
    return out


def test_the_moving_average_is_that_of_the_whole_model_and_changes_nothing(
    averaged: Path, resm_run: "tuple[Path, Run]"
) -> None:
    assert_equal_tensors(load(averaged / LAST)["model"], load(resm_run[0] / LAST)["model"])
    models = [load(averaged / f"checkpoint_1_{i}.pt")["model"] for i in range(1, 13)]
    extra = load(averaged / LAST)["extra_state"]
    assert extra["ema"].keys() == models[0].keys() and VALUES.format(1) in extra["ema"]
    for name in models[0]:
        expected = models[0][name].clone()  # the copy is made after the first update
        for model in models[1::2]:
            expected = 0.5 * expected + 0.5 * model[name]
        for copy in (extra["ema"], extra["ema_fp32_params"]):
            assert torch.allclose(copy[name], expected, rtol=1e-6, atol=1e-8), name
    assert torch.equal(extra["ema"]["encoder.sentence_encoder.version"], torch.tensor([3.0]))
    assert not torch.equal(extra["ema"][VALUES.format(1)], models[-1][VALUES.format(1)])


def test_a_moving_average_goes_on_where_it_was(
    data_bin: Path, averaged: Path, tmp_path: Path
) -> None:
    options = [*RESM, *EMA]
    train(data_bin, tmp_path, *options, "--max-update", "6")
    train(data_bin, tmp_path, *options, "--max-update", "12")
    whole, parts = (load(folder / LAST) for folder in (averaged, tmp_path))
    assert_equal_tensors(whole["model"], parts["model"])
    for copy in ("ema", "ema_fp32_params"):
        assert_equal_tensors(whole["extra_state"][copy], parts["extra_state"][copy])


def test_a_moving_average_becomes_a_checkpoint_that_is_validated(
    data_bin: Path, averaged: Path, tmp_path: Path
) -> None:
    checkpoint_utils.save_ema_as_checkpoint(str(averaged / LAST), str(tmp_path / "ema.pt"))
    subsets = ["--valid-subset", "valid,train"]
    average, model = (
        validate(data_bin, file, *subsets) for file in (tmp_path / "ema.pt", averaged / LAST)
    )
    for subset in ("valid", "train"):
        (one,), (other,) = average.logged(subset), model.logged(subset)
        assert float(one[f"{subset}_loss"]) != float(other[f"{subset}_loss"])
        assert float(one[f"{subset}_memory1_tokens"]) > 0


# --- checkpoints and early stops --------------------------------------------------------------


def test_checkpoints_are_kept_as_asked_and_patience_ends_the_training(
    data_bin: Path, tmp_path: Path
) -> None:
    """Nothing learns, so the second validation is no better than the first, nor the third."""
    options = [*RESM, "--lr", "1e-30", "--memory-value-lr", "0", "--memory-query-norm", "layer"]
    options += ["--validate-interval-updates", "2", "--save-interval-updates", "2"]
    options += ["--patience", "2", "--keep-interval-updates", "1", "--keep-best-checkpoints", "1"]
    run = train(data_bin, tmp_path, *options, "--max-update", "30")
    assert [log["valid_num_updates"] for log in run.logged("valid")] == ["2", "4", "6"]
    assert "early stop" in run.output
    names = sorted(file.name for file in tmp_path.glob("*.pt"))
    assert [name for name in names if name.startswith("checkpoint_1_")] == ["checkpoint_1_6.pt"]
    assert len([name for name in names if "best_loss" in name]) == 1
    assert {LAST, "checkpoint_best.pt"} <= set(names)


# --- the hub ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sentencepiece model, data, a model, and one finetuned on sentences."""
    folder = tmp_path_factory.mktemp("spoken")
    words = ["cats dogs birds we", "see like hear eat", "the a", "tree house mice"]
    text = [" ".join(line) for line in itertools.product(*map(str.split, words))]
    (folder / "spm.model").write_bytes(train_sentencepiece(text * 10, 60))
    pieces = load_sentencepiece(folder / "spm.model")
    encoded = [" ".join(pieces.encode(line, out_type=str)) for line in text]
    for split, lines in (("train", encoded * 4), ("valid", encoded)):
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    data = binarise(folder, folder / "bin")
    train(data, folder / "model", *RESM, "--max-update", "20", "--lr", "1e-2")
    dictionary, labels = Dictionary.load(str(data / "dict.txt")), Dictionary()
    for label in ("yes", "no"):
        labels.add_symbol(label)
    for split in ("train", "valid"):
        lines = [dictionary.encode_line(line, add_if_not_exist=False).tolist() for line in encoded]
        write_split(folder / "sentences/input0", split, dictionary, lines)
        ids = [[labels.index("yes" if "cats" in line else "no"), labels.eos()] for line in text]
        write_split(folder / "sentences/label", split, labels, ids)
    run_well(
        *(BIN / "fairseq-train", folder / "sentences", *TRAIN, *MODEL, *RESM, "--max-update", "2"),
        *("--task", "pkm_sentence_prediction", "--criterion", "pkm_sentence_prediction"),
        *("--num-classes", "2", "--init-token", "0", "--max-positions", "32"),
        *("--finetune-from-model", folder / "model" / LAST, "--save-dir", folder / "head"),
    )
    return folder


def from_hub(folder: Path, checkpoint: str = "model", data: str = "bin") -> Any:
    return PkmRobertaModel.from_pretrained(
        str(folder / checkpoint),
        checkpoint_file=LAST,
        data_name_or_path=str(folder / data),
        bpe="sentencepiece",
        sentencepiece_model=str(folder / "spm.model"),
    )


@torch.no_grad()
def test_the_hub_interface_reads_writes_and_fills_masks(spoken: Path) -> None:
    hub = from_hub(spoken)
    assert not hub.model.training
    tokens = hub.encode("cats like the tree")
    assert hub.decode(tokens) == "cats like the tree"
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(spoken / "model" / LAST)], arg_overrides={"data": str(spoken / "bin")}
    )
    features = model.eval()(tokens[None], features_only=True)[0]
    assert torch.equal(hub.extract_features(tokens), features)
    hiddens = hub.extract_features(tokens, return_all_hiddens=True)
    assert len(hiddens) == 3 and torch.equal(hiddens[-1], features)
    filled = hub.fill_mask("cats like the<mask>", topk=3)
    start, end = hub.encode("cats like the")[:-1], tokens[-1:]
    masked = torch.cat([start, tokens.new_tensor([task.mask_idx]), end])
    best = model(masked[None])[0][0, -2].softmax(dim=0).topk(3)
    assert [probability for _, probability, _ in filled] == pytest.approx(best.values.tolist())
    symbols = [task.source_dictionary[int(i)].replace("\u2581", " ") for i in best.indices]
    assert [piece for _, _, piece in filled] == symbols
    with hub.model.record_memory_usage() as usage:
        hub.extract_features(tokens)
    assert usage[1].tokens == len(tokens)


def test_the_lines_of_the_readme_run(spoken: Path) -> None:
    (code,) = [block for block in blocks("python") if "PkmRobertaModel" in block]
    for demo, here in (("arms/resm_init", "model"), ("data/bin", "bin"), ("data/spm", "spm")):
        assert f"demo_out/{demo}" in code
        code = code.replace(f"demo_out/{demo}", str(spoken / here))
    names: Dict[str, Any] = {}
    exec(code, names)
    tokens = names["hub"].encode("Good morrow, my lord.")
    assert names["features"].shape == (1, len(tokens), 32)


@torch.no_grad()
def test_the_hub_interface_predicts_with_a_finetuned_head(spoken: Path) -> None:
    hub, name = from_hub(spoken, "head", "sentences"), "sentence_classification_head"
    state = load(spoken / "head" / LAST)["model"]
    head = hub.model.classification_heads[name]
    assert torch.equal(head.dense.weight, state[f"classification_heads.{name}.dense.weight"])
    tokens = hub.encode("cats like the tree")
    expected = hub.model(tokens[None], classification_head_name=name)[0].log_softmax(dim=-1)
    assert torch.equal(hub.predict(name, tokens), expected) and expected.shape == (1, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_name_or_path": "roberta.base"}, "roberta.base does not exist"),
        ({"checkpoint_file": "none.pt"}, "none.pt does not exist"),
        ({"data_name_or_path": "./none"}, "none does not exist"),
        ({"user_dir": "pkm_fairseq"}, "leave out user_dir"),
    ],
)
def test_what_the_hub_interface_does_not_find_is_named(
    spoken: Path, changed: Dict[str, str], message: str
) -> None:
    given = {"model_name_or_path": str(spoken / "model"), "checkpoint_file": LAST}
    given["data_name_or_path"] = "../bin"
    with pytest.raises(ValueError, match=message):
        PkmRobertaModel.from_pretrained(**{**given, **changed})


def test_what_a_model_lacks_is_an_error_that_a_server_catches(spoken: Path, tmp_path: Path) -> None:
    """A head without input0/, and a model without its dictionary."""
    with pytest.raises(ValueError, match=f"no dictionary at {spoken}/bin/input0/dict.txt"):
        from_hub(spoken, "head", "bin")
    files = [str(spoken / "model" / LAST)]
    with pytest.raises(ValueError, match=f"no dictionary at {tmp_path}/dict.txt"):
        checkpoint_utils.load_model_ensemble_and_task(files, arg_overrides={"data": str(tmp_path)})
    with pytest.raises(ValueError, match=f"no dictionary at {tmp_path}/dict.txt"):
        hub_utils.from_pretrained(
            *(str(spoken / "model"), LAST, str(tmp_path)), user_dir=str(USER_DIR)
        )


# --- --user-dir -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip installs into, with a copy of the package that says when it is imported."""
    folder = tmp_path_factory.mktemp("site")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(USER_DIR, folder / "pkm_fairseq", ignore=ignore)
    with (folder / "pkm_fairseq/__init__.py").open("a") as package:
        package.write('\nprint("the installed copy")\n')
    return folder


def test_a_relative_user_dir_wins_over_what_is_installed(
    data_bin: Path, installed: Path, tmp_path: Path
) -> None:
    options = ["--user-dir", "../pkm_fairseq/", "--max-update", "1", "--save-dir", tmp_path]
    done = run_well(
        *(BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, *MODEL, *RESM, *options),
        cwd=ROOT / "tests",
        env={"PYTHONPATH": str(installed)},
    )
    assert [log["num_updates"] for log in done.logged("train_inner")] == ["1"]
    assert "the installed copy" not in done.output

"""Memories in models of transformers: formulas, padding, saving, and what is refused."""

import copy
import logging
import math
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import torch
from torch import Tensor, nn

from pkm_fairseq.huggingface import Architecture, memory_class, register_architecture
from pkm_fairseq.huggingface.architectures import ARCHITECTURES
from pkm_fairseq.huggingface.card import model_card
from pkm_fairseq.huggingface.models import MemoryModel
from pkm_fairseq.memory import ProductKeyMemory
from pkm_fairseq.memory.hosts import new_usage, observing
from pkm_fairseq.memory.observe.staleness import origin_of
from tests.hf_models import (
    SMALL,
    add_memories,
    batch,
    configuration,
    plain,
    transformers,
    with_memories,
)

ALL = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "modernbert")


def test_these_are_the_architectures() -> None:
    assert set(ALL) <= set(ARCHITECTURES)


# --- formulas ---------------------------------------------------------------------------------


def second_sublayer(model_type: str, block: Any, before: nn.Module, h: Tensor, read: Tensor) -> Any:
    """What a block must make of h, spelled out; ``before`` is the block before it had a memory."""
    replaced = block.memory_mode == "replace"
    parts: Any = before
    if model_type == "modernbert":  # h is the residual stream, normalised for FFN and memory
        ffn = 0 if replaced else parts.mlp(parts.mlp_norm(h))
        return h + ffn + read
    if model_type == "distilbert":
        ffn = 0 if replaced else parts.ffn(h)
        return parts.output_layer_norm(h + ffn + read)
    ffn = 0 if replaced else parts.output.dense(parts.intermediate(h))
    return parts.output.LayerNorm(h + ffn + read)


@pytest.mark.parametrize("mode", ["residual", "replace"])
@pytest.mark.parametrize("model_type", ALL)
def test_a_block_computes_the_formula(model_type: str, mode: str) -> None:
    model = plain(model_type).eval()
    before = copy.deepcopy(ARCHITECTURES[model_type].blocks_of(model.base_model)[2])
    add_memories(model, SMALL, [2], mode)
    (block,) = model.memory_layers().values()
    seen, given = {}, batch()
    norm = {"modernbert": "mlp_norm", "distilbert": "sa_layer_norm"}.get(model_type)
    attention = block.get_submodule(norm or "attention.output")
    attention.register_forward_hook(
        lambda _, args, out: seen.update(h=args[0] if norm == "mlp_norm" else out)
    )
    block.register_forward_hook(lambda _, args, out: seen.update(out=out))
    model(**given)
    h, padding = seen["h"], given["attention_mask"] == 0
    into = block.mlp_norm(h) if norm == "mlp_norm" else h
    expected = second_sublayer(model_type, block, before, h, block.memory(into, padding))
    assert torch.allclose(seen["out"], expected, rtol=0, atol=1e-6)
    assert block.memory(into, padding).abs().max() > 0.01


def test_what_a_memory_reads_is_dropped_out_as_the_feed_forward() -> None:
    for model_type, least, most in (("bert", 0.3, 0.7), ("modernbert", 0, 0)):
        model = add_memories(plain(model_type, dropout=0.5), SMALL, [1]).train()
        read = model.memory_layers()[1].read(torch.randn(3, 9, 16))
        assert least <= float((read == 0).float().mean()) <= most


# --- padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("given_by", ["name", "place"])
def test_padding_is_in_no_statistic_and_in_no_count(given_by: str) -> None:
    model, given = with_memories("bert").train(), batch()
    usage = new_usage(model)
    with observing(model, usage):
        if given_by == "name":
            model(**given)
        else:
            model(given["input_ids"], given["attention_mask"])
    n_tokens = int(given["attention_mask"].sum())
    assert [count.tokens for count in usage.values()] == [n_tokens, n_tokens]
    with observing(model, usage):
        model(given["input_ids"])  # no mask: all are tokens, though one call had padding
    assert usage[0].tokens == n_tokens + given["input_ids"].numel()
    model(**given)
    with observing(model, usage):
        model.base_model.encoder(torch.randn(3, 9, 16))  # the mask of the last call is forgotten
    assert usage[0].tokens == n_tokens + 2 * given["input_ids"].numel()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_each_batch_its_own_padding_back(reentrant: bool) -> None:
    """Two batches with other paddings before one backward pass, which computes both again."""
    model, given = with_memories("bert").train(), batch()
    flipped = {**given, "attention_mask": given["attention_mask"].flip(0)}
    found = []
    for checkpointed in (False, True):
        one = copy.deepcopy(model)
        if checkpointed:
            one.activation_checkpointing_enable({"use_reentrant": reentrant})
        loss = sum(one(**x, labels=x["input_ids"]).loss for x in (given, flipped))
        loss.backward()
        grads = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads, one.state_dict()))
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        assert torch.allclose(found[1][1][name], grad, rtol=0, atol=1e-6), name
    for name, tensor in found[0][2].items():  # statistics, too: the second pass is no batch
        assert torch.equal(found[1][2][name], tensor), name


def test_a_mask_that_does_not_say_what_is_padding_is_refused() -> None:
    model, given = with_memories("bert"), batch()
    mask = torch.ones(3, 9, 9)
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 9, 9\), must be \(batch, tok"):
        model(given["input_ids"], mask)


# --- a model is a model -----------------------------------------------------------------------


def test_a_model_with_memories_is_copied_and_pickled() -> None:
    model, given = with_memories("distilbert").eval(), batch()
    expected = model(**given).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**given).logits, expected)
        nn.init.zeros_(twin.memory_layers()[0].memory.values.weight)
        assert not torch.equal(twin(**given).logits, expected)
    assert torch.equal(model(**given).logits, expected)


MAKE = """
import pickle, sys
from pathlib import Path
import torch
from tests.hf_models import batch, with_memories
models = [with_memories(name).eval() for name in ("bert", "distilbert")]
pickle.dump([(x, x(**batch()).logits) for x in models], open(sys.argv[1], "wb"))
"""
LOAD = """
import pickle, sys
import torch
from tests.hf_models import batch
for model, logits in pickle.load(open(sys.argv[1], "rb")):
    assert torch.equal(model(**batch()).logits, logits)
    print(type(model.memory_layers()[0]).__name__)
"""


def test_a_pickle_is_loaded_in_a_new_process(tmp_path: Path) -> None:
    for code in (MAKE, LOAD):
        command = [sys.executable, "-c", code, str(tmp_path / "models.pkl")]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PkmBertLayer", "PkmTransformerBlock"]


def test_the_configuration_of_another_model_stays_as_it_is() -> None:
    config = configuration("bert")
    first, second = (transformers.BertForMaskedLM(config) for _ in range(2))
    add_memories(first, SMALL, [1])
    assert type(second.config) is type(config) is transformers.BertConfig
    assert not hasattr(second.config, "memory_layers")
    assert first.base_model.config is first.config


def test_linear_layers_of_a_memory_are_drawn_as_those_of_the_model() -> None:
    config = configuration("bert", initializer_range=0.5)
    model = add_memories(transformers.BertModel(config), replace(SMALL, v_dim=12), [1])
    memory = model.memory_layers()[1].memory
    for linear in (memory.query_proj, memory.output_proj):
        assert 0.4 < float(linear.weight.detach().std()) < 0.6
    assert float(memory.query_proj.bias.abs().max()) == 0
    assert float(memory.keys.abs().max()) <= SMALL.half_dim**-0.5


# --- saving and loading -----------------------------------------------------------------------


def saved(model: Any, folder: Path, **load: Any) -> Any:
    """The model, saved and loaded by transformers' own class for its head."""
    model.save_pretrained(folder)
    return transformers.AutoModelForMaskedLM.from_pretrained(folder, **load)


@pytest.mark.parametrize("ties_embeddings", [True, False])
def test_shared_values_are_stored_once_and_shared_again(
    tmp_path: Path, ties_embeddings: bool
) -> None:
    from safetensors import safe_open

    config = configuration("bert", tie_word_embeddings=ties_embeddings)
    model = transformers.BertForMaskedLM(config)
    add_memories(model, replace(SMALL, share_values=True), [0, 2]).eval()
    again, info = saved(model, tmp_path, output_loading_info=True)
    again.eval()
    assert not any(info.values()), info
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as stored:
        names = [name for name in stored.keys() if "memory.values" in name]  # noqa: SIM118
    assert names == ["bert.encoder.layer.0.memory.values.weight"]
    layers = again.memory_layers()
    assert layers[0].memory.values is layers[2].memory.values
    assert torch.allclose(again(**batch()).logits, model(**batch()).logits, rtol=0, atol=1e-6)
    base = transformers.AutoModel.from_pretrained(tmp_path).memory_layers()
    assert base[0].memory.values.weight is base[2].memory.values.weight


def test_values_and_statistics_stay_in_float32_in_half_precision(tmp_path: Path) -> None:
    loaded = saved(with_memories("bert"), tmp_path, dtype=torch.bfloat16)
    kept = {n for n, x in loaded.state_dict().items() if x.dtype == torch.float32}
    exact = ("memory.values.weight", "running_mean", "running_var", "last_read", "origin")
    assert kept == {n for n in loaded.state_dict() if n.endswith((*exact, "last_top1"))}
    halved = with_memories("bert").bfloat16()
    assert {n for n, x in halved.state_dict().items() if x.dtype == torch.float32} == kept
    assert loaded(**batch()).logits.isfinite().all()
    added = add_memories(plain("bert").bfloat16(), SMALL, [0, 2])
    assert {n for n, x in added.state_dict().items() if x.dtype == torch.float32} == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_in_bfloat16_are_so_from_the_start_and_statistics_never(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = plain("bert").to(dtype)
    add_memories(model, replace(SMALL, value_dtype="bfloat16"), [1])
    loaded = saved(model, tmp_path, dtype=dtype)
    for one in (model, loaded):
        memory = one.memory_layers()[1].memory
        assert memory.values.weight.dtype == torch.bfloat16
        assert memory.query_norm.running_var.dtype == torch.float32
        assert memory.keys.dtype == one.dtype == dtype
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x), name


def test_memories_that_a_checkpoint_lacks_are_drawn(tmp_path: Path) -> None:
    plain("bert").save_pretrained(tmp_path)
    config = with_memories("bert").config
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, config=config)
    block = model.memory_layers()[2]
    memory: ProductKeyMemory = block.memory
    assert 0.2 < float(memory.values.weight.std()) < 0.3  # 16 ** -0.5 is 0.25
    assert 0.4 < float(memory.keys.abs().max()) <= 0.5
    assert torch.equal(memory.query_norm.running_var, torch.ones(16))
    assert torch.equal(block.reads.origin, origin_of(memory.keys, "residual"))
    assert not block.reads.last_read.any()


def leave_out(folder: Path, *parts: str) -> None:
    """Remove the tensors whose names have one of these parts from a saved model."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    kept = {n: x for n, x in load_file(file).items() if not any(part in n for part in parts)}
    save_file(kept, file, {"format": "pt"})


KINDS: Dict[str, Dict[str, Any]] = {
    "batch": {"value_dtype": "bfloat16"},
    "layer": {"query_norm": "layer", "learn_score_scale": True, "score_scale": 3.0},
    "none": {"query_norm": "none", "query": "mlp", "output": "swilu", "v_dim": 6},
    "experts": {"values": "experts", "v_dim": 6},
    "shared": {"share_values": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_memory_that_is_missing_is_drawn_as_in_a_new_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_memories(plain("bert"), replace(SMALL, **KINDS[kind]), [0, 2])
    model.save_pretrained(tmp_path)
    leave_out(tmp_path, ".memory.", ".reads.")
    empty_like = torch.empty_like

    def poisoned(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # as what lies in memory may be
        made = empty_like(x, *args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(torch, "empty_like", poisoned)
    load = transformers.AutoModelForMaskedLM.from_pretrained
    loaded, info = load(tmp_path, output_loading_info=True)
    monkeypatch.undo()
    values = {name for name in model.state_dict() if ".memory.values." in name}
    assert values <= info["missing_keys"]
    for name, expected in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == expected.dtype and found.isfinite().all(), name
        if ".reads." not in name:
            size, wanted = (float(x.float().square().mean().sqrt()) for x in (found, expected))
            assert size == pytest.approx(wanted, rel=0.5), name
    assert loaded(**batch()).logits.isfinite().all()


def test_the_origin_of_a_memory_is_unknown_if_only_its_keys_are_saved(tmp_path: Path) -> None:
    with_memories("bert").save_pretrained(tmp_path)
    leave_out(tmp_path, ".reads.")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert not loaded.memory_layers()[0].reads.origin.any()


def test_a_device_map_splits_no_block(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = with_memories("bert", head="")
    size = sum(4 * p.numel() for p in model.parameters())
    places = accelerate.infer_auto_device_map(
        model, {"cpu": size * 2 // 3, "disk": 10**9}, list(model._no_split_modules)
    )
    assert set(places.values()) == {"cpu", "disk"}
    assert not [name for name in places if "layer." in name and not name[-1].isdigit()], places


def test_times_of_reads_are_saved(tmp_path: Path) -> None:
    model = with_memories("bert").train()
    model.run.updates = 6
    model(**batch())
    times = model.memory_layers()[0].reads.last_read
    assert set(times.tolist()) == {0.0, 7.0}
    assert torch.equal(saved(model, tmp_path).memory_layers()[0].reads.last_read, times)


def test_a_head_of_your_own_is_saved_and_loaded_by_its_class(tmp_path: Path) -> None:
    class OwnHead(transformers.BertPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.own = nn.Linear(config.hidden_size, 1)
            self.post_init()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            scores: Tensor = self.own(self.bert(input_ids, attention_mask).pooler_output)
            return scores

    model = add_memories(OwnHead(configuration("bert")), SMALL, [1]).eval()
    model.save_pretrained(tmp_path)
    loaded = memory_class(OwnHead).from_pretrained(tmp_path).eval()
    assert isinstance(loaded, OwnHead)
    card = (tmp_path / "README.md").read_text()
    assert "import OwnHead\n" in card and "memory_class(OwnHead).from_pretrained(" in card
    kind: Any = type("Mine", (memory_class(OwnHead),), {"__module__": "of_mine"})
    assert "from of_mine import Mine\n\nmodel = Mine.from_pretrained(" in (
        model_card(kind(loaded.config))
    )
    mixed: Any = type("Mixed", (MemoryModel, OwnHead), {"__module__": "of_mine"})
    assert "model = Mixed.from_pretrained(" in model_card(mixed(loaded.config))
    kind.__module__ = "__main__"
    card = model_card(kind(loaded.config))
    assert "__main__" not in card and "# Mine: define it as the script" in card
    assert torch.allclose(loaded(**batch()), model(**batch()), rtol=0, atol=1e-6)


def test_the_model_card_says_what_is_known_and_leaves_other_cards_alone(tmp_path: Path) -> None:
    model = with_memories("bert")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    n_parameters = sum(p.numel() for p in model.parameters())
    facts = (f"{n_parameters:,}", f"{2 * 64 * 16:,}", "beside the feed-forward of layers 0, 2")
    for fact in (*facts, "2 heads x 4 slots", "AutoModelForMaskedLM", "No usage was counted"):
        assert fact in card, fact
    assert "from transformers import AutoModelForMaskedLM\n" in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "README.md").write_bytes("für mich".encode("latin-1"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"f\xfcr mich"


def test_a_tokenizer_beside_the_model_is_found_and_fills_masks(tmp_path: Path) -> None:
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    (tmp_path / "vocab.txt").write_text("\n".join(symbols))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    with_memories("bert").save_pretrained(tmp_path)
    found = transformers.pipeline("fill-mask", str(tmp_path))("a [MASK] b")
    assert len(found) == 5 and found[0]["token"] < 60


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "layers", "mode", "message"),
    [
        (lambda: nn.Linear(2, 2), [0], "residual", "the model is a Linear, must be one of transf"),
        (lambda: with_memories("bert"), [1], "residual", r"has memories in layers \[0, 2\]"),
        (lambda: plain("bert"), [0], "both", "mode is 'both', must be one of residual, replace"),
        (
            lambda: plain("bert"),
            [3],
            "residual",
            r"layers are \[3\], must be one or more different numbers in 0",
        ),
        (lambda: plain("bert"), [1, 1], "residual", r"layers are \[1, 1\], must be one or more"),
        (lambda: plain("bert"), [], "residual", r"layers are \[\], must be one or more"),
        (
            lambda: transformers.BertLMHeadModel(configuration("bert", is_decoder=True)),
            [0],
            "residual",
            "the model is a decoder",
        ),
        (
            lambda: transformers.BertModel(configuration("bert", chunk_size_feed_forward=2)),
            [0],
            "residual",
            "chunk_size_feed_forward is 2, must be 0",
        ),
        (
            lambda: transformers.AlbertModel(
                transformers.AlbertConfig(
                    vocab_size=9, hidden_size=8, num_attention_heads=2, intermediate_size=8
                )
            ),
            [0],
            "residual",
            "type 'albert' is unknown, must be one of bert, roberta, xlm-roberta, electra, dist",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    make: Callable[[], Any], layers: Any, mode: str, message: str
) -> None:
    model = make()
    kind, names = type(model), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_memories(model, SMALL, layers, mode)
    assert type(model) is kind and list(model.state_dict()) == names


def test_a_table_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = plain("bert")
    before, config = {n: x.clone() for n, x in model.state_dict().items()}, model.config
    with pytest.raises(MemoryError, match="could not be had"):
        add_memories(model, replace(SMALL, n_keys=2_000_000), [0])
    assert type(model) is transformers.BertForMaskedLM and model.config is config
    assert not hasattr(config, "memory_layers")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert add_memories(model, SMALL, [0]).memory_layers()


def test_a_configuration_without_memory_is_refused(tmp_path: Path) -> None:
    plain("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no memory_layers: load the model without memory"):
        memory_class(transformers.BertForMaskedLM).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size_feed_forward": 3}, "chunk_size_feed_forward is 3, must be 0"),
        ({"is_decoder": True}, "the model is a decoder"),
        ({"memory_mode": "both"}, "mode is 'both', must be one of residual, replace"),
        ({"num_hidden_layers": 2}, r"layers are \[0, 2\], must be one or more different numbers"),
        ({"memory": {**asdict(SMALL), "novel": 1}}, "memory has novel, which this version of"),
    ],
    ids=str,
)
def test_settings_that_are_changed_at_loading_are_checked(
    settings: Dict[str, Any], message: str, tmp_path: Path
) -> None:
    with_memories("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, **settings)


# --- architectures of one's own ---------------------------------------------------------------


class ToyConfig(transformers.PreTrainedConfig):  # type: ignore[misc, name-defined]
    model_type = "toy"
    hidden_size: int = 16
    initializer_range: float = 0.02


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x)


class ToyModel(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
    config_class = ToyConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tower = nn.ModuleDict({"stages": nn.ModuleList(ToyBlock() for _ in range(2))})
        self.post_init()

    def forward(self, x: Tensor, attention_mask: Any = None) -> Tensor:
        for block in self.tower["stages"]:
            x = block(x)
        return x


def test_another_architecture_is_named_added_to_saved_and_loaded(tmp_path: Path) -> None:
    toy = ToyModel(ToyConfig())
    with pytest.raises(ValueError, match="add another one with register_architecture"):
        add_memories(toy, SMALL, [0])
    register_architecture(ToyConfig, Architecture("tower.stages", ffn="mix"), [ToyModel])
    with pytest.raises(ValueError, match="'toy' is already registered"):
        register_architecture(ToyConfig, Architecture("tower.stages", ffn="mix"))
    x, mask = torch.randn(2, 3, 16), torch.tensor([[1, 1, 1], [1, 1, 0]])
    before = toy.eval()(x)
    add_memories(toy, SMALL, [1])
    read = toy.memory_layers()[1].memory(toy.tower["stages"][0](x), mask == 0)
    assert torch.allclose(toy(x, mask), before + read, rtol=0, atol=1e-6)
    toy.save_pretrained(tmp_path)
    again = memory_class(ToyModel).from_pretrained(tmp_path).eval()
    assert torch.allclose(again(x, mask), toy(x, mask), rtol=0, atol=1e-6)


def test_modules_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, message in (
        (Architecture("encoder.stages"), "BertModel has no list of blocks 'encoder.stages'"),
        (Architecture("encoder.layer", ffn="mlp"), "a block BertLayer has no mlp"),
        (
            Architecture("encoder.layer", dropout="hidden_dropout"),
            "dropout is 'hidden_dropout', must be an entry of BertConfig",
        ),
    ):
        monkeypatch.setitem(ARCHITECTURES, "bert", wrong)
        with pytest.raises(ValueError, match=message):
            add_memories(plain("bert"), SMALL, [0])


# --- without transformers ---------------------------------------------------------------------


def test_without_transformers_the_rest_works_and_this_says_what_to_install() -> None:
    code = """
import sys
for name in ("transformers", "safetensors", "accelerate", "tokenizers"):
    sys.modules[name] = None  # not installed
import pkm_fairseq.memory
try:
    import pkm_fairseq.huggingface
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == (
        "pkm_fairseq.huggingface needs transformers, safetensors and accelerate: "
        "pip install 'pkm_fairseq[huggingface]'"
    ), done.stderr


def test_importing_sets_up_no_logging() -> None:
    assert not logging.getLogger("pkm_fairseq").handlers

"""Finetuning of values alone, and of chosen rows: the choice by numpy, the rest bit for bit."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pkm_fairseq.memory import (
    ColumnShards,
    MemoryAdam,
    MemoryConfig,
    ProductKeyMemory,
    build_values,
    memory_param_groups,
)
from pkm_fairseq.memory import memory as memory_module
from pkm_fairseq.memory.finetune import FinetuneConfig, finetune_values, tables_by_layers
from pkm_fairseq.memory.gradient import table_state
from pkm_fairseq.memory.observe.slot_counts import (
    CountsFile,
    SlotCounts,
    load_counts,
    needed,
    save_counts,
)
from pkm_fairseq.memory.rows import RowBudget, RowChoice
from tests.workers import on_workers

CONFIG = MemoryConfig(n_keys=8, heads=2, knn=4, k_dim=8)
WIDTH, TOKENS = 8, 12


class Net(nn.Module):
    """Two residual memories between layers, and a head."""

    def __init__(self, config=CONFIG, shards=None):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        values = build_values(WIDTH, config, shards) if config.share_values else None
        made = (ProductKeyMemory(WIDTH, config, values, shards) for _ in range(2))
        self.memories = nn.ModuleDict({str(layer): memory for layer, memory in enumerate(made)})
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.first(x)
        for memory in self.memories.values():
            x = x + memory(x)
        return self.head(x)

    def layers(self):
        return {int(layer): memory for layer, memory in self.memories.items()}

    def tables(self):
        shared = tables_by_layers(self.layers()).values()
        return [table.weight for tables in shared for table in tables]


def net(shards=None, **settings):
    torch.manual_seed(0)
    made = Net(MemoryConfig(**{**vars(CONFIG), **settings}), shards)
    for memory in made.memories.values():  # statistics of a training
        memory.query_norm.running_var.mul_(0.3)
    return made


def tokens(seed, n=TOKENS):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(model, seed):
    return model(tokens(seed)).square().mean()


def counts_of(n_slots, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = SlotCounts(n_slots)
    for _ in range(5):
        counts.update(torch.randint(n_slots, (n_slots // 2,), generator=generator))
        counts.end_batch()
    return counts


@pytest.fixture
def background(tmp_path):
    return write_background(tmp_path / "background.pt", CONFIG.n_slots)


def write_background(file, n_slots, layers=((0,), (1,))):
    tables = {key: counts_of(n_slots, seed) for seed, key in enumerate(layers)}
    save_counts(file, CountsFile(tables, {}))
    return str(file)


def choosing(background, slots="10", **settings):
    return FinetuneConfig(finetune="slots", finetune_slots=slots, background=background, **settings)


def adam(model, **settings):
    return MemoryAdam(memory_param_groups(model, value_lr=0.1), **settings)


# --- the choice -------------------------------------------------------------------------------


def by_numpy(reads, batches, n_batches, budget):
    """The rows with the highest TF-IDF, by the formula of Lin et al. 2025; ties to the lower."""
    reads, batches = np.array(reads), np.array(batches)
    score = reads / max(1, reads.sum()) * np.log((n_batches + 1) / (batches + 1))
    order = [slot for slot in np.lexsort((np.arange(len(reads)), -score)) if reads[slot]]
    top = budget if isinstance(budget, int) else math.ceil(budget * len(order))
    return sorted(int(slot) for slot in order[:top])


SIZES = st.integers(2, 40)


@given(SIZES, st.integers(1, 9), st.one_of(st.integers(1, 50), st.sampled_from([0.1, 0.5, 1.0])),
       st.randoms(use_true_random=False))  # fmt: skip
def test_the_choice_is_that_of_numpy(n_slots, n_batches, budget, random):
    reads = [random.choice([0, 0, 1, 2, 5]) for _ in range(n_slots)]
    background = SlotCounts(n_slots)
    for _ in range(n_batches):
        background.update(torch.tensor([random.randrange(n_slots) for _ in range(n_slots)]))
        background.end_batch()
    choice = RowChoice(RowBudget.parse(budget), background)
    expected = by_numpy(reads, background.batches.tolist(), n_batches, budget)
    assert choice.choose(torch.tensor(reads)).tolist() == expected
    by_count = by_numpy(reads, [0] * n_slots, 1, budget)  # every slot as rare as any other
    assert RowChoice(RowBudget.parse(budget)).choose(torch.tensor(reads)).tolist() == by_count


@pytest.mark.parametrize(
    ("text", "of_100"),
    [
        ("24000", 100),
        (7, 7),
        ("7", 7),
        ("0.5", 50),
        ("50%", 50),
        ("0.101", 11),
        ("1.0", 100),
        ("7%", 7),
        ("14%", 14),
        ("0.55", 55),
    ],
)
def test_a_budget_is_a_number_or_a_share(text, of_100):
    assert RowBudget.parse(text).rows(100) == of_100


def test_a_budget_in_per_cent_is_exact():
    for tenths in range(1, 1000):
        rows = RowBudget.parse(f"{tenths / 10:.1f}%").rows(1000)
        assert rows == tenths, f"{tenths / 10:.1f}%"


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "0.0", "1.5", "150%", "many", "nan", "%", "1e999999999%", None]
)
def test_an_impossible_budget_is_refused(text):
    with pytest.raises(ValueError, match=r"must be a number of rows, e\.g\. 1024, or a share"):
        RowBudget.parse(text)


def test_batches_are_counted_in_which_a_slot_is_read():
    counts = SlotCounts(4)
    for batch in ([[0, 1], [1, 1]], [[1, 3]], [[0, 0]]):
        for look_up in batch:
            counts.update(torch.tensor(look_up))
        counts.end_batch()
    assert counts.reads.tolist() == [3, 4, 0, 1]
    assert (counts.batches.tolist(), counts.n_batches) == ([2, 2, 0, 1], 3)
    assert needed(counts, 0.5).tolist() == [1] and needed(counts, 0.51).tolist() == [1, 0]
    assert needed(SlotCounts(4)) is None


def test_observers_count_what_memories_look_up_without_padding():
    model, counts = net().eval(), SlotCounts(CONFIG.n_slots)
    memory, padding = model.memories["0"], torch.arange(TOKENS) % 3 == 0
    with memory.observed_by(counts):
        _, seen = memory(tokens(1), padding, return_lookup=True)
    slots = seen.slots[~padding].flatten().tolist()
    assert counts.reads.tolist() == [slots.count(slot) for slot in range(CONFIG.n_slots)]


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("drops", [True, False])
def test_padding_and_dummy_batches_choose_no_row(monkeypatch, trains, drops):
    """Also in eval mode, and where padding is otherwise read and overwritten, as on a GPU."""
    monkeypatch.setattr(memory_module, "is_plain", lambda x: drops)
    model, padding = net().train(trains), torch.arange(TOKENS) % 3 == 0
    memory, config = model.memories["0"], FinetuneConfig("slots", "8", finetune_score="count")
    finetune_values(model, model.layers(), config)
    optimizer = adam(model)
    _, seen = memory(tokens(1), padding, return_lookup=True)
    memory(tokens(1), padding).sum().backward()
    memory.run.is_dummy = True
    (memory(tokens(2)).sum() * 0).backward()
    optimizer.step()
    rows = table_state(memory.values.weight).rows
    assert rows.n_read == len(seen.slots[~padding].unique()) and rows.n_chosen == 8


# --- files of counts --------------------------------------------------------------------------


def test_counts_are_saved_and_loaded(tmp_path):
    counts = CountsFile({(1, 3): counts_of(9, 0), (4,): counts_of(9, 1)}, {"text": "a.txt"})
    save_counts(tmp_path / "counts.pt", counts)
    loaded = load_counts(tmp_path / "counts.pt", "it")
    assert loaded.about == {"text": "a.txt"} and list(loaded.tables) == [(1, 3), (4,)]
    for layers, table in counts.tables.items():
        for name in ("reads", "batches"):
            assert torch.equal(getattr(loaded.tables[layers], name), getattr(table, name))
        assert loaded.tables[layers].n_batches == table.n_batches


def test_loaded_counts_go_on(tmp_path):
    """A batch counts only for the slots that it reads."""
    counts = SlotCounts(4)
    counts.update(torch.tensor([0, 0, 1]))
    counts.end_batch()
    save_counts(tmp_path / "counts.pt", CountsFile({(1,): counts}, {}))
    loaded = load_counts(tmp_path / "counts.pt", "it").tables[1,]
    loaded.update(torch.tensor([1, 2]))
    loaded.end_batch()
    assert loaded.reads.tolist() == [2, 2, 1, 0]
    assert loaded.batches.tolist() == [1, 2, 1, 0]


def test_what_is_no_file_of_counts_is_refused_in_one_line(tmp_path):
    for content, said in (
        (None, "f: no such file"),
        (b"PK\x03\x04 and no archive", "f: not a file of slot counts"),
        ({"model": {}}, "f: not a file of slot counts"),
        ({"kind": "pkm_fairseq slot counts", "version": 2}, "f: its version is 2, must be 1"),
    ):
        if isinstance(content, bytes):
            (tmp_path / "f").write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / "f")
        with pytest.raises(ValueError, match=said) as stop:
            load_counts(tmp_path / "f", "f")
        assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"finetune": "rows"}, "memory-finetune is 'rows', must be one of values, slots"),
        ({"finetune": "slots"}, "needs --memory-background FILE"),
        ({"finetune": "slots", "finetune_slots": "0"}, "memory-finetune-slots is '0', must be"),
        ({"finetune_slots": "3"}, "--memory-finetune-slots 3 has no effect without"),
        ({"finetune": "values", "background": "f"}, "--memory-background f has no effect without"),
        (
            {"finetune": "slots", "finetune_score": "count", "background": "f"},
            "--memory-background f has no effect with --memory-finetune-score count",
        ),
        (
            {"finetune": "slots", "finetune_score": "count", "finetune_scope": "data"},
            "--memory-finetune-scope data needs --memory-finetune-counts FILE",
        ),
        (
            {"finetune": "slots", "finetune_score": "count", "finetune_counts": "f"},
            "--memory-finetune-counts f has no effect without --memory-finetune-scope data",
        ),
    ],
)
def test_what_is_impossible_or_has_no_effect_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        FinetuneConfig(**settings)


def test_counts_of_other_memories_are_refused(tmp_path):
    for n_slots, layers, said in (
        (CONFIG.n_slots, ((0,), (2,)), "counts 64 slots of layer 0; 64 slots of layer 2: must"),
        (81, ((0,), (1,)), "must count 64 slots of layer 0, as in the model"),
    ):
        file = write_background(tmp_path / "other.pt", n_slots, layers)
        with pytest.raises(ValueError, match=said):
            finetune_values(net(), net().layers(), choosing(file))
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no layer has a memory"):
        finetune_values(model, {}, FinetuneConfig(finetune="values"))


# --- what moves -------------------------------------------------------------------------------


def test_values_alone_move_and_statistics_stay():
    model, free = net(), net()
    finetune_values(model, model.layers(), FinetuneConfig(finetune="values"))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = adam(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) != name.endswith("values.weight"), name
    loss_of(free, 0).backward()  # the test sees what would move
    assert free.first.weight.grad.any()
    statistics = "memories.0.query_norm.running_var"
    assert not torch.equal(free.state_dict()[statistics], before[statistics])


def test_what_is_added_later_is_trained():
    model = net()
    finetune_values(model, model.layers(), FinetuneConfig(finetune="values"))
    model.head = nn.Linear(WIDTH, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tables = {f"memories.{layer}.values.weight" for layer in (0, 1)}
    assert trained == {"head.weight", "head.bias", *tables}


def chosen_of(model, background, seeds, budget=10):
    """By numpy: the rows of each table that an update may move that reads these batches."""
    model, found = copy.deepcopy(model).eval(), []
    counts = load_counts(Path(background), "it")
    for index, memory in model.layers().items():
        reads = SlotCounts(CONFIG.n_slots)
        with memory.observed_by(reads), torch.no_grad():
            for seed in seeds:
                model(tokens(seed))
        table = counts.tables[(index,)]
        batches = table.batches.tolist()
        found.append(by_numpy(reads.reads.tolist(), batches, table.n_batches, budget))
    return found


@pytest.mark.parametrize("value_optimizer", ["adam", "sgd"])
def test_chosen_rows_move_as_without_a_choice_and_the_others_not_by_a_bit(
    background, value_optimizer
):
    model, free = net(), net()
    finetune_values(model, model.layers(), choosing(background))
    finetune_values(free, free.layers(), FinetuneConfig(finetune="values"))
    optimizers = [adam(x, value_optimizer=value_optimizer) for x in (model, free)]
    for step in range(3):
        free.load_state_dict(model.state_dict())
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        expected = chosen_of(model, background, [2 * step, 2 * step + 1])
        before = [(p.clone(), copy.deepcopy(optimizers[0].state[p])) for p in model.tables()]
        for x, optimizer in zip((model, free), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(x, 2 * step).backward()  # two micro-batches
            loss_of(x, 2 * step + 1).backward()
            optimizer.step()
        for (was, state), p, other, rows in zip(
            before, model.tables(), free.tables(), expected, strict=True
        ):
            assert len(rows) == 10
            assert (p != was).any(dim=1).nonzero().flatten().tolist() == rows
            assert (other != was).any(dim=1).sum() > 10
            assert torch.equal(p[rows], other[rows])
            kept = [row for row in range(CONFIG.n_slots) if row not in rows]
            now = optimizers[0].state[p]
            assert ("exp_avg" in now) == (value_optimizer == "adam")
            for moment in ("exp_avg", "exp_avg_sq") if "exp_avg" in state else ():
                assert torch.equal(now[moment][kept], state[moment][kept])
                assert not torch.equal(now[moment][rows], state[moment][rows])
            assert (table_state(p).rows.n_chosen, table_state(p).rows.n_read > 10) == (10, True)


def test_gradient_descent_is_its_formula():
    model = net()
    finetune_values(model, model.layers(), FinetuneConfig(finetune="values"))
    optimizer = adam(model, value_optimizer="sgd")
    loss_of(model, 0).backward()
    expected = [p.detach() - 0.1 * p.grad.dense() for p in model.tables()]
    optimizer.step()
    for p, values in zip(model.tables(), expected, strict=True):
        torch.testing.assert_close(p.detach(), values, rtol=1e-6, atol=1e-8)


def test_rows_that_are_chosen_once_are_the_same_in_every_update(tmp_path, background):
    data = tmp_path / "data.pt"
    tables = {(layer,): counts_of(CONFIG.n_slots, 7 + layer) for layer in (0, 1)}
    save_counts(data, CountsFile(tables, {}))
    model = net()
    config = choosing(background, finetune_scope="data", finetune_counts=str(data))
    finetune_values(model, model.layers(), config)
    before = [p.clone() for p in model.tables()]
    optimizer = adam(model)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    for layer, (p, was) in enumerate(zip(model.tables(), before, strict=True)):
        rarity = load_counts(Path(background), "it").tables[(layer,)]
        reads = tables[(layer,)].reads.tolist()
        rows = by_numpy(reads, rarity.batches.tolist(), rarity.n_batches, 10)
        moved = (p != was).any(dim=1).nonzero().flatten().tolist()
        assert moved and set(moved) <= set(rows)


def test_layers_that_share_a_table_choose_by_the_reads_of_both(tmp_path):
    background = write_background(tmp_path / "b.pt", CONFIG.n_slots, [(0, 1)])
    model = net(share_values=True)
    finetune_values(model, model.layers(), choosing(background))
    counts, before = SlotCounts(CONFIG.n_slots), model.tables()[0].clone()
    for memory in model.layers().values():
        memory.observers.append(counts)
    optimizer = adam(model)
    loss_of(model, 0).backward()
    optimizer.step()
    table = load_counts(Path(background), "it").tables[(0, 1)]
    rows = by_numpy(counts.reads.tolist(), table.batches.tolist(), table.n_batches, 10)
    assert (model.tables()[0] != before).any(dim=1).nonzero().flatten().tolist() == rows


def test_both_tables_of_experts_move_in_the_same_rows(background):
    model = net(values="experts")
    finetune_values(model, model.layers(), choosing(background))
    before = [p.clone() for p in model.tables()]
    optimizer = adam(model)
    loss_of(model, 0).backward()
    optimizer.step()
    moved = [
        (p != was).any(dim=1).nonzero().flatten().tolist()
        for p, was in zip(model.tables(), before, strict=True)
    ]
    assert moved[0] == moved[1] and moved[2] == moved[3] and len(moved[0]) == 10


def test_a_choice_is_kept_by_copies_and_refused_where_it_would_be_lost(background):
    model = net()
    finetune_values(model, model.layers(), choosing(background))
    for x in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="is chosen by MemoryAdam"):
            loss_of(x, 0).backward()
    optimizer = adam(model)
    loss_of(model, 0).backward()
    nn.utils.clip_grad_value_(model.tables(), 1e-6)
    with pytest.raises(ValueError, match="has lost count of them"):
        optimizer.step()


@pytest.mark.parametrize("value_optimizer", ["adam", "sgd"])
def test_a_finetuning_resumes_as_if_it_had_not_stopped(background, value_optimizer):
    def start():
        model = net()
        finetune_values(model, model.layers(), choosing(background))
        return model, adam(model, value_optimizer=value_optimizer)

    def go(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    straight, stopped, resumed = start(), start(), start()
    go(*straight, range(4))
    go(*stopped, range(2))
    for part, saved in zip(resumed, stopped, strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    go(*resumed, range(2, 4))
    for p, q in zip(straight[0].tables(), resumed[0].tables(), strict=True):
        assert torch.equal(p, q)


def test_a_state_of_gradient_descent_has_no_moments_for_adam():
    model = net()
    finetune_values(model, model.layers(), FinetuneConfig(finetune="values"))
    optimizer = adam(model, value_optimizer="sgd")
    loss_of(model, 0).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="the state holds no exp_avg of values"):
        adam(model).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="value_optimizer is 'rms', must be one of adam, sgd"):
        adam(model, value_optimizer="rms")


# --- several workers --------------------------------------------------------------------------


def on_one_of_several(rank, background):
    ways = (1, "factors"), (1, "dense"), (2, "auto")
    return [train_one_of_several(rank, background, *way) for way in ways]


def train_one_of_several(rank, background, n_shards, exchange_as):
    """Values after three updates; the last one gives the second worker a dummy batch."""
    shards = None if n_shards == 1 else ColumnShards(n_shards)
    model = net(shards)
    finetune_values(model, model.layers(), choosing(background))
    optimizer = adam(model, exchange_as=exchange_as)
    for step in range(3):
        optimizer.zero_grad()
        is_dummy = step == 2 and rank == 1
        for memory in model.layers().values():
            memory.run.is_dummy = is_dummy
        (loss_of(model, 2 * step + rank) * (not is_dummy)).backward()
        optimizer.step()
    optimizer.consolidate_state_dict()
    tables, saved = model.state_dict(), optimizer.state_dict()
    moments = [x["exp_avg"] for x in saved["state"].values() if "exp_avg" in x]
    return [x for name, x in tables.items() if name.endswith("values.weight")], moments


def test_workers_choose_by_the_reads_of_all_of_them(tmp_path, background):
    model = net()
    finetune_values(model, model.layers(), choosing(background))
    optimizer = adam(model)
    for step in range(3):
        optimizer.zero_grad()
        for seed in [2 * step, 2 * step + 1][: 2 if step < 2 else 1]:
            (loss_of(model, seed) / 2).backward()
        optimizer.step()
    moments = [optimizer.state[p]["exp_avg"] for p in model.tables()]
    for values, moved in on_workers(2, tmp_path, on_one_of_several, background)[0]:
        for own, theirs in zip([*model.tables(), *moments], [*values, *moved], strict=True):
            # which rows moved shows in the moments, zero elsewhere; sums are in another order
            assert torch.equal((own != 0).any(dim=1), (theirs != 0).any(dim=1))
            torch.testing.assert_close(theirs, own.detach(), rtol=1e-4, atol=1e-6)
    assert not dist.is_initialized()

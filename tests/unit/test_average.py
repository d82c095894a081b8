"""Gradients of tables averaged over workers: both forms give the same, and which is chosen."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist

from pkm_fairseq.memory import ColumnShards, MemoryAdam, ValueTable
from pkm_fairseq.memory.adam import memory_param_groups
from pkm_fairseq.memory.exchange import average, average_all, received_bytes
from pkm_fairseq.memory.gradient import (
    FactoredGradient,
    entries_of,
    is_exchanged,
    squared_norm,
    table_state,
)
from pkm_fairseq.memory.kernels import Float8Table
from tests.workers import on_workers

N_SLOTS, WIDTH, READS = 40, 6, 7
FORMS = ("factors", "dense")


def lookups(rank, step=0, reads=READS):
    """Slots, weights and output gradients; other numbers of tokens, the third worker has none."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    n = (5, 3, 0, 2)[rank]
    slots = torch.randint(N_SLOTS - 4, (n, 1, reads), generator=generator)  # some are never read
    weights = torch.randn(n, 1, reads, generator=generator, dtype=torch.float64)
    return slots, weights, torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)


def a_table(form="auto", dtype=torch.float64, shards=None):
    torch.manual_seed(0)
    table = ValueTable(N_SLOTS, WIDTH, shards=shards).to(dtype)
    table.factored = True
    table_state(table.weight).exchange_as = form
    return table


def leave(table, slots, weights, grads):
    dtype = table.weight.dtype
    table(slots, weights.to(dtype).requires_grad_()).backward(grads.to(dtype))


def mean_by_hand(world, step=0):
    total = torch.zeros(N_SLOTS, WIDTH, dtype=torch.float64)
    for slots, weights, grads in (lookups(rank, step) for rank in range(world)):
        for n, t in ((n, t) for n in range(len(slots)) for t in range(READS)):
            total[slots[n, 0, t]] += weights[n, 0, t] * grads[n]
    return total / world


# --- the same mean ----------------------------------------------------------------------------


def means(rank):
    found = {}
    for form in FORMS:
        table = a_table(form)
        leave(table, *lookups(rank))
        average(table.weight)
        assert is_exchanged(table.weight)
        assert isinstance(table.weight.grad, FactoredGradient)
        table.weight.grad.mul_(2)
        entries = entries_of(table.weight)
        norm = squared_norm(table.weight)
        found[form] = table.weight.grad.dense(), entries.slots.unique(), norm
    return found


def test_both_forms_give_the_mean_of_all_workers(tmp_path):
    expected = 2 * mean_by_hand(3)
    rows = (expected != 0).any(dim=1).nonzero().flatten()
    assert 10 < len(rows) < N_SLOTS - 4
    for found in on_workers(3, tmp_path, means):
        for form, (gradient, read, norm) in found.items():
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12, msg=form)
            assert torch.equal(read, rows), form
            assert norm == pytest.approx(float(expected.square().sum()), rel=1e-12), form


def opposite(rank, form):
    """Two workers' gradients of row 3 cancel exactly; then nobody reads anything."""
    table = a_table()
    optimizer = MemoryAdam([table.weight], lr=0.1, exchange_as=form)
    start = table.weight.detach().clone()
    slots, weights = torch.tensor([[[3, 4 + rank]]]), torch.ones(1, 1, 2, dtype=torch.float64)
    leave(table, slots, weights, torch.full((1, WIDTH), 1.0 - 2.0 * rank, dtype=torch.float64))
    optimizer.step()
    moved = (table.weight.detach() != start).any(dim=1).nonzero().flatten().tolist()
    average(table.weight)
    return moved, table.weight.grad


@pytest.mark.parametrize("form", FORMS)
def test_a_row_whose_gradients_cancel_stays_and_no_read_is_no_gradient(tmp_path, form):
    assert on_workers(2, tmp_path, opposite, form) == [([4, 5], None)] * 2


def trainings(rank, dtype, settings, n_shards):
    """Values and moments after three clipped updates, in each form."""
    shards = None if n_shards == 1 else ColumnShards(n_shards)
    return [train(rank, form, dtype, settings, shards) for form in FORMS]


def train(rank, form, dtype, settings, shards):
    table = a_table(dtype=dtype, shards=shards)
    optimizer = MemoryAdam(memory_param_groups(table, value_lr=0.1), exchange_as=form, **settings)
    for step in range(3):
        leave(table, *lookups(rank, step))
        optimizer.exchange_gradients()
        norm = squared_norm(table.weight) ** 0.5
        table.weight.grad.mul_(0.3 / norm)  # as PkmAdam clips
        optimizer.step()
    assert table_state(table.weight).exchanged_as == form
    state = optimizer.state[table.weight].items()
    found = {k: x.decoded() if isinstance(x, Float8Table) else x for k, x in state}
    return {"values": table.weight.detach().clone(), **found}


@pytest.mark.parametrize(
    ("world", "n_shards", "dtype", "settings"),
    [
        (3, 1, torch.float64, {}),
        (4, 2, torch.float64, {}),
        (2, 1, torch.float32, {"value_optimizer": "sgd"}),
        (2, 1, torch.bfloat16, {"moment_dtype": "bfloat16"}),
        (2, 1, torch.bfloat16, {"moment_dtype": "float8"}),
    ],
)
def test_both_forms_train_the_same_values_and_moments(tmp_path, world, n_shards, dtype, settings):
    # an element in bfloat16 or 8 bits may be rounded the other way
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    tolerance = 2**-3 if settings.get("moment_dtype") == "float8" else tolerance
    for factors, dense in on_workers(world, tmp_path, trainings, dtype, settings, n_shards):
        assert factors.keys() == dense.keys()
        start = a_table(dtype=dtype).weight.detach()
        assert n_shards > 1 or not torch.equal(factors["values"], start)
        for name, x in factors.items():
            x, y = torch.as_tensor(x), torch.as_tensor(dense[name])
            torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance, msg=name)
            assert (x != y).double().mean() < 0.02 or dtype != torch.bfloat16
            if x.dim() == 2 and name != "values":  # zero where no update moved the row
                assert torch.equal((x != 0).any(dim=1), (y != 0).any(dim=1)), name


# --- the choice -------------------------------------------------------------------------------


def choices(rank):
    """Forms that "auto" chooses: for few reads, for many, then for few again, and anew."""
    found = []
    table = a_table()
    for reads in (1, 60, 1):
        for _ in range(2):
            table.weight.grad = None
            leave(table, *lookups(rank, reads=reads))
            choice = average(table.weight)
            found.append((table_state(table.weight).exchanged_as, choice is not None))
        if reads == 1:
            MemoryAdam([table.weight])  # decides anew
    assert table_state(copy.deepcopy(table).weight).exchanged_as is None
    return found


def test_the_first_gradient_decides_and_the_choice_stays(tmp_path):
    expected = [("factors", True), ("factors", False), ("dense", True), *[("dense", False)] * 3]
    assert on_workers(2, tmp_path, choices) == [expected] * 2


@pytest.mark.parametrize("world", [2, 8, 100])
def test_dense_moves_fewer_bytes_from_the_even_point_of_the_documents(world):
    values = ValueTable(N_SLOTS, WIDTH).weight
    f, table_bytes = 8 * READS + 4 * WIDTH + 4, 4 * N_SLOTS * WIDTH
    even = 2 * table_bytes / f / world  # tokens of each
    for tokens, fewer in ((0.9 * even, "factors"), (1.1 * even, "dense")):
        sizes = [READS * tokens] * world, [tokens] * world
        factors, dense = (received_bytes(values, *sizes, form) for form in FORMS)
        assert (factors < dense) == (fewer == "factors")
        assert factors == pytest.approx((world - 1) * tokens * f)
        assert dense == pytest.approx(2 * (world - 1) / world * table_bytes)
    longest = received_bytes(values, [3, READS, 0], [1, 5, 0], "factors")
    assert longest == 2 * (8 * READS + 5 * (4 * WIDTH + 4))  # shorter ones are padded


def logged(rank, form):
    """What is logged for two tables, in two updates."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("pkm_fairseq.memory.exchange")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    tables = [a_table(form, torch.float32) for _ in range(2)]
    for _ in range(2):
        for table in tables:
            leave(table, *lookups(rank))
        average_all([table.weight for table in tables])
    return lines


@pytest.mark.parametrize(
    ("form", "said"), [("auto", "as factors (by their bytes)"), ("dense", "dense (as told)")]
)
def test_the_first_worker_logs_the_choice_once(tmp_path, form, said):
    first, second = on_workers(2, tmp_path, logged, form)
    assert second == []
    factors, dense = 2 * 5 * (8 * READS + 4 * WIDTH + 4), 2 * 4 * N_SLOTS * WIDTH
    assert first == [
        f"2 workers exchange the gradients of 2 value table(s) {said}: each worker receives "
        f"{factors / 1e6:.2f} MB as factors or {dense / 1e6:.2f} MB dense in this update"
    ]


def handed_over(rank):
    """Bytes that a worker hands to the all-reduce of a dense gradient."""
    table, sent, all_reduce = a_table("dense", torch.float32), [], dist.all_reduce
    leave(table, *lookups(rank))
    dist.all_reduce = lambda x, group: (sent.append(x.nbytes), all_reduce(x, group=group))
    average(table.weight)
    dist.all_reduce = all_reduce
    return sent


def test_dense_sends_one_gradient_of_the_tables_size(tmp_path):
    assert on_workers(2, tmp_path, handed_over) == [[4 * N_SLOTS * WIDTH]] * 2


def apart(rank):
    table = a_table(("factors", "dense")[rank])
    leave(table, *lookups(rank))
    try:
        average(table.weight)
    except ValueError as error:
        return str(error)


def test_workers_that_would_exchange_in_different_forms_are_told(tmp_path):
    for said in on_workers(2, tmp_path, apart):
        assert "--memory-exchange" in said and "factors, dense" in said


def averaged_by_hand(rank):
    table = a_table()
    leave(table, *lookups(rank))
    before = table.weight.grad.dense()
    said = []
    for collective in (dist.all_reduce, lambda x: dist.broadcast(x, 0)):
        with pytest.raises(RuntimeError) as error:
            collective(table.weight.grad)
        said.append(str(error.value))
    return said, torch.equal(table.weight.grad.dense(), before)


def test_a_collective_on_a_factored_gradient_is_refused_and_not_ignored(tmp_path):
    for said, is_unchanged in on_workers(2, tmp_path, averaged_by_hand):
        assert is_unchanged
        for text, name in zip(said, ("allreduce", "broadcast"), strict=True):
            assert text.startswith(f"{name} does not work on the factored gradient of a value")
            assert "exchange_gradients" in text


def test_an_unknown_form_is_refused():
    with pytest.raises(
        ValueError, match="exchange_as is 'sum', must be one of auto, factors, dense"
    ):
        MemoryAdam([a_table().weight], exchange_as="sum")

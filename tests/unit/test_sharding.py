"""A value table split over workers computes what a whole one computes."""

from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pkm_fairseq.memory import ColumnShards, MemoryConfig, ProductKeyMemory, ValueTable
from pkm_fairseq.memory.adam import MemoryAdam
from pkm_fairseq.memory.exchange import average
from pkm_fairseq.memory.gradient import FactoredGradient, gradient_is_finite, squared_norm

from ..workers import on_workers

N_SLOTS, V_DIM = 36, 12


def whole_table(init: str = "normal") -> ValueTable:
    torch.manual_seed(0)
    return ValueTable(N_SLOTS, V_DIM, init).double()


def lookups(rank: int) -> "tuple[Tensor, Tensor, Tensor]":
    """Slots, weights and gradients of what was read, of other lengths on every worker."""
    generator = torch.Generator().manual_seed(rank)
    n = (3, 0, 5, 1)[rank]
    slots = torch.randint(N_SLOTS, (n, 2, 4), generator=generator)
    weights = torch.rand(n, 2, 4, generator=generator, dtype=torch.float64)
    return slots, weights, torch.randn(n, V_DIM, generator=generator, dtype=torch.float64)


def read(table: ValueTable, rank: int) -> Dict[str, Tensor]:
    slots, weights, grad_read = lookups(rank)
    weights.requires_grad_()
    out = table(slots, weights)
    out.backward(grad_read)
    return {"read": out.detach(), "weights": weights.grad}


def read_split(rank: int, n_shards: int, factored: bool) -> Dict[str, Tensor]:
    table = ValueTable(N_SLOTS, V_DIM, shards=ColumnShards(n_shards)).double()
    table.factored = factored
    found = {"values": table.weight.detach(), **read(table, rank)}
    if factored:
        assert isinstance(table.weight.grad, FactoredGradient)
        slots, weights, bags, grads = table.weight.grad.entries()
        found["gradient"] = torch.zeros_like(table.weight).index_add_(
            0, slots, weights[:, None] * grads[bags]
        )
    else:
        found["gradient"] = table.weight.grad
    return found


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("world,n_shards", [(2, 2), (4, 2), (3, 3)])
def test_reads_and_gradients_are_those_of_a_whole_table(
    tmp_path: Path, world: int, n_shards: int, factored: bool
) -> None:
    found = on_workers(world, tmp_path, read_split, n_shards, factored)
    for start in range(0, world, n_shards):
        group, table = found[start : start + n_shards], whole_table()
        for rank, part in enumerate(group, start):
            for key, tensor in read(table, rank).items():
                torch.testing.assert_close(part[key], tensor, rtol=0, atol=1e-12)
        assert torch.equal(torch.cat([part["values"] for part in group], dim=1), table.weight)
        gradient = torch.cat([part["gradient"] for part in group], dim=1)
        torch.testing.assert_close(gradient, table.weight.grad, rtol=0, atol=1e-12)


def experts_of(shards: Any = None) -> "tuple[ProductKeyMemory, MemoryAdam]":
    torch.manual_seed(0)
    config = MemoryConfig(
        n_keys=6, heads=2, knn=3, k_dim=8, query_norm="none", values="experts", output="swilu"
    )
    net = ProductKeyMemory(V_DIM, config, shards=shards).double()
    return net, MemoryAdam(net.parameters(), lr=0.01)


def gradients_of(net: ProductKeyMemory, rank: int) -> Dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn((3, 5)[rank], V_DIM, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    out = net(x)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64))
    grads = {name: param.grad for name, param in net.named_parameters()}
    return {
        "read": out.detach(),
        "x": x.grad,
        **{n: g.dense() if isinstance(g, FactoredGradient) else g for n, g in grads.items()},
    }


def experts_split(rank: int) -> Dict[str, Any]:
    net, adam = experts_of(ColumnShards(2))
    found = {"gradients": gradients_of(net, rank)}
    adam.step()
    adam.consolidate_state_dict()
    saved = net.state_dict()
    return {**found, "saved": {k: saved[k] for k in ("values.down.weight", "values.up.weight")}}


def test_experts_that_are_split_read_and_learn_as_whole_ones(tmp_path: Path) -> None:
    split = on_workers(2, tmp_path, experts_split)
    (net, adam), tables = experts_of(), ("values.down.weight", "values.up.weight")
    for rank in range(2):
        adam.zero_grad()
        expected, found = gradients_of(net, rank), split[rank]["gradients"]
        for name in expected.keys() - set(tables):  # of this worker's tokens
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=name)
    adam.zero_grad()
    gradients_of(net, 0)
    both = gradients_of(net, 1)  # accumulated
    for name in tables:  # of all tokens
        columns = torch.cat([part["gradients"][name] for part in split], dim=1)
        assert both[name].abs().max() > 0.01
        torch.testing.assert_close(columns, both[name], rtol=0, atol=1e-12)
    for name in tables:
        net.get_parameter(name).grad.mul_(0.5)  # the mean over workers
    adam.step()
    for name in tables:
        torch.testing.assert_close(split[0]["saved"][name], net.get_parameter(name).detach())


def train_split(rank: int, n_shards: int, clip: float, exchange_as: str) -> Dict[str, Any]:
    """Three updates of a memory whose gradients are averaged; then saved."""
    net, adam = small_memory(ColumnShards(n_shards), exchange_as)
    values = net.values.weight
    for step in range(3):
        adam.zero_grad()
        loss_of(net, rank, step).backward()
        for param in net.parameters():
            if param is not values:
                dist.all_reduce(param.grad)
                param.grad /= dist.get_world_size()
        average(values)
        norm = squared_norm(values) ** 0.5
        values.grad.mul_(clip / norm)
        adam.step()
    columns = {"values": values.detach().clone(), **adam.state[values]}
    adam.consolidate_state_dict()
    saved = {"model": net.state_dict(), "adam": adam.state_dict()}
    assert net.state_dict()["values.weight"].shape == values.shape  # given out once
    return {"columns": columns, "saved": saved, "norm": norm}


def small_memory(
    shards: Any = None, exchange_as: str = "auto"
) -> "tuple[ProductKeyMemory, MemoryAdam]":
    torch.manual_seed(0)
    config = MemoryConfig(n_keys=6, heads=2, knn=3, k_dim=8, query_norm="layer")
    net = ProductKeyMemory(V_DIM, config, shards=shards).double()
    values = net.values.weight
    rest = [p for p in net.parameters() if p is not values]
    groups = [{"params": rest, "lr": 0.01}, {"params": [values]}]
    return net, MemoryAdam(groups, exchange=False, exchange_as=exchange_as)


def loss_of(net: ProductKeyMemory, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(5 + rank, V_DIM, generator=generator, dtype=torch.float64)
    return net(x).pow(2).sum()


@pytest.mark.parametrize(
    "world,n_shards,exchange_as", [(2, 2, "auto"), (4, 2, "factors"), (4, 2, "dense")]
)
def test_split_tables_are_trained_saved_and_loaded_as_whole_ones(
    tmp_path: Path, world: int, n_shards: int, exchange_as: str
) -> None:
    found = on_workers(world, tmp_path, train_split, n_shards, 0.5, exchange_as)
    net, adam = small_memory()
    for step in range(3):
        adam.zero_grad()
        (sum(loss_of(net, rank, step) for rank in range(world)) / world).backward()
        norm = squared_norm(net.values.weight) ** 0.5
        net.values.weight.grad.mul_(0.5 / norm)
        adam.step()
    assert [part["norm"] for part in found] == pytest.approx([norm] * world, rel=1e-12)

    whole = {"values": net.values.weight.detach(), **adam.state[net.values.weight]}
    for key in ("values", "exp_avg", "exp_avg_sq"):
        for start in range(0, world, n_shards):
            columns = [part["columns"][key] for part in found[start : start + n_shards]]
            assert all(x.shape == (N_SLOTS, V_DIM // n_shards) for x in columns)  # 1 / W of it
            torch.testing.assert_close(torch.cat(columns, dim=1), whole[key], rtol=0, atol=1e-12)

    other, other_adam = small_memory()
    other.load_state_dict(found[0]["saved"]["model"])
    other_adam.load_state_dict(found[0]["saved"]["adam"])
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=1e-12)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        theirs = other_adam.state[other.values.weight][key]
        torch.testing.assert_close(theirs, whole[key], rtol=0, atol=1e-12)


def load_split(rank: int, saved: Dict[str, Any]) -> Dict[str, Tensor]:
    net, adam = small_memory(ColumnShards(3))
    with torch.no_grad():
        net.values.weight.zero_()
    net.load_state_dict(saved["model"])
    adam.load_state_dict(saved["adam"])
    return {"values": net.values.weight.detach(), **adam.state[net.values.weight]}


def test_a_whole_checkpoint_loads_into_shards(tmp_path: Path) -> None:
    net, adam = small_memory()
    loss_of(net, 0, 0).backward()
    adam.step()
    saved = {"model": net.state_dict(), "adam": adam.state_dict()}
    found = on_workers(3, tmp_path, load_split, saved)
    whole = {"values": net.values.weight.detach(), **adam.state[net.values.weight]}
    for key in ("values", "exp_avg", "exp_avg_sq"):
        assert torch.equal(torch.cat([part[key] for part in found], dim=1), whole[key]), key
    assert [part["step"] for part in found] == [1, 1, 1]


def save_8_bits(rank: int) -> "tuple[Dict[str, Tensor], Dict[str, Any]]":
    table = ValueTable(N_SLOTS, 256, shards=ColumnShards(2))
    table.factored = True
    adam = MemoryAdam([table.weight], exchange=False, moment_dtype="float8")
    slots, weights, _ = lookups(2)
    table(slots, weights.float()).square().sum().backward()
    adam.step()
    adam.consolidate_state_dict()
    return decoded(adam.state[table.weight]), adam.state_dict()


def load_8_bits(rank: int, saved: Dict[str, Any]) -> Dict[str, Tensor]:
    table = ValueTable(N_SLOTS, 256, shards=ColumnShards(2))
    adam = MemoryAdam([table.weight], exchange=False, moment_dtype="float8")
    adam.load_state_dict(saved)
    return decoded(adam.state[table.weight])


def decoded(state: Dict[str, Any]) -> Dict[str, Tensor]:
    return {name: state[name].decoded() for name in ("exp_avg", "exp_avg_sq")}


def test_moments_in_8_bits_are_saved_and_loaded_without_loss(tmp_path: Path) -> None:
    found = on_workers(2, tmp_path, save_8_bits)
    saved = found[0][1]
    (tmp_path / "again").mkdir()
    again = on_workers(2, tmp_path / "again", load_8_bits, saved)
    for name in ("exp_avg", "exp_avg_sq"):
        parts = [columns[name] for columns, _ in found]
        assert parts[0].shape == (N_SLOTS, 128) and parts[0].count_nonzero()
        assert torch.equal(saved["state"][0][name], torch.cat(parts, dim=1))
        for part, loaded in zip(parts, again, strict=True):
            assert torch.equal(loaded[name], part)


def one_is_not_finite(rank: int) -> "list[Any]":
    """What each worker is told if one worker's columns get a gradient that is not finite."""
    table = ValueTable(N_SLOTS, V_DIM, shards=ColumnShards(2))
    table.factored = True
    slots, weights, grad_read = lookups(2)
    grad_read[0, 0] = torch.inf if rank == 1 else 0  # the first column is worker 0's
    table(slots, weights.requires_grad_()).backward(grad_read.float())
    own = [bool(part.isfinite().all()) for part in table.weight.grad.entries()]
    return [all(own), gradient_is_finite(table.weight)]


def test_all_workers_see_that_one_has_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    assert on_workers(2, tmp_path, one_is_not_finite) == [[False, False], [True, False]]


def wrong_splits(rank: int) -> "list[str]":
    found = []
    for n_shards, v_dim in ((2, V_DIM), (0, V_DIM), (3, 10)):
        try:
            ValueTable(N_SLOTS, v_dim, shards=ColumnShards(n_shards))
        except ValueError as error:
            found.append(str(error))
    return found


def test_impossible_splits_are_refused(tmp_path: Path) -> None:
    divisor = "must be a divisor of the number of workers, which is 3"
    expected = [f"memory-shards is {n}, {divisor}" for n in (2, 0)]
    expected.append("memory-shards is 3, must divide the width of a value, 10")
    assert on_workers(3, tmp_path, wrong_splits) == [expected] * 3


def draw(rank: int, n_slots: int, dtype: torch.dtype) -> Tensor:
    return ValueTable(n_slots, 6, dtype=dtype, shards=ColumnShards(2)).weight.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_values_of_a_large_table_are_those_of_a_whole_one(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    n_slots = 130**2  # more than are drawn at once
    parts = on_workers(2, tmp_path, draw, n_slots, dtype)
    torch.manual_seed(0)
    assert torch.equal(torch.cat(parts, dim=1), ValueTable(n_slots, 6, dtype=dtype).weight)


def saved_at_odd_moments(rank: int) -> Dict[str, Any]:
    """What is saved before the first update, after an error, and what then cannot be loaded."""
    net, adam = small_memory(ColumnShards(2))
    adam.consolidate_state_dict()  # of a checkpoint that fairseq then does not write
    try:
        raise RuntimeError("an error on one worker")
    except RuntimeError:
        adam.consolidate_state_dict()  # does not wait for the others
        crashed = net.state_dict()["values.weight"]
    adam.state_dict()
    adam.consolidate_state_dict()
    first = {"values": net.state_dict()["values.weight"], **adam.state_dict()}
    net.load_state_dict(net.state_dict())  # one's own
    try:
        net.load_state_dict({**net.state_dict(), "values.weight": crashed.clone()})
    except ValueError as error:
        return {"crashed": crashed, "first": first, "refused": str(error)}
    return {}


def saved_in_either_order(rank: int) -> Dict[str, Any]:
    """The values in states that are made before and after that of the optimizer."""
    net, adam = small_memory(ColumnShards(2))
    found = {}
    adam.consolidate_state_dict()
    adam.state_dict()
    found["after"] = net.state_dict()["values.weight"].clone()
    adam.consolidate_state_dict()
    found["before"] = net.state_dict()["values.weight"].clone()
    adam.state_dict()
    found["no save"] = net.state_dict()["values.weight"].clone()
    return found


def test_a_state_is_whole_whichever_is_made_first(tmp_path: Path) -> None:
    first, _ = on_workers(2, tmp_path, saved_in_either_order)
    net, _ = small_memory()
    assert torch.equal(first["before"], net.values.weight)
    assert torch.equal(first["after"], net.values.weight)
    assert first["no save"].shape == (N_SLOTS, V_DIM // 2)


def exchanged_twice(rank: int) -> "list[Tuple[Tensor, Tensor]]":
    """The gradients of a table that all workers share, after one exchange and after two."""
    found = []
    for factored in (True, False):
        net, adam = small_memory(ColumnShards(2))
        net.values.factored = factored
        loss_of(net, rank, 0).backward()
        adam.exchange_gradients()
        once = gradient_of(net).dense()
        adam.exchange_gradients()
        found.append((once, gradient_of(net).dense()))
    return found


def gradient_of(net: ProductKeyMemory) -> FactoredGradient:
    gradient = net.values.weight.grad
    assert isinstance(gradient, FactoredGradient)  # a dense one becomes it in an exchange
    return gradient


def test_a_gradient_that_was_exchanged_is_not_exchanged_again(tmp_path: Path) -> None:
    for found in on_workers(2, tmp_path, exchanged_twice):
        for once, twice in found:
            assert once.count_nonzero() and torch.equal(once, twice)


AFTER_AN_EXCHANGE: Dict[str, Callable[[FactoredGradient], Any]] = {
    "nothing": lambda gradient: None,
    "clipped by element": lambda gradient: gradient.clamp_(-1e9, 1e9),
    "copied back": lambda gradient: gradient.copy_(gradient.clone()),
    "copied back dense": lambda gradient: gradient.copy_(gradient.dense()),
}


def exchanged_in_between(rank: int, adding: int) -> "Dict[str, Tuple[Tensor, Tensor]]":
    """The gradient of two micro-batches, exchanged after the last and after each of them.

    Args:
        rank: of this worker.
        adding: workers from this rank on have no second micro-batch.
    """
    found = {}
    for name, then in AFTER_AN_EXCHANGE.items():
        net, adam = small_memory(ColumnShards(2))
        of = []
        for exchanges in (1, 2):
            adam.zero_grad()
            loss_of(net, rank, 0).backward()
            if exchanges == 2:
                adam.exchange_gradients()
                then(gradient_of(net))
            if rank < adding:
                loss_of(net, rank, 1).backward()
            adam.exchange_gradients()
            of.append(gradient_of(net).dense())
        found[name] = of[0], of[1]
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_added_to_an_exchanged_gradient_counts_as_much(tmp_path: Path, world: int) -> None:
    """Also if only one of two groups that share a table has another micro-batch."""
    for found in on_workers(world, tmp_path, exchanged_in_between, 2):
        for name, (once, each) in found.items():
            assert once.count_nonzero(), name
            torch.testing.assert_close(each, once, rtol=1e-6, atol=1e-9, msg=name)


SUMS: Dict[str, Tuple[float, Callable[[FactoredGradient], Any]]] = {  # and how often it is in them
    "twice": (2, lambda gradient: gradient + gradient),
    "twice in place": (2, lambda gradient: gradient.add_(gradient.clone())),
    "with itself in place": (2, lambda gradient: gradient.add_(gradient)),
    "of halves": (1, lambda gradient: gradient * 0.5 + gradient * 0.5),
    "with nothing": (1, lambda gradient: gradient + torch.zeros(gradient.shape)),
}


def sums_of_exchanged(rank: int) -> "Dict[str, Tuple[Tensor, Tensor]]":
    """The mean gradient, and a sum with it that is exchanged again, divided by the factor."""
    found = {}
    for name, (factor, add) in SUMS.items():
        net, adam = small_memory(ColumnShards(2))
        loss_of(net, rank, 0).backward()
        adam.exchange_gradients()
        mean = gradient_of(net).dense()
        net.values.weight.grad = add(gradient_of(net))
        adam.exchange_gradients()
        found[name] = mean, gradient_of(net).dense() / factor
    return found


def test_a_sum_with_an_exchanged_gradient_is_divided_once(tmp_path: Path) -> None:
    for found in on_workers(2, tmp_path, sums_of_exchanged):
        for name, (mean, of_sum) in found.items():
            assert mean.count_nonzero(), name
            torch.testing.assert_close(of_sum, mean, rtol=1e-6, atol=1e-9, msg=name)


def test_only_whole_tables_are_loaded_and_an_error_waits_for_nobody(tmp_path: Path) -> None:
    whole, other = on_workers(2, tmp_path, saved_at_odd_moments)
    net, _ = small_memory()
    assert torch.equal(whole["first"]["values"], net.values.weight)
    assert whole["first"]["state"] == {}
    for found in (whole, other):
        assert found["crashed"].shape == (N_SLOTS, V_DIM // 2)
        part, table = (N_SLOTS, V_DIM // 2), (N_SLOTS, V_DIM)
        assert f"shape {part}, one worker's part; must be whole, {table}" in (found["refused"])

"""pkm_adam against a loop over elements, and against fairseq's adam."""

import copy
import math
from argparse import Namespace

import pytest
import torch
from fairseq.optim import build_optimizer
from fairseq.optim.adam import FairseqAdam
from torch import nn

from pkm_fairseq.memory import ValueTable, kernels
from pkm_fairseq.memory.gradient import FactoredGradient
from pkm_fairseq.optim.pkm_adam import PkmAdam, PkmAdamConfig
from tests.helpers import batch, build, small_dictionary

BETAS, EPS = (0.9, 0.98), 1e-6
ROWS, WIDTH = 6, 3


def options(**settings):
    """fairseq's options of the optimizer."""
    defaults = dict(
        optimizer="pkm_adam",
        adam_betas=str(BETAS),
        adam_eps=EPS,
        weight_decay=0.0,
        memory_value_lr=0.1,
        memory_value_lr_factor=None,
        memory_value_lr_schedule="constant",
        memory_value_optimizer="adam",
        memory_moment_dtype="float32",
        memory_exchange="auto",
        memory_checkpoint="whole",
        memory_value_clip_norm=0.0,
        lr=[0.01],
        use_old_adam=True,
        fp16_adam_stats=False,
        tpu=False,
    )
    return Namespace(**{**defaults, **settings})


class Net(nn.Module):
    """A table of values and something beside it."""

    def __init__(self, n_tables=1, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.tables = nn.ModuleList(ValueTable(ROWS, WIDTH) for _ in range(n_tables))
        self.to(dtype)

    @property
    def table(self):
        return self.tables[0].weight


def gradients(steps, rows=None, seed=0, dtype=torch.float32):
    """Random gradients of a table, zero outside the given rows of each step."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(steps, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    for step in range(steps):
        keep = set(range(ROWS)) if rows is None else rows[step]
        for row in set(range(ROWS)) - keep:
            drawn[step, row] = 0
    return drawn.to(dtype)


def take_step(net, optimizer, gradient, dense=1.0):
    """One update with this gradient of the table, and some gradient of the rest."""
    net.table.grad = gradient.clone()
    for parameter in net.linear.parameters():
        parameter.grad = torch.full_like(parameter, dense)
    optimizer.step()


def lazy_adam_by_hand(start, grads, lr):
    """fairseq's formula, element by element; rows without gradient stand still."""
    values = start.double().tolist()
    m = [[0.0] * WIDTH for _ in range(ROWS)]
    v = [[0.0] * WIDTH for _ in range(ROWS)]
    for step, grad in enumerate(grads.double().tolist(), start=1):
        for row in range(ROWS):
            if not any(grad[row]):
                continue
            for column in range(WIDTH):
                g = grad[row][column]
                m[row][column] = BETAS[0] * m[row][column] + (1 - BETAS[0]) * g
                v[row][column] = BETAS[1] * v[row][column] + (1 - BETAS[1]) * g * g
                size = lr * math.sqrt(1 - BETAS[1] ** step) / (1 - BETAS[0] ** step)
                moved = size * m[row][column] / (math.sqrt(v[row][column]) + EPS)
                values[row][column] -= moved
    return torch.tensor(values, dtype=torch.float64)


# --- the update of the values -----------------------------------------------------------------

SOME_ROWS = [{0, 2}, {2}, set(), {0, 5}, {1, 2, 5}, {0}]


def test_values_follow_the_formula_written_as_a_loop():
    net = Net(dtype=torch.float64)
    start = net.table.detach().clone()
    optimizer = PkmAdam(options(), net.parameters())
    grads = gradients(len(SOME_ROWS), SOME_ROWS, dtype=torch.float64)
    for grad in grads:
        take_step(net, optimizer, grad)
    expected = lazy_adam_by_hand(start, grads, lr=0.1)
    # moments are float32: relative rounding 2**-24 of updates of at most lr each
    assert torch.allclose(net.table.detach(), expected, rtol=0, atol=len(grads) * 0.1 * 2**-20)
    assert optimizer.optimizer.state[net.table]["step"] == len(grads)  # one count per table


def test_a_row_moves_if_and_only_if_its_gradient_is_not_zero():
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    for step, rows in enumerate(SOME_ROWS):
        before = net.table.detach().clone()
        take_step(net, optimizer, gradients(len(SOME_ROWS), SOME_ROWS)[step])
        moved = (net.table.detach() != before).any(dim=1).nonzero().flatten().tolist()
        assert set(moved) == rows, step


def test_one_element_of_a_gradient_is_enough_to_move_a_row():
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    full, single = gradients(2)
    take_step(net, optimizer, full)
    before = net.table.detach().clone()
    only = torch.zeros_like(single)
    only[3, 1] = single[3, 1]
    take_step(net, optimizer, only)
    moved = net.table.detach() != before
    assert moved[3].all()  # momentum moves its other elements
    assert not moved[[0, 1, 2, 4, 5]].any()


def test_a_row_that_was_not_read_keeps_its_moments():
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    grads = gradients(2, [{0, 1}, {1}])
    take_step(net, optimizer, grads[0])
    state = optimizer.optimizer.state[net.table]
    before = state["exp_avg"][0].clone(), state["exp_avg_sq"][0].clone()
    take_step(net, optimizer, grads[1])
    assert torch.equal(state["exp_avg"][0], before[0])
    assert torch.equal(state["exp_avg_sq"][0], before[1])
    assert before[0].any()


def test_equals_fairseqs_adam_when_every_row_has_a_gradient():
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    lazy = PkmAdam(options(memory_value_lr=0.01), ours.parameters())
    dense = FairseqAdam(options(), theirs.parameters())
    for grad in gradients(6):
        take_step(ours, lazy, grad)
        take_step(theirs, dense, grad)
    assert torch.equal(ours.linear.weight, theirs.linear.weight)
    assert torch.equal(ours.linear.bias, theirs.linear.bias)
    # division and scaling are in another order: a few roundings of each of 6 updates
    assert torch.allclose(ours.table, theirs.table, rtol=1e-6, atol=6 * 0.01 * 2**-20)


def test_is_not_fairseqs_adam_when_rows_have_no_gradient():
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    lazy = PkmAdam(options(memory_value_lr=0.01), ours.parameters())
    dense = FairseqAdam(options(), theirs.parameters())
    for grad in gradients(len(SOME_ROWS), SOME_ROWS):
        take_step(ours, lazy, grad)
        take_step(theirs, dense, grad)
    assert not torch.allclose(ours.table, theirs.table, atol=1e-3)


def test_everything_else_is_updated_as_by_fairseqs_adam_with_weight_decay():
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    lazy = PkmAdam(options(weight_decay=0.1), ours.parameters())
    dense = FairseqAdam(options(weight_decay=0.1), theirs.parameters())
    for grad in gradients(4):
        take_step(ours, lazy, grad)
        take_step(theirs, dense, grad)
    assert torch.equal(ours.linear.weight, theirs.linear.weight)


def test_weight_decay_leaves_values_alone():
    nets = []
    for decay in (0.0, 0.5):
        torch.manual_seed(1)
        net = Net()
        optimizer = PkmAdam(options(weight_decay=decay), net.parameters())
        for grad in gradients(4):
            take_step(net, optimizer, grad)
        nets.append(net)
    assert torch.equal(nets[0].table, nets[1].table)
    assert not torch.equal(nets[0].linear.weight, nets[1].linear.weight)


@pytest.mark.parametrize("gradient", [None, torch.zeros(ROWS, WIDTH)])
def test_a_table_that_was_not_read_stays(gradient):
    net = Net(n_tables=2)
    optimizer = PkmAdam(options(), net.parameters())
    other = net.tables[1].weight
    before = other.detach().clone()
    other.grad = gradient
    take_step(net, optimizer, gradients(1)[0])
    assert torch.equal(other, before)


def test_each_table_has_its_own_step_count():
    net = Net(n_tables=2)
    optimizer = PkmAdam(options(), net.parameters())
    take_step(net, optimizer, gradients(1)[0])
    net.tables[1].weight.grad = gradients(1)[0]
    take_step(net, optimizer, gradients(1)[0])
    state = optimizer.optimizer.state
    assert state[net.tables[0].weight]["step"] == 2
    assert state[net.tables[1].weight]["step"] == 1


def test_the_gradient_is_still_there_after_the_step():
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    grad = gradients(1)[0]
    take_step(net, optimizer, grad)
    assert torch.equal(net.table.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_in_half_precision_have_moments_in_float32(dtype):
    net = Net(dtype=dtype)
    start = net.table.detach().clone()
    optimizer = PkmAdam(options(), net.parameters())
    grads = gradients(3, dtype=dtype)
    for grad in grads:
        take_step(net, optimizer, grad)
    state = optimizer.optimizer.state[net.table]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    expected = lazy_adam_by_hand(start, grads, lr=0.1)
    eps = torch.finfo(dtype).eps * float(expected.abs().max())  # rounded after every update
    assert torch.allclose(net.table.detach().double(), expected, rtol=0, atol=3 * eps)


def test_gradients_accumulate_before_they_count():
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    first, second = gradients(2, [{0, 1}, {1, 2}])
    second[1] = -first[1]  # what cancels does not move
    before = net.table.detach().clone()
    take_step(net, optimizer, first + second)
    moved = (net.table.detach() != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [0, 2]


# --- rates ------------------------------------------------------------------------------------


def lr_of(optimizer, parameter):
    (rate,) = [
        group["lr"]
        for group in optimizer.param_groups
        if any(p is parameter for p in group["params"])
    ]
    return rate


def test_every_parameter_is_in_one_group_with_its_rate():
    net = Net(n_tables=2)
    optimizer = PkmAdam(options(memory_value_lr=0.5, lr=[0.25]), net.parameters())
    rates = {name: lr_of(optimizer, p) for name, p in net.named_parameters()}
    assert rates == {
        "linear.weight": 0.25,
        "linear.bias": 0.25,
        "tables.0.weight": 0.5,
        "tables.1.weight": 0.5,
    }


def test_the_schedule_leaves_the_rate_of_values():
    net = Net()
    optimizer = PkmAdam(options(memory_value_lr=0.5), net.parameters())
    optimizer.set_lr(0.125)
    assert optimizer.get_lr() == 0.125
    assert lr_of(optimizer, net.linear.weight) == 0.125
    assert lr_of(optimizer, net.table) == 0.5


def test_the_rate_of_values_changes_the_result():
    tables = []
    for rate in (0.1, 0.2):
        torch.manual_seed(1)
        net = Net()
        take_step(net, PkmAdam(options(memory_value_lr=rate), net.parameters()), gradients(1)[0])
        tables.append(net.table.detach())
    assert not torch.equal(*tables)


# --- clipping ---------------------------------------------------------------------------------


def test_clipping_sees_and_scales_everything_but_values():
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    net.table.grad = 100 * gradients(1)[0]
    table_grad = net.table.grad.clone()
    for parameter in net.linear.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    n_elements = sum(p.numel() for p in net.linear.parameters())
    norm = optimizer.clip_grad_norm(1.0)
    assert float(norm) == pytest.approx(3.0 * n_elements**0.5)
    assert torch.equal(net.table.grad, table_grad)
    clipped = torch.cat([p.grad.flatten() for p in net.linear.parameters()])
    assert float(clipped.norm()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_of_values_that_is_not_finite_is_seen_in_the_norm(wrong):
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    assert optimizer.clip_grad_norm(0.0).isfinite()
    net.table.grad[1, 1] = wrong
    assert float(optimizer.clip_grad_norm(0.0)) == float("inf")


def test_without_a_limit_nothing_is_scaled():
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    n_elements = sum(p.numel() for p in net.linear.parameters())
    assert float(optimizer.clip_grad_norm(0.0)) == pytest.approx(3.0 * n_elements**0.5)
    assert all((p.grad == 3).all() for p in net.parameters())


def test_scaling_of_gradients_reaches_values_too():
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.multiply_grads(0.5)  # fairseq divides by the number of tokens like this
    assert all((p.grad == 1.5).all() for p in net.parameters())


# --- saving and loading -----------------------------------------------------------------------


def trained(steps=3, **settings):
    net = Net()
    optimizer = PkmAdam(options(**settings), net.parameters())
    for step in range(steps):
        take_step(net, optimizer, gradients(6, SOME_ROWS)[step])
    return net, optimizer


def resumed(net, optimizer, tmp_path, overrides=None, **settings):
    """A new optimizer with a saved and loaded state, on a copy of the net."""
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    twin = copy.deepcopy(net)
    other = PkmAdam(options(**settings), twin.parameters())
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"), overrides)
    return twin, other


def test_a_loaded_state_goes_on_bit_for_bit(tmp_path):
    net, optimizer = trained(weight_decay=0.1)
    twin, other = resumed(net, optimizer, tmp_path, weight_decay=0.1)
    for step in range(3, 6):
        grad = gradients(6, SOME_ROWS)[step]
        take_step(net, optimizer, grad)
        take_step(twin, other, grad)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_that_was_loaded_is_saved_as_it_was(tmp_path):
    net, optimizer = trained()
    twin, other = resumed(net, optimizer, tmp_path)
    _, other = resumed(twin, other, tmp_path)
    groups = [saved.state_dict()["param_groups"] for saved in (optimizer, other)]
    assert groups[0] == groups[1]
    kinds = [
        {name: (type(value), getattr(value, "dtype", None)) for name, value in state.items()}
        for saved in (optimizer, other)
        for state in saved.state_dict()["state"].values()
    ]
    assert kinds[: len(kinds) // 2] == kinds[len(kinds) // 2 :]


def test_a_state_that_is_not_loaded_would_be_noticed(tmp_path):
    net, optimizer = trained()
    twin, other = resumed(net, optimizer, tmp_path)
    other.optimizer.state.clear()
    grad = gradients(6, SOME_ROWS)[3]
    take_step(net, optimizer, grad)
    take_step(twin, other, grad)
    assert not torch.equal(net.table, twin.table)


def test_a_changed_rate_of_values_takes_effect_on_resuming(tmp_path):
    net, optimizer = trained(memory_value_lr=0.1)
    twin, other = resumed(net, optimizer, tmp_path, memory_value_lr=0.7)
    assert lr_of(other, twin.table) == 0.7
    assert len(other.optimizer.state) == 3


def test_overrides_of_fairseq_do_not_reach_values(tmp_path):
    net, optimizer = trained(memory_value_lr=0.1)
    overrides = {"lr": 0.3, "weight_decay": 0.2}
    twin, other = resumed(net, optimizer, tmp_path, overrides, memory_value_lr=0.1)
    assert lr_of(other, twin.linear.weight) == 0.3
    assert lr_of(other, twin.table) == 0.1
    assert [group["weight_decay"] for group in other.param_groups[:2]] == [0.2, 0.0]


# --- without tables, with models --------------------------------------------------------------


def test_without_tables_it_is_fairseqs_adam_and_warns(caplog):
    ours, theirs = nn.Linear(4, 2), nn.Linear(4, 2)
    theirs.load_state_dict(ours.state_dict())
    lazy = PkmAdam(options(weight_decay=0.1), ours.parameters())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "--memory-value-lr" in record.getMessage()
    dense = FairseqAdam(options(weight_decay=0.1), theirs.parameters())
    for _ in range(3):
        for net, optimizer in ((ours, lazy), (theirs, dense)):
            optimizer.zero_grad()
            net(torch.ones(4)).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_with_tables_it_does_not_warn(caplog):
    PkmAdam(options(), Net().parameters())
    assert not caplog.records


def test_defaults_are_those_of_the_papers():
    assert PkmAdamConfig().memory_value_lr == 1e-3
    assert PkmAdamConfig().weight_decay == 0.0


def test_a_flat_parameter_is_refused_as_it_has_no_rows():
    assert PkmAdam(options(), Net().parameters()).supports_flat_params is False


@pytest.mark.parametrize("share", [True, False])
def test_a_model_moves_the_rows_it_read_and_only_them(share):
    dictionary = small_dictionary()
    model = build(
        "resm_roberta_tiny", memory_layers=[0, 2], memory_n_keys=12, memory_share_values=share
    )
    optimizer = build_optimizer(options(), list(model.parameters()))
    assert isinstance(optimizer, PkmAdam)
    tables = {index: layer.memory.values.weight for index, layer in model.memory_layers().items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    old = {index: table.detach().clone() for index, table in tables.items()}
    with model.record_memory_usage() as usage:
        model(batch(dictionary, [7, 3, 5]))[0].square().mean().backward()
    optimizer.step()
    read = {index: counted.read_mass.sum(0) > 0 for index, counted in usage.items()}
    if share:
        read = dict.fromkeys(read, read[0] | read[2])
    for index, table in tables.items():
        moved = (table.detach() != old[index]).any(dim=1)
        assert 0 < moved.sum() < len(moved)
        assert torch.equal(moved, read[index])
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    # the padding rows have no gradient; every parameter as a whole moves
    assert not still


def test_a_scheduler_that_reaches_into_the_groups_does_not_reach_values():
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    for group in optimizer.param_groups:  # as torch's ReduceLROnPlateau does
        group["lr"] = 1e-9
    net.table.grad = gradients(1)[0]
    optimizer.step()
    assert lr_of(optimizer, net.linear.weight) == 1e-9
    assert lr_of(optimizer, net.table) == options().memory_value_lr


# --- factors ----------------------------------------------------------------------------------


def read_table(net):
    """A loss that reads some rows of the table, one of them twice."""
    slots = torch.tensor([[[0, 2, 2]], [[2, 5, 0]]])
    weights = torch.tensor([[[0.5, 1.0, -0.25]], [[2.0, 0.125, 1.0]]])
    return (net.tables[0](slots, weights) * torch.arange(1.0, WIDTH + 1)).sum()


def test_factors_move_what_a_dense_gradient_moves():
    tables = []
    for factored in (True, False):
        torch.manual_seed(1)
        net = Net()
        optimizer = PkmAdam(options(), net.parameters())
        if not factored:
            net.tables[0].factored = False
        for _ in range(3):
            optimizer.zero_grad()
            read_table(net).backward()
            assert isinstance(net.table.grad, FactoredGradient) == factored
            optimizer.step()
        tables.append(net.table.detach())
    assert torch.allclose(*tables, atol=1e-6)


def test_a_loss_scaler_reaches_factors():
    """fairseq's --amp: torch scales the loss, and divides what is in the optimizer's groups."""
    tables = []
    for init_scale in (None, 2.0**10):
        torch.manual_seed(1)
        net = Net()
        optimizer = PkmAdam(options(adam_eps=1.0), net.parameters())  # so that sizes count
        scaler = torch.amp.GradScaler("cpu", init_scale or 1.0, enabled=init_scale is not None)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(read_table(net)).backward()
            scaler.unscale_(optimizer.optimizer)
            optimizer.clip_grad_norm(0.0)
            scaler.step(optimizer.optimizer)
            scaler.update()
        tables.append(net.table.detach())
    assert torch.allclose(*tables, atol=1e-6)


def test_what_wraps_the_optimizer_and_walks_its_parameters_reaches_factors():
    """As fairseq's AMPOptimizer, which does not call multiply_grads of what it wraps."""
    tables = []
    for factor in (1.0, 0.5):
        torch.manual_seed(1)
        net = Net()
        optimizer = PkmAdam(options(adam_eps=1.0), net.parameters())
        read_table(net).backward()
        for parameter in optimizer.params:
            if parameter.grad is not None:
                parameter.grad.data.mul_(factor)
        optimizer.step()
        tables.append(net.table.detach())
    assert not torch.allclose(*tables, atol=1e-4)


def test_what_is_saved_does_not_depend_on_factors(tmp_path):
    net, optimizer = trained()
    saved = optimizer.state_dict()
    assert [len(group["params"]) for group in saved["param_groups"]] == [2, 1]
    twin, other = resumed(net, optimizer, tmp_path)
    read_table(twin).backward()
    assert twin.table.grad is not None
    other.step()
    assert not torch.equal(net.table, twin.table)


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_values_are_clipped_to_their_own_norm(limit):
    net = Net(n_tables=2)
    optimizer = PkmAdam(options(memory_value_clip_norm=limit), net.parameters())
    read_table(net).backward()
    net.tables[1].weight.grad = gradients(1)[0]
    net.linear.weight.grad = torch.full_like(net.linear.weight, 7.0)
    other = net.tables[1].weight.grad.clone()
    entries = net.table.grad.entries()
    squares = float(kernels.squared_norm(net.table, entries)) + float(other.square().sum())
    optimizer.clip_grad_norm(0.0)
    factor = min(1.0, limit / squares**0.5)
    assert factor == (1.0 if limit > 1 else pytest.approx(limit / squares**0.5))
    assert torch.allclose(net.table.grad.entries().weights, entries.weights * factor)
    assert torch.allclose(net.tables[1].weight.grad, other * factor)
    assert (net.linear.weight.grad == 7).all()


def test_moments_are_loaded_in_their_own_precision(tmp_path):
    net, optimizer = trained()
    twin = copy.deepcopy(net)
    twin.tables.bfloat16()
    other = PkmAdam(options(), twin.parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    for moment in ("exp_avg", "exp_avg_sq"):
        ours = other.optimizer.state[twin.table][moment]
        assert torch.equal(ours, optimizer.optimizer.state[net.table][moment])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_was_skipped_leaves_nothing_behind(set_to_none):
    tables = []
    for skipped in (True, False):
        torch.manual_seed(1)
        net = Net()
        optimizer = PkmAdam(options(), net.parameters())
        if skipped:
            (read_table(net) * float("inf")).backward()
            optimizer.optimizer.zero_grad(set_to_none=set_to_none)
            assert net.table.grad is None or not net.table.grad.dense().any()
        read_table(net).backward()
        optimizer.step()
        tables.append(net.table.detach())
    assert torch.equal(*tables) and tables[0].isfinite().all()


def test_a_loss_scaler_skips_a_step_whose_factors_are_not_finite():
    net = Net()
    optimizer = PkmAdam(options(), net.parameters())
    scaler = torch.amp.GradScaler("cpu", 4.0)
    before = net.table.detach().clone()
    slots, weights = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1)
    read = net.tables[0](slots, weights)
    net.linear.weight.grad = torch.ones_like(net.linear.weight)  # finite
    scaler.scale(read.sum()).backward()
    net.table.grad.mul_(float("inf"))
    assert float(optimizer.clip_grad_norm(0.0)) == float("inf")
    scaler.step(optimizer.optimizer)
    scaler.update()
    assert torch.equal(net.table, before)
    assert scaler.get_scale() == 2.0


def test_a_norm_of_values_that_overflows_is_seen():
    net = Net()
    optimizer = PkmAdam(options(memory_value_clip_norm=1.0), net.parameters())
    slots, weights = torch.zeros(1, 1, 2, dtype=torch.int64), torch.full((1, 1, 2), 3e38)
    (net.tables[0](slots, weights) * 10).sum().backward()  # each factor is finite
    assert net.table.grad.is_finite()
    assert float(optimizer.clip_grad_norm(0.0)) == float("inf")


# --- the learning rate of values --------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "at_start", "at_half", "at_a_tenth"),
    [
        ({}, 0.1, 0.1, 0.1),
        ({"memory_value_lr_schedule": "follow"}, 0.1, 0.05, 0.01),
        ({"memory_value_lr": 1e-3, "memory_value_lr_factor": 4.0}, 0.04, 0.04, 0.04),
        (
            {
                "memory_value_lr": 1e-3,
                "memory_value_lr_factor": 4.0,
                "memory_value_lr_schedule": "follow",
            },
            *(0.04, 0.02, 0.004),
        ),
    ],
    ids=["constant", "follow", "factor", "factor and follow"],
)
def test_the_rate_of_values_is_what_its_options_make_of_lr(settings, at_start, at_half, at_a_tenth):
    rates = []
    for lr in (None, 0.005, 0.001):  # of everything else; 0.01 at the start
        net = Net(dtype=torch.float64)
        start = net.table.detach().clone()
        optimizer = PkmAdam(options(**settings), net.parameters())
        if lr is not None:
            optimizer.set_lr(lr)
        grad = gradients(1, dtype=torch.float64)
        take_step(net, optimizer, grad[0])
        rates.append(optimizer.param_groups[1]["lr"])
        moved = lazy_adam_by_hand(start, grad, rates[-1])
        assert torch.allclose(net.table.detach(), moved, rtol=0, atol=1e-6)
    assert rates == pytest.approx([at_start, at_half, at_a_tenth])


def test_moments_that_bmuf_cannot_average_are_refused():
    for odd in ({"memory_moment_dtype": "float8"}, {"memory_value_optimizer": "sgd"}):
        with pytest.raises(ValueError, match=r"--use-bmuf does not work with --memory-"):
            PkmAdam(options(use_bmuf=True, **odd), Net().parameters())
        PkmAdam(options(use_bmuf=False, **odd), Net().parameters())


def test_rates_of_values_that_contradict_each_other_are_refused():
    params = Net().parameters
    with pytest.raises(ValueError, match=r"value-lr 0.1 and --memory-value-lr-factor 2.0 exclude"):
        PkmAdam(options(memory_value_lr_factor=2.0), params())
    with pytest.raises(ValueError, match=r"lr is 0.0, must be above 0 .*follow"):
        PkmAdam(options(memory_value_lr_schedule="follow", lr=[0.0]), params())

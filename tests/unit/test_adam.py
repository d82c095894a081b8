"""MemoryAdam in ordinary torch loops: whatever torch does to optimizers and gradients."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

from pkm_fairseq.memory import (
    MemoryAdam,
    MemoryConfig,
    ProductKeyMemory,
    ValueTable,
    ignore_tables_in_ddp,
    memory_param_groups,
)
from pkm_fairseq.memory.adam import MOMENTS
from pkm_fairseq.memory.gradient import FactoredGradient
from pkm_fairseq.memory.kernels import Float8Table
from tests.workers import on_workers

CONFIG = MemoryConfig(n_keys=16, heads=2, knn=4, k_dim=8, query_norm="layer")
WIDTH = 16


class Net(nn.Module):
    """A residual memory and something behind it."""

    def __init__(self, config=CONFIG):
        super().__init__()
        self.memory = ProductKeyMemory(WIDTH, config)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(x + self.memory(x))

    @property
    def values(self):
        return self.memory.values.weight


def net(seed=0, **settings):
    torch.manual_seed(seed)
    return Net(MemoryConfig(**{**vars(CONFIG), **settings}))


def adam(model, **settings):
    return MemoryAdam(memory_param_groups(model, lr=1e-2, value_lr=1e-1), **settings)


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(12, WIDTH, generator=generator)).square().mean()


def train(model, optimizer, steps=3, first=0, clip=None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if clip is not None:
            clip(model.parameters())
        optimizer.step()


def assert_same(one, other, **tolerance):
    for (name, x), y in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def table_and_rest():
    """A table whose every row is read, and a parameter beside it."""
    torch.manual_seed(0)
    return ValueTable(4, 2), nn.Parameter(torch.ones(2))


def read_all(table):
    return table(torch.arange(4).view(1, 1, 4), torch.ones(1, 1, 4))


# --- the update -------------------------------------------------------------------------------


def test_the_rest_is_updated_as_by_torchs_adamw():
    ours, theirs = net(), net()
    optimizer = MemoryAdam(memory_param_groups(ours, lr=1e-2, value_lr=0.0, weight_decay=0.1))
    theirs.values.requires_grad_(False)
    rest = [p for p in theirs.parameters() if p.requires_grad]
    train(ours, optimizer, 5)
    train(theirs, torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1), 5)
    assert_same(ours, theirs)


def test_rows_that_were_read_move_as_by_lazy_adam_and_no_others():
    model = net()
    before = model.values.detach().clone()
    with torch.no_grad():
        seen = model.memory(
            torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0)), return_lookup=True
        )
    train(model, adam(model), 1)
    moved = (model.values != before).any(dim=1).nonzero().flatten()
    assert moved.tolist() == seen[1].slots.unique().tolist()
    # Adam's first step is of the size of the learning rate, whatever the gradient
    step = (model.values - before)[moved].abs()
    assert float(step.max()) == pytest.approx(0.1, rel=1e-3)


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    model, twin = net(), net()
    optimizer, other = adam(model), adam(twin)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == float(loss_of(twin, 0))
    train(twin, other, 1)
    assert_same(model, twin, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_every_implementation_of_torchs_adam_gives_the_same(settings):
    ours, theirs = net(), net()
    train(ours, adam(ours, **settings))
    train(theirs, adam(theirs))
    assert_same(ours, theirs)


def test_gradients_accumulate_over_backward_passes():
    ours, theirs = net(), net()
    for model, optimizer in ((ours, adam(ours)), (theirs, adam(theirs))):
        if model is ours:
            for seed in (0, 1):
                loss_of(model, seed).backward()
        else:
            (loss_of(model, 0) + loss_of(model, 1)).backward()
        optimizer.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("owner", ["model", "optimizer"])
def test_zero_grad_of_model_and_optimizer_forgets_the_gradient_of_values(owner, set_to_none):
    model, twin = net(), net()
    optimizer, other = adam(model), adam(twin)
    (loss_of(model, 5) * math.inf).backward()
    (model if owner == "model" else optimizer).zero_grad(set_to_none=set_to_none)
    assert model.values.grad is None or not model.values.grad.dense().any()
    loss_of(model, 0).backward()
    optimizer.step()
    train(twin, other, 1)
    assert_same(model, twin, rtol=0, atol=0)


def test_a_gradient_for_an_input_alone_leaves_values_as_they_were():
    model = net()
    adam(model)
    x = torch.randn(5, WIDTH, requires_grad=True)
    (of_x,) = torch.autograd.grad(model(x).sum(), x)
    assert of_x.any() and model.values.grad is None
    (of_values,) = torch.autograd.grad(model(x).sum(), model.values)
    model.memory.values.factored = False
    (dense,) = torch.autograd.grad(model(x).sum(), model.values)
    torch.testing.assert_close(of_values.dense(), dense)


# --- what is kept owns its memory -------------------------------------------------------------


def test_a_gradient_buffer_may_be_reused():
    table, _ = table_and_rest()
    dense = copy.deepcopy(table)
    MemoryAdam([table.weight])
    slots, weights, buffer = torch.tensor([[[1]]]), torch.ones(1, 1, 1), torch.empty(1, 2)
    for micro in (1.0, 2.0):
        buffer.fill_(micro)
        table(slots, weights).backward(buffer)
        dense(slots, weights).backward(buffer)
    buffer.zero_(), slots.zero_(), weights.zero_()
    assert torch.equal(table.weight.grad.dense(), dense.weight.grad)
    assert table.weight.grad.dense()[1].tolist() == [3, 3]


@pytest.mark.parametrize("clip", [False, True])
def test_a_parameter_that_is_added_through_a_view_shares_nothing_with_values(clip):
    gradients = []
    for factored in (True, False):
        model = net()
        model.memory.values.factored = factored
        prompt = nn.Parameter(torch.zeros(5, WIDTH))
        torch.manual_seed(1)
        for _ in range(1 if clip else 2):
            h = prompt.unsqueeze(0) + model.memory(torch.randn(1, 5, WIDTH))  # a batch of one
            (h * torch.randn(1, 5, WIDTH)).sum().backward()
        if clip:
            nn.utils.clip_grad_norm_([prompt], 0.01)
        gradients.append(model.values.grad.dense() if factored else model.values.grad)
    torch.testing.assert_close(*gradients)


def test_a_look_up_may_be_changed_after_the_backward_pass():
    model = net()
    optimizer, before = adam(model), model.values.detach().clone()
    read, lookup = model.memory(torch.randn(5, WIDTH), return_lookup=True)
    rows = lookup.slots.unique().tolist()
    read.sum().backward()
    lookup.slots.zero_()
    lookup.weights.zero_()
    optimizer.step()
    assert (model.values != before).any(1).nonzero().flatten().tolist() == rows


# --- clipping and scaling ---------------------------------------------------------------------

CLIPS = {
    "norm": lambda params: nn.utils.clip_grad_norm_(params, 0.05),
    "norm, foreach": lambda params: nn.utils.clip_grad_norm_(params, 0.05, foreach=True),
    "maximum norm": lambda params: nn.utils.clip_grad_norm_(params, 1e-3, norm_type=math.inf),
    "1-norm": lambda params: nn.utils.clip_grad_norm_(params, 0.5, norm_type=1),
    "value": lambda params: nn.utils.clip_grad_value_(params, 1e-3),
    "value, foreach": lambda params: nn.utils.clip_grad_value_(params, 1e-3, foreach=True),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clipping_is_that_of_a_dense_gradient(name):
    found = []
    for factored in (True, False):
        model = net()
        model.memory.values.factored = factored
        loss_of(model, 0).backward()
        before = model.values.grad.dense() if factored else model.values.grad.clone()
        norm = CLIPS[name](list(model.parameters()))
        after = model.values.grad.dense() if factored else model.values.grad
        assert not torch.equal(before, after)
        found.append([p.grad for p in model.parameters() if p is not model.values])
        found[-1] += [after] if norm is None else [after, norm]
    torch.testing.assert_close(*found)


def test_walking_the_groups_meets_the_parameters_of_the_model_and_nothing_else():
    table, p = table_and_rest()
    optimizer = MemoryAdam([{"params": [p]}, {"params": [table.weight]}], lr=0.1)
    (read_all(table).sum() * 1e-4 + (p * torch.tensor([3e-3, 4e-3])).sum()).backward()
    params = [q for group in optimizer.param_groups for q in group["params"]]
    assert [id(q) for q in params] == [id(p), id(table.weight)]
    norm = nn.utils.clip_grad_norm_(params, 0.1)
    assert float(norm) == pytest.approx((0.005**2 + 8 * 1e-8) ** 0.5)
    assert p.grad.tolist() == pytest.approx([0.003, 0.004])


def test_what_measures_a_gradient_sees_the_whole_of_it():
    model, twin = net(), net()
    model.memory.values.factored = True
    for x in (model, twin):
        loss_of(x, 0).backward()
    ours, dense = model.values.grad, twin.values.grad
    torch.testing.assert_close(ours.norm(), dense.norm())
    torch.testing.assert_close(ours.abs().max(), dense.abs().max())
    assert not ours.isnan().any() and torch.isfinite(ours).all()
    torch.testing.assert_close(ours.data.clone().mul_(2).dense(), 2 * dense)
    torch.testing.assert_close((ours / 4).dense(), dense / 4)
    torch.testing.assert_close((ours + dense).dense(), 2 * dense)
    torch.testing.assert_close(dense.clone().add_(ours), 2 * dense)
    assert "reads=96" in repr(ours)


@pytest.mark.parametrize(
    "change", [lambda g: g.add_(1.0), lambda g: g.view(-1), lambda g: g.sqrt_(), lambda g: g[0]]
)
def test_what_would_be_lost_on_factors_is_refused_in_one_line(change):
    model = net()
    model.memory.values.factored = True
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"set values\.factored = False") as refused:
        change(model.values.grad)
    assert "\n" not in str(refused.value)


def test_what_only_reads_a_gradient_gets_a_dense_one():
    model = net()
    model.memory.values.factored = True
    loss_of(model, 0).backward()
    g, half = model.values.grad, torch.tensor([0.5])
    dense, out = g.dense(), torch.empty_like(g.dense())
    assert torch.equal(torch.stack([g, g]), torch.stack([dense, dense]))
    assert torch.equal(torch.cat([g, dense]), torch.cat([dense, dense]))
    assert torch.equal(torch.add(g, g, out=out), 2 * dense) and torch.equal(out, 2 * dense)
    assert torch.equal(
        torch.div(g, 0.3, rounding_mode="floor"), torch.div(dense, 0.3, rounding_mode="floor")
    )
    for order in (0, -1, -math.inf, 3, math.inf):
        norms = [torch.linalg.vector_norm(x, order) for x in (g, dense)]
        torch.testing.assert_close(*norms)
    assert torch.equal((g * half).dense(), dense / 2)
    assert torch.equal(g.mul_(half).dense(), dense / 2)
    with pytest.raises(RuntimeError, match="share_memory_ does not work on the factored gradient"):
        model.share_memory()


@pytest.mark.parametrize("convert", ["float", "half", "bfloat16", "double"])
def test_a_table_that_keeps_its_dtype_is_converted_with_its_gradient(convert):
    table = ValueTable(4, 2, keeps_dtype=True)
    table.factored = True
    read_all(table).sum().backward()
    before = table.weight.grad.dense()
    getattr(table, convert)()
    kept = torch.float64 if convert == "double" else torch.float32
    assert table.weight.dtype == table.weight.grad.dtype == kept
    assert torch.equal(table.weight.grad.dense().float(), before)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_another_optimizer_is_refused_or_dense(kind):
    model, twin = net(), net()
    adam(model)
    other = kind(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="update the table with MemoryAdam"):
        train(model, other, 1)
    model = net()
    adam(model)
    model.memory.values.factored = False
    train(model, kind(model.parameters(), lr=0.1))
    train(twin, kind(twin.parameters(), lr=0.1))
    assert_same(model, twin, rtol=0, atol=0)


def test_a_loss_scaler_scales_and_unscales_values():
    ours, theirs = net(), net()
    optimizer = adam(ours)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(ours, step)).backward()
        if step == 1:
            scaler.unscale_(optimizer)  # as before clipping
        scaler.step(optimizer)
        scaler.update()
    train(theirs, adam(theirs))
    assert_same(ours, theirs)


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_scaler_skips_a_step_whose_values_alone_overflow(unscale, fused):
    table, _ = table_and_rest()
    optimizer = MemoryAdam([table.weight], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = table.weight.detach().clone()
    scaler.scale(read_all(table).sum() * 1e35).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(table.weight, before)
    assert scaler.get_scale() == 2.0**15
    table.zero_grad()
    scaler.scale(read_all(table).sum()).backward()
    scaler.step(optimizer)
    assert table.weight.isfinite().all() and not torch.equal(table.weight, before)


# --- groups, schedules, settings --------------------------------------------------------------

SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.5**e]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 2], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [1e-3, 1e-2], [1e-2, 1e-1]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [1e-2, 1e-1], 10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, min_lr=[0.0, 1e-2]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
}


def test_every_scheduler_of_torch_is_tried():
    of_torch = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert of_torch - {"LRScheduler", "_LRScheduler"} == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_set_the_rates_that_they_set_of_torchs_adam(name):
    rates = []
    for kind in (MemoryAdam, torch.optim.AdamW):
        model = net()
        optimizer = kind(memory_param_groups(model, lr=1e-2, value_lr=1e-1))
        schedule = SCHEDULES[name](optimizer)
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of calls in the wrong order
            for step in range(4):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
                schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                found.append([group["lr"] for group in optimizer.param_groups])
        rates.append(found)
    assert rates[0] == rates[1]


def test_hooks_run_once_per_step():
    model, calls = net(), []
    optimizer = adam(model)
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # torch wraps its step, too
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 1)
    assert calls == ["before", "after"]


def test_the_groups_of_a_model():
    model = net()
    model.head.bias.requires_grad_(False)
    rest, values = memory_param_groups(model, lr=0.1, value_lr=0.2, weight_decay=0.3)
    assert [p is model.values for p in values["params"]] == [True]
    assert {id(p) for p in rest["params"]} == {
        id(p) for p in model.parameters() if p is not model.values and p is not model.head.bias
    }
    assert (rest["lr"], rest["weight_decay"]) == (0.1, 0.3)
    assert (values["lr"], values["weight_decay"]) == (0.2, 0.0)
    assert len(memory_param_groups(nn.Linear(2, 2))) == 1


def test_a_parameter_that_was_put_in_place_of_the_table_is_a_table():
    model = net()
    model.memory.values.weight = nn.Parameter(torch.zeros(256, WIDTH))
    optimizer = adam(model)
    loss_of(model, 0).backward()
    assert isinstance(model.values.grad, FactoredGradient)
    optimizer.step()
    assert model.values.any(dim=1).sum() < 256


@pytest.mark.parametrize(
    "groups,said",
    [
        (lambda m: dict(params=m.parameters(), lr=-1.0), "lr is -1.0, must be at least 0"),
        (lambda m: dict(params=m.parameters(), eps=-1.0), "eps is -1.0, must be at least 0"),
        (lambda m: dict(params=m.parameters(), betas=(0.9, 1.0)), "betas are .*, must be two"),
        (lambda m: dict(params=m.parameters(), betas=0.9), "betas are 0.9, must be two"),
        (
            lambda m: dict(params=[{"params": [nn.Embedding(3, 2).weight], "lazy": True}]),
            r"a lazy group holds a parameter of shape \(3, 2\), which is no value table",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_line(groups, said):
    with pytest.raises(ValueError, match=said) as refused:
        MemoryAdam(**groups(net()))
    assert "\n" not in str(refused.value)


def test_a_weight_decay_of_values_is_refused_however_it_came():
    model = net()
    optimizer = MemoryAdam(model.parameters(), lr=1e-2, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay 0.1, must be 0: use memory_param_groups"):
        train(model, optimizer, 1)
    optimizer = adam(model)
    optimizer.param_groups[1]["weight_decay"] = 0.2
    with pytest.raises(ValueError, match=r"weight_decay 0.2, must be 0"):
        train(model, optimizer, 1)


# --- saving and loading -----------------------------------------------------------------------


def resume(make, steps=2):
    """Train, save, load into a new model and optimizer, and train both on."""
    model = net()
    optimizer = make(model)
    train(model, optimizer, steps)
    twin = net(1)
    other = make(twin)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x, o in ((model, optimizer), (twin, other)):
        train(x, o, 2, first=steps)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]
    assert_same(model, twin, rtol=0, atol=0)


def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped():
    resume(adam)


def test_a_group_that_was_added_late_is_resumed_too():
    def late(model):
        rest = [p for p in model.memory.parameters() if p is not model.values]
        optimizer = MemoryAdam([{"params": rest}, {"params": [model.values], "lr": 1e-1}], lr=1e-2)
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 5e-3})
        return optimizer

    resume(late)


def one_group(kind):
    return lambda model: kind(model.parameters(), lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.AdamW])
def test_a_state_of_torchs_adam_is_taken_and_given(other):
    """Both ways; values go on moving, and lazily."""
    model = net()
    theirs = one_group(other)(model)
    train(model, theirs)
    twin = copy.deepcopy(model)
    ours = one_group(MemoryAdam)(twin)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    torch.testing.assert_close(
        ours.state[twin.values]["exp_avg"], theirs.state[model.values]["exp_avg"]
    )
    before = twin.values.detach().clone()
    train(twin, ours, 1, first=3)
    moved = (twin.values != before).any(dim=1)
    assert 0 < moved.sum() < len(moved)
    assert float(ours.state[twin.values]["step"]) == 4
    twin.memory.values.factored = False
    back = one_group(other)(twin)
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(twin, back, 1, first=4)
    assert float(back.state[twin.values]["step"]) == 5


def test_a_state_with_integer_step_counts_is_taken():
    """As fairseq's Adam and version 0.1.0 save it."""
    model, twin = net(), net()
    ours, other = adam(model), adam(twin)
    train(model, ours)
    saved = copy.deepcopy(ours.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    saved["param_groups"][1]["lazy"] = True
    for group in saved["param_groups"]:
        group.pop("foreach"), group.pop("fused")
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    for x, o in ((model, ours), (twin, other)):
        train(x, o, 2, first=3)
    assert_same(model, twin, rtol=0, atol=0)


def test_a_state_that_does_not_fit_is_refused():
    model = net()
    optimizer = adam(model)
    amsgrad = torch.optim.Adam(memory_param_groups(net()), amsgrad=True)
    with pytest.raises(ValueError, match="an Adam with amsgrad, which must be off"):
        optimizer.load_state_dict(amsgrad.state_dict())
    larger = net(n_keys=20)
    train(larger, adam(larger), 1)
    with pytest.raises(ValueError, match=r"has shape .*must be that of its parameter"):
        optimizer.load_state_dict(adam_state(larger))
    with pytest.raises(ValueError, match=r"of groups of \[\d+\] parameters, must be"):
        optimizer.load_state_dict(MemoryAdam(net().parameters()).state_dict())


def test_a_state_of_a_training_that_froze_other_parameters_is_refused():
    model, frozen = net(), net()
    frozen.memory.values.requires_grad_(False)
    state = adam_state(model)
    with pytest.raises(ValueError, match="were trained; start with a new optimizer") as refused:
        MemoryAdam(memory_param_groups(frozen)).load_state_dict(state)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    "settings", [{"value_optimizer": "sgd"}, {"moment_dtype": "float8", "exchange": False}]
)
def test_a_copy_of_model_and_optimizer_goes_on_as_they_do(copied, steps_before, settings):
    model = net()
    optimizer = adam(model, **settings)
    train(model, optimizer, steps_before)
    twin, other = copied((model, optimizer))
    assert other._exchange == settings.get("exchange", True)
    for x, o in ((model, optimizer), (twin, other)):
        train(x, o, 2, first=steps_before)
        o.state_dict()
    assert_same(model, twin, rtol=0, atol=0)
    assert model.values is not twin.values


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("moment_dtype", ["float32", "float8"])
def test_a_copy_knows_its_tables_whichever_is_copied_first(copied, moment_dtype):
    model = net()
    optimizer = adam(model, moment_dtype=moment_dtype)
    train(model, optimizer, 2)
    alone = copied(optimizer).state_dict()
    other, twin = copied((optimizer, model))
    for state in (alone, other.state_dict()):
        assert torch.equal(all_moments(state), all_moments(optimizer.state_dict()))
    for x, o in ((model, optimizer), (twin, other)):
        train(x, o, 2, first=2)
        assert x.memory.values.factored
    assert_same(model, twin, rtol=0, atol=0)


def all_moments(state):
    return torch.cat(
        [s[m].double().flatten() for _, s in sorted(state["state"].items()) for m in MOMENTS]
    )


def test_a_copy_has_the_same_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        optimizer = adam(net(), process_group=group)
        assert copy.deepcopy(optimizer)._process_group is group
    finally:
        dist.destroy_process_group()


def adam_state(model):
    optimizer = adam(model)
    train(model, optimizer, 1)
    return optimizer.state_dict()


def test_the_calls_for_distributed_checkpoints_work():
    model, twin = net(), net()
    optimizer, other = adam(model), adam(twin)
    train(model, optimizer)
    state = get_optimizer_state_dict(model, optimizer)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, state)
    for x, o in ((model, optimizer), (twin, other)):
        train(x, o, 2, first=3)
    assert_same(model, twin, rtol=0, atol=0)


def test_values_in_bfloat16_have_moments_in_float32_also_when_loaded():
    model, twin = (net(value_dtype="bfloat16") for _ in range(2))
    optimizer, other = adam(model), adam(twin)
    train(model, optimizer)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours, theirs = optimizer.state[model.values], other.state[twin.values]
    assert theirs["exp_avg"].dtype == torch.float32
    assert torch.equal(ours["exp_avg"], theirs["exp_avg"])


def test_small_updates_of_values_in_bfloat16_add_up():
    """Each is a twentieth of the last place; of another optimizer they would all be lost."""
    values = ValueTable(4_000, 8, dtype=torch.bfloat16)
    nn.init.ones_(values.weight)
    optimizer = MemoryAdam([{"params": [values.weight], "lr": 2.0**-8 / 20}])
    slots = torch.arange(4_000)[:, None]
    for _ in range(40):
        values(slots, torch.ones(4_000, 1)).sum().backward()  # Adam moves each value by lr
        optimizer.step()
    moved = 1 - values.weight.detach().float()
    assert moved.mean() == pytest.approx(40 * 2.0**-8 / 20, rel=0.02)


@pytest.mark.parametrize(
    ("value_optimizer", "moment_dtype"),
    [("adam", "bfloat16"), ("adam", "float8"), ("sgd", "bfloat16"), ("sgd", "float8")],
)
def test_tables_in_bfloat16_go_on_as_if_they_had_not_stopped(value_optimizer, moment_dtype):
    settings = {"value_optimizer": value_optimizer, "moment_dtype": moment_dtype}
    model, twin = (net(value_dtype="bfloat16") for _ in range(2))
    optimizer, other = adam(model, **settings), adam(twin, **settings)
    train(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    for x, o in ((model, optimizer), (twin, other)):
        train(x, o, 3, first=3)
    assert_same(model, twin, rtol=0, atol=0)
    moments = [other.state[twin.values].get(name) for name in ("exp_avg", "exp_avg_sq")]
    assert [x is None or x.dtype == torch.bfloat16 for x in moments] == [True, True]
    in_8_bits = [isinstance(x, Float8Table) for x in moments]
    assert in_8_bits == [(value_optimizer, moment_dtype) == ("adam", "float8")] * 2
    saved = [x for x in state["state"].values() if "exp_avg" in x]
    assert all(isinstance(x["exp_avg"], torch.Tensor) for x in saved)
    assert (moments[0] is None) == (value_optimizer == "sgd")


def test_tables_of_one_optimizer_are_rounded_apart():
    tables = [ValueTable(64, 8, init="zero", dtype=torch.bfloat16) for _ in range(2)]
    optimizer = MemoryAdam([t.weight for t in tables], lr=1e-3, value_optimizer="sgd")
    for table in tables:
        table(torch.arange(64)[:, None], torch.full((64, 1), 0.3)).sum().backward()
    optimizer.step()
    one, other = (table.weight.detach() for table in tables)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.float(), torch.full((64, 8), -3e-4), rtol=2**-7, atol=0)


def test_moments_of_another_dtype_are_loaded_and_refused():
    model, twin = net(), net()
    optimizer, other = adam(model), adam(twin, moment_dtype="bfloat16")
    train(model, optimizer)
    other.load_state_dict(optimizer.state_dict())
    ours, theirs = optimizer.state[model.values], other.state[twin.values]
    assert torch.equal(theirs["exp_avg"], ours["exp_avg"].bfloat16())
    narrow = adam(model, moment_dtype="float8")
    narrow.load_state_dict(optimizer.state_dict())
    theirs = narrow.state[model.values]
    right = [Float8Table(*ours["exp_avg"].shape, signed) for signed in (True, False)]
    for name, table in zip(("exp_avg", "exp_avg_sq"), right, strict=True):
        assert torch.equal(theirs[name].codes, table.copy_(ours[name]).codes), name
        assert 0 < (theirs[name].decoded() - ours[name]).abs().max() < 0.1 * ours[name].max()
    other.load_state_dict(narrow.state_dict())
    assert torch.equal(other.state[twin.values]["exp_avg"], right[0].decoded())
    with pytest.raises(
        ValueError, match="moment_dtype is 'int8', must be one of float32, bfloat16, f"
    ):
        adam(net(), moment_dtype="int8")


# --- several workers --------------------------------------------------------------------------


def data_parallel(rank, wrap, exchange_as):
    """Three steps; every worker has other tokens, and the last one fewer."""
    model = net()
    if wrap == "ignored":
        ignore_tables_in_ddp(model)
    wrapped = model if wrap == "none" else DistributedDataParallel(model)
    optimizer = adam(model, exchange_as=exchange_as)
    for step in range(3):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(12 - 4 * rank, WIDTH, generator=generator)
        wrapped(x).square().mean().backward()
        if wrap == "none":
            for p in model.parameters():
                if p is not model.values:
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def together():
    """The same with one worker: the mean of the workers' losses."""
    model = net()
    optimizer = adam(model)
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            generator = torch.Generator().manual_seed(10 * step + rank)
            x = torch.randn(12 - 4 * rank, WIDTH, generator=generator)
            (model(x).square().mean() / 2).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("wrap", "exchange_as"),
    [("ddp", "auto"), *[(w, f) for w in ("ignored", "none") for f in ("factors", "dense")]],
)
def test_workers_end_with_the_values_of_one_that_has_all_tokens(tmp_path, wrap, exchange_as):
    one = together()
    for found in on_workers(2, tmp_path, data_parallel, wrap, exchange_as):
        for name, x in one.items():
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)


def frozen_apart(rank):
    """A worker whose frozen values are not the first one's, when DDP wraps its model."""
    model = net(seed=rank)
    model.values.requires_grad_(False)
    DistributedDataParallel(ignore_tables_in_ddp(model))
    return model.values.detach()


def test_frozen_values_are_those_of_the_first_worker(tmp_path):
    for values in on_workers(2, tmp_path, frozen_apart):
        assert torch.equal(values, net(seed=0).values)


def start_apart(rank):
    model = net(seed=rank)
    try:
        train(model, adam(model), 1)
    except ValueError as error:
        return str(error)
    return "no error"


def test_workers_that_start_with_other_values_are_told(tmp_path):
    for said in on_workers(2, tmp_path, start_apart):
        assert "value tables of worker" in said and "broadcast them" in said

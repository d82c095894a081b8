"""pkm_adam in fairseq's wrappers for mixed precision, against pkm_adam alone in full precision."""

import copy
import math

import pytest
import torch
from fairseq import optim
from fairseq.optim.adam import FairseqAdam
from omegaconf import OmegaConf
from torch import nn

from pkm_fairseq.memory import ValueTable
from pkm_fairseq.memory.query import BatchQueryNorm
from pkm_fairseq.optim.pkm_adam import PkmAdam
from tests.helpers import batch, build, small_dictionary

ROWS, WIDTH = 6, 4

# fairseq's options, by the name of the test's case
FORMS = {
    "fp16 flat": {"fp16": True},
    "fp16": {"fp16": True, "fp16_no_flatten_grads": True},
    "bf16": {"bf16": True},
    "memory-efficient fp16": {"fp16": True, "memory_efficient_fp16": True},
    "memory-efficient bf16": {"bf16": True, "memory_efficient_bf16": True},
}
FP16 = [name for name in FORMS if "fp16" in name]
COPYING = [name for name in FORMS if "memory" not in name]


def config(name="pkm_adam", memory_value_clip_norm=0.0, loss_scale=128, **common):
    """As much of fairseq's configuration as its wrappers look at."""
    defaults = dict(
        fp16=False,
        bf16=False,
        cpu=True,
        memory_efficient_fp16=False,
        memory_efficient_bf16=False,
        fp16_no_flatten_grads=False,
        fp16_init_scale=loss_scale,
        fp16_scale_window=None,
        fp16_scale_tolerance=0.0,
        threshold_loss_scale=None,
        min_loss_scale=1e-4,
        model_parallel_size=1,
    )
    optimizer = dict(
        _name=name,
        adam_betas="(0.9, 0.98)",
        adam_eps=1e-2,  # so that sizes of gradients count
        weight_decay=0.01,
        lr=[0.01],
    )
    if name == "pkm_adam":
        ours = dict(memory_value_lr=0.1, memory_value_clip_norm=memory_value_clip_norm)
    else:
        ours = dict(tpu=False)
    return OmegaConf.create(
        dict(
            common={**defaults, **common},
            optimizer={**optimizer, **ours},
            optimization=dict(update_freq=[1]),
            distributed_training=dict(distributed_world_size=1),
        )
    )


class Net(nn.Module):
    """A table of values and something beside it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2)
        self.values = ValueTable(ROWS, WIDTH, keeps_dtype=True)

    @property
    def table(self):
        return self.values.weight


def as_the_trainer_does(monkeypatch, form, net=None, **settings):
    """A model and its optimizer, converted and wrapped as fairseq's trainer does it."""
    # of the wrappers for fp16, the flat one asks for the device, None on the CPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr("pkm_fairseq.compat.precision._check_device", lambda *_: None)
    torch.manual_seed(1)
    net = Net() if net is None else net
    cfg = config(**settings, **(FORMS[form] if form else {}))
    trained = [p for p in net.parameters() if p.requires_grad]
    if form is None:
        return net, optim.build_optimizer(cfg.optimizer, trained)
    net = net.half() if cfg.common.fp16 else net.bfloat16()
    trained = [p for p in net.parameters() if p.requires_grad]
    is_efficient = cfg.common.memory_efficient_fp16 or cfg.common.memory_efficient_bf16
    kind = optim.MemoryEfficientFP16Optimizer if is_efficient else optim.FP16Optimizer
    return net, kind.build_optimizer(cfg, trained)


def loss_of(net, step=0):
    """Reads some rows, one of them twice; everything on the way is exact in half precision."""
    slots = torch.tensor([[[0, 2, 2]], [[2, 5, step]]])
    weights = torch.tensor([[[0.5, 1.0, -0.25]], [[2.0, 0.125, 1.0]]])
    read = net.values(slots, weights).to(net.linear.weight.dtype)
    ahead = torch.arange(1, WIDTH + 1, dtype=read.dtype)
    return (read * ahead).sum().float() + net.linear(ahead).float().sum()


def backward(net, optimizer, sample_size, clip_norm=0.0, step=0):
    """Everything of an update but the step."""
    optimizer.zero_grad()
    optimizer.backward(loss_of(net, step))
    optimizer.multiply_grads(1 / sample_size)
    return optimizer.clip_grad_norm(clip_norm)


def gradient_of_table(net):
    return net.table.grad.dense().float()


# --- what values are stored in ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_values_of_a_model_stay_in_their_dtype_and_nothing_else_does(stored, dtype):
    model = build("resm_roberta_tiny", memory_value_dtype=stored)
    (layer,) = model.memory_layers().values()
    table = layer.memory.values.weight
    before = table.detach().clone()
    model.to(dtype)
    assert layer.memory.values.weight is table
    assert table.dtype == getattr(torch, stored)
    assert torch.equal(table, before)
    rest = {p.dtype for p in model.parameters() if p is not table}
    assert rest == {dtype}
    norm = layer.memory.query_norm
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    still = norm.running_mean.clone()
    logits = model(batch(small_dictionary(), [5, 3]))[0]
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert not torch.equal(norm.running_mean, still)
    assert set(dict(norm.named_buffers())) == {"running_mean", "running_var"}


def test_small_changes_of_the_statistics_are_not_lost():
    norms = [BatchQueryNorm(16, keeps_dtype=keeps) for keeps in (True, False)]
    norms[0].bfloat16()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        query = (torch.randn(64, 16, generator=generator) / 8 + 1).bfloat16()
        for norm in norms:
            norm(query)
    assert torch.equal(norms[0].running_mean, norms[1].running_mean)
    assert torch.equal(norms[0].running_var, norms[1].running_var)


def test_no_table_of_another_dtype_is_made_on_the_way():
    seen = []
    Net().values._apply(lambda x: (seen.append(x.numel()), x.half())[1])
    assert seen == [0]


def test_values_on_their_own_are_converted():
    assert ValueTable(ROWS, WIDTH).half().weight.dtype == torch.float16


def test_a_model_in_double_precision_has_values_in_it():
    model = build("resm_roberta_tiny").double()
    assert {x.dtype for x in model.parameters()} == {torch.float64}
    (layer,) = model.memory_layers().values()
    assert {x.dtype for x in layer.memory.buffers()} == {torch.float64}


def test_values_that_keep_their_dtype_follow_to_another_device():
    values = Net().half().values
    values.to(device="meta", dtype=torch.float16)
    assert values.weight.device.type == "meta"
    assert values.weight.dtype == torch.float32


# --- one update is that of full precision ---------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_values_may_be_all_that_is_trained(monkeypatch, form):
    tables = []
    for each in (form, None):
        torch.manual_seed(1)
        net = Net()
        net.linear.requires_grad_(False)
        net, optimizer = as_the_trainer_does(monkeypatch, each, net)
        before = net.table.detach().clone()
        for step in range(2):
            backward(net, optimizer, 1, step=step)
            optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert not torch.equal(net.table, before)
        tables.append(net.table)
    assert torch.equal(*tables)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value_clip", [0.0, 0.5])
def test_values_move_as_in_full_precision(monkeypatch, form, value_clip):
    """Loss scale, sample size and clipping of values reach them once; --clip-norm does not."""
    tables = []
    for one in (form, None):
        net, optimizer = as_the_trainer_does(monkeypatch, one, memory_value_clip_norm=value_clip)
        norms = []
        for step in range(3):
            norms.append(float(backward(net, optimizer, 3, clip_norm=0.01, step=step)))
            optimizer.step()
        assert all(norm > 0.1 for norm in norms)  # --clip-norm cuts in
        tables.append(net.table.detach())
    assert torch.equal(*tables)


@pytest.mark.parametrize("form", FORMS)
def test_the_rest_is_clipped_and_moves(monkeypatch, form):
    moved = []
    for one, clip_norm in ((form, 0.01), (None, 0.01), (None, 0.0)):
        net, optimizer = as_the_trainer_does(monkeypatch, one)
        before = net.linear.weight.detach().float().clone()
        backward(net, optimizer, 3, clip_norm)
        optimizer.step()
        moved.append(net.linear.weight.detach().float() - before)
    rounding = 2**-7 if "bf16" in form else 2**-10  # of parameters below 1
    assert torch.allclose(moved[0], moved[1], rtol=0, atol=rounding)
    assert not torch.allclose(moved[1], moved[2], rtol=0.1)


@pytest.mark.parametrize("form", FP16)
def test_no_gradient_of_values_vanishes(monkeypatch, form):
    """At a sample size of 20,000; where values are in half precision, many do."""
    gradients = []
    for one in (form, None):
        net, optimizer = as_the_trainer_does(monkeypatch, one)
        read = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)).exp() * 1e-4
        slots = torch.arange(64).view(64, 1, 1) % ROWS
        weights = torch.linspace(1e-3, 1, 64).view(64, 1, 1)
        optimizer.zero_grad()
        optimizer.backward((net.values(slots, weights) * read).sum())
        optimizer.multiply_grads(1 / 20_000)
        optimizer.clip_grad_norm(0.0)
        gradients.append(gradient_of_table(net))
    assert torch.equal(*gradients)
    assert (gradients[0] != 0).all()
    in_half = (gradients[0] * 128).half() / 128 / 20_000  # as fairseq divides
    assert (in_half == 0).float().mean() > 0.5


@pytest.mark.parametrize("form", FORMS)
def test_gradients_accumulate_over_batches(monkeypatch, form):
    tables = []
    for one in (form, None):
        net, optimizer = as_the_trainer_does(monkeypatch, one)
        optimizer.zero_grad()
        for step in range(2):
            optimizer.backward(loss_of(net, step))
        optimizer.multiply_grads(torch.tensor(0.125))  # fairseq may hand over a tensor
        optimizer.clip_grad_norm(0.0)
        optimizer.step()
        tables.append(net.table.detach())
    assert torch.equal(*tables)


# --- what fairseq copies --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_optimizer_updates_the_table_itself(monkeypatch, form):
    net, optimizer = as_the_trainer_does(monkeypatch, form)
    assert [group["params"] for group in optimizer.param_groups][-1] == [net.table]
    assert net.values.factored
    if form in COPYING:
        copies = optimizer._copies()
        n_rest = sum(p.numel() for p in net.linear.parameters())
        assert sum(p.numel() for p in copies) == n_rest
        assert len(copies) == (1 if form == "fp16 flat" else 2)


def test_another_optimizer_gets_fairseqs_own_wrappers(monkeypatch):
    for form in FORMS:
        _, optimizer = as_the_trainer_does(monkeypatch, form, name="adam")
        assert type(optimizer) in (optim.FP16Optimizer, optim.MemoryEfficientFP16Optimizer)


@pytest.mark.parametrize("form", FORMS)
def test_another_optimizer_trains_values_in_float32(monkeypatch, form):
    tables = []
    for one in (form, None):
        net, optimizer = as_the_trainer_does(monkeypatch, one, name="adam")
        for step in range(2):
            backward(net, optimizer, 2, step=step)  # a power of two: exact in half precision
            optimizer.step()
        assert not net.values.factored
        tables.append(net.table.detach())
    assert tables[0].dtype == torch.float32
    assert torch.equal(*tables)


# --- overflow -------------------------------------------------------------------------------------


def state_of(net, optimizer):
    saved = optimizer.optimizer.state[net.table]
    return [net.table.detach().clone(), *(saved[k].clone() for k in ("exp_avg", "exp_avg_sq"))]


@pytest.mark.parametrize("form", FP16)
@pytest.mark.parametrize("where", ["factor", "rest"])
def test_an_overflow_moves_nothing_and_lowers_the_loss_scale(monkeypatch, form, where):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # fairseq can skip then
    net, optimizer = as_the_trainer_does(monkeypatch, form)
    backward(net, optimizer, 3)
    optimizer.step()
    before, scale = state_of(net, optimizer), optimizer.scaler.loss_scale
    optimizer.zero_grad()
    optimizer.backward(loss_of(net))
    wrong = net.linear.weight.grad
    if where == "factor":
        wrong = net.table.grad.entries().grads
    wrong[0, 0] = math.inf
    with pytest.raises(OverflowError):
        optimizer.clip_grad_norm(0.0)
    optimizer.zero_grad()
    assert net.table.grad is None
    assert optimizer.scaler.loss_scale == scale / 2
    assert all(torch.equal(x, y) for x, y in zip(before, state_of(net, optimizer), strict=True))
    assert optimizer.optimizer.state[net.table]["step"] == 1
    backward(net, optimizer, 3, step=1)
    optimizer.step()
    assert net.table.isfinite().all()
    assert not torch.equal(net.table, before[0])
    assert optimizer.optimizer.state[net.table]["step"] == 2


def test_the_loss_scale_does_not_change_what_values_become(monkeypatch):
    tables = []
    for scale in (2, 2**12):
        net, optimizer = as_the_trainer_does(monkeypatch, "fp16", loss_scale=scale)
        backward(net, optimizer, 3)
        optimizer.step()
        tables.append(net.table.detach())
    assert torch.equal(*tables)


def test_without_cuda_an_overflow_ends_the_training_in_one_line(monkeypatch):
    net, optimizer = as_the_trainer_does(monkeypatch, "fp16")
    optimizer.zero_grad()
    (loss_of(net) * math.inf).backward()
    with pytest.raises(ValueError, match=r"^fp16: .*--fp16-init-scale") as stop:
        optimizer.clip_grad_norm(0.0)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("form", ["bf16", "memory-efficient bf16"])
def test_an_infinite_gradient_shows_in_the_norm(monkeypatch, form):
    """There is no loss scale with bfloat16: fairseq stops."""
    net, optimizer = as_the_trainer_does(monkeypatch, form)
    optimizer.zero_grad()
    optimizer.backward(loss_of(net))
    net.table.grad.entries().grads[0, 0] = math.inf
    assert not optimizer.clip_grad_norm(1.0).isfinite()


# --- checkpoints ----------------------------------------------------------------------------------


def train(net, optimizer, steps):
    for step in steps:
        backward(net, optimizer, 3, clip_norm=0.5, step=step)
        optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_resumes_goes_on_as_if_it_had_not_stopped(monkeypatch, tmp_path, form):
    whole, optimizer = as_the_trainer_does(monkeypatch, form)
    train(whole, optimizer, range(5))
    first, optimizer = as_the_trainer_does(monkeypatch, form)
    train(first, optimizer, range(3))
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    rest, optimizer = as_the_trainer_does(monkeypatch, form)
    rest.load_state_dict(loaded["model"])
    rest, optimizer = as_the_trainer_does(monkeypatch, form, rest)  # fairseq builds it again
    optimizer.load_state_dict(loaded["optimizer"])
    train(rest, optimizer, range(3, 5))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_moments_are_loaded_in_float32(monkeypatch, form):
    net, optimizer = as_the_trainer_does(monkeypatch, form)
    train(net, optimizer, range(2))
    saved = optimizer.state_dict()
    _, other = as_the_trainer_does(monkeypatch, form)
    other.load_state_dict(saved)
    states = [state for state in other.optimizer.state.values() if state]
    assert len(states) == (2 if form == "fp16 flat" else 3)
    for ours, theirs in zip(states, optimizer.optimizer.state.values(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert ours[moment].dtype == torch.float32
            assert torch.equal(ours[moment], theirs[moment])
            assert ours[moment].data_ptr() != theirs[moment].data_ptr()


def test_copies_that_are_flat_in_one_run_only_are_refused(monkeypatch):
    _, flat = as_the_trainer_does(monkeypatch, "fp16 flat")
    _, other = as_the_trainer_does(monkeypatch, "fp16")
    for one, another in ((flat, other), (other, flat)):
        with pytest.raises(ValueError, match="another setting of --fp16-no-flatten-grads"):
            one.load_state_dict(another.state_dict())


@pytest.mark.parametrize("form", ["fp16", "fp16 flat"])
def test_a_state_without_copies_is_refused_with_its_reason(monkeypatch, form):
    _, optimizer = as_the_trainer_does(monkeypatch, form)
    state = optimizer.state_dict()
    del state["fp32_params"]
    with pytest.raises(ValueError, match="by a run in full or memory-efficient precision"):
        optimizer.load_state_dict(state)


# --- --amp ----------------------------------------------------------------------------------------


def amp(name, scale):
    """fairseq's --amp with a scaler for the CPU, where it has none."""
    torch.manual_seed(1)
    net, cfg = Net(), config(name)
    optimizer = optim.AMPOptimizer.build_optimizer(cfg, list(net.parameters()))
    optimizer._grad_scaler = torch.amp.GradScaler("cpu", scale)
    return net, optimizer


@pytest.mark.parametrize("name", ["pkm_adam", "adam"])
def test_amp_divides_by_the_loss_scale_once(name):
    results = []
    for scale in (1.0, 2.0**10):
        net, optimizer = amp(name, scale)
        for step in range(2):
            backward(net, optimizer, 3, clip_norm=0.01, step=step)
            optimizer.step()
        results.append(net)
    for one, other in zip(*(net.parameters() for net in results), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("where", ["factor", "rest", "norm"])
def test_amp_skips_a_step_that_is_not_finite(where):
    net, optimizer = amp("pkm_adam", 4.0)
    optimizer.fp32_optimizer.cfg.memory_value_clip_norm = 1.0
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    optimizer.backward(loss_of(net))
    entries = net.table.grad.entries()
    if where == "norm":
        entries.weights.fill_(3e38)  # each factor is finite
    else:
        (entries.grads if where == "factor" else net.linear.weight.grad)[0, 0] = math.inf
    assert not optimizer.clip_grad_norm(0.0).isfinite()
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    assert optimizer.scaler.get_scale() == 2.0


def test_amp_leaves_the_learning_rate_of_values_alone():
    net, optimizer = amp("pkm_adam", 4.0)
    for group in optimizer.param_groups:  # as torch's ReduceLROnPlateau does
        group["lr"] = 0.0
    before = net.table.detach().clone()
    backward(net, optimizer, 3)
    optimizer.step()
    assert not torch.equal(net.table, before)


# --- without CUDA ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pkm_adam", "adam"])
def test_flat_parameters_are_refused_on_the_cpu(name):
    with pytest.raises(ValueError, match="--fp16-no-flatten-grads too, or --memory-efficient-fp16"):
        optim.FP16Optimizer.build_optimizer(config(name, fp16=True), [])


def test_amp_warns_on_the_cpu(caplog):
    amp("pkm_adam", 1.0)
    (record,) = [r for r in caplog.records if r.name == "pkm_fairseq.compat.precision"]
    assert record.levelname == "WARNING"
    assert "--amp does nothing on the CPU" in record.getMessage()


def test_the_optimizers_themselves_are_what_they_were():
    for name, kind in (("pkm_adam", PkmAdam), ("adam", FairseqAdam)):
        built = optim.build_optimizer(config(name).optimizer, list(Net().parameters()))
        assert type(built) is kind

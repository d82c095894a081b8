"""The memory where torch traces, exports, compiles, transforms, fakes or wraps its tensors."""

import copy
import io
import logging
import pickle
from contextlib import ExitStack, contextmanager

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pkm_fairseq.memory import (
    MemoryAdam,
    MemoryConfig,
    ProductKeyMemory,
    kernels,
    memory_param_groups,
)
from pkm_fairseq.memory import search as search_module
from pkm_fairseq.memory.kernels import Entries, adam_rows, backends, is_plain, squared_norm
from tests.workers import on_workers

WIDTH = 12
CONFIG = {"n_keys": 11, "heads": 2, "knn": 3, "k_dim": 8}
MASK = torch.tensor([False, True, False, False, True, False])
MASKS = [None, MASK, ~MASK, MASK & False]
KINDS = {
    "plain": {},
    "bfloat16": {"value_dtype": "bfloat16"},
    "layer norm": {"query_norm": "layer"},
    "narrow": {"v_dim": 8, "query": "mlp"},
    "experts": {"values": "experts", "output": "swilu", "v_dim": 8},
}


@pytest.fixture(autouse=True)
def _anew():
    """Each test is the first to search, to choose a backend and to compile."""
    torch._dynamo.reset()
    search_module._kept_ranks.cache_clear()
    backends.choose_anew()
    yield
    backends.choose_anew()


def memory_of(**settings):
    torch.manual_seed(0)
    return ProductKeyMemory(WIDTH, MemoryConfig(**{**CONFIG, **settings}))


def evaluated(**settings):
    """A memory in evaluation, with running statistics that are not those of a new one."""
    memory = memory_of(**settings)
    memory(inputs(50))
    return memory.eval()


def tables_of(memory):
    return memory.values.tables().values()


def factor(memory, factored=True):
    """Keep gradients of the tables as factors, as MemoryAdam does."""
    for table in tables_of(memory):
        table.factored = factored


def inputs(n=6, seed=1):
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def gradients(memory, x, mask=None):
    """All gradients, by name, the table's as a dense one."""
    memory.zero_grad()
    memory(x, mask).square().sum().backward()
    grads = {name: p.grad for name, p in memory.named_parameters()}
    return {name: g if type(g) is torch.Tensor else g.dense() for name, g in grads.items()}


def assert_close(found, right):
    assert torch.allclose(found, right, atol=1e-5), f"off by {(found - right).abs().max()}"


def assert_equal_gradients(found, right):
    assert found.keys() == right.keys()
    for name in right:
        assert_close(found[name], right[name])
    assert all(g.abs().sum() > 0 for name, g in right.items() if name.startswith("values"))


# --- what is plain data -----------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


class Watching(TorchFunctionMode):
    """Makes subclasses of all new tensors, as modes may."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.as_subclass(Subclass) if func is torch.tensor else out


def test_tensors_and_parameters_are_plain_data_and_nothing_else_is():
    x = torch.zeros(3)
    assert is_plain() and is_plain(x, nn.Parameter(x), x[1:], x.detach())
    assert not is_plain(x, x.as_subclass(Subclass))
    with FakeTensorMode() as mode:
        assert not is_plain(x) and not is_plain()
    assert not is_plain(mode.from_tensor(x))
    with FlopCounterMode(display=False):
        assert not is_plain(x)
    seen = []

    def see(y):
        seen.append(is_plain(y))
        return y.sum()

    def see_gradient(y):
        seen.append(is_plain(y))

    torch.func.vmap(see)(x)
    torch.func.grad(see)(x)
    make_fx(see)(x)
    torch.jit.trace(see, x, check_trace=False)
    y = x.clone().requires_grad_()
    y.register_hook(see_gradient)
    torch.autograd.grad(y * 2, y, torch.ones(2, 3), is_grads_batched=True)
    assert len(seen) >= 5 and not any(seen)
    assert torch.compile(lambda y: y + is_plain(y), backend="eager", fullgraph=True)(x).sum() == 0
    assert is_plain(x)


def failed_export():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = memory_of().eval()

        def forward(self, x):
            if self.memory(x).sum() > 0:  # depends on data
                return x
            return -x

    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Failing(), (inputs(),), strict=False)


@contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def in_fake_mode():
    with FakeTensorMode():
        memory_of()(torch.randn(6, WIDTH)).sum().backward()


def in_context(context):
    with context, ExitStack() as stack:
        if not isinstance(context, torch.inference_mode):
            stack.enter_context(torch.enable_grad())
        memory_of().eval()(torch.randn(6, WIDTH))


BEFORE = {
    "a failed export": failed_export,
    "fake tensors": in_fake_mode,
    "inference mode": lambda: in_context(torch.inference_mode()),
    "a meta device": lambda: in_context(torch.device("meta")),
    "a default device": lambda: in_context(default_device("meta")),
    "a mode of functions": lambda: in_context(Watching()),
    "a mode of operations": lambda: in_context(FlopCounterMode(display=False)),
    "a trace": lambda: torch.jit.trace(memory_of().eval(), inputs(), check_trace=False),
    "vmap": lambda: torch.func.vmap(memory_of().eval())(torch.randn(2, 6, WIDTH)),
    "make_fx": lambda: make_fx(memory_of().eval())(inputs()),
    "a compilation": lambda: torch.compile(memory_of().eval(), backend="eager")(inputs()),
}


@pytest.mark.parametrize("before", BEFORE)
def test_nothing_of_what_was_before_is_left_to_a_later_search(before):
    """What is kept between searches must serve in any context."""
    right = gradients(memory_of(), inputs())
    search_module._kept_ranks.cache_clear()
    BEFORE[before]()
    kept = search_module.candidate_ranks(CONFIG["knn"], torch.device("cpu"))
    assert all(is_plain(rank) and not rank.is_inference() for rank in kept)
    assert_equal_gradients(gradients(memory_of(), inputs()), right)


# --- export and trace ---------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_gives_the_output_of_the_memory(kind, strict):
    memory = evaluated(**KINDS[kind])
    factor(memory, strict)
    sizes = {"x": {0: torch.export.Dim("tokens", min=1)}}
    program = torch.export.export(memory, (inputs(),), dynamic_shapes=sizes, strict=strict)
    for n in (1, 6, 40):
        assert_close(program.module()(inputs(n)), memory(inputs(n)))


def test_an_exported_program_is_saved_and_loaded(tmp_path):
    memory = evaluated().requires_grad_(False)
    torch.export.save(torch.export.export(memory, (inputs(),)), tmp_path / "memory.pt2")
    loaded = torch.export.load(tmp_path / "memory.pt2").module()
    assert_close(loaded(inputs(seed=2)), memory(inputs(seed=2)))


def test_an_exported_program_takes_any_padding_and_tells_its_look_up():
    memory = evaluated()
    program = torch.export.export(memory, (inputs(), MASK), {"return_lookup": True}).module()
    for mask in MASKS[1:]:
        x = inputs(seed=3)
        x[mask] = float("inf")  # what padding holds changes nothing
        read, lookup = program(x, mask, return_lookup=True)
        right, right_lookup = memory(x, mask, return_lookup=True)
        assert_close(read, right)
        assert torch.equal(lookup.slots, right_lookup.slots)
        assert_close(lookup.weights, right_lookup.weights)


@pytest.mark.parametrize("check_trace", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_memory_gives_the_output_of_the_memory(kind, requires_grad, check_trace):
    memory = evaluated(**KINDS[kind]).requires_grad_(requires_grad)
    traced = torch.jit.trace(memory, inputs(), check_trace=check_trace)
    for n in (1, 6, 40):
        assert_close(traced(inputs(n, seed=n)), memory(inputs(n, seed=n)))


@pytest.mark.parametrize("given", MASKS[1:])
def test_a_traced_memory_takes_any_padding(given):
    memory = evaluated()
    traced = torch.jit.trace(memory, (inputs(), given), check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for mask in MASKS[1:]:
        assert_close(loaded(inputs(seed=3), mask), memory(inputs(seed=3), mask))


# --- compile ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_memory_is_one_graph_in_evaluation(kind, mask):
    memory = evaluated(**KINDS[kind])
    compiled = torch.compile(memory, backend="aot_eager", fullgraph=True)
    assert_close(compiled(inputs(seed=4), mask), memory(inputs(seed=4), mask))


def test_nan_at_padding_reaches_no_gradient_of_a_compiled_memory():
    memory, x = evaluated(), inputs()
    x[MASK] = float("nan")
    compiled = torch.compile(memory, backend="aot_eager")
    compiled(x, MASK).square().sum().backward()
    found = {name: p.grad for name, p in memory.named_parameters()}
    assert found and all(grad.isfinite().all() for grad in found.values())
    right = gradients(memory, x.nan_to_num(), MASK)
    for name, grad in found.items():
        assert_close(grad, right[name])


@pytest.mark.parametrize("values", ["table", "experts"])
@pytest.mark.parametrize(("mask", "factored"), [(None, False), (MASK, True)])
def test_a_compiled_memory_trains_as_the_memory(mask, factored, values):
    """With MemoryAdam the graph breaks where values are read: their gradient stays factored."""
    memory, other = memory_of(values=values), memory_of(values=values)
    factor(memory, factored)
    factor(other, factored)
    compiled = torch.compile(other, backend="eager" if factored else "aot_eager")
    right = gradients(memory, inputs(), mask)
    compiled(inputs(), mask).square().sum().backward()
    for table in tables_of(other):
        assert (type(table.weight.grad) is torch.Tensor) != factored
    assert_equal_gradients(gradients(other, inputs(), mask), right)
    found = {name: p.grad for name, p in other.named_parameters()}
    assert_close(found["keys"], right["keys"])


class Graphs:
    """A backend of ``torch.compile`` that counts graphs and keeps the names of operations."""

    def __init__(self):
        self.n, self.operations = 0, set()

    def __call__(self, graph, given):
        self.n += 1
        self.operations |= {str(node.target) for node in graph.graph.nodes}
        return make_boxed_func(graph.forward)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_memory_is_one_graph_of_registered_operations(kind, training):
    memory = evaluated(**KINDS[kind]).train(training)
    other, graphs, backward = copy.deepcopy(memory), Graphs(), Graphs()
    backend = aot_autograd(fw_compiler=graphs, bw_compiler=backward)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(training):
        for n in (6, 40):  # the second is compiled for any number of tokens
            right, found = memory(inputs(n)), compiled(inputs(n))
            assert_close(found, right)
    names = {"search", "gather_sum", *(["gather_dot"] if kind == "experts" else [])}
    assert graphs.n == 2
    assert {f"pkm_fairseq.{name}.default" for name in names} <= graphs.operations
    assert not {"aten.topk.default", "aten.embedding_bag.default"} & graphs.operations
    if training:
        found.square().sum().backward()
        right.square().sum().backward()
        gradients = [{n: p.grad for n, p in x.named_parameters()} for x in (other, memory)]
        assert_equal_gradients(*gradients)
        names = {"score_gradients", "table_gradient", "gather_dot"}
        assert {f"pkm_fairseq.{name}.default" for name in names} <= backward.operations


def test_compiled_code_runs_the_fast_backend(monkeypatch):
    pytest.importorskip("numba")
    memory, ran, run = evaluated().requires_grad_(False), [], kernels.run
    monkeypatch.setattr(kernels, "run", lambda x, *given: ran.append(given[0]) or run(x, *given))
    memory(inputs())
    torch.compile(memory, backend="aot_eager", fullgraph=True)(inputs())
    assert ran == ["topk_pairs", "gather_sum"] * 2


def test_a_factored_gradient_in_a_full_graph_is_refused_with_the_reason():
    memory = memory_of()
    factor(memory)
    reason = r"cannot hold the factored gradient of MemoryAdam: compile without fullgraph=True"
    with pytest.raises(Exception, match=reason):
        torch.compile(memory, backend="eager", fullgraph=True)(inputs())


def test_observers_in_a_full_graph_are_refused_with_the_reason():
    memory = evaluated()
    memory.observers.append(Seen())
    with pytest.raises(Exception, match=r"observers are shown look-ups outside of the graphs"):
        torch.compile(memory, backend="eager", fullgraph=True)(inputs())


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_are_compiled_as_torchs_own_operations(transform):
    memory, graphs = evaluated().requires_grad_(False), Graphs()
    batches = torch.randn(3, 6, WIDTH)
    call = torch.func.vmap(memory)
    if transform == "grad":
        call = torch.func.grad(lambda x: memory(x).square().sum())
    right = call(batches)
    assert_close(torch.compile(call, backend=aot_autograd(fw_compiler=graphs))(batches), right)
    assert not [name for name in graphs.operations if name.startswith("pkm_fairseq")]


def test_a_whole_step_is_compiled_with_the_optimizer():
    def step(memory, optimizer):
        optimizer.zero_grad()
        memory(inputs()).square().sum().backward()
        optimizer.step()

    memory, other = memory_of(query_norm="layer"), memory_of(query_norm="layer")
    for one, wrap in ((memory, lambda f: f), (other, lambda f: torch.compile(f, backend="eager"))):
        optimizer = MemoryAdam(memory_param_groups(one), eps=1e-3)  # noise of 1e-8 moves nothing
        wrap(step)(one, optimizer)
    assert_close(other.values.weight, memory.values.weight)
    assert_close(other.keys, memory.keys)
    assert (memory.values.weight != memory_of(query_norm="layer").values.weight).any()


class Seen:
    def __init__(self):
        self.slots = []

    def observe(self, seen):
        self.slots.append(seen.slots.clone())


def test_observers_are_shown_what_a_compiled_memory_looks_up_and_nothing_of_a_trace():
    memory, seen = evaluated(), Seen()
    _, right = memory(inputs(), MASK, return_lookup=True)
    memory.observers.append(seen)
    torch.compile(memory, backend="eager")(inputs(), MASK)
    assert len(seen.slots) == 1 and torch.equal(seen.slots[0], right.slots)
    torch.export.export(memory, (inputs(), MASK), strict=False)
    torch.jit.trace(memory, (inputs(), MASK), check_trace=False)
    torch.func.vmap(memory)(torch.randn(2, 6, WIDTH))
    assert len(seen.slots) == 1


# --- transforms ---------------------------------------------------------------------------------


def functional(memory):
    return lambda params, x: torch.func.functional_call(memory, params, (x,))


def detached(memory):
    return {name: p.detach() for name, p in memory.named_parameters()}


def test_vmap_is_a_loop():
    memory, batches = evaluated(), torch.randn(3, 6, WIDTH)
    assert_close(torch.func.vmap(memory)(batches), torch.stack([memory(x) for x in batches]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factored", [False, True])
def test_func_grad_is_the_gradient(kind, factored):
    memory = evaluated(**KINDS[kind])
    factor(memory, factored)
    call = functional(memory)
    found = torch.func.grad(lambda p: call(p, inputs()).square().sum())(detached(memory))
    right = gradients(memory, inputs())
    tolerance = {name: 0.01 if g.dtype == torch.bfloat16 else 1e-5 for name, g in right.items()}
    for name in right:
        assert torch.allclose(found[name], right[name], atol=tolerance[name])


def test_gradients_of_single_tokens_sum_to_that_of_all():
    memory = evaluated()
    call = functional(memory)
    of_token = torch.func.grad(lambda p, x: call(p, x[None]).square().sum())
    found = torch.func.vmap(of_token, in_dims=(None, 0))(detached(memory), inputs())
    right = gradients(memory, inputs())
    assert_equal_gradients({name: g.sum(0) for name, g in found.items()}, right)


def test_a_functional_call_leaves_its_gradient_with_its_own_parameters():
    memory = evaluated()
    factor(memory)
    given = {name: p.detach().clone().requires_grad_() for name, p in memory.named_parameters()}
    functional(memory)(given, inputs()).square().sum().backward()
    assert memory.values.weight.grad is None
    found = given["values.weight"].grad
    right = gradients(memory, inputs())["values.weight"]
    assert_close(found if type(found) is torch.Tensor else found.dense(), right)


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobians(vectorize):
    memory = evaluated()
    found = torch.autograd.functional.jacobian(memory, inputs(), vectorize=vectorize)
    assert_close(found, torch.func.jacrev(memory)(inputs()))
    assert found.abs().sum() > 0


def test_a_vectorised_backward_pass_to_a_factored_table_is_refused_in_one_line():
    memory = evaluated()
    factor(memory)
    y = memory(inputs())
    with pytest.raises(RuntimeError, match=r"^a vectorised [^\n]* values\.factored = False[^\n]*$"):
        torch.autograd.grad(
            y, [memory.values.weight], torch.ones(2, *y.shape), is_grads_batched=True
        )


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_gives_a_graph_of_the_memory(mode):
    memory = evaluated()
    state = {**detached(memory), **dict(memory.named_buffers())}
    graph = make_fx(functional(memory), tracing_mode=mode)(state, inputs())
    assert_close(graph(state, inputs(seed=5)), memory(inputs(seed=5)))


# --- no data, or more than data -----------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors_have_shapes(kind, mask):
    memory, x = memory_of(**KINDS[kind]).to("meta"), inputs().to("meta")
    memory.eval()
    mask = None if mask is None else mask.to("meta")
    read, lookup = memory(x, mask, return_lookup=True)
    assert read.is_meta and read.shape == x.shape and lookup.slots.shape == (6, 2, 3)
    read.sum().backward()
    assert all(table.weight.grad.shape == table.weight.shape for table in tables_of(memory))
    memory.train()(x).sum().backward()


def test_fake_tensors_have_shapes():
    with FakeTensorMode():
        memory, x = memory_of(), torch.randn(6, WIDTH)
        memory(x).sum().backward()
        assert memory.values.weight.grad.shape == memory.values.weight.shape
        assert memory.eval()(x, torch.zeros(6, dtype=torch.bool)).shape == x.shape


@pytest.mark.parametrize("how", ["meta", "fake", "subclass", "vmap"])
def test_a_gradient_of_no_numbers_is_refused_in_one_line(how):
    table, index = torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
    entries = Entries(index, torch.ones(4), index, torch.ones(2, 3))
    moments = torch.zeros(5, 3), torch.zeros(5, 3)

    def use(table, *others):
        moments, entries = others[:2], Entries(*others[2:])
        with pytest.raises(RuntimeError, match=r"^the gradient of a value table needs [^\n]*$"):
            adam_rows(table, *moments, entries, 0.1, (0.9, 0.99), 1e-8)
        with pytest.raises(RuntimeError, match=r"^the gradient of a value table needs [^\n]*$"):
            squared_norm(table, entries)
        return table

    given = (table, *moments, *entries)
    if how == "meta":
        use(*(x.to("meta") for x in given))
    elif how == "fake":
        mode = FakeTensorMode()
        use(*map(mode.from_tensor, given))
    elif how == "subclass":
        use(*(x.as_subclass(Subclass) for x in given))
    else:
        torch.func.vmap(lambda x: use(table, *moments, *entries) + x)(torch.zeros(2))
    assert not table.any()


def test_a_subclass_of_tensor_is_read_by_torch_and_the_log_says_so(caplog):
    memory = evaluated()
    right = memory(inputs())
    caplog.clear()  # the first look-up may have logged which kernels run
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = memory(inputs().as_subclass(Subclass))
    assert type(found) is Subclass
    assert_close(found.as_subclass(torch.Tensor), right)
    lines = [r.getMessage() for r in caplog.records]
    assert lines == ["memory kernels: torch, which is slower, because of tensors of type Subclass"]


def test_a_training_under_a_mode_is_that_without_it(caplog):
    memory, other = memory_of(query_norm="layer"), memory_of(query_norm="layer")
    for one, mode in ((memory, ExitStack()), (other, FlopCounterMode(display=False))):
        optimizer = MemoryAdam(memory_param_groups(one), eps=1e-3)
        with mode, caplog.at_level(logging.WARNING):
            one(inputs()).square().sum().backward()
            optimizer.step()
    assert mode.get_total_flops() > 0
    assert_close(other.values.weight, memory.values.weight)
    assert [r.getMessage() for r in caplog.records] == [
        "memory kernels: torch, which is slower, because a mode watches torch's operations"
    ]


def test_inference_is_followed_by_training():
    memory, other = memory_of(), memory_of()
    with torch.inference_mode():
        memory.eval()(inputs())
    assert_equal_gradients(gradients(memory.train(), inputs()), gradients(other, inputs()))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "saved"])
def test_a_copy_of_a_memory_that_has_been_used_reads_and_trains(how, tmp_path):
    memory = evaluated()
    torch.export.export(memory, (inputs(),))
    if how == "saved":
        torch.save(memory, tmp_path / "memory.pt")
        other = torch.load(tmp_path / "memory.pt", weights_only=False)
    else:
        other = how(memory)
    assert torch.equal(other(inputs()), memory(inputs()))
    assert_equal_gradients(gradients(other, inputs()), gradients(memory, inputs()))


def test_a_memory_of_quantised_linear_layers_reads_for_the_queries_they_make():
    memory = evaluated(v_dim=8, query="mlp")
    quantised = torch.ao.quantization.quantize_dynamic(memory, {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.query_proj.out, nn.Linear)
    read = quantised(inputs())
    slots, weights = quantised.search(inputs())
    right = (weights[..., None] * memory.values.weight[slots]).sum((1, 2))
    right = quantised.output_proj(right, inputs())
    assert_close(read, right)


def test_kernels_leave_torch_its_memory():
    """``Tensor.numpy`` would forbid to resize it, as FSDP does with parameters it has gathered."""
    memory, x = memory_of(), inputs().requires_grad_()
    factor(memory)
    y = memory(x)
    y.square().sum().backward()
    used = [x, y, memory.values.weight, memory.keys, *memory.values.weight.grad.entries()]
    assert all(t.untyped_storage().resizable() for t in used)


def test_memory_that_was_freed_is_an_error():
    memory = evaluated().requires_grad_(False)
    memory.values.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"the memory of a tensor of shape \(121, 12\) has been"):
        memory(inputs())


# --- FSDP ---------------------------------------------------------------------------------------


def model_with_memory():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), memory_of(query_norm="layer"))


def three_steps(model, optimizer, own=slice(None)):
    for step in range(3):
        optimizer.zero_grad()
        model(inputs(8, seed=step)[own]).square().mean().backward()
        optimizer.step()
    return model


def sgd(model, exchange=True):
    return torch.optim.SGD(model.parameters(), 0.1)


def adam(model, exchange=True):
    return MemoryAdam(memory_param_groups(model, 0.01, 0.1), eps=1e-3, exchange=exchange)


def sharded_training(rank):
    """How far parameters are from those of one worker, and what MemoryAdam says of the table."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = torch.distributed.get_world_size()
    mesh, differences = init_device_mesh("cpu", (world,)), {}
    own = slice(rank, None, world)
    for name, parts, optimizer in (("whole", (), sgd), ("parts", (1,), sgd), ("lazy", (), adam)):
        model, alone = model_with_memory(), model_with_memory()
        ignored = {model[1].values.weight} if optimizer is adam else set()
        for part in parts:
            fully_shard(model[part], mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=ignored)
        three_steps(model, optimizer(model), own)
        three_steps(alone, optimizer(alone, exchange=False))
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        whole = [(p if p in ignored else p.full_tensor(), q) for p, q in pairs]
        differences[name] = max(float((p - q).abs().max()) for p, q in whole)
    with pytest.raises(ValueError) as refusal:
        fully_shard(other := model_with_memory(), mesh=mesh)
        adam(other)
    return differences, str(refusal.value)


@pytest.mark.parametrize("world", [1, 2])
def test_fsdp_trains_as_one_worker(world, tmp_path):
    for differences, refusal in on_workers(world, tmp_path, sharded_training):
        assert max(differences.values()) < 1e-6
        assert "a value table is a DTensor, must be whole: tell FSDP" in refusal

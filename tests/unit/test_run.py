"""The state of a run, and who looks on at a memory."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pkm_fairseq.memory import MemoryUsage, ProductKeyMemory, ReadTimes, RunState
from pkm_fairseq.memory import memory as memory_module
from pkm_fairseq.memory.hosts import merge_read_times, set_finished_updates, with_memories
from pkm_fairseq.memory.observe.capture import InputCapture
from pkm_fairseq.memory.observe.readers import SlotReaders
from tests.helpers import SMALL, batch, build, small_dictionary

WIDTH = 6
MASK = torch.tensor([[False, False, True], [False, True, True]])
DICTIONARY = small_dictionary()


def memory_of(**settings):
    torch.manual_seed(0)
    return ProductKeyMemory(WIDTH, SMALL, **settings)


def inputs(*leading, seed=1):
    return torch.randn(*leading, WIDTH, generator=torch.Generator().manual_seed(seed))


class Spy:
    """Keeps what it is shown."""

    def __init__(self):
        self.seen = []

    def observe(self, seen):
        self.seen.append(seen)


def the_group():
    """As a host hands over the workers."""
    return "the group"


# --- the state of a run -----------------------------------------------------------------------


def test_a_state_knows_neither_training_nor_workers_at_first():
    run = RunState()
    assert (run.updates, run.is_dummy, run.group()) == (None, False, None)
    assert RunState(the_group).group() == "the group"


def test_a_dummy_batch_ends_with_its_context_and_an_error_in_it():
    run = RunState()
    with run.dummy_batch():
        assert run.is_dummy
        with run.dummy_batch(False):
            assert not run.is_dummy
        assert run.is_dummy
    with pytest.raises(RuntimeError), run.dummy_batch():
        raise RuntimeError
    assert not run.is_dummy


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_memories_of_a_copied_model_share_a_state_of_their_own(copied):
    run = RunState(the_group)
    model = torch.nn.ModuleList(ProductKeyMemory(WIDTH, SMALL, run=run) for _ in range(2))
    run.updates = 3
    twin = copied(model)
    states = [state for memory in twin for state in (memory.run, memory.query_norm.run)]
    assert all(state is states[0] for state in states)
    assert states[0] is not run
    assert (states[0].updates, states[0].group()) == (3, "the group")
    states[0].updates = 7
    assert run.updates == 3
    alone = copied(model[0])
    assert alone.run is alone.query_norm.run is not run


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_all_memories_of_a_fairseq_model_read_its_state(copied):
    model = build("resm_roberta_tiny", memory_layers=[0, 2])
    for one in (model, copied(model)):
        for layer in one.memory_layers().values():
            assert layer.memory.run is layer.memory.query_norm.run is one.run
            assert layer.memory.observers == [layer.reads]
    model.set_num_updates(5)
    assert model.run.updates == 5


def test_a_memory_without_a_state_makes_its_own():
    first, second = memory_of(), memory_of()
    assert first.run is first.query_norm.run is not second.run
    assert first.run.updates is None


def test_a_model_without_memories_is_none_with_memories():
    assert with_memories(build("roberta")) is None
    assert with_memories(build("pkm_roberta_tiny", memory_layers=[])) is None
    model = build("pkm_roberta_tiny")
    assert with_memories(model) is model

    class Wrapper:  # as fairseq wraps a model for data-parallel training
        def __getattr__(self, name):
            return getattr(model, name)

    assert with_memories(Wrapper()).run is model.run
    merge_read_times(model)  # one worker: nothing to do


def test_finished_updates_are_told_to_all_and_remembered_once():
    model = build("resm_roberta_tiny", memory_layers=[0, 2]).train()
    set_finished_updates(model, 4)
    model(batch(DICTIONARY, [7, 3]))
    for layer in model.memory_layers().values():
        assert layer.memory.run.updates == 4
        assert set(layer.reads.last_read.tolist()) == {0, 5}
        assert "updates" not in vars(layer.reads)


# --- observers --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, MASK])
def test_an_observer_is_shown_what_was_looked_up(mask):
    memory, spies, x = memory_of(), (Spy(), Spy()), inputs(2, 3)
    memory.observers.extend(spies)
    memory.run.updates = 2
    _, lookup = memory(x, mask, return_lookup=True)
    for spy in spies:
        (seen,) = spy.seen
        assert torch.equal(seen.x, x) and seen.padding_mask is mask
        assert torch.equal(seen.slots, lookup.slots) and seen.slots.dtype == torch.int64
        assert torch.equal(seen.weights, lookup.weights)
        assert not seen.weights.requires_grad and not seen.x.requires_grad
        assert seen.run is memory.run and seen.training
    memory.eval()(x, mask)
    assert not spies[0].seen[1].training


def test_without_observers_nothing_is_made_for_them(monkeypatch):
    made, original = [], memory_module.Observation
    monkeypatch.setattr(
        memory_module, "Observation", lambda *args: made.append(1) or original(*args)
    )
    memory = memory_of()
    assert memory.observers == []
    memory(inputs(2, 3), MASK)
    assert not made
    memory.observers.append(Spy())
    memory(inputs(2, 3), MASK)
    assert made  # the spy does see it


def test_slots_and_weights_are_shaped_only_for_who_asks(monkeypatch):
    """A layer of fairseq is observed at all times, also in evaluation, where nothing is noted."""
    shaped, original = [], memory_module.Observation._as_x

    def counting(self, rows, fill):
        shaped.append(fill)
        return original(self, rows, fill)

    monkeypatch.setattr(memory_module.Observation, "_as_x", counting)
    memory = memory_of()
    memory.observers.append(ReadTimes(SMALL.n_slots))
    memory.eval()(inputs(2, 3), MASK)
    assert not shaped
    memory.run.updates = 0
    memory.train()(inputs(2, 3), MASK)
    assert shaped == [-1]


def test_observing_changes_no_output_and_no_gradient():
    plain, observed = memory_of(), memory_of()
    observed.observers.extend([MemoryUsage(25, 2), ReadTimes(25), InputCapture()])
    observed.run.updates = 0
    reads = [memory(inputs(2, 3), MASK) for memory in (plain, observed)]
    assert torch.equal(*reads)
    for read in reads:
        read.square().sum().backward()
    for ours, theirs in zip(observed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_input_of_a_single_token_is_captured():
    memory, capture, x = memory_of(), InputCapture(), inputs(3)
    with memory.observed_by(capture):
        memory(x[0])
        memory(x)
    assert torch.equal(capture.inputs(), torch.cat([x[:1], x]))


def test_an_observer_looks_on_while_its_context_is_open():
    memory, usage = memory_of(), MemoryUsage(25, 2)
    with memory.observed_by(usage):
        memory(inputs(4))
        with memory.observed_by(usage):  # twice
            memory(inputs(4))
    assert usage.tokens == 12
    with pytest.raises(RuntimeError), memory.observed_by(usage):
        raise RuntimeError
    memory(inputs(4))
    assert usage.tokens == 12 and memory.observers == []


def test_an_observer_may_take_itself_off():
    class Once(Spy):
        def observe(self, seen):
            super().observe(seen)
            memory.observers.remove(self)

    memory, once, spy = memory_of(), Once(), Spy()
    memory.observers.extend([once, spy])
    for _ in range(3):
        memory(inputs(4))
    assert (len(once.seen), len(spy.seen)) == (1, 3)


def test_the_example_of_the_documentation_runs(capsys):
    text = (Path(__file__).parents[2] / "docs/usage.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    used, never = map(float, capsys.readouterr().out.split())
    assert 0 < used < 1 and 0 < never < 1


def test_two_counts_at_once_count_the_same():
    memory, usages = memory_of(), [MemoryUsage(25, 2), MemoryUsage(25, 2, max_tokens=2)]
    memory.observers.extend(usages)
    for _ in range(2):
        memory(inputs(2, 3), MASK)
    assert [usage.tokens for usage in usages] == [6, 2]


@pytest.mark.parametrize("training", [True, False])
def test_dummy_batches_are_not_shown_and_change_no_statistic(training):
    memory, spy = memory_of().train(training), Spy()
    memory.observers.append(spy)
    before = copy.deepcopy(memory.state_dict())
    with memory.run.dummy_batch():
        read, lookup = memory(inputs(5), return_lookup=True)
    assert not spy.seen and lookup.slots.shape == (5, 2, 3)
    assert all(torch.equal(t, before[name]) for name, t in memory.state_dict().items())
    assert torch.equal(memory(inputs(5)), read)  # and it is read as any other
    assert len(spy.seen) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_second_pass_of_activation_checkpointing_is_not_shown(use_reentrant, dtype):
    plain, twice = memory_of().to(dtype), memory_of().to(dtype)
    searches, usage, reads = [], MemoryUsage(25, 2), ReadTimes(25)
    twice.observers.extend([usage, reads])
    twice.run.updates = 0
    search = twice.search
    twice.search = lambda tokens: searches.append(1) or search(tokens)
    for seed in (1, 2):
        x = inputs(7, seed=seed).to(dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        plain(x).square().sum().backward()
        checkpoint(twice, y, use_reentrant=use_reentrant).square().sum().backward()
        assert torch.equal(x.grad, y.grad)
    assert len(searches) == 4 and usage.tokens == 14
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[name]), name
    for ours, theirs in zip(twice.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_copy_of_a_memory_has_observers_of_its_own():
    memory, usage = memory_of(), MemoryUsage(25, 2)
    memory.observers.append(usage)
    twin = copy.deepcopy(memory)
    twin(inputs(4))
    assert usage.tokens == 0
    (own,) = twin.observers
    assert own.tokens == 4
    memory(inputs(3))
    assert (usage.tokens, own.tokens) == (3, 4)


def test_a_copy_of_a_model_records_reads_of_its_own():
    model = build("resm_roberta_tiny", memory_layers=[0, 2]).train()
    model.set_num_updates(0)
    with model.record_memory_usage() as usage:
        twin = copy.deepcopy(model)
        twin(batch(DICTIONARY, [7, 3]))
        assert {counts.tokens for counts in usage.values()} == {0}
    assert not any(layer.reads.last_read.any() for layer in model.memory_layers().values())
    assert all(layer.reads.last_read.any() for layer in twin.memory_layers().values())


# --- what is kept owns its memory -------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("training", [True, False])
def test_a_lookup_that_is_handed_out_is_the_callers_own(training, mask):
    memory, twin = memory_of().train(training), memory_of().train(training)
    read, lookup = memory(inputs(2, 3), mask, return_lookup=True)
    lookup.slots.zero_()
    lookup.weights.fill_(7)
    read.square().sum().backward()  # autograd's own tensors are untouched
    twin(inputs(2, 3), mask).square().sum().backward()
    for ours, theirs in zip(memory.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("mask", [None, MASK])
def test_captured_inputs_outlive_the_buffer_they_came_in(mask):
    memory, capture, buffer = memory_of(), InputCapture(), inputs(2, 3)
    memory.observers.append(capture)
    expected = []
    for seed in (1, 2):
        buffer.copy_(inputs(2, 3, seed=seed))  # one buffer for all batches
        memory(buffer, mask)
        expected.append(inputs(2, 3, seed=seed)[slice(None) if mask is None else ~mask])
    buffer.zero_()
    captured = capture.inputs()
    assert torch.equal(captured, torch.cat([x.reshape(-1, WIDTH) for x in expected]))
    assert capture.n_tokens == len(captured)
    again = capture.inputs()
    captured.zero_()
    assert again.any()


def test_captured_inputs_of_one_batch_are_the_callers_own():
    memory, capture = memory_of(), InputCapture()
    with pytest.raises(ValueError, match="was not read"):
        capture.inputs()
    with memory.observed_by(capture):
        memory(inputs(4))
    capture.inputs().zero_()
    assert torch.equal(capture.inputs(), inputs(4))


def test_counts_and_times_outlive_the_look_up():
    slots = torch.tensor([[[3, 0]], [[3, 1]]])
    weights = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]])
    usage, reads = MemoryUsage(4, 1), ReadTimes(4)
    watched, tokens = torch.tensor([0, 3]), torch.tensor([[5, 4]])
    readers = SlotReaders(watched, 4, 6)
    usage.update(slots, weights)
    reads.record(slots, 1)
    readers.begin(tokens)
    tokens.zero_()  # the batch's buffer is filled anew before the memory reads
    readers.update(slots[:, None], weights[:, None])
    for given in (slots, weights, watched):
        given.zero_()
    assert usage.read_count.tolist() == [[1, 1, 0, 2]]
    assert usage.read_mass.tolist() == [[0.25, 0.5, 0, 1.25]]
    assert reads.last_read.tolist() == [1, 1, 0, 1]
    assert readers.slots.tolist() == [0, 3]
    assert readers.reads.tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]]
    twin = MemoryUsage(4, 1).merge(usage)
    usage.to(torch.device("cpu")).read_count.zero_()
    assert twin.read_count.tolist() == [[1, 1, 0, 2]]

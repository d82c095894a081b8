"""Times of reads, and what they and the movement of values say."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pkm_fairseq.memory import Observation, ReadTimes, RunState
from pkm_fairseq.memory.observe.staleness import OUTDATED_AFTER, QUANTILES, movement, summarise
from tests.helpers import batch, build, small_dictionary

DICTIONARY = small_dictionary()


def reads_of(*updates, n_slots=6):
    """Times after look-ups, each (slots (N, H, K), padding or None), in updates from 1."""
    reads = ReadTimes(n_slots)
    for update, slots in enumerate(updates, 1):
        reads.record(torch.tensor(slots), update)
    return reads


def test_the_update_of_the_last_read_and_of_the_last_first_choice_is_kept():
    reads = reads_of([[[0, 1], [2, 3]]], [[[1, 0], [1, 4]]], [[[3, 1], [3, 1]]])
    assert reads.last_read.tolist() == [2, 3, 1, 3, 2, 0]
    assert reads.last_top1.tolist() == [1, 2, 1, 3, 0, 0]


def test_times_of_a_model_that_was_built_without_memory_can_be_placed():
    with torch.device("meta"):
        reads = ReadTimes(4).half()
    placed = reads.to_empty(device="cpu")
    assert placed.last_read.device.type == "cpu" and placed.origin.dtype == torch.float32


def test_padding_is_no_read():
    reads = ReadTimes(4)
    slots = torch.tensor([[[0, 1]], [[-1, -1]]])
    reads.record(slots, 1, torch.tensor([False, True]))
    assert reads.last_read.tolist() == [1, 1, 0, 0]


def seen(training, updates):
    """A look-up of one token, by a memory of one head."""
    run, slots = RunState(), torch.tensor([[[0, 1]]])
    run.updates = updates
    return Observation(torch.zeros(1, 3), None, slots, torch.ones(1, 1, 2) / 2, training, run)


def test_outside_a_training_nothing_is_recorded():
    reads = ReadTimes(4)
    for training, updates in ((True, None), (False, 3), (False, None)):
        reads.observe(seen(training, updates))
    assert not reads.last_read.any()
    reads.observe(seen(True, 3))
    assert reads.last_read.tolist() == [4, 4, 0, 0]


def test_times_of_another_training_are_forgotten_and_those_of_this_one_kept():
    reads = reads_of([[[0, 1]]], [[[2, 3]]], [[[4, 5]]])
    resumed, fresh = ReadTimes(6), ReadTimes(6)
    for copied, finished in ((resumed, 3), (fresh, 0)):
        copied.load_state_dict(reads.state_dict())
        copied.forget_after(finished)
    assert resumed.last_read.tolist() == [1, 1, 2, 2, 3, 3]
    assert not fresh.last_read.any()
    assert not fresh.last_top1.any()
    back = copy.deepcopy(resumed)
    back.forget_after(1)  # the same process, but an earlier checkpoint
    assert back.last_read.tolist() == [1, 1, 0, 0, 0, 0]


def test_half_precision_of_a_model_does_not_reach_the_times():
    reads = ReadTimes(3)
    reads.record(torch.tensor([[[0, 1]]]), 100_000)  # float16 ends at 65,504
    for cast in (reads.half(), reads.bfloat16(), reads.double()):
        assert cast.last_read.dtype == torch.float32
        assert cast.last_read.tolist() == [100_000, 100_000, 0]


@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=60), st.integers(0, 20_000))
def test_summary_equals_its_definitions_in_plain_python(times, later):
    updates = max(times) + later
    said = summarise(torch.tensor(times, dtype=torch.float32), updates)
    since = sorted(updates - time for time in times)
    assert said["never"] == pytest.approx(times.count(0) / len(times))
    for x in OUTDATED_AFTER:
        share = sum(age > x for age in since) / len(since)
        assert said["outdated"][str(x)] == pytest.approx(share)
    for q in QUANTILES:
        value = said[f"p{q}"]
        assert value in since
        assert sum(age <= value for age in since) >= q / 100 * len(since)
        assert sum(age < value for age in since) < q / 100 * len(since)


def test_outdated_by_more_than_is_not_outdated_by():
    last = torch.tensor([0.0, 90.0, 89.0, 100.0])
    said = summarise(last, 100)
    assert said["outdated"]["10"] == 2 / 4  # by 100 and 11, not by 10
    assert said["outdated"]["100"] == 0
    assert said["never"] == 1 / 4


def test_movement_of_values_by_hand():
    initial = torch.zeros(4, 2)
    values = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    said = movement([(values, initial)])
    assert said["unmoved"] == 0.5
    assert (said["p10"], said["p50"], said["p90"], said["max"]) == (0, 0, 5, 5)


def test_movement_of_a_large_table_is_that_of_its_parts():
    values, initial = torch.randn(20_000, 3), torch.randn(20_000, 3)  # more than one block
    distances = (values - initial).norm(dim=1)
    assert movement([(values, initial)])["max"] == pytest.approx(float(distances.max()))
    values[19_999] += 1000
    assert movement([(values, initial)])["max"] > 1000


def test_values_of_another_shape_are_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(3, 2\)"):
        movement([(torch.zeros(4, 2), torch.zeros(3, 2))])


def test_movement_of_a_slot_with_rows_in_two_tables_is_that_of_both():
    initial, values = torch.zeros(4, 2), torch.zeros(4, 2)
    values[1, 0], other = 3.0, torch.zeros(4, 1)
    other[1], other[2] = 4.0, 2.0
    said = movement([(values, initial), (other, torch.zeros(4, 1))])
    assert (said["unmoved"], said["max"], said["p50"], said["p90"]) == (0.5, 5, 0, 5)


# --- in a model -----------------------------------------------------------------------------


def model_of(arch="resm_roberta_tiny", **options):
    return build(arch, DICTIONARY, memory_layers=[0, 2], **options)


def test_usage_of_the_last_updates_is_what_a_count_of_them_finds():
    model = model_of(memory_n_keys=30).train()
    updates = 130
    samples = [batch(DICTIONARY, [5, 2], seed=seed) for seed in range(updates)]
    windows, counts = (10, 100), {}
    for window in windows:
        counts[window] = model.new_memory_usage()
    for finished, tokens in enumerate(samples):
        model.set_num_updates(finished)
        with contextlib.ExitStack() as stack:
            for window in windows:
                if finished >= updates - window:
                    stack.enter_context(model.record_memory_usage(counts[window]))
            model(tokens)
    for index, layer in model.memory_layers().items():
        said = layer.reads.summary(updates)
        assert set(said["top1"]["used"]) == {"10", "100"}  # there were no 1000 updates
        for window in windows:
            counted = counts[window][index].summary()
            assert said["top1"]["used"][str(window)] == counted["top1_usage"]
            assert said["read"]["used"][str(window)] == counted["topk_usage"]
            if window == 10:
                assert 0 < counted["top1_usage"] < 1


def test_training_by_fairseq_records_what_each_layer_reads():
    model = model_of().train()
    tokens = batch(DICTIONARY, [7, 3, 5])
    for finished in (0, 1):
        model.set_num_updates(finished)
        with model.record_memory_usage() as usage:
            model(tokens)
        for index, layer in model.memory_layers().items():
            read = usage[index].read_count.sum(0) > 0
            top1 = usage[index].top1_count.sum(0) > 0
            assert torch.equal(layer.reads.last_read == finished + 1, read)
            assert torch.equal(layer.reads.last_top1 == finished + 1, top1)
    first, second = (layer.reads.last_read for layer in model.memory_layers().values())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("is_told", [True, False])
def test_evaluation_records_nothing(is_told):
    model = model_of()
    if is_told:
        model.set_num_updates(3)
    model.train(not is_told)  # told but evaluating; training but by nobody who counts
    model(batch(DICTIONARY, [7, 3, 5]))
    assert not any(layer.reads.last_read.any() for layer in model.memory_layers().values())


def test_recording_changes_no_output():
    model = model_of().train()
    tokens = batch(DICTIONARY, [7, 3, 5])
    without, _ = model(tokens)
    model.set_num_updates(0)
    assert torch.equal(model(tokens)[0], without)


def test_an_earlier_checkpoint_makes_a_model_forget_what_came_after():
    model = model_of().train()
    tokens = batch(DICTIONARY, [7, 3, 5])
    for finished in (0, 4):
        model.set_num_updates(finished)
        model(tokens)
    reads = [layer.reads for layer in model.memory_layers().values()]
    assert {float(x.last_read.max()) for x in reads} == {5}
    model.set_num_updates(5)  # goes on
    assert {float(x.last_read.max()) for x in reads} == {5}
    model.set_num_updates(2)
    assert {float(x.last_read.max()) for x in reads} <= {0, 1}


@pytest.mark.parametrize("arch", ["pkm_roberta_tiny", "resm_roberta_tiny"])
def test_a_checkpoint_of_a_version_without_times_loads(arch):
    model = model_of(arch)
    older = {n: t for n, t in model.state_dict().items() if ".reads." not in n}
    assert len(older) < len(model.state_dict())
    model.load_state_dict(older, strict=True)


def test_a_moving_average_of_times_is_known_to_be_one():
    reads, average = ReadTimes(4), ReadTimes(4)
    for times in (reads, average):
        times.record(torch.tensor([[[0, 3]]]), 3)
    assert not reads.is_averaged
    reads.record(torch.tensor([[[0, 1]]]), 5)
    average.last_read.mul_(0.9).add_(reads.last_read, alpha=0.1)
    assert average.is_averaged and not reads.is_averaged

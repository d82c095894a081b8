"""The simulation of many workers: against loops over pairs of workers, and in its limits."""

import json
import math
import sys

import pytest

from pkm_fairseq.experiments.benchmark.cluster import (
    Cluster,
    Device,
    Training,
    held_bytes,
    measure,
    simulate,
)
from pkm_fairseq.experiments.benchmark.exchange import Table, even_tokens, plan_bytes
from tests.validation.models import SCRIPTS, load_script

TABLE = Table(n_slots=4096, v_dim=64, reads=16)
FORMS = ("factors", "dense", "owned")
FOREVER = math.inf  # bytes/s of what costs no time
F = 8 * 16 + 4 * 64 + 4  # bytes of a token's factors
DENSE = 4 * 4096 * 64


def cluster(workers, per_node=4, intra=FOREVER, inter=FOREVER, latency=0.0):
    return Cluster(workers, per_node, intra, inter, latency)


def device(read=FOREVER, update=FOREVER, stream=FOREVER):
    return Device(read, update, stream)


def training(tokens=32, layers=1, passes=1, base=1.0, rest=0.0, query=0.0):
    return Training(TABLE, layers, tokens, passes, base, rest, query)


def into_a_node(workers, per_node, bytes_each):
    """Bytes that reach the workers of the first node from outside, each once, pair by pair."""
    inside = range(per_node)
    return sum(bytes_each for other in range(workers) if other not in inside)


@pytest.mark.parametrize(("workers", "per_node"), [(4, 4), (8, 4), (64, 4), (6, 1)])
def test_factors_take_what_enters_a_node_or_a_worker(workers, per_node):
    tokens, speed = 32, 1e6
    slow_links = simulate(cluster(workers, per_node, inter=speed), device(), training(), "factors")
    entering = into_a_node(workers, per_node, tokens * F) / per_node / speed
    assert slow_links["between"] == pytest.approx(entering)
    slow_nodes = simulate(cluster(workers, per_node, intra=speed), device(), training(), "factors")
    within = 0 if per_node == 1 else (workers - 1) * tokens * F / speed
    assert slow_nodes["between"] == pytest.approx(within)


@pytest.mark.parametrize("form", ["dense", "owned"])
def test_dense_gradients_take_a_rings_bytes_whatever_the_tokens(form):
    for tokens in (1, 1000):
        found = simulate(cluster(4, intra=1e6), device(), training(tokens), form)
        assert found["between"] == pytest.approx(2 * 3 / 4 * DENSE / 1e6)
        found = simulate(cluster(8, 1, inter=1e6), device(), training(tokens), form)
        assert found["between"] == pytest.approx(2 * 7 / 8 * DENSE / 1e6)


@pytest.mark.parametrize(("factor", "better"), [(0.9, "factors"), (1.1, "dense")])
def test_by_links_alone_the_break_even_point_is_that_of_the_bytes(factor, better):
    tokens = factor * even_tokens(TABLE) / 8
    totals = {
        form: simulate(cluster(8, 1, inter=1e6), device(), training(tokens), form)["total"]
        for form in ("factors", "dense")
    }
    assert min(totals, key=totals.__getitem__) == better


def test_kernels_take_the_bytes_that_they_move():
    tokens = 32
    read = simulate(cluster(4), device(read=1e6), training(tokens), "dense")
    rows = 4 * tokens * 16 * 64
    assert read["read"] == pytest.approx(2 * rows / 1e6)
    assert read["update"] == pytest.approx(rows / 1e6)  # the own tokens
    read = simulate(cluster(4), device(read=1e6), training(tokens), "factors")
    assert read["update"] == pytest.approx(4 * rows / 1e6)  # everybody's
    hit = 4096 * (1 - math.exp(-4 * tokens * 16 / 4096))  # distinct rows of uniform reads
    for form, share in (("factors", 1), ("dense", 1), ("owned", 1 / 4)):
        found = simulate(cluster(4), device(update=1e6), training(tokens), form)
        assert found["update"] == pytest.approx(7 * 4 * 64 * hit * share / 1e6), form


def test_shards_take_what_a_group_receives_and_an_nth_of_the_update():
    tokens, shards, speed = 32, 4, 1e6
    found = simulate(cluster(16, intra=speed), device(), training(tokens), "dense", shards)
    received = plan_bytes(TABLE, tokens, 16, shards)["group"] - 8 * (shards - 1)  # their numbers
    assert found["group"] == pytest.approx(received / speed)
    assert found["between"] == 0  # the groups are the nodes
    found = simulate(cluster(16, inter=speed), device(), training(tokens), "dense", shards)
    assert found["group"] == 0
    assert found["between"] == pytest.approx(2 * 3 / 4 * DENSE / shards / speed)
    one, split = (
        simulate(cluster(16), device(update=1e6), training(10**6), "dense", n)["update"]
        for n in (1, shards)
    )
    assert split == pytest.approx(one / shards, rel=1e-6)
    slow = device(1e6, 1e6, 1e6)
    whole = [simulate(cluster(4), slow, training(), x, 4)["total"] for x in FORMS]
    assert len(set(whole)) == 1  # one group exchanges nothing


def test_accumulation_adds_steps_and_layers_add_up():
    waits = cluster(4, latency=1.0)
    once, twice = (
        simulate(waits, device(), training(passes=n), "factors", 4)["group"] for n in (1, 2)
    )
    assert (once, twice) == (6 * 2, 2 * 6 * 2)  # six collectives of log2(4) steps
    one = simulate(waits, device(1e6, 1e6, 1e6), training(query=0.1), "dense")
    two = simulate(waits, device(1e6, 1e6, 1e6), training(query=0.1, layers=2), "dense")
    of_memories = [x["total"] - x["base"] - x["rest"] for x in (one, two)]
    assert of_memories[1] == pytest.approx(2 * of_memories[0])
    assert one["total"] == pytest.approx(sum(x for name, x in one.items() if name != "total"))


def test_the_backward_pass_hides_the_other_gradients():
    for rest, exposed in ((4e5, 0.0), (1e6, 1.5 - 2 / 3)):
        found = simulate(cluster(4, intra=1e6), device(), training(rest=rest), "plain")
        assert found["rest"] == pytest.approx(exposed)
        assert found["total"] == pytest.approx(1 + exposed)


@pytest.mark.parametrize("shards", [1, 4])
def test_workers_hold_what_the_plan_says_and_owners_a_part_of_the_moments(shards):
    held = held_bytes(cluster(16), TABLE, "dense", shards)
    assert held == plan_bytes(TABLE, 1, 16, shards)["held"] == 3 * DENSE / shards
    assert held_bytes(cluster(16), TABLE, "owned", shards) == DENSE / shards + 2 * DENSE / 16


@pytest.mark.parametrize(
    ("workers", "per_node", "shards"), [(6, 4, 1), (8, 4, 3), (12, 4, 6), (8, 4, 0)]
)
def test_groups_that_do_not_fit_are_refused(workers, per_node, shards):
    with pytest.raises(ValueError, match="must"):
        simulate(cluster(workers, per_node), device(), training(), "dense", shards)


def test_a_table_whose_columns_cannot_be_divided_is_refused():
    said = "^shards is 3, must divide the width of a value, 64$"
    for form in FORMS:
        with pytest.raises(ValueError, match=said):
            simulate(cluster(6, 3), device(), training(), form, 3)
        with pytest.raises(ValueError, match=said):
            held_bytes(cluster(6, 3), TABLE, form, 3)


def test_this_machine_has_speeds():
    assert all(1e6 < speed < 1e13 for speed in measure(TABLE, tokens=64, repeats=2))


# --- the script ---------------------------------------------------------------------------------


def test_the_report_replaces_an_older_one_as_a_whole(tmp_path, monkeypatch, capsys):
    file, older = tmp_path / "found.json", tmp_path / "older.json"
    file.write_text("older")
    older.hardlink_to(file)  # a file that is written in place changes here, too
    options = ["--workers", "4", "--tokens", "64", "--n-keys", "32", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["simulate_cluster.py", *options])
    load_script(SCRIPTS / "simulate_cluster.py").main()
    assert json.loads(file.read_text())["updates"]
    assert older.read_text() == "older"
    assert {path.name for path in tmp_path.iterdir()} == {"found.json", "older.json"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "simulate_cluster.py --v-dim 4 --workers 8 --shards 8",
            "shards is 8, must divide the width of a value, 4",
        ),
        (
            "simulate_cluster.py --workers 8 64 --shards 3 5",
            "--shards is 3, 5, must divide a number of --workers, 8, 64",
        ),
        (
            "measure_exchange.py --plan --v-dim 4 --workers 8 --shards 1 8",
            "shards is 8, must divide the width of a value, 4",
        ),
        (
            "measure_exchange.py --plan --workers 8 --shards 3",
            "--shards is 3, must divide a number of --workers, 8",
        ),
        (
            "measure_exchange.py --v-dim 6 --workers 2 4",
            "shards is 4, must divide the width of a value, 6",
        ),
    ],
)
def test_shards_that_do_not_fit_are_refused_before_a_table_is_printed(
    command, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_script(SCRIPTS / sys.argv[0]).main()
    assert not capsys.readouterr().out

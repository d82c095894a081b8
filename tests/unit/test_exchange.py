"""The formula for what workers exchange, and that it is what they exchange."""

import pytest

from pkm_fairseq.experiments.benchmark.exchange import (
    Table,
    even_tokens,
    measure,
    plan_bytes,
    received_bytes,
)

TABLE = Table(n_slots=64, v_dim=8, reads=6)


@pytest.mark.parametrize(
    "way,expected",
    [
        ("factors", 50 * (6 * 8 + 8 * 4 + 4) + 24),
        ("dense", 64 * 8 * 4 + 24),
        ("shards", 50 * (6 * 12 + 2 * 8 * 4 / 2) + 8),
    ],
)
def test_workers_exchange_what_the_formula_says(way, expected):
    found = measure(TABLE, tokens=50, workers=2, way=way)
    formula = received_bytes(TABLE, tokens=50, workers=2)[way]
    assert formula == expected
    # to the one other worker; columns and gradients of weights also to itself, which is not sent
    assert found["sent"] - formula == (50 * (2 * 8 * 4 / 2 + 6 * 4) if way == "shards" else 0)
    assert found["received"] == 0 or found["received"] >= formula  # 0: no such device


def test_a_plan_adds_what_groups_exchange_to_what_is_exchanged_within():
    plan = plan_bytes(TABLE, tokens=10, workers=8, shards=2)
    assert plan["held"] == 3 * 64 * (8 / 2) * 4
    assert plan["group"] == 10 * (6 * 12 + 8 * 4) + 8
    assert plan["factors"] == 3 * (20 * (6 * 8 + 4 * 4 + 4) + 24)
    assert plan["dense"] == 2 * 3 / 4 * 64 * 4 * 4 + 3 * 24
    alone = plan_bytes(TABLE, tokens=10, workers=8, shards=1)
    assert alone["group"] == 0
    assert alone["factors"] == received_bytes(TABLE, tokens=10, workers=8)["factors"]


@pytest.mark.parametrize("workers", [2, 7])
def test_from_the_even_point_on_a_dense_all_reduce_sends_fewer_bytes(workers):
    even = even_tokens(TABLE) / workers
    more, less = (received_bytes(TABLE, even * factor, workers) for factor in (1.5, 0.5))
    assert more["factors"] > more["dense"] and less["factors"] < less["dense"]
    assert more["dense"] == 2 * (workers - 1) / workers * 64 * 8 * 4 + (workers - 1) * 24


def test_a_table_whose_columns_cannot_be_divided_is_refused():
    said = "^shards is 3, must divide the width of a value, 8$"
    with pytest.raises(ValueError, match=said):
        plan_bytes(TABLE, tokens=10, workers=6, shards=3)
    with pytest.raises(ValueError, match=said):
        measure(TABLE, tokens=10, workers=3, way="shards")

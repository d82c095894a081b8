"""The formula for what workers exchange, and that it is what they exchange."""

import pytest

from pkm_fairseq.benchmark.exchange import Table, even_tokens, measure, received_bytes

TABLE = Table(n_slots=64, v_dim=8, reads=6)


def test_workers_exchange_what_the_formula_says():
    found = measure(TABLE, tokens=50, workers=2, dense=False)
    formula = received_bytes(TABLE, tokens=50, workers=2)["factors"]
    assert formula == 50 * (6 * 8 + 8 * 4 + 4) + 16
    assert found["sent"] == formula  # to the one other worker
    assert found["received"] == 0 or found["received"] >= formula  # 0: no such device


@pytest.mark.parametrize("workers", [2, 7])
def test_from_the_even_point_on_a_dense_all_reduce_sends_fewer_bytes(workers):
    even = even_tokens(TABLE) / workers
    more, less = (received_bytes(TABLE, even * factor, workers) for factor in (1.5, 0.5))
    assert more["factors"] > more["dense"] and less["factors"] < less["dense"]
    assert more["dense"] == 2 * (workers - 1) / workers * 64 * 8 * 4

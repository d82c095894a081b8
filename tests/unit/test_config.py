"""MemoryConfig: defaults, derived sizes, and every check with its message."""

from dataclasses import FrozenInstanceError, fields

import pytest

from pkm_fairseq.memory import MemoryConfig
from pkm_fairseq.memory.config import QUERY_NORMS, VALUE_DTYPES, VALUES_INITS

# (settings, what the message must name)
IMPOSSIBLE = [
    ({"n_keys": 1}, ["n_keys", "1", "at least 2"]),
    ({"n_keys": 0}, ["n_keys", "0", "at least 2"]),
    ({"n_keys": -3}, ["n_keys", "-3", "at least 2"]),
    ({"n_keys": 2.5}, ["n_keys", "2.5", "integer"]),
    ({"n_keys": "64"}, ["n_keys", "'64'", "integer"]),
    ({"n_keys": None}, ["n_keys", "None", "integer"]),
    ({"heads": True}, ["heads", "True", "integer"]),
    ({"heads": 0}, ["heads", "0", "at least 1"]),
    ({"heads": 1.0}, ["heads", "1.0", "integer"]),
    ({"knn": 0}, ["knn", "0", "at least"]),
    ({"knn": 1}, ["knn", "1", "at least 2", "softmax over one score"]),
    ({"knn": 9, "n_keys": 8}, ["knn", "9", "at most", "8"]),
    ({"knn": 2.0}, ["knn", "2.0", "integer"]),
    ({"k_dim": 0}, ["k_dim", "0", "at least 2"]),
    ({"k_dim": 7}, ["k_dim", "7", "even"]),
    ({"k_dim": "8"}, ["k_dim", "'8'", "integer"]),
    ({"v_dim": 0}, ["v_dim", "0", "at least 1"]),
    ({"v_dim": 3.5}, ["v_dim", "3.5", "integer"]),
    ({"query": "deep"}, ["query", "'deep'", "linear, mlp"]),
    ({"values": "rows"}, ["values", "'rows'", "table, experts"]),
    ({"output": "glu"}, ["output", "'glu'", "linear, swilu"]),
    ({"score_activation": "tanh"}, ["score_activation", "'tanh'", "softmax, relu"]),
    *[
        ({"score_scale": x}, ["score_scale", repr(x), "above 0"])
        for x in (0, -1.0, float("inf"), "1")
    ],
    ({"learn_score_scale": 1}, ["learn_score_scale", "1", "True or False"]),
    ({"query_norm": "bacth"}, ["query_norm", "'bacth'", *QUERY_NORMS]),
    ({"query_norm": None}, ["query_norm", "None", *QUERY_NORMS]),
    ({"values_init": "ones"}, ["values_init", "'ones'", *VALUES_INITS]),
    ({"value_dtype": "float16"}, ["value_dtype", "'float16'", *VALUE_DTYPES]),
    *[
        ({name: value}, [name, repr(value), "[0, 1)"])
        for name in ("input_dropout", "query_dropout", "read_dropout", "key_dropout")
        for value in (-0.1, 1.0, 1.5, float("nan"), "0.1", None, True)
    ],
    ({"n_keys": 10, "knn": 6, "key_dropout": 0.5}, ["key_dropout", "0.5", "5 of 10", "knn", "6"]),
    ({"share_values": 1}, ["share_values", "1", "True or False"]),
    ({"share_values": "false"}, ["share_values", "'false'", "True or False"]),
]


@pytest.mark.parametrize(("settings", "named"), IMPOSSIBLE)
def test_impossible_value_is_an_error_that_names_it_and_what_is_allowed(settings, named):
    with pytest.raises(ValueError) as error:
        MemoryConfig(**settings)
    message = str(error.value)
    assert "\n" not in message
    for words in named:
        assert words in message


def test_every_field_has_a_check():
    checked = {name for settings, _ in IMPOSSIBLE for name in settings}
    assert checked == {f.name for f in fields(MemoryConfig)}


def test_defaults_are_those_of_the_papers():
    config = MemoryConfig()
    assert (config.n_keys, config.heads, config.knn, config.k_dim) == (512, 4, 32, 256)
    assert config.v_dim is None
    assert (config.query_norm, config.values_init) == ("batch", "normal")
    assert config.value_dtype == "float32"
    assert (config.input_dropout, config.query_dropout, config.read_dropout) == (0, 0, 0)
    assert (config.key_dropout, config.n_kept_keys) == (0, 512)
    assert config.share_values is False


@pytest.mark.parametrize(
    "settings",
    [
        {"n_keys": 2, "knn": 2, "heads": 1, "k_dim": 2, "v_dim": 1},
        {"n_keys": 8, "knn": 8},
        {"input_dropout": 0, "query_dropout": 0.999, "read_dropout": 0.5},
        *[{"query_norm": norm} for norm in QUERY_NORMS],
        *[{"values_init": init} for init in VALUES_INITS],
        *[{"value_dtype": dtype} for dtype in VALUE_DTYPES],
        {"share_values": True},
    ],
)
def test_values_at_the_edge_of_the_allowed_are_taken(settings):
    config = MemoryConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_places_are_those_of_the_first_release():
    names = "n_keys heads knn k_dim v_dim query_norm values_init value_dtype input_dropout "
    names += "query_dropout read_dropout key_dropout share_values"
    assert [f.name for f in fields(MemoryConfig)][:13] == names.split()


def test_derived_sizes():
    config = MemoryConfig(n_keys=7, knn=3, k_dim=10)
    assert (config.n_slots, config.half_dim) == (49, 5)


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        MemoryConfig().knn = 4

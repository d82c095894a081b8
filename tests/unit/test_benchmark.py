"""The benchmark: both sides compute the same, are timed fairly, and are reported as they were."""

import itertools
import json
import subprocess
import sys
import types
from collections import Counter
from functools import partial
from statistics import median

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY

from pkm_fairseq.experiments.benchmark import (
    child,
    counting,
    layer,
    machine,
    models,
    narrow,
    output,
    parts,
    peak,
    saving,
    subjects,
    textbook,
)
from pkm_fairseq.experiments.benchmark import run as benchmark_run
from pkm_fairseq.experiments.benchmark.settings import Settings
from pkm_fairseq.experiments.benchmark.textbook import (
    MismatchError,
    TextbookMemory,
    check_same_read,
)
from pkm_fairseq.experiments.benchmark.timing import (
    balanced_orders,
    compare,
    interleave,
    quartiles,
)
from pkm_fairseq.memory import MemoryConfig, MemoryUsage, ProductKeyMemory
from pkm_fairseq.memory.kernels import Float8Table
from pkm_fairseq.memory.observe.staleness import ReadTimes
from tests.validation.models import SCRIPTS, load_script

WIDTH = 12
CONFIG = MemoryConfig(n_keys=6, heads=2, knn=4, k_dim=8)


def memory_of(config=CONFIG, dtype=torch.float64):
    return ProductKeyMemory(WIDTH, config).to(dtype)


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch):
    monkeypatch.setattr(machine, "COPIED", 1 << 20)


# --- the textbook memory ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_textbook_computes_what_the_memory_computes(training):
    memory = memory_of().train(training)
    copy = TextbookMemory(memory).train(training)
    x, grad = torch.randn(2, 40, WIDTH, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ours, theirs = memory(inputs[0]), copy(inputs[1])
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    ours.backward(grad)
    theirs.backward(grad)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-12)
    expected = dict(memory.named_parameters())
    found = dict(copy.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.grad.abs().max() > 0 or name == "query_proj.bias", name
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=0, atol=1e-11), name


@pytest.mark.parametrize("name", [subjects.ADAM, subjects.FUSED])
def test_training_steps_are_the_same_where_every_row_is_read(name):
    memory = memory_of(MemoryConfig(n_keys=4, heads=2, knn=4, k_dim=8))
    other = subjects.other(name, memory)
    ours = subjects.ours(memory, name)
    for _ in range(4):
        x, grad = torch.randn(2, 100, WIDTH, dtype=torch.float64)
        assert subjects.distinct_slots(ours, x) == memory.config.n_slots
        ours.train_step(x, grad)
        other.train_step(x, grad)
    start = ProductKeyMemory(WIDTH, memory.config)
    expected = dict(memory.named_parameters())
    for key, parameter in other.module.named_parameters():
        moved = (parameter - dict(start.named_parameters())[key]).abs().max()
        assert moved > 1e-3, key
        if key != "query_proj.bias":  # no gradient but rounding: normalisation takes means away
            assert torch.allclose(parameter, expected[key], rtol=0, atol=1e-6), key


def test_sparse_adam_moves_the_rows_read_as_ours_does_in_a_first_step():
    memory = memory_of()
    other, ours = subjects.other(subjects.SPARSE, memory), subjects.ours(memory, subjects.SPARSE)
    start = memory.values.weight.detach().clone()
    x, grad = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    read = subjects.distinct_slots(ours, x)
    for subject in (ours, other):
        subject.train_step(x, grad)
    moved = (memory.values.weight != start).any(dim=1)
    assert int(moved.sum()) == read < memory.config.n_slots
    assert torch.allclose(other.module.values.weight, memory.values.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [subjects.OURS, *subjects.OTHERS[:3]])
def test_every_parameter_has_one_optimizer(name):
    memory = memory_of()
    is_ours = name == subjects.OURS
    subject = subjects.ours(memory, subjects.FUSED) if is_ours else subjects.other(name, memory)
    groups = [group for optimizer in subject.optimizers for group in optimizer.param_groups]
    owned = Counter(id(p) for g in groups for p in g["params"])
    assert owned == Counter(id(p) for p in subject.module.parameters())
    fused = {type(o).__name__: o.defaults.get("fused") for o in subject.optimizers}
    assert (
        fused
        == {
            subjects.OURS: {"MemoryAdam": True},
            subjects.ADAM: {"Adam": None},
            subjects.FUSED: {"Adam": True},
            subjects.SPARSE: {"Adam": None, "SparseAdam": None},
        }[name]
    )


def test_a_training_step_of_ours_makes_no_dense_gradient():
    memory = memory_of()
    subject = subjects.ours(memory, subjects.ADAM)
    before = memory.values.weight.detach().clone()
    subject.train_step(*torch.randn(2, 9, WIDTH, dtype=torch.float64))
    assert memory.values.weight.grad is None
    assert not torch.equal(memory.values.weight, before)


# --- the check before timing ------------------------------------------------------------------


def swap_halves(copy):
    copy.keys.data = copy.keys.data.flip(1)


def shift_values(copy):
    copy.values.weight.data = copy.values.weight.data.roll(1, 0)


def drop_a_neighbour(copy):
    search = copy.search
    copy.search = lambda half: textbook.Found(*(x[..., [0, 0, 2, 3]] for x in search(half)))


def misplace_some(copy):
    search = copy.search

    def wrong(half):
        scores, slots = search(half)
        slots[:2] = (slots[:2] + 1) % 36
        return textbook.Found(scores, slots)

    copy.search = wrong


def change_temperature(copy):
    search = copy.search
    copy.search = lambda half: textbook.Found(1.1 * search(half).scores, search(half).slots)


def read_nan(copy):
    copy.values.weight.data[:] = torch.nan


def change_running_mean(copy):
    copy.query_norm.running_mean += 1


FAULTS = [swap_halves, shift_values, drop_a_neighbour, change_temperature, read_nan]
FAULTS += [change_running_mean, misplace_some]


def test_the_check_accepts_a_copy():
    memory = memory_of(dtype=torch.float32)
    check_same_read(memory, TextbookMemory(memory), torch.randn(50, WIDTH))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds(fault):
    memory = memory_of(dtype=torch.float32)
    copy = TextbookMemory(memory)
    fault(copy)
    with pytest.raises(MismatchError, match="differ"):
        check_same_read(memory, copy, torch.randn(50, WIDTH))


def test_a_wrong_comparison_is_not_timed(monkeypatch, script, tmp_path, capsys):
    half_scores = TextbookMemory.half_scores
    monkeypatch.setattr(TextbookMemory, "half_scores", lambda *args: half_scores(*args).flip(2))
    monkeypatch.setattr(layer, "interleave", lambda *_: pytest.fail("was timed"))
    file = tmp_path / "found.json"
    command = ["--what=layer", "--tokens=16", "--n-keys=32", f"--json={file}"]
    assert script.main(command) == 1
    assert "NOT THE SAME: slots in training differ" in capsys.readouterr().err
    assert not file.exists()


# --- timing -----------------------------------------------------------------------------------


class FakeClock:
    """A clock that moves only when it is told to."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def contestant(self, name, seconds):
        def prepare(turn):
            self.now += 1000  # not timed

            def step():
                self.log.append((name, turn))
                self.now += seconds[turn]

            return step

        return prepare


def test_contestants_take_turns_and_only_their_steps_are_timed():
    clock = FakeClock()
    sides = {
        "a": clock.contestant("a", [9, 9, 1, 2, 3]),
        "b": clock.contestant("b", [9, 9, 4, 5, 6]),
    }
    assert interleave(sides, 3, 2, clock) == {"a": [1, 2, 3], "b": [4, 5, 6]}
    turns = [turn for _, turn in clock.log]
    assert turns == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    first = [name for name, _ in clock.log[::2]]
    assert sorted(Counter(first).values()) == [2, 3]  # who comes first alternates
    assert all(one != two for one, two in itertools.pairwise(first))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_each_contestant_follows_every_other_one_equally_often(n):
    names = [str(i) for i in range(n)]
    orders = balanced_orders(names)
    assert all(sorted(order) == names for order in orders)
    places = [Counter(column) for column in zip(*orders, strict=True)]
    assert all(len(set(place.values())) == 1 and len(place) == n for place in places)
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(pairs) == n * (n - 1) and len(set(pairs.values())) <= 1


def test_no_round_is_an_error():
    with pytest.raises(ValueError, match="rounds is 0"):
        interleave({}, 0)


def test_a_ratio_is_the_median_of_pairs_not_of_sides():
    found = compare([1.0, 2.0, 10.0], [8.0, 4.0, 50.0])  # ratios 8, 2, 5; medians 2 and 8
    assert found == {
        "ratio": 5.0,
        "subject_ms": 2000.0,
        "against_ms": 8000.0,
        "spread": [3.5, 6.5],
        "pairs": 3,
    }
    assert quartiles([7.0]) == [7.0, 7.0]
    with pytest.raises(ValueError):
        compare([1.0], [1.0, 2.0])


def test_throughput_is_compared_round_by_round():
    found = parts.throughput(8 * 10**9, [1.0, 2.0, 4.0], [16.0, 5.0, 2.0])
    assert found == {"bytes": 8 * 10**9, "gb_s": 4.0, "share_of_memcpy": 0.8}


def test_memcpy_counts_bytes_read_and_written():
    memcpy = machine.Memcpy(1 << 20)
    memcpy()
    source, target = memcpy.blocks
    source.normal_()
    memcpy()
    assert torch.equal(source, target) and source.nbytes == 1 << 20
    assert memcpy.n_bytes == 2 << 20
    assert memcpy.note([1e-3]) == [pytest.approx(2.097152)]
    memcpy.note([1.0])
    memcpy.note([1.0])
    assert memcpy.median_gb_s() == pytest.approx(2.097152e-3)
    memcpy.measure(times=4)
    assert len(memcpy.gb_s) == 7 and not memcpy.blocks


# --- the layer --------------------------------------------------------------------------------


def test_blocks_where_memory_holds_only_one(monkeypatch):
    built, checked = [], []
    monkeypatch.setattr(layer, "available_bytes", lambda: 0)
    table = 32**2 * subjects.WIDTH * 4
    both = (subjects.TABLES[subjects.OURS] + subjects.TABLES[subjects.ADAM]) * table
    monkeypatch.setattr(layer, "available_bytes", lambda: (subjects.SLACK + both - 1) / 0.9)
    for name in ("ours", "other"):
        build = getattr(subjects, name)
        note = partial(lambda name, build, *args: built.append(name) or build(*args), name, build)
        monkeypatch.setattr(subjects, name, note)
    monkeypatch.setattr(layer, "check_same_read", lambda *_: checked.append(1))
    found = output.Report({}, tell=lambda _: None)
    settings = Settings(("layer",), (8,), (32,), pairs=3)
    monkeypatch.setattr(subjects, "OTHERS", (subjects.ADAM,))
    layer.measure(settings, found)
    assert checked == [1] and built == ["other", "ours", "other", "other", "ours"]
    assert [e["turns"] for e in found.entries] == ["blocks", "blocks"]
    assert [e["pairs"] for e in found.entries] == [3, 3]


@pytest.mark.parametrize("part", [layer, parts, models, peak])
def test_what_does_not_fit_into_memory_is_skipped_with_a_reason(part, monkeypatch):
    monkeypatch.setattr(layer, "available_bytes", lambda: 2**30)
    settings = Settings(tokens=(8, 16), n_keys=(32,), pairs=1)
    found = output.Report({}, tell=lambda _: None)
    more = [machine.Memcpy(1 << 20)] if part is parts else []
    part.measure(settings, found, *more)
    assert len(found.entries) == part.count(settings)
    reasons = {e["reason"] for e in found.entries}
    assert any("of the 1.0 GiB that are free" in reason for reason in reasons)
    assert found.as_dict(1.0)["skipped"] == found.entries


def test_both_sides_get_the_same_tokens_and_others_in_the_next_round():
    seen = {"a": [], "b": []}

    class Side(subjects.Subject):
        def train_step(self, x, grad):
            seen[self.name].append((x, grad))

    sides = [Side(name, torch.nn.Identity(), None, ()) for name in seen]
    layer.time_all(sides, [(layer.TRAIN, 4)], rounds=2)
    for (x1, grad1), (x2, grad2) in zip(seen["a"], seen["b"], strict=True):
        assert torch.equal(x1, x2) and torch.equal(grad1, grad2)
    assert not torch.equal(seen["a"][0][0], seen["a"][1][0])
    assert seen["a"][0][0].shape == (4, subjects.WIDTH)


def test_inference_is_timed_in_evaluation_without_gradients():
    modes = []

    class Probe(torch.nn.Module):
        def forward(self, x):
            modes.append((self.training, torch.is_grad_enabled()))
            return x

    probe = Probe()
    sides = [subjects.Subject("probe", probe, probe, ())]
    layer.time_all(sides, [(layer.FORWARD, 4)], rounds=1)
    assert set(modes) == {(False, False)}
    modes.clear()
    layer.time_all(sides, [(layer.TRAIN, 4)], rounds=1)
    assert set(modes) == {(True, True)}


def test_the_package_gets_the_same_sizes(monkeypatch):
    class PKM(torch.nn.Linear):
        def __init__(self, **sizes):
            super().__init__(sizes["dim"], sizes["dim"])
            self.sizes = sizes

    fake = types.ModuleType("product_key_memory")
    fake.PKM = PKM
    fake.fetch_pkm_value_parameters = lambda module: ([module.weight], [module.bias])
    monkeypatch.setitem(sys.modules, "product_key_memory", fake)
    subject = subjects.package(64)
    sizes = {"dim": 768, "num_keys": 64, "heads": 4, "dim_head": 128, "topk": 32}
    assert subject.module.sizes == sizes
    rates = {id(p): g["lr"] for g in subject.optimizers[0].param_groups for p in g["params"]}
    assert rates == {id(subject.module.weight): 1e-2, id(subject.module.bias): 1e-3}
    assert subject.read(torch.randn(5, 768)).shape == (5, 768)


# --- parts ------------------------------------------------------------------------------------


def test_parts_of_both_sides_compute_the_same(monkeypatch):
    monkeypatch.setattr(parts, "WIDTH", WIDTH)
    memory = memory_of(dtype=torch.float32)
    copy = TextbookMemory(memory)
    setting = parts.Setting(memory, copy, torch.randn(20, WIDTH))
    contests = {**parts.of_search(setting), **parts.of_table(setting)}
    assert tuple(contests) == (*parts.OF_SEARCH, *parts.OF_TABLE)
    for what, contest in contests.items():
        ours, theirs = contest.ours(0)(), contest.other(0)()
        if what == "topk_pairs":
            ours, theirs = ours.sort().values, theirs.slots.sort().values
        ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (ours, theirs))
        for one, two in zip(ours, theirs, strict=True):
            assert torch.allclose(one, two, rtol=0, atol=1e-5), what


@pytest.mark.parametrize("name", parts.UPDATES)
def test_updates_of_both_sides_are_the_same(name, monkeypatch):
    monkeypatch.setattr(parts, "WIDTH", WIDTH)
    memory = memory_of(dtype=torch.float32)
    copy = TextbookMemory(memory)
    setting = parts.Setting(memory, copy, torch.randn(20, WIDTH))
    start = setting.values.clone()
    contest = parts.update(setting, name)
    for turn in range(3):  # the same rows each time, so that dense and lazy Adam agree
        contest.ours(turn)()
        contest.other(turn)()
    assert (setting.values - start).abs().max() > 1e-3
    assert torch.allclose(setting.values, copy.values.weight, rtol=0, atol=1e-5)


def test_bytes_that_must_move(monkeypatch):
    monkeypatch.setattr(parts, "WIDTH", WIDTH)
    memory = memory_of(dtype=torch.float32)
    setting = parts.Setting(memory, TextbookMemory(memory), torch.randn(20, WIDTH))
    rows, entries, row = setting.rows, 20 * 2 * 4, WIDTH * 4
    assert 0 < rows <= 36 < entries
    read = parts.of_table(setting)["gather_sum"]
    assert read.bytes == rows * row + 20 * row + entries * (8 + 4)
    assert read.bytes_by_entry == entries * row + 20 * row + entries * (8 + 4)
    update = parts.update(setting, subjects.ADAM)
    assert update.bytes == 6 * rows * row + 20 * row + entries * (8 + 8 + 4)


# --- models -----------------------------------------------------------------------------------


def test_the_models_are_those_of_the_paper():
    settings = Settings()
    chosen, pairs = models.choose(settings)
    assert pairs == [
        ("resm_base", "roberta_base"),
        ("resm_base_bfloat16", "roberta_base"),
        ("pkm_base", "roberta_base"),
        ("resm_base", "roberta_large"),
    ]
    assert models.counted(settings) == (chosen, ("resm_base", "resm_base_uncounted"))
    for model in chosen.values():
        assert model.arch in ARCH_MODEL_REGISTRY
        optimizer = "adam" if model.n_keys is None else "pkm_adam"
        command = model.command("somewhere")
        assert command[command.index("--optimizer") + 1] == optimizer
    narrow = chosen["resm_base_bfloat16"].command("somewhere")
    assert {*narrow} - {*chosen["resm_base"].command("somewhere")} == {*models.NARROW}
    assert (models.SENTENCES, models.LENGTH) == (8, 128)


def test_samples_are_masked_tokens_of_the_vocabulary():
    dictionary = models.vocabulary(models.SYMBOLS)
    mask = dictionary.add_symbol("<mask>")
    assert len(dictionary) == models.SYMBOLS
    sample = models.sample(dictionary, torch.Generator().manual_seed(1))
    tokens, target = sample["net_input"]["src_tokens"], sample["target"]
    masked = tokens.eq(mask)
    assert tokens.shape == (8, 128) and sample["ntokens"] == 1024
    assert 0.1 < masked.double().mean() < 0.2
    assert torch.equal(target.ne(dictionary.pad()), masked)
    assert not tokens.eq(dictionary.pad()).any()
    again = models.sample(dictionary, torch.Generator().manual_seed(1))
    assert torch.equal(again["target"], target)


def test_a_training_step_is_fairseqs_and_changes_every_parameter(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "SENTENCES", 2)
    run = models.build(models.SMALL_MODELS["resm_tiny"], seed=1, save_dir=str(tmp_path))
    model = run.trainer.get_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert run.distinct_slots()[0] > 0
    run.train_step(0)()
    assert run.trainer.get_num_updates() == 1
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert all("class" in name or "embed_positions" in name for name in still), still
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    run.forward(0)()
    assert not model.training
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


# --- peak memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("may_reset", [True, False])
def test_the_peak_of_a_step_is_seen_and_forgotten(may_reset, monkeypatch):
    if not may_reset:
        monkeypatch.setattr(machine, "_reset_peak", lambda: False)

    def step(size):
        block = torch.ones(size << 18)  # MiB
        for _ in range(20):
            block.mul_(1.0)

    before = machine.resident_bytes()
    assert machine.peak_bytes(lambda: step(128)) - before > 100 << 20
    assert machine.peak_bytes(lambda: step(1)) - before < 64 << 20


def test_peak_memory_is_measured_in_another_process():
    found = peak.in_child(subjects.ADAM, 8, 64, seed=1)
    table = 64**2 * 768 * 4
    assert found["table_bytes"] == table
    assert found["peak_bytes"] == found["idle_bytes"] + found["step_bytes"]
    assert found["extra_bytes"] == found["peak_bytes"] - 3 * table
    assert found["step_bytes"] > table  # a dense gradient


def test_a_child_that_fails_says_why(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: no more\n")
    monkeypatch.setattr(child, "run_to_end", lambda command: failed)
    with pytest.raises(ValueError, match="of ours could not be measured: MemoryError: no more"):
        peak.in_child("ours", 8, 32, 1)


# --- the script -------------------------------------------------------------------------------


@pytest.fixture
def script():
    return load_script(SCRIPTS / "benchmark_memory.py")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--what", "layers"], "what is layers, must be among layer, parts, model, memory, usage"),
        (["--tokens", "1"], "tokens is 1, must be in 2..65536"),
        (["--tokens", "many"], "argument --tokens: 'many' is not a list of numbers"),
        (["--tokens", ""], "argument --tokens: '' is not a list of numbers"),
        (["--n-keys", "31"], "n-keys is 31, must be in 32..4096"),
        (["--n-keys", "128,x"], "argument --n-keys: '128,x' is not a list of numbers"),
        (["--pairs", "0"], "pairs is 0, must be in 1..1000"),
        (["--pairs", "few"], "argument --pairs: invalid int value: 'few'"),
        (["--threads", "0"], "threads is 0, must be in 1.."),
        (["--threads", "100000"], "threads is 100000, must be in 1.."),
        (["--seed", "-1"], "seed is -1, must be in 0.."),
        (
            ["--json", "nowhere/a.json"],
            "--json nowhere/a.json must be a file in a folder that exists",
        ),
        (["--markdown", "."], "--markdown . must be a file in a folder that exists"),
        (["--plot", "found.txt"], "--plot is found.txt, must end in .png, .svg, .pdf"),
        (["--what", "parts", "--plot", "p.svg"], "--what must name layer"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_input_is_one_line_and_status_2(script, command, message, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_run, "run", lambda *_: pytest.fail("was measured"))
    try:
        status = script.main(command)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1 and error.startswith("benchmark_memory: error: ")
    assert message in error


def test_an_unknown_backend_is_one_line_and_status_2(script, capsys, monkeypatch):
    monkeypatch.setenv("PKM_BACKEND", "cuda")
    sizes = ["--what=layer", "--tokens=8", "--n-keys=32", "--pairs=1"]
    assert script.main(sizes) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "benchmark_memory: error: PKM_BACKEND is cuda, must be one of torch, numba, triton"
    )


def test_a_fault_does_not_look_like_different_results(script, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(benchmark_run, "run", fail)
    assert script.main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("RuntimeError: a fault\n")


RESULT = {"what", "tokens", "n_keys", "subject", "against", "ratio", "subject_ms", "against_ms"}
MORE = {"spread", "pairs", "distinct_slots"}
MOVED = {"bytes", "gb_s", "share_of_memcpy"}


def test_quick_from_end_to_end(script, tmp_path, monkeypatch, capsys):
    for name, size in (("SENTENCES", 2), ("LENGTH", 16)):
        monkeypatch.setattr(models, name, size)
    monkeypatch.setattr(peak, "in_child", lambda name, tokens, n, _: peak.here(name, tokens, n))
    monkeypatch.setattr(subjects, "installed", lambda _: None)
    files = {name: tmp_path / f"found.{name}" for name in ("json", "md", "svg")}
    command = ["--quick", "--tokens=8,16", "--n-keys=32", "--pairs=2"]
    options = [f"--json={files['json']}", f"--markdown={files['md']}", f"--plot={files['svg']}"]
    assert script.main([*command, *options]) == 0
    assert sorted(tmp_path.iterdir()) == sorted(files.values())  # nothing half-written
    found = json.loads(files["json"].read_text())
    assert_json(found)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if " slots: " in line]) == benchmark_run.count(
        Settings(tokens=(8, 16), n_keys=(32,), quick=True)
    )
    page = files["md"].read_text()
    for title in (*output.TITLES.values(), output.PARTS):
        assert page.count(f"### {title}\n") == 1
    assert page.count("not installed") == 2 + 2  # tokens: forward, training
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert (
        len(tables)
        == benchmark_run.count(Settings(tokens=(8, 16), n_keys=(32,), quick=True))
        + 2 * len(output.TITLES)
        + 2
    )
    assert files["svg"].read_text().startswith("<?xml")


def assert_json(found):
    assert set(found) == {"machine", "settings", "memcpy_gb_s", "results", "memory", "skipped"}
    assert found["memcpy_gb_s"] > 0
    assert {"threads", "cores", "versions", "backend", "processor"} <= set(found["machine"])
    assert found["settings"]["layer"] == {"width": 768, "heads": 4, "knn": 32, "k_dim": 256}
    whats = Counter(result["what"] for result in found["results"])
    names = Counter(what for what, _ in parts.names())
    assert whats == Counter(
        {
            **{what: 2 * times for what, times in names.items()},
            **{layer.TRAIN: 6, layer.FORWARD: 2, models.TRAIN: 4, models.FORWARD: 3},
            **{
                what: 2 * len(narrow.NARROW)
                for what in (*narrow.NAMES.values(), *narrow.PARTS.values())
            },
            counting.CALLS: 1,
        }
    )
    for result in found["results"]:
        assert set(result) >= RESULT | MORE, result
        assert result["ratio"] > 0 and result["pairs"] == 2
        low, high = result["spread"]
        assert low <= result["ratio"] <= high
        what = result["what"].removeprefix("narrow_")
        moves = what in {"gather_sum", "gather_dot", "adam_rows"}
        assert (set(result) >= MOVED) == moves
    resm = [r for r in found["results"] if r["subject"] == "resm_tiny"]
    assert {(r["what"], r["against"], r["tokens"], r["n_keys"]) for r in resm} == {
        (models.FORWARD, "roberta_tiny", 32, 64),
        (models.TRAIN, "roberta_tiny", 32, 64),
        (models.TRAIN, "resm_tiny_uncounted", 32, 64),
    }
    (calls,) = [r for r in found["results"] if r["what"] == counting.CALLS]
    assert (calls["subject"], calls["against"], calls["tokens"]) == ("counting", "its step", 32)
    assert 0 < calls["subject_ms"] < calls["against_ms"]
    assert [m["subject"] for m in found["memory"]] == 2 * [subjects.OURS, subjects.ADAM]
    assert {"subject", "table_bytes", "peak_bytes", "extra_share_of_table"} <= set(
        found["memory"][0]
    )
    skipped = {(s["what"], s["tokens"], s["against"], s["reason"]) for s in found["skipped"]}
    assert skipped == {
        (what, tokens, subjects.PACKAGE, "not installed")
        for what in (layer.TRAIN, layer.FORWARD)
        for tokens in (8, 16)
    }


def test_narrow_tables_have_their_dtypes_and_start_from_the_same_weights():
    *ours, textbook = narrow.contestants(32)
    stored = []
    for subject, (name, *_, size) in zip(ours, narrow.NARROW, strict=True):
        assert subject.name == name
        x, grad = subjects.batches(64, 1)
        subject.train_step(x[0], grad[0])
        values = subject.module.values.weight
        state = subject.optimizers[0].state[values]
        parts = [values]
        for moment in ("exp_avg", "exp_avg_sq"):
            found = state[moment]
            parts += [found.codes, found.exponents] if isinstance(found, Float8Table) else [found]
        assert sum(part.nbytes for part in parts) == size * values.numel()
        stored.append(values.dtype)
    assert stored == [torch.float32, torch.bfloat16, torch.bfloat16]
    *ours, textbook = narrow.contestants(32)
    for subject in ours:
        exact = textbook.module.values.weight
        assert torch.equal(
            subject.module.values.weight, exact.to(subject.module.values.weight.dtype)
        )
        assert torch.equal(subject.module.keys, textbook.module.keys)


def test_narrow_tables_move_fewer_bytes():
    *ours, _ = narrow.contestants(32)
    moved = {
        part: [
            narrow.bytes_of(part, subject, size)
            for subject, (*_, size) in zip(ours, narrow.NARROW, strict=True)
        ]
        for part in narrow.PARTS
    }
    assert moved["gather_sum"] == moved["gather_dot"] == [4, 2, 2]
    assert moved["adam_rows"] == [24, 12, 4 + 4 * (1 + 1 / 64)]


def test_what_was_measured_is_saved_when_interrupted(monkeypatch):
    saved = []
    monkeypatch.setattr(benchmark_run, "Memcpy", partial(machine.Memcpy, 1 << 20))

    def interrupted(settings, found):
        found.skip(layer.TRAIN, 8, 32, "x", "for the test")
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark_run.run(
            Settings(("layer", "parts")), lambda _: None, lambda found, _: saved.append(found)
        )
    assert len(saved) == 1 and len(saved[0].entries) == 1


def test_a_plot_of_what_was_skipped_says_so(tmp_path):
    found = output.Report({}, tell=lambda _: None)
    found.skip(layer.TRAIN, 8, 32, subjects.PACKAGE, "not installed")
    numbers = compare([1.0, 1.0], [2.0, 4.0])
    found.result(layer.TRAIN, 8, 32, subjects.OURS, subjects.ADAM, **numbers)
    for suffix in ("svg", "png"):
        output.plot(found.entries, tmp_path / f"plot.{suffix}")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plot.png", "plot.svg"]


def test_medians_are_over_pairs_in_one_process():
    times = iter([0.0, 1.0, 1.0, 3.0, 3.0, 7.0, 7.0, 8.0])
    found = interleave({"a": lambda _: int, "b": lambda _: int}, 2, 0, lambda: next(times))
    assert found == {"a": [1.0, 1.0], "b": [2.0, 4.0]}
    assert compare(found["a"], found["b"])["ratio"] == median([2.0, 4.0])


@pytest.mark.parametrize(("name", "counts"), [("resm_tiny", True), ("resm_tiny_uncounted", False)])
def test_the_uncounted_model_counts_no_read_and_the_other_does(name, counts, tmp_path):
    run = models.build(models.SMALL_MODELS[name], seed=1, save_dir=str(tmp_path))
    calls = MemoryUsage.update, ReadTimes.record
    ticks = iter(range(100))
    with counting.stopwatch(lambda: next(ticks)) as laps:
        run.train_step(0)()
    assert laps == ([1, 1, 1] if counts else [])  # two in the layer, one after it
    assert calls == (MemoryUsage.update, ReadTimes.record)
    logged = run.trainer.criterion._window
    (layer,) = run.trainer.get_model().memory_layers().values()
    assert bool(layer.reads.last_read.any()) == counts
    assert (logged is not None) == counts
    assert not list(tmp_path.iterdir())  # no copy of the values


# --- memory to save and to load -------------------------------------------------------------------


def noted(monkeypatch, folder, first, second):
    """What is measured if two trainings save and load in these phases."""

    def train(setting, folder, updates):
        with (folder / "0.jsonl").open("a") as out:
            for n, phase in enumerate(first if updates == 3 else second):
                print(json.dumps({"phase": phase, "before": 10 * updates + n, "peak": 0}), file=out)

    monkeypatch.setattr(saving, "_train", train)
    setting = saving.Setting(folder, n_keys=32, v_dim=8, workers=1, shards=1, stored="whole")
    return [(row["phase"], row["before"]) for row in saving.measure(setting, folder / "x")]


def test_a_save_at_the_end_of_an_epoch_is_not_taken_for_the_load(monkeypatch, tmp_path):
    found = noted(monkeypatch, tmp_path, ["saving", "saving"], ["loading", "saving"])
    assert found == [("saving", 31), ("loading", 40)]


@pytest.mark.parametrize(
    ("first", "second"), [(["saving"], ["saving"]), ([], ["loading", "saving"])]
)
def test_a_phase_that_is_missing_is_an_error(first, second, monkeypatch, tmp_path):
    said = f"worker 0 went through {', '.join(first + second)}, must save and then load"
    with pytest.raises(ValueError, match=said):
        noted(monkeypatch, tmp_path, first, second)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("measure_checkpoint.py --data no --workers 0", "--workers is 0, must be at least 1"),
        ("measure_checkpoint.py --data no --shards 0", "--shards is 0, must be at least 1"),
        ("measure_checkpoint.py --data no --n-keys 0", "--n-keys is 0, must be at least 1"),
        ("measure_checkpoint.py --data no --v-dim -4", "--v-dim is -4, must be at least 1"),
        ("compare_kinds.py cost --width 0", "--width is 0, must be at least 1"),
        ("compare_kinds.py cost --tokens 0", "--tokens is 0, must be at least 1"),
        ("compare_kinds.py cost --rounds 0", "--rounds is 0, must be at least 1"),
        (
            "compare_kinds.py train --data no --out no --updates 0",
            "--updates is 0, must be at least 1",
        ),
    ],
)
def test_other_scripts_refuse_a_number_before_they_print(
    command, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_script(SCRIPTS / sys.argv[0]).main()
    assert not capsys.readouterr().out and not any(tmp_path.iterdir())

"""What is said of checkpoints and logs, against naive counts."""

import html
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from markupsafe import Markup

from pkm_fairseq.analysis import (
    analyse,
    checkpoints,
    curves,
    drift,
    examine,
    page,
    plots,
    readers,
    tables,
)
from pkm_fairseq.memory import MemoryConfig, MemoryUsage, ProductKeyMemory, ReadTimes
from pkm_fairseq.memory.observe.readers import SlotReaders
from pkm_fairseq.models.capture import load_model
from tests.helpers import SMALL, build, small_dictionary

WIDTH = 8


def memory(seed: int, config: MemoryConfig = SMALL) -> ProductKeyMemory:
    torch.manual_seed(seed)
    return ProductKeyMemory(WIDTH, config).eval()


# --- drift ------------------------------------------------------------------------------------


def test_drift_is_what_loops_over_tokens_and_heads_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "TOKENS", 4)  # several blocks, the last one smaller
    monkeypatch.setattr(drift, "ROWS", 7)
    before, after = memory(1), memory(1)
    with torch.no_grad():
        for parameter in after.parameters():  # near enough that some slots stay, not all
            parameter += 0.2 * parameter.std() * torch.randn_like(parameter)
    x = torch.randn(10, WIDTH)
    y = x + 0.3 * torch.randn(10, WIDTH)
    (found,) = drift.drift({3: before}, {3: after}, {3: x}, {3: y})
    with torch.no_grad():
        slots, others = before.search(x)[0].tolist(), after.search(y)[0].tolist()
        query, other = before.query(x).flatten(2), after.query(y).flatten(2)
    for head in range(SMALL.heads):
        overlaps, same, cosines, distances = [], [], [], []
        for n in range(10):
            a, b = set(slots[n][head]), set(others[n][head])
            overlaps.append(len(a & b) / len(a | b))
            same.append(slots[n][head][0] == others[n][head][0])
            p, q = query[n, head].numpy(), other[n, head].numpy()
            cosines.append(p @ q / np.linalg.norm(p) / np.linalg.norm(q))
            distances.append(np.linalg.norm(q - p) / np.linalg.norm(p))
        said = found["heads"][head]
        assert said["head"] == head
        assert said["topk_jaccard"] == pytest.approx(np.mean(overlaps))
        assert said["top1_same"] == pytest.approx(np.mean(same))
        assert said["query_cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
        assert said["query_moved"] == pytest.approx(np.mean(distances), rel=1e-4)
        keys = before.keys[head].detach(), after.keys[head].detach()
        assert said["keys_moved"] == pytest.approx(
            float((keys[1] - keys[0]).norm() / keys[0].norm()), rel=1e-5
        )
    assert 0 < found["topk_jaccard"] < 1 and 0 < found["top1_same"] < 1
    assert found["heads"][0]["topk_jaccard"] != found["heads"][1]["topk_jaccard"]
    for name in ("topk_jaccard", "top1_same", "query_cosine", "query_moved"):
        assert found[name] == pytest.approx(np.mean([head[name] for head in found["heads"]]))
    was, now = (m.values.weight.detach().numpy() for m in (before, after))
    single = np.linalg.norm(now - was, axis=1)
    typical = np.linalg.norm(was) / np.sqrt(len(was))
    assert (found["layer"], found["tokens"]) == (3, 10)
    assert found["values_moved"] == pytest.approx(np.linalg.norm(now - was) / np.linalg.norm(was))
    assert found["values_moved_max"] == pytest.approx(single.max() / typical)
    median = np.percentile(single, 50, method="inverted_cdf")
    assert found["values_moved_p50"] == pytest.approx(median / typical)
    assert found["values_unmoved"] == 0


def test_a_memory_has_not_drifted_from_itself() -> None:
    same, x = memory(1), torch.randn(5, WIDTH)
    (found,) = drift.drift({0: same}, {0: same}, {0: x}, {0: x})
    assert [found[k] for k in ("topk_jaccard", "top1_same", "values_unmoved")] == [1, 1, 1]
    assert found["query_cosine"] == pytest.approx(1)
    moved = ("query_moved", "keys_moved", "values_moved", "values_moved_max")
    assert [found[name] for name in moved] == [0, 0, 0, 0]


def test_only_what_moved_is_said_to_have_moved() -> None:
    before, after, x = memory(1), memory(1), torch.randn(6, WIDTH)
    with torch.no_grad():
        after.values.weight[4] += 1
    (found,) = drift.drift({0: before}, {0: after}, {0: x}, {0: x})
    assert found["values_unmoved"] == pytest.approx(24 / 25)
    assert found["values_moved_p90"] == 0 < found["values_moved_p99"] == found["values_moved_max"]
    assert found["keys_moved"] == 0 and found["topk_jaccard"] == 1


def test_distance_from_zero_values_is_not_a_number_that_json_lacks() -> None:
    before, after, x = memory(1), memory(1), torch.randn(3, WIDTH)
    with torch.no_grad():
        before.values.weight.zero_()
    (found,) = drift.drift({0: before}, {0: after}, {0: x}, {0: x})
    assert found["values_moved"] is None
    json.dumps(found, allow_nan=False)


def test_memories_of_other_shapes_cannot_be_compared() -> None:
    x = torch.randn(3, WIDTH)
    other = memory(1, MemoryConfig(n_keys=6, heads=2, knn=3, k_dim=4))
    with pytest.raises(ValueError, match=r"n_slots=25 .* cannot .* n_slots=36") as error:
        drift.drift({0: memory(1)}, {0: other}, {0: x}, {0: x})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"layers \[0\] before, \[1\] after"):
        drift.drift({0: memory(1)}, {1: memory(1)}, {0: x}, {1: x})
    with pytest.raises(ValueError, match="3 tokens before and 2 after"):
        drift.drift({0: memory(1)}, {0: memory(1)}, {0: x}, {0: x[:2]})


def save(file: Path, model: Any, dictionary: Dictionary, **more: Any) -> Path:
    options = {**vars(model.args), **more}
    torch.save({"cfg": {"model": options}, "model": model.state_dict()}, file)
    return file


def test_drift_of_a_pretrained_and_a_finetuned_checkpoint(tmp_path: Path) -> None:
    dictionary = small_dictionary()
    sequences = [torch.randint(4, 19, (n,)) for n in (9, 12, 4)]
    files = []
    for seed in (0, 1):
        model = build("resm_roberta_tiny", dictionary, seed=seed, memory_layers=[0, 2])
        if seed:
            model.register_classification_head("sentence_classification_head", num_classes=3)
        files.append(save(tmp_path / f"{seed}.pt", model, dictionary))
    models = [load_model(torch.load(file, weights_only=False), dictionary) for file in files]
    found = drift.drift_of_models(*models, sequences, dictionary.pad(), 20)
    assert [(layer["layer"], layer["tokens"]) for layer in found] == [(0, 20), (2, 20)]
    assert all(layer["values_moved"] > 1 for layer in found)
    everything = drift.drift_of_models(*models, sequences, dictionary.pad(), 99)
    assert everything[0]["tokens"] == 25


# --- who reads ----------------------------------------------------------------------------------


def naive_readers(
    model: Any, layer: int, sequences: List[torch.Tensor], slot: int
) -> Dict[int, List[Any]]:
    """By symbol, all (weight, sequence, position) of reads of a slot, one sequence at a time."""
    found: Dict[int, List[Any]] = {}
    caught = []
    memory = model.memory_layers()[layer].memory
    hook = memory.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    for number, sequence in enumerate(sequences):
        with torch.no_grad():
            model(sequence[None], features_only=True)
            slots, weights = memory.search(caught.pop()[:, 0])  # (T, H, K)
        for position, symbol in enumerate(sequence.tolist()):
            for s, w in zip(slots[position].flatten(), weights[position].flatten(), strict=True):
                if s == slot:
                    found.setdefault(symbol, []).append((float(w), number, position))
    hook.remove()
    return found


def test_readers_and_usage_are_what_one_token_at_a_time_gives() -> None:
    dictionary = small_dictionary()
    model = build("resm_roberta_tiny", dictionary, memory_layers=[1, 2]).eval()
    generator = torch.Generator().manual_seed(5)
    sequences = [
        torch.randint(4, 19, (2 + n % 10,), generator=generator) for n in range(40)
    ]  # 3 batches
    origins = {1: (1, 2), 2: (3, 4)}
    opened = checkpoints.Opened(
        "m", Path("m.pt"), model, dictionary, None, False, origins=origins
    )  # fmt: skip
    steps: List[int] = []
    found = examine.examine(opened, sequences, 4, steps.append)
    total = sum(map(len, sequences))
    assert sum(steps) == 2 * total and len(steps) == 6
    assert all(x.memory.observers == [x.reads] for x in model.memory_layers().values())
    assert [layer["layer"] for layer in found.report["layers"]] == [1, 2]
    assert found.report["origins"] == {"1": [1, 2], "2": [3, 4]}
    for layer in found.report["layers"]:
        mass = found.mass[layer["layer"]]
        assert layer["tokens"] == total and layer["staleness"] is None
        hot = [slot["slot"] for slot in layer["hot_slots"]]
        assert hot == mass.argsort(descending=True)[:4].tolist()
        for slot in layer["hot_slots"]:
            naive = naive_readers(model, layer["layer"], sequences, slot["slot"])
            weight = {symbol: sum(read[0] for read in reads) for symbol, reads in naive.items()}
            whole = sum(weight.values())
            assert whole == pytest.approx(float(mass[slot["slot"]]), rel=1e-4)
            assert slot["symbols"] == len(naive)
            assert slot["times_uniform"] == pytest.approx(25 * whole / float(mass.sum()), rel=1e-4)
            top = sorted(weight, key=weight.get, reverse=True)[: readers.TOKENS]
            assert [r["token"] for r in slot["readers"]] == [dictionary[s] for s in top]
            assert [r["reads"] for r in slot["readers"]] == [len(naive[s]) for s in top]
            for symbol, context in zip(top, slot["contexts"], strict=False):
                strongest, number, position = max(naive[symbol])
                words = [dictionary[i] for i in sequences[number].tolist()]
                assert context["weight"] == pytest.approx(strongest, rel=1e-4)
                assert context["token"] == words[position]
                around = f"{context['before']}{context['token']}{context['after']}".split()
                around_at = slice(max(0, position - readers.AROUND), position + readers.AROUND + 1)
                assert around == words[around_at]


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_reads_without_weight_have_no_share(weight: float) -> None:
    """Relu gives reads of scores below 0 no weight."""
    dictionary = small_dictionary()
    slots = torch.tensor([0, 1]).expand(5, 1, 1, 2)
    weights = torch.tensor([weight, 0.0]).expand(5, 1, 1, 2)
    usage = MemoryUsage(4, 1)
    usage.update(slots, weights)
    mass = usage.read_mass.sum(0)
    sequence = torch.tensor([0, 4, 5, 6, 7])
    watcher = SlotReaders(torch.arange(2), 4, len(dictionary))
    watcher.begin(sequence[None])
    watcher.update(slots, weights)
    first, second = readers.describe_readers(watcher, mass, [sequence], dictionary)
    assert (first["times_uniform"], second["times_uniform"]) == (4 * weight, 0)
    assert [reader["weight_share"] for reader in first["readers"]] == [weight / 5] * 5
    assert [reader["weight_share"] for reader in second["readers"]] == [0] * 5
    assert second["symbols"] == 5


def test_padding_reads_no_slot() -> None:
    watcher = readers.SlotReaders(torch.tensor([0, 3]), 9, 6)
    watcher.begin(torch.tensor([[5, 1]]))  # (B, T), the second is padding
    slots = torch.tensor([[[[3, 0]]], [[[-1, -1]]]])  # (T, B, H, K), as a memory returns it
    weights = torch.tensor([[[[0.75, 0.25]]], [[[0.0, 0.0]]]])
    watcher.update(slots, weights, torch.tensor([[False], [True]]))
    assert watcher.reads.tolist() == [[0, 0, 0, 0, 0, 1]] * 2
    assert watcher.weight[:, 5].tolist() == [0.25, 0.75]
    assert set(watcher.best) == {(0, 5), (1, 5)}


def test_pieces_become_readable_text() -> None:
    pieces = ["<s>", "\u2581the", "\u2581ca", "ts", ",", "</s>", "\u2581a"]
    assert checkpoints.joined(pieces, True) == "<s> the cats, </s> a"
    assert checkpoints.joined(["12", "7"], False) == "12 7"
    assert [checkpoints.shown(piece, True) for piece in pieces] == [
        *("<s>", "the", "ca", "\u2026ts", ",", "</s>", "a")
    ]
    dictionary = Dictionary()
    ids = [dictionary.add_symbol(piece) for piece in pieces[1:5]]
    place = readers.Place(0.5, 0, 2)
    context = readers._context(place, [torch.tensor(ids)], dictionary, True)
    assert (context["before"], context["token"], context["after"]) == ("the ca", "ts", ",")
    context = readers._context(place._replace(position=0), [torch.tensor(ids)], dictionary, True)
    assert (context["before"], context["token"], context["after"]) == (" ", "the", " cats,")


# --- the text -----------------------------------------------------------------------------------


def test_the_first_tokens_and_no_more() -> None:
    sequences = [torch.arange(5), torch.arange(5, 8), torch.arange(8, 20)]
    for n in (1, 5, 6, 8, 20, 99):
        taken = checkpoints.first_tokens(iter(sequences), n)
        assert torch.cat(taken).tolist() == list(range(min(n, 20)))


def test_names_of_files(tmp_path: Path) -> None:
    odd = tmp_path / "lr=1" / "c.pt"
    odd.parent.mkdir()
    odd.touch()
    found = checkpoints.named_files(["A=x/a.pt", "runs/b/c.pt", "r/d/e.pt", "r/d/f.pt", str(odd)])
    assert [name for name, _ in found] == ["A", "b", "d/e", "d/f", "lr=1"]
    assert (found[0][1], found[-1][1]) == (Path("x/a.pt"), odd)
    for wrong in ("=x.pt", "A="):
        with pytest.raises(ValueError, match="must be FILE or NAME=FILE"):
            checkpoints.named_files([wrong])
    with pytest.raises(ValueError, match="two files are called A"):
        checkpoints.named_files(["A=x.pt", "A=y.pt"])


# --- charts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "most"), [(4, 4), (6, 3), (7, 3), (512, 256)])
def test_bins_are_means_over_blocks(n: int, most: int) -> None:
    grid = np.random.default_rng(0).random((n, n))
    found = plots.binned(grid, most)
    assert len(found) == min(n, most)
    edges = [n * i // len(found) for i in range(len(found) + 1)]
    for i, j in ((0, 0), (len(found) - 1, 0), (len(found) - 2, len(found) - 1)):
        block = grid[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
        assert found[i, j] == pytest.approx(block.mean())


@pytest.mark.parametrize("n", [1, 1200, 262_144])
def test_a_thinned_curve_keeps_its_ends(n: int) -> None:
    ranks = plots._thin(n)
    assert (ranks[0], ranks[-1]) == (0, n - 1) and len(ranks) <= 2 * plots.POINTS
    assert (np.diff(ranks) > 0).all()


@pytest.mark.parametrize(
    ("masses", "name"),
    [
        ([1.0] * 9, "_a"),
        ([0.0] * 8 + [3.0], "a$b$_c"),
        (list(range(9)), '<b>&"'),
        ([0.0] * 9, "relu gave no read any weight"),
    ],
)
def test_charts_of_any_masses_and_names(masses: List[float], name: str) -> None:
    mass = torch.tensor(masses, dtype=torch.float64)
    chart = plots.mass_chart(1, {name: mass})
    assert chart.svg.startswith('<svg role="img" aria-label="')
    assert f"{html.escape(name, quote=False)}</text>" in chart.svg  # in the legend, as it is
    assert "<b>" not in chart.svg
    assert "heat map of 3 by 3" in plots.heat_chart(mass, "Layer 1").svg
    assert "nan" not in chart.svg + plots.heat_chart(mass, "Layer 1").svg


# --- logs ---------------------------------------------------------------------------------------


def summary(seed: int, n_keys: int = 4) -> Dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    usage = MemoryUsage(n_keys**2, 2)
    slots = torch.randint(n_keys**2, (20, 2, 3), generator=generator)
    usage.update(slots, torch.rand(20, 2, 3, generator=generator).softmax(-1))
    return usage.summary()


def staleness(updates: int) -> Dict[str, Any]:
    q = {"never": 0.25, "p10": 0, "p50": 3, "p90": updates / 2, "p99": updates}
    q["outdated"] = {"10": 0.5, "100": 0.25, "1000": 0.0, "10000": 0.0}
    q["used"] = {"10": 0.5}
    moved = {"unmoved": 0.0, "p10": 0.1, "p50": 0.2, "p90": 0.3, "p99": 0.5, "max": 1.0}
    return {"updates": updates, "read": q, "top1": q, "moved": moved}


def record(updates: int, split: str, n_keys: int = 4, layers: Any = (1, 2)) -> Dict[str, Any]:
    found = [
        {"layer": i, **summary(updates + i, n_keys), "staleness": staleness(updates)}
        for i in layers
    ]
    return {"update": updates, "split": split, "budget": 20, "layers": found, "shared": None}


def write_log(file: Path, records: List[Dict[str, Any]], n_keys: int = 4, end: str = "") -> Path:
    shape = {"n_slots": n_keys**2, "heads": 2, "knn": 3}
    layers = {str(layer["layer"]): shape for layer in records[0]["layers"]} if records else {}
    header = {"format": 1, "layers": layers or {"1": shape}, "shared_values": False}
    file.write_text("".join(json.dumps(line) + "\n" for line in (header, *records)) + end)
    return file


def test_a_log_is_read_in_order_and_the_latest_count_of_an_update_wins(tmp_path: Path) -> None:
    again = record(20, "valid")
    again["layers"][0]["gini"] = 0.123
    records = [record(10, "valid"), record(20, "valid"), record(25, "train"), again]
    log = curves.read_log("a", write_log(tmp_path / "u.jsonl", records))
    assert [r["update"] for r in log.records] == [10, 20, 25] and not log.truncated
    updates, ginis = curves.series(log, "valid", "1", ("gini",))
    assert updates == [10, 20] and ginis == [records[0]["layers"][0]["gini"], 0.123]
    assert curves.series(log, "train", "2", ("staleness", "read", "p90")) == ([25], [12.5])
    assert curves.series(log, "train", "2", ("staleness", "gone", "p90")) == ([], [])
    assert curves.splits_of(log) == ["valid", "train"]
    assert [r["update"] for r in curves.last_counts(log)] == [20, 25]


def test_every_metric_is_in_the_log(tmp_path: Path) -> None:
    log = curves.read_log("a", write_log(tmp_path / "u.jsonl", [record(10, "valid")]))
    for metric in curves.METRICS:
        assert curves.series(log, "valid", "1", metric.path)[0] == [10], metric
        if metric.ceiling:
            assert curves.series(log, "valid", "1", (metric.ceiling,))[0] == [10]


def test_a_truncated_last_line_is_recovered_and_said(tmp_path: Path) -> None:
    file = write_log(tmp_path / "u.jsonl", [record(10, "valid")], end='{"update": 20, "spl')
    args = Namespace(log=[str(file)], checkpoint=[], data=None, text=None, split="valid")
    warnings: List[str] = []
    found = analyse.analyse(args, lambda *_: None, warnings.append)
    assert warnings == [f"{file}: skipped the last line, which is incomplete"]
    assert found.report["notes"] == warnings
    assert found.report["logs"][0]["last"][0]["update"] == 10


def test_logs_that_contradict_their_header_or_are_none(tmp_path: Path) -> None:
    file = tmp_path / "u.jsonl"
    wrong = record(20, "valid", n_keys=5)
    for records, match in (
        ([record(10, "valid"), wrong], "line 3 counts 25 slots and 2 heads in layer 1, the header"),
        ([{**record(10, "valid"), "shared": summary(1)}], "line 2 counts a shared table"),
        ([{**record(10, "valid"), "split": None}], "line 2 does not name its split"),
        ([record(10, "valid"), record(20, "valid", layers=(1, 3))], "line 3 is no count of"),
        ([], "holds no count of memory usage yet"),
    ):
        with pytest.raises(ValueError, match=match) as error:
            curves.read_log("a", write_log(file, records))
        assert "\n" not in str(error.value) and str(file) in str(error.value)
    file.write_text("| train | loss 3\n")
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        curves.read_log("a", file)


def test_logs_of_different_shapes_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = curves.Metric("Unknown", ("gone", "p50"), "updates", "In no log.")
    monkeypatch.setattr(curves, "METRICS", (*curves.METRICS[:1], unknown, curves.METRICS[-1]))
    first = write_log(tmp_path / "a", [record(10, "valid"), record(15, "train")])
    second = write_log(tmp_path / "b", [record(10, "valid", 5, (1,))], n_keys=5)
    logs = [curves.read_log("$a$", first), curves.read_log("b", second)]
    charts = {chart.title: chart.svg for chart in curves.draw_curves(logs)}
    assert list(charts) == ["Top-1 usage", "Values moved, 99th percentile"]
    usage = charts["Top-1 usage"]
    for said in ("16 slots, 2 heads, knn 3", "25 slots", "layer 1", "layer 2", "split train"):
        assert said in usage, said
    expected = logs[1].records[0]["layers"][0]["top1_usage"]
    assert f"b, layer 1, valid: {expected:.4g} at update 10" in usage
    rows = tables.log_rows(logs)
    assert [row[:5] for row in rows][-1] == ["b", "25 slots, 2 heads, knn 3", "1", "valid", "10"]
    assert len(rows) == 5


def test_a_single_count_is_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line needs two."""
    drawn: List[Any] = []
    monkeypatch.setattr(curves, "below", lambda axes, _: drawn.extend(axes.get_lines()))
    monkeypatch.setattr(curves, "METRICS", curves.METRICS[:1])
    counts = [record(10, "valid"), record(20, "valid"), record(15, "train")]
    curves.draw_curves([curves.read_log("a", write_log(tmp_path / "a", counts))])
    found = {(len(x.get_xdata()), x.get_marker() != "None") for x in drawn if x.get_linewidth() > 1}
    assert found == {(2, False), (1, True)}


def checkpoint_report(
    file: str, updates: Any, layers: Any = (1, 2), origin: Any = None
) -> Dict[str, Any]:
    found = record(updates or 0, "", layers=layers)["layers"]
    for layer in found:
        layer["knn"] = 3
    more = {"updates": updates, "layers": found, "shared": None}
    origins = None if origin is None else {str(layer): [origin] * 8 for layer in layers}
    return {"name": file, "checkpoint": file, "origins": origins, **more}


def test_checkpoints_of_a_training_make_a_curve_and_a_lone_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curves, "METRICS", curves.METRICS[:1])
    reports = [
        checkpoint_report("x/arm/last.pt", 30),
        checkpoint_report("x/arm/first.pt", 10),
        checkpoint_report("x/other/last.pt", 30),
        checkpoint_report("x/arm/of_other_layers.pt", 20, (1,)),
        checkpoint_report("y/arm/a.pt", 5),
        checkpoint_report("y/arm/b.pt", 6),
        checkpoint_report("y/arm/unknown.pt", None),
    ]
    first, second = curves.logs_of_checkpoints(reports, "test")
    assert first.name.endswith("x/arm") and second.name.endswith("y/arm")  # not both "arm"
    assert curves.logs_of_checkpoints(reports[:2], "test")[0].name == "arm, checkpoints"
    updates, ginis = curves.series(first, "test", "2", ("gini",))
    assert updates == [10, 30]
    assert ginis == [reports[1]["layers"][1]["gini"], reports[0]["layers"][1]["gini"]]
    usage = curves.draw_curves([first])[0].svg
    assert "split test" in usage and "at update 30" in usage
    assert curves.draw_curves(curves.logs_of_checkpoints(reports[2:3], "test")) == []


def test_two_trainings_in_one_folder_make_two_curves() -> None:
    reports = [
        checkpoint_report("x/arm/a10.pt", 10, origin=7),
        checkpoint_report("x/arm/b10.pt", 10, origin=9),
        checkpoint_report("x/arm/a20.pt", 20, origin=7),
        checkpoint_report("x/arm/b30.pt", 30, origin=9),
    ]
    first, second = curves.logs_of_checkpoints(reports, "test")
    found = [curves.series(log, "test", "1", ("gini",)) for log in (first, second)]
    expected = [([10, 20], [reports[0], reports[2]]), ([10, 30], [reports[1], reports[3]])]
    for (updates, ginis), (at, of) in zip(found, expected, strict=True):
        assert updates == at and ginis == [report["layers"][0]["gini"] for report in of]
    assert first.name != second.name
    assert first.name.endswith("x/arm, a10.pt to a20.pt")
    assert second.name.endswith("x/arm, b10.pt to b30.pt")


def test_checkpoints_without_an_origin_belong_to_the_training_of_their_folder() -> None:
    old = [checkpoint_report(f"x/arm/{updates}.pt", updates) for updates in (1, 2)]
    new = [checkpoint_report(f"x/arm/{updates}.pt", updates, origin=7) for updates in (3, 4)]
    (log,) = curves.logs_of_checkpoints([old[0], *new, old[1]], "test")
    assert curves.series(log, "test", "1", ("gini",))[0] == [1, 2, 3, 4]
    other = [checkpoint_report(f"x/arm/other{updates}.pt", updates, origin=9) for updates in (3, 4)]
    logs = curves.logs_of_checkpoints([*old, *new, *other], "test")  # of which is not known
    assert [curves.series(log, "test", "1", ("gini",))[0] for log in logs] == [
        [1, 2], [3, 4], [3, 4]
    ]  # fmt: skip
    assert len({log.name for log in logs}) == 3


def test_checkpoints_that_cannot_be_compared_still_stand_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("memories are in layers [0] before, [1] after")

    def opened(name: str, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(name=name, masking=None)

    monkeypatch.setattr(analyse, "open_checkpoint", opened)
    monkeypatch.setattr(analyse, "_drift", refuse)
    monkeypatch.setattr(analyse, "_text_for", lambda *_: [])
    monkeypatch.setattr(
        analyse,
        "examine",
        lambda opened, *_: examine.Examined(
            {"name": opened.name, "layers": [{"layer": 1, "draws_per_slot": draws[opened.name]}]},
            {},
        ),
    )
    draws = {"a": 100, "b": 23.4}
    args = Namespace(checkpoint=["a=x", "b=y"], log=[], data="d", text=None, split="valid", hot=1)
    args.unmasked = True
    args.force_drift, args.save_counts = False, None
    warnings: List[str] = []
    found = analyse.analyse(args, lambda *_: lambda n: None, warnings.append).report
    assert [checkpoint["name"] for checkpoint in found["checkpoints"]] == ["a", "b"]
    assert found["drift"] == []
    assert found["notes"] == warnings
    drift, unequal = warnings
    assert drift == "no drift from a to b: memories are in layers [0] before, [1] after"
    assert "a, layer 1: 100; b, layer 1: 23.4" in unequal
    assert "at 23.4 draws per slot or fewer" in unequal


def opened_of(model: Any, folder: str, file: str = "last.pt") -> checkpoints.Opened:
    """As much of an opened checkpoint as says what it may be compared with."""
    state = {} if model is None else model.state_dict()
    origins = checkpoints.origins_of({"model": state})
    return checkpoints.Opened(
        folder, Path(folder) / file, None, None, None, True, origins=origins
    )  # fmt: skip


def test_drift_is_of_checkpoints_of_one_training() -> None:
    dictionary = small_dictionary()

    def model_of(arch: str = "resm_roberta_tiny", seed: int = 0) -> Any:
        return build(arch, dictionary, seed=seed)

    start = opened_of(model_of(), "start")
    reason = checkpoints.why_not_one_training
    later = model_of(seed=5)
    later.load_state_dict(model_of().state_dict())  # a restart, or finetuning
    averaged = model_of()
    with torch.no_grad():
        for tensor in averaged.state_dict().values():
            tensor.copy_((tensor.half() * 0.3 + tensor.half() * 0.7) if tensor.dim() else tensor)
    assert reason(start, opened_of(later, "later")) is None
    assert reason(start, opened_of(averaged, "averaged")) is None
    for other in (model_of(seed=1), model_of("pkm_roberta_tiny")):  # of another mode: one seed
        assert "different trainings" in str(reason(start, opened_of(other, "other")))
        assert "different trainings" in str(reason(start, opened_of(other, "start", "x.pt")))
    old = opened_of(None, "old")
    assert reason(old, opened_of(None, "old", "half.pt")) is None
    assert "an older version" in str(reason(old, start))


def test_drift_of_different_trainings_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyse, "why_not_one_training", lambda *_: "of two")
    args = Namespace(force_drift=False)
    with pytest.raises(ValueError, match=r"of two \(--force-drift"):
        analyse._drift(args, *[SimpleNamespace()] * 2)
    args.force_drift = True
    with pytest.raises(AttributeError, match="model"):  # it goes on
        analyse._drift(args, *[SimpleNamespace()] * 2)


def test_a_shared_table_is_as_fresh_as_its_latest_reader() -> None:
    layers = {}
    for layer, (read, top1) in {0: ([5, 0], [1, 0]), 2: ([3, 9], [4, 0])}.items():
        reads = ReadTimes(2)
        reads.last_read.copy_(torch.tensor(read))
        reads.last_top1.copy_(torch.tensor(top1))
        layers[layer] = SimpleNamespace(reads=reads)
    model = SimpleNamespace(memory_layers=lambda: layers)
    opened: Any = SimpleNamespace(model=model, updates=10, has_read_times=True)
    shared = examine.staleness_in(opened, [0, 2])
    assert shared is not None
    assert (shared["read"]["p10"], shared["read"]["p99"]) == (1, 5)
    assert (shared["top1"]["p10"], shared["top1"]["p99"], shared["top1"]["never"]) == (6, 10, 0.5)
    counted = {"name": "a", "layers": [], "shared": {"staleness": shared}}
    assert [row[:3] for row in tables.staleness_rows([counted])] == [["a", "shared", "10"]]


def test_charts_whose_names_differ_in_signs_only_are_all_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = ["Layer 1, lr 1: usage", "Layer 1, lr-1: usage", "Layer 1, LR/1: usage",
              "Layer 1, lr 1: usage 2", "Top-1 usage"]  # fmt: skip
    charts = [plots.Chart(title, "", Markup(f"<svg>{title}</svg>")) for title in titles]
    monkeypatch.setattr(page, "charts_of_checkpoints", lambda *_: {1: charts[:4]})
    monkeypatch.setattr(page, "_curves", lambda _: charts[4:])
    page.write_charts(analyse.Analysis({"checkpoints": []}, [], [], None), tmp_path)
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert sorted(text.split(">")[1].split("<")[0] for text in written.values()) == sorted(titles)
    assert list(sorted(written)) == [
        *("layer_1_lr_1_usage.svg", "layer_1_lr_1_usage_2.svg", "layer_1_lr_1_usage_2_2.svg"),
        *("layer_1_lr_1_usage_3.svg", "top_1_usage.svg"),
    ]


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "nothing to analyse"),
        ({"checkpoint": ["a"]}, "needs a text"),
        ({"checkpoint": ["a"], "data": "d", "tokens": 0}, "--tokens is 0, must be at least 1"),
        ({"checkpoint": ["a"], "data": "d", "draws": 0}, "--draws is 0, must be at least 1"),
        ({"checkpoint": ["a"], "data": "d", "draws": 3, "tokens": 5}, "give one of them"),
        ({"log": ["a"], "draws": 7}, "--draws has no effect without --checkpoint"),
        (
            {"checkpoint": ["a"], "data": "d", "force_drift": True},
            "--force-drift has no effect without two",
        ),
        ({"log": ["a"], "unmasked": True}, "--unmasked has no effect without --checkpoint"),
        ({"checkpoint": ["a"], "data": "d", "hot": 0}, "--hot is 0"),
        ({"checkpoint": ["a"], "data": "d", "probe": 5}, "--probe has no effect without two"),
        ({"checkpoint": ["a", "b"], "data": "d", "probe": -1}, "--probe is -1"),
        ({"checkpoint": ["a"], "data": "d", "dict": "d"}, "--dict has no effect without --text"),
        ({"checkpoint": ["a"], "text": "t", "split": "v"}, "--split has no effect without --data"),
        ({"log": ["a"], "data": "d"}, "--data has no effect without --checkpoint"),
        ({"log": ["a"], "tokens": 7}, "--tokens has no effect without --checkpoint"),
    ],
)
def test_options_that_are_impossible_or_without_effect(given: Dict[str, Any], match: str) -> None:
    names = ("data", "text", "split", "sentencepiece_model", "dict", "tokens", "hot", "probe")
    args = Namespace(checkpoint=[], log=[], unmasked=False, force_drift=False)
    vars(args).update(dict.fromkeys((*names, "draws", "save_counts", "counts_batch")))
    vars(args).update(given)
    with pytest.raises(ValueError, match=match):
        analyse.check_options(args)

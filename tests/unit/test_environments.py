"""Environments in which numba is there and cannot run: torch's kernels, and one line that says so.

A processor other than that for which numba's cache was filled cannot be had here; numba keeps the
processor's name in the index of its cache and compiles anew.
"""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import pkm_fairseq
from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory
from pkm_fairseq.memory.kernels import backends

pytest.importorskip("numba")

ROOT = Path(pkm_fairseq.__file__).parents[1]
WORDS = "memory kernels: torch on cpu in float32, which is slower: numba cannot run here "

# a step of training, and what the memory logged
STEP = """
import json, logging, sys
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append([record.levelname, record.getMessage()])
logging.getLogger("pkm_fairseq").addHandler(handler)
logging.getLogger("pkm_fairseq").setLevel(logging.INFO)
import torch
from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory

def step(n=6):
    torch.manual_seed(0)
    memory = ProductKeyMemory(16, MemoryConfig(n_keys=16, heads=2, knn=4, k_dim=8))
    y = memory(torch.randn(n, 16))
    y.square().sum().backward()
    return [float(y.detach().sum()), float(memory.values.weight.grad.norm())]
"""


def run(script, folder=None, **environment):
    """Run the step and a script in a process of its own; what it prints as JSON."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "PKM_"))}
    env.update({"PYTHONPATH": str(folder or ROOT), "OMP_NUM_THREADS": "2"}, **environment)
    done = subprocess.run(
        [sys.executable, "-c", STEP + script], env=env, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PRINT = "result = step(); print(json.dumps([result, lines, torch.get_num_threads()]))"


@pytest.fixture
def right(monkeypatch):
    """What the step gives with torch alone."""
    monkeypatch.setenv("PKM_BACKEND", "torch")
    torch.manual_seed(0)
    memory = ProductKeyMemory(16, MemoryConfig(n_keys=16, heads=2, knn=4, k_dim=8))
    y = memory(torch.randn(6, 16))
    y.square().sum().backward()
    return [float(y.detach().sum()), float(memory.values.weight.grad.norm())]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("NUMBA_DISABLE_JIT", "1", "(NUMBA_DISABLE_JIT is set)"),
        ("NUMBA_THREADING_LAYER", "unknown", "(The threading layer requested 'unknown' is"),
        ("NUMBA_THREADING_LAYER", "tbb", "(No threading layer could be loaded."),
        ("NUMBA_NUM_THREADS", "0", "(Number of threads specified must be > 0.)"),
    ],
)
def test_a_setting_with_which_numba_cannot_start(right, name, value, reason):
    if value == "tbb" and importlib.util.find_spec("tbb"):
        pytest.skip("tbb is installed")
    result, lines, threads = run(PRINT, **{name: value})
    assert [(level, line.startswith(WORDS + reason)) for level, line in lines] == [
        ("WARNING", True)
    ]
    assert "\n" not in lines[0][1]
    assert result == pytest.approx(right, rel=1e-4)
    assert threads == 2


@pytest.mark.parametrize(
    ("name", "value"), [("NUMBA_NUM_THREADS", "1"), ("NUMBA_THREADING_LAYER", "workqueue")]
)
def test_a_setting_with_which_numba_runs(right, name, value):
    """Among them fewer threads than torch has, and a pool that aborts when two threads use it."""
    script = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    list(pool.map(step, [300] * 20))
"""
    result, lines, threads = run(script + PRINT, **{name: value})
    assert lines == [["INFO", "memory kernels: numba on cpu in float32"]]
    assert result == pytest.approx(right, rel=1e-4)
    assert threads == 2


BROKEN = {
    "llvmlite": 'raise OSError("libllvmlite.so: cannot open\\nshared object file")',
    "numba": "",  # an empty package
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_installation_that_is_broken(right, name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(BROKEN[name])
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result, lines, _ = run(PRINT, folder=path)
    assert [(level, line.startswith(WORDS)) for level, line in lines] == [("WARNING", True)]
    assert "\n" not in lines[0][1]
    assert result == pytest.approx(right, rel=1e-4)


@pytest.fixture
def copied(tmp_path):
    """A copy of the package without what was compiled, and an environment without other caches."""
    shutil.copytree(
        ROOT / "pkm_fairseq", tmp_path / "pkm_fairseq", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path, {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache"}


def test_no_folder_for_the_cache(right, copied):
    folder, environment = copied
    (folder / "pkm_fairseq/memory/kernels/__pycache__").touch()  # a file: nobody can write there
    result, lines, _ = run(PRINT, folder=folder, PYTHONDONTWRITEBYTECODE="1", **environment)
    assert [(level, line.startswith(WORDS + "(cannot cache")) for level, line in lines] == [
        ("WARNING", True)
    ]
    assert result == pytest.approx(right, rel=1e-4)


def test_a_cache_that_vanishes_before_the_first_kernel(right, copied):
    """It was there when the kernels were chosen; what then cannot be compiled runs in torch."""
    folder, environment = copied
    script = """
import os, shutil
from pkm_fairseq.memory.kernels import backends, numba_backend
cache = os.path.join(os.path.dirname(numba_backend.__file__), "__pycache__")
shutil.rmtree(cache)
open(cache, "w").close()
"""
    result, lines, _ = run(script + PRINT, folder=folder, **environment)
    (first, *_), (second, warning) = lines
    assert (first, second) == ("INFO", "WARNING")
    assert warning.startswith(WORDS + "([Errno ")
    assert result == pytest.approx(right, rel=1e-4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_children_run_torch_on_one_thread_and_say_so(right):
    """They would be killed by numba's OpenMP, or wait for ever for torch's threads."""
    script = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from torch.utils.data import DataLoader, Dataset

fork = multiprocessing.get_context("fork")

def child(n):
    signal.alarm(300)  # a child that waits for ever ends
    before = len(lines)
    return [step(n), lines[before:], torch.get_num_threads()]

class Steps(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return json.dumps(child(6))

parent = step(), step(2000)
read, write = os.pipe()
if not os.fork():
    os.write(write, json.dumps([child(6), child(2000)]).encode())
    os._exit(0)
os.close(write)
with os.fdopen(read) as pipe:
    forked = json.loads(pipe.read())
assert os.wait()[1] == 0
with ProcessPoolExecutor(1, mp_context=fork) as pool:
    pooled = list(pool.map(child, [6]))
loader = DataLoader(Steps(), num_workers=1, multiprocessing_context=fork)
loaded = [json.loads(x) for [x] in loader]
again = step()
print(json.dumps([parent, forked, pooled, loaded, again, lines]))
"""
    (small, large), forked, pooled, loaded, again, lines = run(script)
    assert lines == [["INFO", "memory kernels: numba on cpu in float32"]]
    line = (
        "memory kernels: torch on cpu in float32, which is slower: "
        "this process was forked from one that ran numba"
    )
    (first, said, threads), (second, said_again, _) = forked
    assert (said, said_again, threads) == ([["WARNING", line]], [], 1)
    assert pooled[0][1] == loaded[0][1] == [["WARNING", line]]
    for result in (small, again, first, pooled[0][0], loaded[0][0], loaded[1][0]):
        assert result == pytest.approx(right, rel=1e-4)
    assert second == pytest.approx(large, rel=1e-4)


def test_several_threads_at_once():
    def step(seed, results):
        memory = memories[seed]
        for _ in range(5):
            memory.zero_grad()
            memory(inputs[seed]).square().sum().backward()
        results[seed] = memory.values.weight.grad

    torch.manual_seed(0)
    config = MemoryConfig(n_keys=16, heads=2, knn=4, k_dim=8, query_norm="layer")
    memories = [ProductKeyMemory(16, config) for _ in range(4)]
    inputs = torch.randn(4, 300, 16)
    one_by_one, at_once = {}, {}
    for seed in range(4):
        step(seed, one_by_one)
    backends.choose_anew()
    threads = [threading.Thread(target=step, args=(seed, at_once)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(at_once[seed], one_by_one[seed]) for seed in range(4))


def test_a_kernel_that_cannot_be_compiled_leaves_its_work_to_torch(monkeypatch, caplog):
    from pkm_fairseq.memory.kernels import numba_backend

    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.delenv("PKM_BACKEND", raising=False)
    monkeypatch.setattr(numba_backend, "_compiled", set())
    monkeypatch.setattr(numba_backend, "_cache_locked", fail)
    backends.choose_anew()
    memory = ProductKeyMemory(16, MemoryConfig(n_keys=16, heads=2, knn=4, k_dim=8))
    x = torch.randn(6, 16)
    try:
        with caplog.at_level(logging.WARNING):
            found = memory(x)
            found.sum().backward()
    finally:
        backends.choose_anew()
    assert [r.getMessage() for r in caplog.records] == [
        WORDS + "([Errno 28] No space left on device)"
    ]
    monkeypatch.undo()
    slots, weights = memory.eval().search(x)
    assert torch.allclose(
        memory(x), (weights[..., None] * memory.values.weight[slots]).sum((1, 2)), atol=1e-5
    )

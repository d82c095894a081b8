"""Describe the machine: names, versions, free memory, and the speed of memcpy."""

import ctypes
import os
import platform
import threading
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from torch import Tensor

from ...memory import kernels
from ...memory.kernels import allocate
from .timing import time_once

PROC = Path("/proc")
PACKAGES = ("torch", "numpy", "numba", "ve-fairseq", "fairseq-fixed", "product-key-memory")
COPIED = 512 << 20  # bytes, more than most caches hold
SAMPLING = 1e-3  # seconds between samples of the memory in use, if the system records no peak


def describe() -> Dict[str, Any]:
    """The machine and the versions, ready for JSON."""
    return {
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_kib(PROC / "meminfo", "MemTotal") / 2**20, 1),
        "huge_pages": _huge_pages(),
        "device": "cpu",
        "dtype": "float32",
        "backend": kernels.backend_for(torch.empty(0))
        .__name__.rpartition(".")[2]
        .removesuffix("_backend"),
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> Dict[str, Optional[str]]:
    """Versions of the packages that matter; None for one that is not installed."""
    return {name: installed(name) for name in PACKAGES}


def installed(name: str) -> Optional[str]:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, if the system provides it."""
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def available_bytes() -> int:
    """Free memory."""
    return _kib(PROC / "meminfo", "MemAvailable") * 1024


class Memcpy:
    """The machine's own memcpy, on as many threads as torch uses.

    Bytes are counted as read plus written; the pages are those of a value table.
    """

    def __init__(self, n_bytes: Optional[int] = None) -> None:
        self.rows = (COPIED if n_bytes is None else n_bytes) >> 12
        self.n_bytes = 2 * self.rows << 12
        self.gb_s: List[float] = []
        self.blocks: List[Tensor] = []

    def __call__(self) -> None:
        """Copy once."""
        if not self.blocks:
            self.blocks = [allocate(self.rows, 1024, torch.float32).zero_() for _ in range(2)]
        self.blocks[1].copy_(self.blocks[0])

    def release(self) -> None:
        """Release the memory until the next copy."""
        self.blocks = []

    def measure(self, times: int = 5) -> None:
        """Copy several times and record the speed."""
        self()  # the first touches new pages
        self.note([time_once(self) for _ in range(times)])
        self.release()

    def note(self, seconds: List[float]) -> List[float]:
        """Record copies that were timed elsewhere; return their GB/s."""
        speeds = [self.n_bytes / took / 1e9 for took in seconds]
        self.gb_s += speeds
        return speeds

    def median_gb_s(self) -> float:
        """The median of all recorded speeds."""
        return median(self.gb_s)


def resident_bytes() -> int:
    """Memory that this process has in use."""
    return _kib(PROC / "self/status", "VmRSS") * 1024


def peak_bytes(step: Callable[[], object]) -> int:
    """The most memory this process has in use while a step runs."""
    if _reset_peak():
        step()
        return _kib(PROC / "self/status", "VmHWM") * 1024
    with _sampled() as samples:
        step()
    return max(samples)


def release_free_memory() -> None:
    """Make the allocator release unused memory, so that it does not count as in use."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _reset_peak() -> bool:
    """Reset Linux' record of the peak memory in use; this may be forbidden."""
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def _sampled() -> Iterator[List[int]]:
    samples, done = [resident_bytes()], threading.Event()

    def sample() -> None:
        while not done.is_set():
            samples.append(resident_bytes())
            time.sleep(SAMPLING)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield samples
    finally:
        done.set()
        sampler.join()
        samples.append(resident_bytes())


def _kib(file: Path, key: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ValueError(f"{file} does not say {key}")


def _huge_pages() -> Optional[str]:
    """Whether the system provides large pages: "always", "madvise" (on request) or "never"."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None

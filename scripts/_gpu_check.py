"""Run the CUDA tests in under ten minutes, on a machine without network.

Into OUT go result.json, outcomes.jsonl (one line a test) and log.txt; what was finished is kept
when time runs out. Exit status: 0 all passed, 1 something failed or ran out of time, 2 a mistake
in the arguments, or no CUDA device.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from _script import Parser, take_interrupts

ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = "PKM_GPU_OUTCOMES"  # the environment variable that names the file of outcomes
BUDGET = 570.0  # seconds for everything
# beside torch, triton, numba, transformers, accelerate, scikit-learn, sentencepiece and pytest
TRAVEL = (
    *("hydra-core", "omegaconf", "bitarray", "regex", "tqdm", "sacrebleu", "portalocker"),
    *("tabulate", "colorama", "lxml", "hypothesis", "sortedcontainers", "pytest-xdist", "execnet"),
)
ANTLR = "antlr4-python3-runtime==4.9.3"  # of hydra; there is no wheel of it to be had
GLIBC = ("2_28", "2_27", "2_26", "2_17")
PACKAGES = ("torch", "triton", "numba", "transformers", "numpy", "pytest", "ve-fairseq")
# name, seconds, what pytest runs
STEPS: List[Tuple[str, float, Tuple[str, ...]]] = [
    ("kernels on CUDA", 240, ("tests/gpu/test_triton_gpu.py",)),
    ("trainings on CUDA", 240, ("tests/gpu/test_mixed_precision_gpu.py",)),
    ("core with these versions", 120, ("tests/unit/test_memory.py", "tests/unit/test_tracing.py")),
]
INSTALL = 120.0  # seconds
BENCHMARK = "left out: scripts/benchmark_memory.py measures on the CPU only"


def parse(argv: Optional[List[str]] = None) -> Any:
    """Read the command line."""
    parser = Parser(prog="gpu_check", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument(
        "wheels",
        nargs="?",
        type=Path,
        metavar="WHEELS",
        help="folder to install from (default: wheels)",
    )
    parser.add_argument(
        "--collect", type=Path, metavar="WHEELS", help="only fill this folder, with a registry"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: install, and collect the tests"
    )
    args = parser.parse_args(argv)
    if (args.out is None) == (args.collect is None) or (args.collect and args.dry_run):
        parser.error("give either OUT [WHEELS] [--dry-run] or --collect WHEELS")
    args.wheels = args.wheels or ROOT / "wheels"
    if args.out and not list(args.wheels.glob("*.whl")):
        parser.error(f"{args.wheels} holds no wheels; --collect {args.wheels} fills it")
    if args.out and args.out.exists() and (not args.out.is_dir() or list(args.out.iterdir())):
        parser.error(f"{args.out} must be a new or an empty folder")
    return args


# --- what travels -------------------------------------------------------------------------------


def collect(wheels: Path) -> None:
    """Download what the CUDA machine lacks, at the versions of requirements/, for Python 3.12."""
    pip = [sys.executable, "-m", "pip"]
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    target += [f"--platform=manylinux_{version}_x86_64" for version in GLIBC]
    download = [*pip, "download", "-q", "--no-deps", "-d", str(wheels), *target]
    requirements = ROOT / "requirements"
    pinned = ["--require-hashes", "-r", str(requirements / "fairseq-ve.txt")]
    for command in (
        [*download, *pinned],
        [*download, "-c", str(requirements / "base.txt"), *TRAVEL],
        [*pip, "wheel", "-q", "--no-deps", "-w", str(wheels), ANTLR],
    ):
        subprocess.run(command, check=True)
    size = sum(wheel.stat().st_size for wheel in wheels.glob("*.whl"))
    print(f"gpu_check: {wheels} holds {size / 2**20:.0f} MiB")


def install(wheels: Path, folder: Path, log: Any) -> Path:
    """A Python with the wheels over all that this one has; this one stays as it is."""
    run = {"stdout": log, "stderr": log, "check": True, "timeout": INSTALL}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], **run)
    python = folder / "bin/python"
    print_site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", print_site], capture_output=True, text=True, check=True)
    here = [path for path in sys.path if path.endswith("-packages")]
    (Path(found.stdout.strip()) / "beside.pth").write_text("\n".join(here) + "\n")
    pip = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed"]
    subprocess.run([*pip, "--no-compile", *sorted(wheels.glob("*.whl"))], **run)
    return python


# --- pytest loads this file as a plugin -----------------------------------------------------------


def pytest_runtest_logreport(report: Any) -> None:
    """Keep each outcome at once, so that a killed run loses none."""
    mine = OUTCOMES in os.environ and "PYTEST_XDIST_WORKER" not in os.environ
    if mine and (report.when == "call" or report.outcome != "passed"):
        line = json.dumps({"test": report.nodeid, "outcome": report.outcome, "when": report.when})
        with open(os.environ[OUTCOMES], "a") as file:
            file.write(line + "\n")


def summary(outcomes: Path) -> Dict[str, Any]:
    """How many tests passed, failed and were skipped, and the names of those that failed."""
    lines = outcomes.read_text().splitlines() if outcomes.exists() else []
    found = {outcome["test"]: outcome["outcome"] for outcome in map(json.loads, lines)}
    count = Counter(found.values())
    failed = [test for test, outcome in found.items() if outcome == "failed"]
    return {**{key: count[key] for key in ("passed", "failed", "skipped")}, "names": failed}


# --- the steps ----------------------------------------------------------------------------------


def device() -> Optional[str]:
    """The name of the CUDA device, if torch sees one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions(python: str) -> Dict[str, str]:
    """What the tests run with."""
    pip = [python, "-m", "pip", "list", "--format=json"]
    listed = json.loads(subprocess.run(pip, capture_output=True, check=True).stdout)
    found = {package["name"]: package["version"] for package in listed}
    return {name: found[name] for name in PACKAGES if name in found}


class Check:
    """The results so far; they are written after every step.

    Args:
        out: where they are written.
        device: the name of the CUDA device.
        dry_run: whether tests are only collected.
    """

    def __init__(self, out: Path, device: Optional[str], dry_run: bool) -> None:
        self.out, self.dry_run, self.began = out, dry_run, time.monotonic()
        self.result: Dict[str, Any] = {"device": device, "dry_run": dry_run, "steps": []}
        self.result["benchmark"] = BENCHMARK
        self.result["versions"] = {"python": platform.python_version()}
        out.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        """Write result.json."""
        self.result["tests"] = summary(self.out / "outcomes.jsonl")
        self.result["seconds"] = round(time.monotonic() - self.began, 1)
        text = json.dumps(self.result, indent=2) + "\n"
        (self.out / "result.json").write_text(text)

    def ended(self, name: str, began: float, status: str) -> None:
        """Note how a step ended."""
        seconds = round(time.monotonic() - began, 1)
        self.result["steps"].append({"name": name, "status": status, "seconds": seconds})
        self.save()
        print(f"gpu_check: {name}: {status}, {seconds:.0f} s", flush=True)

    def install(self, wheels: Path, folder: Path, log: Any) -> Optional[str]:
        """The Python that runs the tests, if it could be made."""
        began, status, python = time.monotonic(), "done", None
        try:
            python = str(install(wheels, folder, log))
            self.result["versions"].update(versions(python))
        except subprocess.TimeoutExpired:
            status = "out of time"
        except subprocess.CalledProcessError:
            status = "failed"
        self.ended("install", began, status)
        return python

    def run(self, python: str, name: str, limit: float, tests: Tuple[str, ...], log: Any) -> None:
        """One step, in a group of processes that ends with it."""
        began = time.monotonic()
        left = min(limit, BUDGET - (began - self.began))
        if left <= 0:
            return self.ended(name, began, "out of time")
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        how = ["--collect-only", "-q"] if self.dry_run else ["-n", str(workers), "-q"]
        command = [python, "-m", "pytest", "-p", "_gpu_check", *how, *tests]
        path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
        env = {**os.environ, "PYTHONPATH": path, OUTCOMES: str(self.out / "outcomes.jsonl")}
        env.pop("PYTEST_XDIST_WORKER", None)  # of a test that calls this: there it is no worker
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = process.wait(left)
            self.ended(name, began, "done" if status == 0 else f"failed (pytest: {status})")
        except subprocess.TimeoutExpired:
            self.ended(name, began, "out of time")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self.save()


def check(args: Any) -> int:
    """Install, run every step, write what was found."""
    found = device()
    if found is None and not args.dry_run:
        print("gpu_check: error: torch sees no CUDA device (--dry-run needs none)", file=sys.stderr)
        return 2
    out = args.out.absolute()
    todo = Check(out, found, args.dry_run)
    with open(out / "log.txt", "w") as log, tempfile.TemporaryDirectory() as folder:
        python = todo.install(args.wheels, Path(folder) / "env", log)
        for name, limit, tests in STEPS if python else ():
            todo.run(str(python), name, limit, tests, log)
    print(f"gpu_check: {json.dumps(todo.result['tests'])}")
    return int(any(step["status"] != "done" for step in todo.result["steps"]))


def main(argv: Optional[List[str]] = None) -> int:
    """Run; a user's mistake is one line and status 2."""
    args = parse(argv)
    if args.collect:
        try:
            collect(args.collect)
        except subprocess.CalledProcessError as error:
            print(f"gpu_check: error: {error}", file=sys.stderr)
            return 1
        return 0
    return check(args)


if __name__ == "__main__":
    take_interrupts()  # SIGTERM ends the group of a step, too
    sys.exit(main())

"""Who may import whom, and what importing does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pkm_fairseq

PACKAGE = Path(pkm_fairseq.__file__).parent

# part -> our own parts it may import; what a part imports of itself is its own business
ALLOWED = {
    "memory": set(),
    "compat": {"files"},
    "validation": {"memory"},
    "models": {"memory", "compat"},
    "criterions": {"memory", "models", "compat", "files"},
    "tasks": {"memory", "models", "compat"},
    "optim": {"memory", "models", "compat"},
    "files": set(),
    "data": {"memory"},
    "demo": {"memory", "data", "models", "files"},
    "analysis": {"memory", "data", "models", "criterions", "demo", "files", "__version__"},
    "glue": {"memory", "data", "models", "criterions", "analysis", "demo", "files"},
    "benchmark": {"memory", "models", "optim"},
    "faults": {"models", "criterions", "demo", "files"},
}
# part -> packages it must never import
FORBIDDEN = {
    "memory": {"fairseq", "faiss", "omegaconf", "hydra"},
    "validation": {"fairseq", "omegaconf", "hydra"},
    **{part: {"faiss"} for part in ("compat", "models", "criterions", "tasks", "optim")},
    **{part: {"faiss"} for part in ("data", "demo", "benchmark", "analysis", "glue", "files")},
    "faults": {"faiss"},
}


def imported(source, module, is_package=False):
    """Full dotted names of everything that the source of ``module`` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def part_of(name):
    """The part of our package that a dotted name belongs to; None for others' packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "pkm_fairseq" and len(parts) > 1 else None


def violations(source, module, is_package=False):
    part = part_of(module)
    names = imported(source, module, is_package)
    wrong = {n for n in names if part_of(n) not in {None, part, *ALLOWED[part]}}
    return wrong | {n for n in names if n.split(".")[0] in FORBIDDEN[part]}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        if part_of(name) is not None and name != "pkm_fairseq.__main__":
            yield path, name, is_package


def test_every_part_imports_only_what_the_design_allows():
    seen = set()
    for path, name, is_package in modules():
        seen.add(part_of(name))
        assert not violations(path.read_text(encoding="utf-8"), name, is_package), name
    assert {"memory", "models", "criterions", "tasks", "optim"} <= seen
    assert seen <= set(ALLOWED), "a new part: say here what it may import"


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("import fairseq", "pkm_fairseq.memory.layer", False),
        ("from fairseq.data import Dictionary", "pkm_fairseq.memory.layer", False),
        ("def f():\n    import faiss", "pkm_fairseq.memory.layer", False),
        ("from ..models import roberta", "pkm_fairseq.memory.layer", False),
        ("from .. import models", "pkm_fairseq.memory.layer", False),
        ("from ..models import roberta", "pkm_fairseq.memory", True),
        ("from . import models", "pkm_fairseq.compat", False),
        ("import pkm_fairseq.models.roberta", "pkm_fairseq.memory.layer", False),
        ("from pkm_fairseq.tasks import common", "pkm_fairseq.models.roberta", False),
        ("from ..optim import pkm_adam", "pkm_fairseq.models.roberta", False),
        ("from ..criterions import usage", "pkm_fairseq.tasks.common", False),
        ("from ..criterions import usage", "pkm_fairseq.tasks", True),
        ("from ..models import roberta", "pkm_fairseq.validation.report", False),
        ("import fairseq.options", "pkm_fairseq.validation.report", False),
        ("import faiss", "pkm_fairseq.models.roberta", False),
    ],
)
def test_a_forbidden_import_is_noticed(source, module, is_package):
    assert violations(source, module, is_package)


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("from .config import MemoryConfig", "pkm_fairseq.memory.layer", False),
        ("from . import roberta", "pkm_fairseq.models", True),
        ("from ..memory import MemoryConfig\nimport fairseq", "pkm_fairseq.models.config", False),
        ("from ..models.init_from import f", "pkm_fairseq.tasks.common", False),
        ("import faiss", "pkm_fairseq.validation.report", False),
    ],
)
def test_an_allowed_import_is_allowed(source, module, is_package):
    assert not violations(source, module, is_package)


def run_python(code):
    """Standard output of a fresh Python; it must end well."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_prints_nothing_and_configures_no_logging():
    code = """
import logging, sys
import fairseq.options, fairseq.tasks, fairseq.models, fairseq.criterions  # what they do is theirs
handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
print("before", flush=True)
import pkm_fairseq
assert logging.getLogger().handlers == handlers
assert logging.getLogger().level == level
assert not logging.getLogger("pkm_fairseq").handlers
"""
    assert run_python(code).splitlines()[-1] == "before"


def test_the_core_works_without_fairseq():
    code = """
import sys
for name in ("fairseq", "omegaconf", "hydra", "faiss", "numba", "triton"):
    sys.modules[name] = None  # not installed
import torch, pkm_fairseq
from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory
memory = ProductKeyMemory(8, MemoryConfig(n_keys=4, knn=2, k_dim=4))
memory(torch.randn(3, 8)).sum().backward()
assert not [m for m in sys.modules if m.startswith("pkm_fairseq.") and ".memory" not in m]
print("works")
"""
    assert run_python(code) == "works\n"

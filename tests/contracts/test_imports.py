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
    "compat": {"errors", "memory"},
    "validation": {"memory"},
    "errors": set(),
    "plugin": {"errors", "compat", "models", "criterions", "tasks", "optim"},
    "models": {"memory", "compat", "plugin", "errors"},
    "criterions": {"memory", "models", "compat", "plugin", "errors"},
    "tasks": {"memory", "models", "compat", "plugin"},
    "optim": {"memory", "models", "compat", "plugin", "errors"},
    "huggingface": {"memory"},
    "settings": {"memory", "models", "criterions", "optim"},
    "analysis": {"memory", "models", "__version__"},
    "experiments": set(),
    "experiments.runs": {"memory", "models"},
    "experiments.data": {"memory", "experiments.runs"},
    "experiments.demo": {"memory", "models", "analysis", "experiments.runs", "experiments.data",
                         "experiments.facts"},
    "experiments.glue": {"memory", "models", "criterions", "analysis", "experiments.runs",
                         "experiments.data"},
    "experiments.benchmark": {"memory", "experiments.runs"},
    "experiments.facts": {"memory", "experiments.runs", "experiments.data"},
    "experiments.convert": {"memory", "models", "huggingface"},
}  # fmt: skip
# part -> packages it must never import, besides those that another one owns
FORBIDDEN = {
    "memory": {"fairseq", "omegaconf", "hydra"},
    "errors": {"fairseq", "omegaconf", "hydra", "torch"},
    "validation": {"fairseq", "omegaconf", "hydra"},
    "huggingface": {"fairseq", "omegaconf", "hydra"},
}
# package -> the only part that may import it, if any
OWNERS = {
    "faiss": "validation",
    **dict.fromkeys(("transformers", "safetensors", "accelerate", "tokenizers"), "huggingface"),
    **dict.fromkeys(("tests", "scripts", "_script")),
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
    first, *parts = name.split(".")
    if first != "pkm_fairseq" or not parts:
        return None
    inside = ".".join(parts[:2])
    return inside if inside in ALLOWED else parts[0]


def violations(source, module, is_package=False):
    part = part_of(module)
    names = imported(source, module, is_package)
    wrong = {n for n in names if part_of(n) not in {None, part, *ALLOWED[part]}}
    owned = {package for package, owner in OWNERS.items() if owner != part}
    forbidden = owned | FORBIDDEN.get(part, set())
    return wrong | {n for n in names if n.split(".")[0] in forbidden}


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
        ("import fairseq", "pkm_fairseq.memory.memory", False),
        ("from fairseq.data import Dictionary", "pkm_fairseq.memory.memory", False),
        ("def f():\n    import faiss", "pkm_fairseq.memory.memory", False),
        ("from ..models import roberta", "pkm_fairseq.memory.memory", False),
        ("from .. import models", "pkm_fairseq.memory.memory", False),
        ("from ..models import roberta", "pkm_fairseq.memory", True),
        ("from . import models", "pkm_fairseq.compat", False),
        ("import pkm_fairseq.models.roberta", "pkm_fairseq.memory.memory", False),
        ("from pkm_fairseq.tasks import common", "pkm_fairseq.models.roberta", False),
        ("from ..optim import pkm_adam", "pkm_fairseq.models.roberta", False),
        ("from ..criterions import usage", "pkm_fairseq.tasks.common", False),
        ("from ..criterions import usage", "pkm_fairseq.tasks", True),
        ("from ..models import roberta", "pkm_fairseq.validation.report", False),
        ("import fairseq.options", "pkm_fairseq.validation.report", False),
        ("import faiss", "pkm_fairseq.models.roberta", False),
        ("import transformers", "pkm_fairseq.memory.memory", False),
        ("def f():\n    import safetensors", "pkm_fairseq.experiments.demo.pipeline", False),
        ("from ..models import roberta", "pkm_fairseq.huggingface.add", False),
        ("import fairseq", "pkm_fairseq.huggingface.add", False),
        ("import faiss", "pkm_fairseq.experiments.demo.pipeline", False),
        ("from ..experiments import runs", "pkm_fairseq.models.roberta", False),
        ("from ..experiments.runs import logs", "pkm_fairseq.analysis.curves", False),
        ("from ..experiments.demo import page", "pkm_fairseq.memory.memory", False),
        ("from ..demo import page", "pkm_fairseq.experiments.glue.finetune", False),
        ("from .. import demo", "pkm_fairseq.experiments.glue.finetune", False),
        ("from ..glue import tasks", "pkm_fairseq.experiments.data.corpus", False),
        ("from ..data import corpus", "pkm_fairseq.experiments.runs.logs", False),
        ("from ..demo.evaluate import load", "pkm_fairseq.experiments.facts.recall", False),
        ("from tests.faults import differing", "pkm_fairseq.experiments.runs.logs", False),
        ("import _script", "pkm_fairseq.experiments.demo.pipeline", False),
    ],
)
def test_a_forbidden_import_is_noticed(source, module, is_package):
    assert violations(source, module, is_package)


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("from .config import MemoryConfig", "pkm_fairseq.memory.memory", False),
        ("from . import roberta", "pkm_fairseq.models", True),
        ("from ..memory import MemoryConfig\nimport fairseq", "pkm_fairseq.models.config", False),
        ("from ..models.init_from import f", "pkm_fairseq.tasks.common", False),
        ("import faiss", "pkm_fairseq.validation.report", False),
        ("import transformers", "pkm_fairseq.huggingface.add", False),
        ("from ..runs import logs", "pkm_fairseq.experiments.glue.finetune", False),
        ("from . import metrics", "pkm_fairseq.experiments.glue", True),
        ("from ...analysis import svg", "pkm_fairseq.experiments.demo.page", False),
    ],
)
def test_an_allowed_import_is_allowed(source, module, is_package):
    assert not violations(source, module, is_package)


def test_ctrl_c_ends_every_script_from_its_first_second():
    """A script imports ``_script`` before any library: that takes seconds."""
    scripts = sorted((PACKAGE.parent / "scripts").glob("*.py"))
    assert len(scripts) > 25
    for script in scripts:
        tree = ast.parse(script.read_text(encoding="utf-8"))
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = [getattr(node, "module", None) or node.names[0].name for node in imports]
        others = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
        assert script.name == "_script.py" or others[:1] == ["_script"], script.name


def run_python(code):
    """Standard output of a fresh Python; it must end well."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


SNAPSHOT = """
import atexit, json, logging, sys
import numpy, torch

MODULES = ("fairseq", "fairseq_cli", "omegaconf", "hydra")

def changeable():
    root = logging.getLogger()
    seen = {
        "logging": (root.level, list(root.handlers), logging.getLogger("pkm_fairseq").handlers),
        "exits": atexit._ncallbacks(),
        "safe globals": set(torch.serialization.get_safe_globals()),
        "sys.path": (list(sys.path), list(sys.meta_path)),
    }
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] in MODULES and name not in ("fairseq.distributed_utils",):
            for owner in [module, *(v for v in vars(module).values() if isinstance(v, type))]:
                if getattr(owner, "__module__", name).split(".")[0] in MODULES:
                    for key, value in vars(owner).items():
                        seen[name, getattr(owner, "__name__", ""), key] = id(value)
    for key, value in vars(numpy).items():
        seen["numpy", key] = id(value)
    seen["parameters"] = {k: id(v) for k, v in vars(torch.nn.Module).items()}
    return seen
"""


@pytest.mark.parametrize("first", ["", "import fairseq.options, fairseq.trainer"])
def test_importing_the_core_changes_nothing_else(first):
    code = f"""{SNAPSHOT}
{first}
before = changeable()
print("before", len(before), flush=True)
import pkm_fairseq.memory
after = changeable()
print([key for key in {{**before, **after}} if before.get(key) != after.get(key)])
print("fairseq" in sys.modules)
"""
    *_, counted, changed, imported_fairseq = run_python(code).splitlines()
    assert int(counted.split()[1]) > (10_000 if first else 500)
    assert changed == "[]"
    assert imported_fairseq == str(bool(first))


def test_registering_changes_what_the_table_of_cures_says_and_no_logging():
    code = f"""{SNAPSHOT}
logging.basicConfig(level=logging.ERROR)
before = changeable()
import pkm_fairseq
pkm_fairseq.register()
between = changeable()
pkm_fairseq.register()
assert between == changeable()
assert between["logging"] == before["logging"] and between["exits"] > before["exits"]
assert numpy.compat.long is int
"""
    assert run_python(code) == ""


def test_the_core_works_without_fairseq():
    code = """
import sys
for name in ("fairseq", "omegaconf", "hydra", "faiss", "numba", "triton"):
    sys.modules[name] = None  # not installed
import torch, pkm_fairseq
from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory
memory = ProductKeyMemory(8, MemoryConfig(n_keys=4, knn=2, k_dim=4))
memory(torch.randn(3, 8)).sum().backward()
ours = {m.split(".")[1] for m in sys.modules if m.startswith("pkm_fairseq.")}
assert ours == {"memory", "plugin", "errors"}
for ask in (pkm_fairseq.register, lambda: __import__("pkm_fairseq.models")):
    try:
        ask()
    except ImportError as error:
        print(error)
"""
    line = (
        "the plugin needs fairseq: install ve-fairseq or fairseq-fixed; "
        "pkm_fairseq.memory works without it\n"
    )
    assert run_python(code) == 2 * line

"""In whatever order and way the plugin is asked for, all of it is registered, once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pkm_fairseq

ROOT = Path(pkm_fairseq.__file__).resolve().parents[1]
OURS = ROOT / "pkm_fairseq"
EXTEND = ROOT / "user_dir_examples/extend"

# imports fairseq once, then has a child for each case, in which the package was not imported yet
CASES = """
import json, multiprocessing, sys
from argparse import Namespace
import fairseq.options
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from fairseq.utils import import_user_module

def load(folder):
    import_user_module(Namespace(user_dir=folder))

def missing():
    wanted = [
        (MODEL_REGISTRY, "pkm_roberta"), (ARCH_MODEL_REGISTRY, "resm_roberta_tiny"),
        (CRITERION_REGISTRY, "pkm_masked_lm"), (CRITERION_REGISTRY, "pkm_sentence_prediction"),
        (TASK_REGISTRY, "pkm_masked_lm"), (TASK_REGISTRY, "pkm_sentence_prediction"),
        (OPTIMIZER_REGISTRY, "pkm_adam"),
    ]
    wanting = [name for registry, name in wanted if name not in registry]
    compat = sys.modules.get("pkm_fairseq.compat")
    cured = compat is not None and len(compat.STOCK) == len(compat.CURES)
    return wanting + ([] if cured else ["cures"])

def run(code):
    assert "pkm_fairseq" not in sys.modules and len(missing()) == 8
    try:
        exec(code, globals())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return missing()

if __name__ == "__main__":
    cases = json.load(sys.stdin)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(run, cases, chunksize=1)))
"""


def outcomes(folder: Path, cases: "dict[str, str]") -> "dict[str, object]":
    """What is missing after each case, or how it failed; the package is installed."""
    script = folder / "cases.py"
    script.write_text(CASES)
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> "dict[str, Path]":
    """A link of the same name and one of another, a copy, and user-dirs of one's own."""
    top = tmp_path_factory.mktemp("dirs")
    link, a_link = top / "linked/pkm_fairseq", top / "a_link"
    copy, own, asks = top / "copied/pkm_fairseq", top / "own", top / "asks"
    for folder in (link.parent, copy.parent, own, asks):
        folder.mkdir()
    link.symlink_to(OURS)
    a_link.symlink_to(OURS)
    shutil.copytree(OURS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (own / "__init__.py").write_text("import pkm_fairseq\n")
    (asks / "__init__.py").write_text("import pkm_fairseq\npkm_fairseq.register()\n")
    return {"top": top, "link": link, "a_link": a_link, "copy": copy, "own": own, "asks": asks}


@pytest.fixture(scope="module")
def found(folders: "dict[str, Path]") -> "dict[str, object]":
    return outcomes(folders["top"], {**registering(folders), **refused(folders)})


def registering(folders: "dict[str, Path]") -> "dict[str, str]":
    core = "import pkm_fairseq.memory; assert len(missing()) == 8;"
    ask = {name: f"load({str(folder)!r});" for name, folder in folders.items()}
    ours, register = f"load({str(OURS)!r});", "pkm_fairseq.register();"
    return {
        "user-dir": ours,
        "user-dir twice": ours + ours,
        "core first": core + ours,
        "core first, a relative path": core + "load('../pkm_fairseq/');",
        "core first, a link": core + ask["link"],
        "a link, then the folder": ask["link"] + ours,
        "a link, then the core, then the folder": ask["link"] + "import pkm_fairseq.memory;" + ours,
        "a copy though another one is installed": ask["copy"] + "assert 'copied' in "
        "sys.modules['pkm_fairseq.models.roberta'].__file__;",
        "by hand": core + register + register,
        "by hand, then the user-dir": core + register + ours,
        "the user-dir, then by hand": ours + "import pkm_fairseq;" + register,
        "one's own user-dir": ask["own"],
        "one's own user-dir, then ours": ask["own"] + ours,
        "ours, then one's own user-dir": ours + ask["own"],
        "core first, then one's own that asks for it": core + ask["asks"],
        "the example": f"load({str(EXTEND)!r}); assert 'my_resm_tiny' in ARCH_MODEL_REGISTRY;",
        "core first, then the example": core + f"load({str(EXTEND)!r});",
        **{
            f"importing {part}": core + f"import pkm_fairseq.{part};"
            for part in ("models", "tasks", "criterions", "optim", "models.capture")
        },
    }


def refused(folders: "dict[str, Path]") -> "dict[str, str]":
    return {
        "another copy": f"import pkm_fairseq.memory; load({str(folders['copy'])!r})",
        "another name": f"load({str(folders['a_link'])!r})",
    }


def test_the_plugin_is_registered_in_every_order(
    folders: "dict[str, Path]", found: "dict[str, object]"
) -> None:
    assert {case: found[case] for case in registering(folders) if found[case]} == {}


def test_what_cannot_be_the_package_is_refused_in_one_line(
    folders: "dict[str, Path]", found: "dict[str, object]"
) -> None:
    assert found["another copy"] == (
        f"ImportError: --user-dir {folders['copy']}: pkm_fairseq is already imported from {OURS}, "
        "and a process can use one copy only"
    )
    assert found["another name"] == (
        "ImportError: --user-dir: a_link is a link or copy of pkm_fairseq, must have that name"
    )


def test_asking_for_a_folder_of_the_package_is_nothing_else() -> None:
    """Only fairseq's question registers anything, or refuses."""
    code = f"""
import pkm_fairseq, sys
assert {str(OURS)!r} in pkm_fairseq.__path__ and "/elsewhere" not in pkm_fairseq.__path__
assert "fairseq" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

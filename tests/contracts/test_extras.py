"""The extras of setup.py hold what their parts and the scripts import."""

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest
import setuptools

from pkm_fairseq import __main__ as about

ROOT = Path(__file__).resolve().parents[2]
BROUGHT = {"jinja2": {"markupsafe"}, "transformers": {"tokenizers"}}  # by their own requirements
ROW = re.compile(r"^\| `([\w`, -]+)` \|.*\| ([^|]*) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def extras() -> Dict[str, Set[str]]:
    """The distributions of each extra of setup.py."""
    given: Dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))
        runpy.run_path(str(ROOT / "setup.py"))
    return {
        name: {re.split(r"[<>=]", requirement)[0] for requirement in requirements}
        for name, requirements in given["extras_require"].items()
    }


def distribution(module: str) -> str:
    return about.DISTRIBUTIONS.get(module, [module])[0]


def test_the_report_names_what_each_extra_holds(extras: Dict[str, Set[str]]) -> None:
    of_parts = {name for name, part in about.PARTS.items() if part.is_extra}
    for name in of_parts:
        assert {distribution(module) for module in about.PARTS[name].modules} == extras[name]
    assert extras["faiss-gpu"] == extras["validation"] - {"faiss-cpu"} | {"faiss-gpu"}
    of_0_1 = {"cpu": "kernels", "faiss": "validation", "plots": "reports"}
    for old, new in of_0_1.items():
        assert extras[old] >= extras[new]
    assert set(extras) == of_parts | set(of_0_1) | {"faiss-gpu", "dev"}


def at_the_top(file: Path) -> Iterator[str]:
    """Dotted names that importing a file imports."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def needed(script: Path) -> Set[str]:
    """Packages of others that a script imports when it starts."""
    todo, done, others = [script], set(), set()
    while todo:
        file = todo.pop()
        done.add(file)
        for name in at_the_top(file):
            parts = name.split(".")
            if parts[0] != "pkm_fairseq":
                others.add(parts[0])
            for end in range(len(parts) + 1):
                path = ROOT.joinpath(*parts[:end])
                found = [path.with_suffix(".py"), path / "__init__.py"] if end else []
                todo += [one for one in found if one.is_file() and one not in done]
    return others - sys.stdlib_module_names - {"_script", "tests"}


def rows() -> Dict[str, List[str]]:
    """By script, the extras that docs/start.md says it needs."""
    text = (ROOT / "docs/start.md").read_text(encoding="utf-8")
    return {
        script: names.replace("`", "").split(", ")
        for names, scripts in ROW.findall(text)
        for script in re.findall(r"`(\w+\.py)`", scripts)
    }


def test_the_extras_that_the_docs_name_are_enough_to_start_each_script() -> None:
    scripts = {file.name for file in (ROOT / "scripts").glob("[!_]*.py")}
    assert set(rows()) == scripts
    for script, names in rows().items():
        modules = {module for name in ["core", *names] for module in about.PARTS[name].modules}
        given = modules.union(*(BROUGHT.get(module, set()) for module in modules))
        assert needed(ROOT / "scripts" / script) <= given, script
    of_demo = {"fairseq", "numpy", "rich", "sentencepiece", "torch"}  # imported by what it imports
    assert of_demo <= needed(ROOT / "scripts/demo.py")

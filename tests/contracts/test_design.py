"""The tree that docs/design.md shows is the tree that is there."""

import re
from pathlib import Path

import pkm_fairseq

PACKAGE = Path(pkm_fairseq.__file__).parent
DESIGN = PACKAGE.parent / "docs/design.md"


def drawn(text):
    """Folders of the package, and modules of the core, that the tree in a text names."""
    tree = text.split("## Where is what")[1].split("```")[1]
    names = {"package": set(), "memory": set()}
    for line in tree.splitlines()[2:]:
        part = "memory" if line.startswith("│") else "package"
        names[part].update(re.findall(r"\b(\w+\.py|\w+/)(?=[\s:]|$)", line))
    return names


def present():
    """The same of the file system; what Python itself asks for by name is not drawn."""

    def names(folder):
        modules = {x.name for x in folder.glob("*.py") if not x.name.startswith("__")}
        return modules | {f"{x.name}/" for x in folder.iterdir() if (x / "__init__.py").exists()}

    return {"package": names(PACKAGE), "memory": names(PACKAGE / "memory")}


def test_the_tree_of_the_design_is_the_tree_of_the_package():
    assert drawn(DESIGN.read_text(encoding="utf-8")) == present()


def test_a_missing_and_a_surplus_name_would_be_found():
    text = DESIGN.read_text(encoding="utf-8")
    assert drawn(text.replace("search.py", "find.py")) != present()
    assert drawn(text.replace("├── compat/", "├── compatible/")) != present()

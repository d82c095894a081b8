"""``python -m pkm_fairseq``: where the plugin is, and what of it can be used here."""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Optional

from . import __version__

# import name -> the distributions that provide it, and what needs it
PACKAGES = {
    "torch": (["torch"], "the memory"),
    "fairseq": (["ve-fairseq", "fairseq-fixed", "fairseq"], "the fairseq plugin"),
    "numba": (["numba"], "CPU kernels"),
    "faiss": (["faiss-cpu", "faiss-gpu"], "validation of the search"),
    "sentencepiece": (["sentencepiece"], "the demo's tokenizer"),
    "matplotlib": (["matplotlib"], "the demo's report"),
}


def found(module: str, distributions: "list[str]") -> Optional[str]:
    """The distribution and version that provide a module; None if it cannot be imported."""
    if importlib.util.find_spec(module) is None:
        return None
    for distribution in distributions:
        try:
            return f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "version unknown"


def main() -> None:
    """Print the path for --user-dir, the versions found, and which parts are available."""
    print(f"pkm_fairseq {__version__}")
    print(f"--user-dir {Path(__file__).resolve().parent}")
    for module, (distributions, needed_by) in PACKAGES.items():
        version = found(module, distributions)
        print(f"{module:14} {version or 'not found':24} {needed_by}")


if __name__ == "__main__":
    main()

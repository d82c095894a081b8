"""``python -m pkm_fairseq``: the path for ``--user-dir``, versions, and what is missing."""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from . import __version__


class Package(NamedTuple):
    """A package that a part of this one needs.

    Attributes:
        module: the name to import.
        distributions: what may provide it.
        needed_by: the part.
        command: how to get it.
    """

    module: str
    distributions: List[str]
    needed_by: str
    command: str


FAIRSEQS = ["ve-fairseq", "fairseq-fixed", "fairseq"]
PACKAGES = (
    Package("torch", ["torch"], "the memory", "pip install torch"),
    Package("fairseq", FAIRSEQS, "the fairseq plugin", "pip install ve-fairseq==0.12.3"),
    Package(
        "transformers", ["transformers"], "Hugging Face models", "pip install -e .[huggingface]"
    ),
    Package("numba", ["numba"], "fast kernels on the CPU", "pip install -e .[cpu]"),
    Package("triton", ["triton"], "kernels on a GPU", "part of torch's CUDA builds"),
    Package(
        "faiss", ["faiss-cpu", "faiss-gpu"], "validation of the search", "pip install -e .[faiss]"
    ),
    Package("sentencepiece", ["sentencepiece"], "the demo's tokenizer", "pip install -e .[plots]"),
    Package("matplotlib", ["matplotlib"], "reports", "pip install -e .[plots]"),
)


def found(package: Package) -> Optional[str]:
    """The distribution and version of a package; None if it cannot be imported."""
    if importlib.util.find_spec(package.module) is None:
        return None
    for distribution in package.distributions:
        try:
            return f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "version unknown"


def report() -> Dict[str, Any]:
    """Path, versions, and by module what was found, who needs it and how to get it."""
    return {
        "version": __version__,
        "user_dir": str(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "packages": {
            package.module: {
                "found": found(package),
                "needed_by": package.needed_by,
                "command": package.command,
            }
            for package in PACKAGES
        },
    }


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m pkm_fairseq", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    args = parser.parse_args()
    about = report()
    if args.json:
        print(json.dumps(about, indent=2))
        return
    print(f"pkm_fairseq {about['version']}, Python {about['python']}")
    print(f"--user-dir {about['user_dir']}")
    for module, package in about["packages"].items():
        missing = f"missing: {package['command']}"
        print(f"{module:14} {package['found'] or missing:36} {package['needed_by']}")


if __name__ == "__main__":
    main()

"""``python -m pkm_fairseq``: the path for ``--user-dir``, versions, and what is missing."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from . import __version__

HERE = Path(__file__).resolve().parent
DISTRIBUTIONS = {  # of a module whose distribution has another name, the first choice first
    "fairseq": ["ve-fairseq", "fairseq-fixed", "fairseq"],
    "faiss": ["faiss-cpu", "faiss-gpu"],
    "google.protobuf": ["protobuf"],
    "hydra": ["hydra-core"],
    "sklearn": ["scikit-learn"],
    "yaml": ["pyyaml"],
}


class Part(NamedTuple):
    """A part of the package that needs others.

    Attributes:
        gives: what it is.
        modules: what it imports.
        is_extra: whether an extra of the same name installs them.
    """

    gives: str
    modules: List[str]
    is_extra: bool = True


PARTS = {
    "core": Part("the memory in plain torch", ["torch", "numpy"], is_extra=False),
    "kernels": Part("fast kernels on the CPU", ["numba"]),
    "triton": Part("kernels on a GPU; part of torch's CUDA builds", ["triton"], is_extra=False),
    "fairseq": Part("the fairseq plugin", ["fairseq", "hydra", "omegaconf"]),
    "huggingface": Part(
        "Hugging Face models", ["transformers", "safetensors", "accelerate", "google.protobuf"]
    ),
    "text": Part("tokenizer and data of the demo", ["sentencepiece", "rich"]),
    "reports": Part("tables, figures, HTML pages", ["matplotlib", "jinja2", "rich"]),
    "glue": Part("GLUE", ["sklearn", "scipy", "sentencepiece", "yaml", "rich"]),
    "validation": Part("proof by FAISS that the search is exact", ["faiss", "matplotlib", "rich"]),
}


def found(module: str) -> Optional[str]:
    """The distribution and version of a module; None if it cannot be imported."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a dotted name: the package around it
        spec = None
    if spec is None:
        return None
    names = DISTRIBUTIONS.get(module, [module])
    for name in names:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{module}, version unknown"


def command(name: str) -> Optional[str]:
    """The command that installs an extra; None for what is no extra."""
    if not PARTS[name].is_extra:
        return None
    if (HERE.parent / "setup.py").is_file():  # a checkout
        return f"pip install -e '{HERE.parent}[{name}]'"
    return f"pip install 'pkm_fairseq[{name}]'"


def problem() -> Optional[str]:
    """What is installed and keeps another package from being imported, if anything."""
    if importlib.util.find_spec("torchaudio") is None:
        return None
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        return (
            "torchaudio is built for another torch; transformers cannot be imported beside it: "
            "pip uninstall torchaudio"
        )
    return None


def report() -> Dict[str, Any]:
    """Path, versions, what each part found, how to get what is missing, and what is in the way."""
    parts = {}
    for name, part in PARTS.items():
        packages = {module: found(module) for module in part.modules}
        missing = [module for module, version in packages.items() if version is None]
        parts[name] = {
            "gives": part.gives,
            "packages": packages,
            "missing": missing,
            "command": command(name) if missing else None,
        }
    return {
        "version": __version__,
        "user_dir": str(HERE),
        "python": platform.python_version(),
        "parts": parts,
        "problem": problem(),
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
    print(f"--user-dir {about['user_dir']}\n")
    for name, part in about["parts"].items():
        print(f"{name:12} {part['gives']}")
        versions = [version for version in part["packages"].values() if version]
        if versions:
            print(f"{'':12} found: {', '.join(versions)}")
        if part["missing"]:
            how = f"; {part['command']}" if part["command"] else ""
            print(f"{'':12} missing: {', '.join(part['missing'])}{how}")
    if about["problem"]:
        print(f"\n{about['problem']}")


if __name__ == "__main__":
    main()

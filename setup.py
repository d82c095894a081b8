"""Packaging of pkm_fairseq; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "pkm_fairseq/__init__.py").read_text())[1]

# each extra holds all that its part imports; pkm_fairseq/__main__.py names the parts
EXTRAS = {
    "kernels": ["numba>=0.68"],
    "fairseq": ["ve-fairseq==0.12.3", "hydra-core>=1.3.2,<1.4", "omegaconf>=2.3,<2.4"],
    "huggingface": ["transformers>=5.24", "safetensors", "accelerate>=1.15", "protobuf"],
    "text": ["sentencepiece", "rich"],
    "reports": ["matplotlib", "jinja2", "rich"],
    "glue": ["scikit-learn", "scipy", "sentencepiece", "pyyaml", "rich"],
    "validation": ["faiss-cpu>=1.15", "matplotlib", "rich"],
    "faiss-gpu": ["faiss-gpu>=1.15", "matplotlib", "rich"],  # instead of validation
    "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"],
}
EXTRAS |= {  # the names of 0.1.0
    "cpu": EXTRAS["kernels"],
    "faiss": EXTRAS["validation"],
    "plots": [*EXTRAS["reports"], "sentencepiece"],
}

setup(
    name="pkm_fairseq",
    version=VERSION,
    description="Product-key memories for RoBERTa-style models: a fairseq plugin, a torch core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
    packages=find_packages(include=["pkm_fairseq", "pkm_fairseq.*"]),
    package_data={
        "pkm_fairseq": ["py.typed"],
        "pkm_fairseq.analysis": ["*.html"],
        "pkm_fairseq.experiments.demo": ["*.html"],
        "pkm_fairseq.experiments.glue": ["*.yaml"],
    },
    install_requires=["torch>=2.6", "numpy"],
    extras_require=EXTRAS,
)

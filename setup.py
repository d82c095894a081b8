"""Packaging of pkm_fairseq; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "pkm_fairseq/__init__.py").read_text())[1]

setup(
    name="pkm_fairseq",
    version=VERSION,
    description="Product-key memories for RoBERTa-style models: a fairseq plugin, a torch core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["pkm_fairseq", "pkm_fairseq.*"]),
    package_data={
        "pkm_fairseq": ["py.typed"],
        "pkm_fairseq.analysis": ["*.html"],
        "pkm_fairseq.experiments.demo": ["*.html"],
        "pkm_fairseq.experiments.glue": ["*.yaml"],
    },
    install_requires=["torch>=2.6", "numpy"],
    extras_require={
        "fairseq": ["ve-fairseq==0.12.3", "hydra-core>=1.3.2,<1.4", "omegaconf>=2.3,<2.4"],
        "huggingface": ["transformers>=5.24", "safetensors", "accelerate>=1.15"],
        "cpu": ["numba>=0.68"],
        "faiss": ["faiss-cpu>=1.15", "rich", "matplotlib"],
        "plots": ["matplotlib", "jinja2", "rich", "sentencepiece"],
        "dev": ["pytest", "hypothesis", "ruff", "mypy"],
    },
)

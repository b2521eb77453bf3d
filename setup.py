"""Packaging of hfgen: the top-level folders `pipelines` and `conversion` are installed as sub-packages of `hfgen`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
MAPPED_FOLDERS = ("pipelines", "conversion")

TRAIN = ["matplotlib>=3.9"]
EVAL = ["matplotlib>=3.9"]
LORA = ["peft>=0.17"]
ADAMW8BIT = ["torchao>=0.12"]
DEEPSPEED = ["deepspeed>=0.19.8"]
TEST = ["build>=1.2", "pytest>=8.3", "pytest-xdist>=3.6", "ruff>=0.14"]


def version() -> str:
    source = (ROOT / "hfgen" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)


def all_packages() -> list[str]:
    packages = find_packages(include=["hfgen", "hfgen.*"])
    for folder in MAPPED_FOLDERS:
        packages.append(f"hfgen.{folder}")
        packages.extend(f"hfgen.{folder}.{package}" for package in find_packages(folder))
    return packages


setup(
    name="hfgen",
    version=version(),
    description="Image tokenizers and token-based image generators behind one Hugging Face interface",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=all_packages(),
    package_dir={"hfgen": "hfgen"} | {f"hfgen.{folder}": folder for folder in MAPPED_FOLDERS},
    install_requires=[
        "accelerate>=1.6",
        "datasets>=4.0",
        "diffusers>=0.36",
        "fsspec>=2024.6",
        "huggingface-hub>=1.0",
        "numpy>=1.26",
        "pillow>=10",
        "pyarrow>=15",
        "pyyaml>=6",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "torch>=2.9",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "lora": LORA,
        "adamw8bit": ADAMW8BIT,
        "deepspeed": DEEPSPEED,
        "test": TEST + TRAIN + EVAL + LORA,
    },
    entry_points={"console_scripts": ["hfgen = hfgen.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

"""The wheel: `deft_kernels` from here and `deft_diffusers` from `python/`. Everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'__version__ = "(.+)"', Path("deft_kernels/__init__.py").read_text())[1]

setup(
    version=version,
    packages=find_packages(include=["deft_kernels*"]) + find_packages("python"),
    package_dir={"deft_diffusers": "python/deft_diffusers"},
    package_data={"deft_kernels.triton": ["configs/*.json"], "deft_diffusers.toyworld": ["model/**/*", "model/*"]},
)

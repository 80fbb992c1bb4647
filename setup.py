"""Lists the compiled extensions of csrc/ (none yet); pyproject.toml holds everything else."""

from setuptools import setup

setup(ext_modules=[])

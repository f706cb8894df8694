"""Package discovery over two source roots; everything else is in pyproject.toml."""

from setuptools import find_packages
from setuptools import setup

setup(
    packages=find_packages(include=["jaxrl_llm", "jaxrl_llm.*"]) + find_packages("kernels"),
    package_dir={"jaxrl_kernels": "kernels/jaxrl_kernels"},
    package_data={"jaxrl_llm": ["py.typed", "**/*.json"], "jaxrl_kernels": ["py.typed", "**/*.json"]},
)

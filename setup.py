"""Maps the repository folder itself to the package `semantic_diffusion_adapter`; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

PACKAGE = "semantic_diffusion_adapter"
ROOMS = ("benchmarks", "kernels", "nodes", "runner", "training")

inner = find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")])
setup(
    packages=[PACKAGE, *(f"{PACKAGE}.{name}" for name in inner)],
    package_dir={PACKAGE: "."},
    package_data={"": ["*.toml", "*.json", "*.md", "*.html"]},
)

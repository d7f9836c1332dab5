"""Where packages come from: `models`, `kernels` and `demo` stand at the root and are installed under `mmefficient.`"""

from setuptools import find_namespace_packages, setup

ROOTS = {
    "mmefficient": "mmefficient",
    "mmefficient.models": "models",
    "mmefficient.kernels": "kernels",
    "mmefficient.demo": "demo",
}

setup(
    package_dir=ROOTS,
    packages=[
        name
        for root, folder in ROOTS.items()
        for name in (root, *(f"{root}.{inner}" for inner in find_namespace_packages(folder, exclude=["*__pycache__"])))
    ],
)

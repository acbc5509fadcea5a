"""Metadata of fusednn. Tool settings live in pyproject.toml, exact versions in constraints.txt."""

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

if sys.version_info < (3, 11):  # noqa: UP036 - pip itself would say so after it has downloaded torch
    sys.exit(f"fusednn needs Python 3.11 or newer; this is {sys.version.split()[0]}, {sys.executable}")

ROOT = Path(__file__).parent

extras = {
    # the command line: `fusednn train`
    "app": ["matplotlib>=3.8", "safetensors>=0.4", "scikit-learn>=1.4", "tqdm>=4.66"],
    # the proof: tests and benchmarks
    "test": [
        "pytest>=8",
        "pytest-benchmark>=5",
        "pytest-xdist>=3.6",
        "expecttest>=0.2",
        "hypothesis>=6",
        "numpy>=1.26",
        'triton-viz>=3.0; platform_system == "Linux"',
    ],
    # the implementations that the benchmarks compare with
    "peers": ["liger-kernel>=0.8"],
    "lint": ["import-linter>=2.1", "mypy>=1.13", "pre-commit>=4", "ruff>=0.9"],
}
extras["dev"] = sorted({need for needs in extras.values() for need in needs})

# The training loop for CPUs. On the stable ABI one build serves every Python from 3.11, but not those without a GIL.
# Where it cannot be built the installation goes on without it, and `fusednn.explain` says so. No option here lets the
# compiler reorder sums or forget NaN: a square root may only leave errno alone.
stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
native = Extension(
    "fusednn._native",
    ["kernels/native/mlp_training.cpp", "kernels/native/module.cpp"],
    depends=[
        f"kernels/native/{name}.h"
        for name in ("activations", "description", "facts", "functions", "losses", "products", "step", "updates")
    ],
    define_macros=[("Py_LIMITED_API", "0x030b0000")] if stable else [],
    py_limited_api=stable,
    extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fvisibility=hidden"],
    optional=True,
)

setup(
    name="fusednn",
    version="0.1.0",
    description="Drop-in PyTorch layers, losses and training loops for small networks, in Triton and C++ kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # kernels/ is its own folder at the top of the repository and installs as fusednn.kernels through
    # the link fusednn/kernels: a top-level package called `kernels` would overwrite Hugging Face's.
    packages=[
        "fusednn",
        "fusednn.app",
        "fusednn.kernels",
        "fusednn.ops",
        "fusednn.reading",
        "fusednn.training",
        "fusednn.training.engines",
    ],
    package_data={"fusednn": ["py.typed"]},
    ext_modules=[native],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if stable else {},
    install_requires=["torch>=2.11,<2.15", 'triton>=3.6,<3.10; platform_system == "Linux"'],
    extras_require=extras,
    entry_points={"console_scripts": ["fusednn = fusednn.app.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

"""What is installed under the name `relssl`. Floors stand here, tested versions in `constraints.txt`.

Packages are named one by one, so that `tests`, `benchmarks` and `docs` never reach a user's site-packages.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "relssl/_version.py").read_text())[1]

# relssl.configs is the folder `configs/` of the source tree: recipes, only data.
PACKAGES = [
    "relssl",
    "relssl.bench",
    "relssl.bench.peers",
    "relssl.cli",
    "relssl.configs",
    "relssl.evaluate",
    "relssl.evaluators",
    "relssl.interop",
    "relssl.losses",
    "relssl.methods",
    "relssl.nets",
    "relssl.ops",
    "pipelines",
    "pipelines.engines",
    "dataset_tools",
    "dataset_tools.sources",
]

REQUIRES = [
    "torch>=2.10",  # the first whose weights_only loading of foreign checkpoints has no known hole
    "torchvision>=0.25",
    "numpy>=1.26",
    "numba>=0.61.2",
    "accelerate>=1.2",
    "pyyaml>=6.0.2",
    "safetensors>=0.4.5",
    "pillow>=12.3",  # refuses decompression bombs in every decoder that we open
    "scikit-learn>=1.5.2",
    "threadpoolctl>=3.1",
    "matplotlib>=3.9",
    "jinja2>=3.1.4",
    "typer>=0.15.4",
    "pydantic>=2.9",
    "rich>=13.9",
    "filelock>=3.16",
]

EXTRAS = {
    "ffcv": ["ffcv==1.0.2", "setuptools"],  # compiled while installing: docs/install.md
    "dali": ["nvidia-dali-cuda120>=2.4"],
    "track": ["tensorboard>=2.18"],
    "umap": ["umap-learn>=0.5.7"],
    "bench": ["kornia>=0.7.4"],  # a peer of `relssl bench views`
    "export": ["timm>=1.0.12", "onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.5"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
EXTRAS["dev"] = [
    "hypothesis>=6.120",
    "mypy>=1.14",
    "onnx>=1.18",
    "onnxruntime>=1.20",
    "onnxscript>=0.5",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "setuptools>=77",
    "timm>=1.0.12",
    "types-PyYAML",
    "wheel",
]

setup(
    name="relssl",
    version=VERSION,
    description="Relational self-supervised learning, fed by a fast and exact image pipeline",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "THIRD_PARTY.md"],
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir={"relssl.configs": "configs"},
    package_data={
        "relssl": ["py.typed", "templates/*"],
        "relssl.configs": ["*/*.yaml"],
        "pipelines": ["py.typed"],
        "dataset_tools": ["py.typed"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["relssl = relssl.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)

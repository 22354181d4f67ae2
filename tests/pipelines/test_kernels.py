"""The compiled loops: the same bits with any instruction set, every index inside its array, no cache needed."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import kernels
from pipelines.colour import colour_cpu
from pipelines.crop import crop_image, crop_small
from pipelines.draw import draw
from pipelines.views import ViewSpec
from tests.pipelines.test_crop import smooth_images

ROOT = Path(__file__).resolve().parents[2]
COMPILED = {
    "SSE2": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
    "AVX2": {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2"},
    "checked": {"NUMBA_BOUNDSCHECK": "1"},
}
OPS = [
    ["jitter", 1.0, {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.4}],
    ["grey", 0.2],
    ["blur", 0.7, {"sigma": [0.1, 2.0]}],
    ["solarise", 0.3],
    ["jitter_byol", 0.6, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}],
    ["blur", 0.5, {"sigma": [0.1, 2.0], "kernel": "byol"}],
    ["affine", 0.5, {"degrees": 30, "translate": 0.2, "scale": [0.7, 1.4], "shear": [-20, 20, -20, 20]}],
    ["randaugment", 0.7],
    ["erase", 0.5],
]
RANDOM, PADDED, BYOL = {"random_resized": {}}, {"pad_crop": {"padding": 15}}, {"byol": {}}


def digests() -> list[str]:
    """Hashes of what every compiled loop makes of the same pictures."""
    images = smooth_images(8, 90, 120)
    index, heights, widths = np.arange(8), np.full(8, 90), np.full(8, 120)
    found = []
    for box, interpolation, antialias in (
        (RANDOM, "bilinear", True),
        (RANDOM, "bicubic", True),
        (PADDED, "bilinear", True),
        (BYOL, "bilinear", False),
        (BYOL, "bicubic", False),
    ):
        for size in (16, 50, 112):
            how = {"interpolation": interpolation, "antialias": antialias}
            spec = ViewSpec("a", size, count=2, box=box, flip=0.5, ops=OPS, **how)
            params = draw([spec], seed=0, epoch=0, index=index, heights=heights, widths=widths)[0]
            small = np.empty((2, 8, size, size, 3), np.uint8)
            crop_small(images, index, params, small)
            large = torch.empty((2, 8, size, size, 3), dtype=torch.uint8)
            for i in range(8):
                crop_image(torch.from_numpy(images[i]).permute(2, 0, 1), params, i, large)
            views = torch.empty(2, 8, size, size, 3)
            colour_cpu(large, params, spec, views, 0, 8)
            found += [hashlib.sha256(x).hexdigest() for x in (small, large.numpy(), views.numpy())]
    return found


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("how", COMPILED)
def test_the_same_bits_however_they_are_compiled(how, tmp_path):
    """Plain SSE2, AVX2 with fused multiply-add at hand, and with every index checked, against what this machine has."""
    environment = {**os.environ, **COMPILED[how], "NUMBA_CACHE_DIR": str(tmp_path)}
    code = "from tests.pipelines.test_kernels import digests; print(*digests(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == digests()


def test_kernels_work_where_nothing_can_be_cached():
    """An installation without source files, as in a zip or a frozen program."""

    def from_nowhere(x):  # numba finds no file for it, as in a frozen program
        return x + 1

    from_nowhere.__code__ = from_nowhere.__code__.replace(co_filename="<frozen>")
    assert kernels._compiled(from_nowhere)(1) == 2

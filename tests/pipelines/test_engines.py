"""Which engine `auto` takes, and what it says."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines import engines
from pipelines.engines import choose_engine
from pipelines.errors import ConfigError

GIB = 2**30


class Images(SimpleNamespace):
    def __len__(self):
        return self.count


def images(count, height, width, jpeg=True):
    """A data set as the choice sees it; one image stands for all."""
    return Images(count=count, heights=np.array([height]), widths=np.array([width]), is_jpeg=np.array([jpeg]))


@pytest.mark.parametrize(
    ("files", "device", "free", "engine", "reason"),
    [
        (images(50_000, 32, 32), "cpu", 16 * GIB, "resident", "at most 32 pixels, 146 MiB in all, fit in memory"),
        (images(113_000, 96, 96), "cpu", 16 * GIB, "resident", "2979 MiB"),  # STL-10, labelled and not
        (images(113_000, 96, 96), "cpu", 8 * GIB, "torchvision", "2.9 GiB of pixels are more than the 2.0 GiB"),
        (images(113_000, 96, 96), "cpu", None, "resident", "fit in memory"),
        (images(1_281_167, 64, 64), "cpu", 512 * GIB, "torchvision", "more than the 4.0 GiB"),
        (images(1_281_167, 64, 64), "cuda", 139 * GIB, "resident", "fit in the memory of cuda"),
        (images(1_281_167, 64, 64), "cuda", 24 * GIB, "torchvision", "more than the 6.0 GiB"),
        (
            images(50_000, 400, 500),
            "cpu",
            16 * GIB,
            "torchvision",
            "decoded once each, by 8 threads",
        ),
        (images(50_000, 256, 341, jpeg=False), "cpu", 16 * GIB, "torchvision", "raw pixels of up to 341"),
    ],
)
def test_auto_goes_by_size_storage_and_memory(monkeypatch, files, device, free, engine, reason):
    monkeypatch.setattr(engines, "free_memory", lambda _: free)
    chosen, why = choose_engine("auto", files, torch.device(device), workers=8)
    assert chosen == engine
    assert reason in why
    assert "\n" not in why


def test_few_cores_beside_a_gpu_are_mentioned(monkeypatch):
    monkeypatch.setattr(engines, "free_memory", lambda _: 100 * GIB)
    files = images(50_000, 400, 500)
    for workers, device, mentioned in ((2, "cuda", True), (2, "cpu", False), (16, "cuda", False)):
        _, why = choose_engine("auto", files, torch.device(device), workers)
        assert ("dali" in why) == mentioned


def test_a_name_is_taken_as_it_is():
    assert choose_engine("dali", images(1, 8, 8), torch.device("cpu"), 1) == ("dali", "as configured")
    with pytest.raises(ConfigError, match="did you mean 'torchvision'"):
        choose_engine("torchvison", images(1, 8, 8), torch.device("cpu"), 1)


def test_an_unknown_resize_is_refused():
    with pytest.raises(ConfigError, match=re.escape("did you mean 'area'")):
        engines.refuse_area("aera")

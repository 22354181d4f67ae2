"""The resident engine: one copy of an open data set's images, for as long as an engine uses it."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import beton
from pipelines.engines import resident
from pipelines.loader import ViewLoader
from pipelines.pool import Pool
from pipelines.views import ViewSpec

WHOLE = [(None, [ViewSpec("view", 8, box="whole", normalize=None)])]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    beton.write(tmp_path / "a.beton", ((image, None) for image in images))
    return tmp_path / "a.beton"


def loader(files: object) -> ViewLoader:
    return ViewLoader(files, WHOLE, global_batch=4, engine="resident", shuffle=False, workers=1)


def test_loaders_of_one_open_data_set_share_its_images(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = resident.decode_sample
    monkeypatch.setattr(resident, "decode_sample", lambda files, index: (decoded.append(index), real(files, index))[1])
    with beton.open(path) as files, beton.open(path) as again, loader(files) as first:
        with loader(files) as second:
            assert first.engine.images is second.engine.images
            assert sorted(decoded) == list(range(12))
        views = [batch.views["view"][0] for batch in first]  # the other one's end left them alone
        assert torch.equal(torch.cat(views)[3], torch.from_numpy(np.array(files.decode(3))).permute(2, 0, 1) / 255)
        with loader(again) as other:
            assert other.engine.images is not first.engine.images


def test_the_last_engine_takes_the_images_with_it(path: Path) -> None:
    with beton.open(path) as files:
        pool = Pool(1)
        engines = [resident.Engine(files, device=torch.device("cpu"), pool=pool) for _ in range(2)]
        for engine in engines:
            assert len(engine.images) == 12
            engine.close()
            assert len(engine.images) == 0
        del engine, engines
        gc.collect()
        assert not [entry for entry in resident._IN_USE.values() if entry.files is files]
        pool.close()

"""On a CUDA device: the same views as on the CPU, and nothing in the way there that waits for the device."""

from __future__ import annotations

import pytest
import torch

from pipelines import beton
from pipelines.loader import ViewLoader
from pipelines.views import ViewSpec
from tests.pipelines.test_crop import smooth_images
from tests.pipelines.test_loader import jpeg

pytestmark = pytest.mark.gpu

OPS = [
    ["jitter", 0.8, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}],
    ["grey", 0.2],
    ["blur", 0.5, {"sigma": [0.1, 2.0]}],
]
WARPED = [["affine", 0.5, {"degrees": 18, "translate": 0.1, "scale": [0.9, 1.1], "shear": 10}], ["erase", 0.5]]
BYOL = [
    ["jitter_byol", 0.8, {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}],
    ["blur", 0.5, {"sigma": [0.1, 2.0], "kernel": "byol"}],
]
PLAN = [
    ViewSpec("a", 48, count=2, flip=0.5, ops=OPS),
    ViewSpec("b", 32, flip=0.5),
    ViewSpec("c", 72, box={"pad_crop": {"padding": 9}}, flip=0.5, ops=[["randaugment", 0.5]]),
    ViewSpec("d", 48, flip=0.5, ops=WARPED),
    ViewSpec("e", 48, box={"byol": {}}, flip=0.5, ops=BYOL, interpolation="bicubic", antialias=False),
]
ENGINES = ["resident", "torchvision", pytest.param("ffcv", marks=pytest.mark.ffcv)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "images.beton"
    beton.write(path, ((jpeg(image), i) for i, image in enumerate(smooth_images(32, 90, 70))), count=32)
    return path


def views(data, device, **options):
    """All views of an epoch on the CPU, by name."""
    with ViewLoader(data, [(None, PLAN)], global_batch=8, device=device, **options) as loader:
        batches = list(loader)
    return {name: torch.cat([b.stacked(name).float().cpu() for b in batches]) for name in "abcde"}


@pytest.mark.parametrize("engine", ENGINES)
def test_views_are_those_of_the_cpu(data, engine):
    """A crop may differ by one level where it is rounded; colours then carry that on."""
    here, there = (views(data, device, engine=engine) for device in ("cpu", "cuda"))
    for name in "abcde":
        difference = (here[name] - there[name]).abs() * 255 * 0.225
        assert difference.mean() <= 0.2, name
    assert ((here["b"] - there["b"]).abs() * 255 * 0.225).max() <= 1.01  # no colours
    assert (here["c"] - there["c"]).abs().max() <= 1e-5  # nor a resize; whole levels


@pytest.fixture(scope="module")
def masked_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("masked") / "images.beton"
    masks = smooth_images(32, 128, 128, seed=1)[..., 0] > 128
    images = smooth_images(32, 90, 70)
    beton.write(path, ((jpeg(image), i, masks[i]) for i, image in enumerate(images)), count=32, masks=True)
    return path


MASKED = [ViewSpec("m", 48, count=2, flip=0.5, mask_p=0.7, normalize=None)]


@pytest.mark.parametrize("engine", ENGINES)
def test_masked_views_are_those_of_the_cpu(masked_data, engine):
    found = {}
    for device in ("cpu", "cuda"):
        with ViewLoader(masked_data, [(None, MASKED)], global_batch=8, device=device, engine=engine) as loader:
            found[device] = torch.cat([batch.stacked("m").cpu() for batch in loader])
    grey = [(found[device] == 0.5).all(1) for device in ("cpu", "cuda")]
    assert 0.1 < grey[0].float().mean() < 0.7
    assert (grey[0] != grey[1]).float().mean() < 1e-3
    same = (grey[0] == grey[1]).unsqueeze(1)
    assert ((found["cpu"] - found["cuda"]).abs() * 255 * same).max() <= 1.01


@pytest.mark.parametrize("engine", ENGINES)
def test_masks_do_not_wait_for_the_device(masked_data, engine):
    with ViewLoader(masked_data, [(None, MASKED)], global_batch=8, device="cuda", engine=engine) as loader:
        next(iter(loader))
        loader.set_position(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in loader:
                batch.stacked("m").mul_(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_channels_last(data, dtype):
    with ViewLoader(data, [(None, PLAN)], global_batch=8, device="cuda", dtype=dtype) as loader:
        batch = next(iter(loader))
    assert batch.stacked("a").dtype == dtype
    assert batch.stacked("a").is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_waits_for_the_device(data, engine):
    with ViewLoader(data, [(None, PLAN)], global_batch=8, device="cuda", engine=engine) as loader:
        next(iter(loader))  # what is made once: constants, handles of libraries
        loader.set_position(1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in loader:
                batch.stacked("a").mul_(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_consumer_on_a_stream_of_its_own(data):
    expected = views(data, "cuda", engine="torchvision")["b"]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = views(data, "cuda", engine="torchvision")["b"]
    stream.synchronize()
    assert torch.equal(found, expected)


def test_the_certificate_passes():
    from relssl.bench.parity import certify

    certificate = certify(device="cuda")
    assert certificate.passed, "\n".join(certificate.lines())

"""The images of the parity certificate, stored in every way that engines read: JPEG, raw, and small."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines import beton
from pipelines.errors import ConfigError, InputError
from pipelines.subset import Subset

BATCH = 32  # images held at once; it bounds the memory of engines that keep whole images
SMALL = 32  # pixels, as in CIFAR

# Real photographs inside packages that relssl depends on.
BUILT_IN = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)


@dataclass
class Store:
    """The same pictures as a `.beton` and as PIL decodes them, (H, W, 3) uint8 each."""

    name: str
    files: Any
    pictures: list[np.ndarray]

    def batches(self, size: int = BATCH) -> Iterator[tuple[np.ndarray, Subset, list[np.ndarray]]]:
        """Sample ids, the data set of those alone, and their pictures."""
        for start in range(0, len(self.files), size):
            ids = np.arange(start, min(start + size, len(self.files)))
            yield ids, Subset(self.files, ids), [self.pictures[i] for i in ids]


def built_in_images() -> list[bytes]:
    """JPEG bytes of the photographs that come with scikit-learn and matplotlib.

    Raises:
        InputError: none is there (some distributions leave sample data out).
    """
    paths = [path for package, name in BUILT_IN if (path := _file_of_package(package, name)).is_file()]
    if not paths:
        raise InputError("scikit-learn and matplotlib are installed without their sample images; name a .beton file")
    return [path.read_bytes() for path in paths]


def _file_of_package(package: str, name: str) -> Path:
    """Where a file of a package would lie. The package is not imported: that takes a second."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0] if places else package, name)


def images_of(path: Path, count: int) -> list[bytes]:
    """JPEG bytes of at most `count` images, evenly spaced over a `.beton`; raw ones are encoded at quality 95.

    Raises:
        InputError: the file, or one of the images, is refused.
    """
    if count < 1:
        raise ConfigError(f"--images is at least 1, got {count}")
    with beton.open(path) as files:
        chosen = np.unique(np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)).tolist()
        return [_jpeg_of(files, i) for i in chosen]


def _jpeg_of(files: Any, index: int) -> bytes:
    pixels = files.decode(index)  # a damaged image is refused here, where its file and number are known
    if files.is_jpeg[index]:
        return bytes(files.payload(index))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@contextlib.contextmanager
def stored(images: Sequence[bytes]) -> Iterator[dict[str, Store]]:
    """The images as JPEG, as raw pixels, and their quarters as small raw images; in files that are temporary."""
    with tempfile.TemporaryDirectory(prefix="relssl-parity-") as folder, contextlib.ExitStack() as stack:

        def store(name: str, samples: Sequence[bytes | np.ndarray]) -> Store:
            path = Path(folder, f"{name}.beton")
            beton.write(path, [(sample, None) for sample in samples])
            files = stack.enter_context(beton.open(path))
            return Store(name, files, [files.decode(i) for i in range(len(files))])

        jpeg = store("jpg", images)
        small = [quarter for picture in jpeg.pictures for quarter in _quarters(picture)]
        yield {"jpg": jpeg, "raw": store("raw", jpeg.pictures), "small": store("small", small)}


def _quarters(picture: np.ndarray) -> list[np.ndarray]:
    """The four quarters of a picture, each reduced to a small square."""
    y, x = (max(side // 2, 1) for side in picture.shape[:2])
    parts = (picture[:y, :x], picture[:y, -x:], picture[-y:, :x], picture[-y:, -x:])
    return [np.asarray(Image.fromarray(np.ascontiguousarray(part)).resize((SMALL, SMALL))) for part in parts]

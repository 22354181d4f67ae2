"""CIFAR as published: pickles in the published layout, from folder, archive and a local web server."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dataset_tools.convert import convert_source, detect
from dataset_tools.sources import cifar
from pipelines import beton
from pipelines.errors import ConfigError, InputError
from relssl.cli import run
from tests.dataset_tools.serve import serving

PER_BATCH = 6


def images_of(name: str) -> np.ndarray:
    seed = sum(name.encode())
    return np.random.default_rng(seed).integers(0, 256, (PER_BATCH, 32, 32, 3), dtype=np.uint8)


def batch(name: str, label_key: str) -> bytes:
    planes = images_of(name).transpose(0, 3, 1, 2).reshape(PER_BATCH, 3072)
    labels = [(len(name) + i) % 4 for i in range(PER_BATCH)]
    content = {"batch_label": name, label_key: labels, "data": planes, "filenames": ["a.png"] * PER_BATCH}
    return pickle.dumps(content, protocol=2)


def files_of(spec: cifar.Spec) -> dict[str, bytes]:
    files = {name: batch(name, spec.labels.key) for split in spec.splits.values() for name in split}
    files[spec.meta] = pickle.dumps({spec.labels.names_key: ["ant", "bee", "cat", "dog"]}, protocol=2)
    return files


def archive_of(spec: cifar.Spec, files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{spec.folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture(params=["cifar10", "cifar100"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set whose published sums are those of our little files."""
    spec = cifar.SPECS[request.param]
    files = files_of(spec)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    archive = hashlib.md5(archive_of(spec, files)).hexdigest()
    monkeypatch.setitem(cifar.SPECS, request.param, dataclasses.replace(spec, files=sums, md5=archive))
    return str(request.param)


def put_folder(kind: str, root: Path) -> Path:
    spec = cifar.SPECS[kind]
    (root / spec.folder).mkdir()
    for name, content in files_of(spec).items():
        (root / spec.folder / name).write_bytes(content)
    return root / spec.folder


def put_archive(kind: str, root: Path) -> Path:
    path = root / cifar.SPECS[kind].archive
    path.write_bytes(archive_of(cifar.SPECS[kind], files_of(cifar.SPECS[kind])))
    return path


@pytest.fixture(autouse=True)
def same_archive_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """gzip writes the time of day into its header."""
    monkeypatch.setattr("time.time", lambda: 1.6e9)


# -- reading


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("put", [put_folder, put_archive])
def test_images_and_labels_in_published_order(tmp_path: Path, kind: str, split: str, put: object) -> None:
    assert callable(put)
    place = put(kind, tmp_path)
    assert detect(place) == detect(tmp_path) == kind
    done = convert_source(place, tmp_path / "a.beton", split=split)
    names = cifar.SPECS[kind].splits[split]
    with beton.open(tmp_path / "a.beton") as read:
        assert np.array_equal(
            np.stack([read.decode(i) for i in range(len(read))]),
            np.concatenate([images_of(name) for name in names]),
        )
        assert read.labels.tolist() == [(len(name) + i) % 4 for name in names for i in range(PER_BATCH)]
        assert read.classes == ["ant", "bee", "cat", "dog"]
        assert not read.is_jpeg.any()
    assert done.images == PER_BATCH * len(names)
    by_name = convert_source(kind, tmp_path / "b.beton", split=split, root=tmp_path)
    assert by_name.manifest["content_hash"] == done.manifest["content_hash"]


def test_a_wrong_checksum_is_refused(tmp_path: Path, kind: str) -> None:
    folder = put_folder(kind, tmp_path)
    name = cifar.SPECS[kind].splits["test"][0]
    (folder / name).write_bytes(batch("other", cifar.SPECS[kind].labels.key))
    with pytest.raises(InputError, match=rf"{name}: MD5 .* published is .* --no-checksum"):
        cifar.read(kind, "test", tmp_path)
    assert cifar.read(kind, "test", tmp_path, checksum=False).count == PER_BATCH


def test_a_damaged_archive_is_refused(tmp_path: Path, kind: str) -> None:
    archive = put_archive(kind, tmp_path)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(InputError, match="MD5"):
        cifar.read(kind, "train", tmp_path)
    with pytest.raises(InputError, match=r"a damaged archive|is not in it"):
        cifar.read(kind, "train", tmp_path, checksum=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected 'data' to be uint8"),
        ({"data": np.zeros((2, 3072), np.int64), "labels": [0, 1]}, "expected 'data' to be uint8"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}, "expected 'data' to be uint8"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "expected 2 whole numbers in 'labels'"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "expected 2 whole numbers"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1.5]}, "expected 2 whole numbers"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 9]}, "expected more than 9 names"),
    ],
)
def test_a_batch_of_another_layout_is_refused(tmp_path: Path, content: object, message: str) -> None:
    folder = put_folder("cifar10", tmp_path)
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match=message):
        cifar.read("cifar10", "test", tmp_path, checksum=False)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = put_folder("cifar10", tmp_path)
    (folder / "test_batch").write_bytes(b"cos\nsystem\n(S'echo never'\ntR.")
    with pytest.raises(InputError, match=r"test_batch: refused: this pickle asks for os\.system"):
        cifar.read("cifar10", "test", tmp_path, checksum=False)


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected cifar-10-batches-py/ or cifar-10-python.tar.gz .* --download"):
        convert_source("cifar10", tmp_path / "a.beton", root=tmp_path)
    with pytest.raises(ConfigError, match="CIFAR-10 has the splits train, test"):
        convert_source("cifar10", tmp_path / "a.beton", root=tmp_path, split="val")
    put_folder("cifar10", tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(InputError, match="data_batch_3: part of CIFAR-10, cannot be read"):
        cifar.read("cifar10", "train", tmp_path, checksum=False)


# -- super-classes

FINE = ["apple", "aquarium_fish", "baby", "bear"]
COARSE = ["fish", "fruit_and_vegetables", "large_carnivores", "people"]
COARSE_OF = [1, 0, 3, 2]  # super-class of every class


@pytest.fixture
def cifar100(tmp_path: Path) -> Path:
    """Both kinds of labels, as published."""
    folder = put_folder("cifar100", tmp_path)
    for name in ("train", "test"):
        content = pickle.loads((folder / name).read_bytes())  # noqa: S301  our own
        content["coarse_labels"] = [COARSE_OF[label] for label in content["fine_labels"]]
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": FINE, "coarse_label_names": COARSE}, protocol=2))
    return tmp_path


def test_the_super_classes_of_cifar100(tmp_path: Path, cifar100: Path) -> None:
    options = {"root": cifar100, "split": "test", "checksum": False}
    fine = convert_source("cifar100", tmp_path / "fine.beton", **options)
    coarse = convert_source("cifar100", tmp_path / "coarse.beton", coarse=True, **options)
    with beton.open(tmp_path / "fine.beton") as a, beton.open(tmp_path / "coarse.beton") as b:
        assert (a.classes, b.classes) == (FINE, COARSE)
        assert b.labels.tolist() == [COARSE_OF[label] for label in a.labels]
        assert a.labels.tolist() == [(4 + i) % 4 for i in range(PER_BATCH)]
        assert all(np.array_equal(a.decode(i), b.decode(i)) for i in range(PER_BATCH))
    assert fine.source == "CIFAR-100 test"
    assert coarse.source == "CIFAR-100 test, 4 super-classes"


def test_the_command_line_takes_them_too(tmp_path: Path, cifar100: Path) -> None:
    out = tmp_path / "a.beton"
    assert run(["convert", "cifar100", str(out), "--root", str(cifar100), "--no-checksum", "--coarse"]) == 0
    with beton.open(out) as read:
        assert read.classes == COARSE


def test_coarse_labels_that_are_not_there(tmp_path: Path) -> None:
    put_folder("cifar100", tmp_path)
    with pytest.raises(InputError, match="expected 6 whole numbers in 'coarse_labels'"):
        cifar.read("cifar100", "test", tmp_path, coarse=True, checksum=False)
    for source in ("cifar10", "stl10", "digits"):
        with pytest.raises(ConfigError, match=f"--coarse: only cifar100 has super-classes, this source is: {source}"):
            convert_source(source, tmp_path / "a.beton", coarse=True)
    with pytest.raises(ConfigError, match="CIFAR-10 has no super-classes"):
        cifar.read("cifar10", "test", tmp_path, coarse=True)


# -- download


def test_download(tmp_path: Path, kind: str) -> None:
    (tmp_path / "web").mkdir()
    put_archive(kind, tmp_path / "web")
    with serving(tmp_path / "web") as server:
        done = convert_source(kind, tmp_path / "a.beton", root=tmp_path / "data", download=True, url=server.url)
        convert_source(kind, tmp_path / "b.beton", root=tmp_path / "data", download=True, url=server.url, split="test")
    assert server.requests == [(f"/{cifar.SPECS[kind].archive}", None)]
    assert done.images == PER_BATCH * len(cifar.SPECS[kind].splits["train"])
    assert done.remarks == [f"{done.images} images; published are 50,000 (train)"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [cifar.SPECS[kind].archive]


def test_only_published_data_sets_can_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="only cifar10, cifar100, stl10, tiny-imagenet, slimagenet64 can be downloaded"
    ):
        convert_source("digits", tmp_path / "a.beton", download=True)

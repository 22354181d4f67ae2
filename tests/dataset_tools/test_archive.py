"""Archives of image folders: the file that the unpacked folder gives, and nothing taken that should not be."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset_tools.convert import Conversion, convert_source, detect
from dataset_tools.sources import archive, tree
from pipelines import beton
from pipelines.errors import InputError

RNG = np.random.default_rng(0)
COMPRESSION: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.xz": lzma.compress,
    ".tar.bz2": bz2.compress,
}
KINDS = [*COMPRESSION, ".zip"]
NAMES = ("cat/x/2.jpeg", "cat/x/deep/1.png", "dog/a.JPG", "dog/b.jpg", "emu/only.webp")


def picture(name: str, size: tuple[int, int] = (14, 10)) -> bytes:
    stream = io.BytesIO()
    pixels = RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, {"png": "PNG", "webp": "WEBP"}.get(name.rsplit(".")[-1], "JPEG"))
    return stream.getvalue()


IMAGES = {name: picture(name) for name in NAMES}
Extra = tarfile.TarInfo | tuple[str, bytes]


def tar_of(files: dict[str, bytes], *extra: Extra, format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for entry in [*files.items(), *extra]:
            info = entry if isinstance(entry, tarfile.TarInfo) else tarfile.TarInfo(entry[0])
            content = b"" if isinstance(entry, tarfile.TarInfo) else entry[1]
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zip_of(files: dict[str, bytes], *extra: tuple[zipfile.ZipInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
        for info, content in extra:
            packed.writestr(info, content)
    return stream.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """An archive of the kind that its name says."""
    kind = next(kind for kind in KINDS if path.name.endswith(kind))
    path.write_bytes(zip_of(files) if kind == ".zip" else COMPRESSION[kind](tar_of(files)))
    return path


def unpack(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def typed(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "a.beton"


def stored(done: Conversion) -> list[tuple[bytes, int]]:
    with beton.open(done.path) as read:
        return [(read.payload(i).tobytes(), int(read.labels[i])) for i in range(len(read))]


# -- the same as the folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_archive_gives_the_file_that_the_folder_gives(tmp_path: Path, out: Path, kind: str) -> None:
    others = {"dog/notes.txt": b"x", ".DS_Store": b"x", "dog/.hidden.jpg": b"x"}
    files = dict(sorted((IMAGES | others).items(), key=lambda item: tree.sort_key(item[0])))
    path = pack(tmp_path / f"images{kind}", files)
    assert detect(path) == "archive"
    done = convert_source(path, out)
    assert done.remarks == ["passed over 3 files that are hidden or not images: 2 hidden, 1 .txt"]
    assert (done.images, done.classes, done.num_skipped) == (5, ["cat", "dog", "emu"], 0)
    folder = convert_source(unpack(tmp_path / "images", files), tmp_path / "b.beton")
    assert out.read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert done.manifest["content_hash"] == folder.manifest["content_hash"]
    assert done.manifest["source"] == str(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.beton",
        "a.beton.json",
        "b.beton",
        "b.beton.json",
        "images",
        f"images{kind}",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_members(tmp_path: Path, out: Path, kind: str) -> None:
    """By path where members can be reached at once; that of the archive, which is said, where they cannot."""
    order = ["dog/b.jpg", "cat/x/2.jpeg", "dog/a.JPG"]
    done = convert_source(pack(tmp_path / f"a{kind}", {name: IMAGES[name] for name in order}), out)
    remark = "the order is that of the archive, which is not sorted by path"
    if kind in (".tar", ".zip"):
        order.sort(key=tree.sort_key)
        assert remark not in done.remarks
    else:
        assert remark in done.remarks
    assert stored(done) == [(IMAGES[name], ["cat", "dog"].index(name[:3])) for name in order]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_in_an_archive(tmp_path: Path, out: Path, kind: str) -> None:
    files = {
        f"set/{split}/{name}": IMAGES[name]
        for split in ("test", "train")
        for name in NAMES[2 if split == "test" else 0 :]
    }
    path = pack(tmp_path / f"a{kind}", {**files, "set/training/fox/1.jpg": IMAGES["dog/b.jpg"]})
    assert detect(f"{path}/set/test") == "archive"
    done = convert_source(f"{path}/set/test", out)
    assert (done.images, done.classes, done.remarks) == (3, ["dog", "emu"], [])
    assert done.source == f"{path}/set/test"
    source = archive.read_archive(path, "set/test")
    assert [(key, label) for key, _, label in source.samples] == [
        ("dog/a.JPG", 0),
        ("dog/b.jpg", 0),
        ("emu/only.webp", 1),
    ]
    assert convert_source(f"{path}/set/train/", tmp_path / "b.beton").classes == ["cat", "dog", "emu"]
    assert convert_source(f"{path}/set/train/cat", tmp_path / "c.beton", labels=False).images == 2
    with pytest.raises(InputError, match=r"there is no folder 'train' with images in it; folders at its top: set"):
        convert_source(f"{path}/train", tmp_path / "d.beton")
    with pytest.raises(InputError, match="there is no folder"):
        convert_source(f"{path}/set/test/dog/a.JPG", tmp_path / "d.beton")
    with pytest.raises(InputError, match="there is no folder"):
        convert_source(f"{path}/../set", tmp_path / "d.beton")


@pytest.mark.parametrize("kind", [".tar", ".tar.gz", ".zip"])
def test_splits_are_no_classes(tmp_path: Path, out: Path, kind: str) -> None:
    path = pack(
        tmp_path / f"a{kind}", {f"{split}/{name}": IMAGES[name] for split in ("val", "train") for name in NAMES}
    )
    with pytest.raises(
        InputError, match=rf"look like splits, not classes\. .* relssl convert {path}/train train\.beton"
    ):
        convert_source(path, out)
    assert convert_source(path, out, labels=False).images == 10


def test_a_folder_that_was_packed_with_its_name_is_gone_into(tmp_path: Path, out: Path) -> None:
    files = {f"my set/{name}": content for name, content in IMAGES.items()}
    done = convert_source(pack(tmp_path / "a.tar", files), out)
    assert done.classes == ["cat", "dog", "emu"]
    assert done.remarks == ["everything is in the folder my set: its folders are the classes"]
    plain = convert_source(pack(tmp_path / "b.zip", IMAGES), tmp_path / "b.beton")
    assert done.manifest["content_hash"] == plain.manifest["content_hash"]


@pytest.mark.parametrize(
    ("names", "classes", "remarks"),
    [
        (["cat/1.jpg", "cat/2.jpg"], ["cat"], "all images are of one class, cat: is {} one folder too high?"),
        (["cat/a/1.jpg", "cat/2.jpg"], ["cat"], "all images are of one class, cat: is {} one folder too high?"),
        (["1.jpg", "2.jpg"], None, None),
    ],
)
def test_what_is_not_gone_into(
    tmp_path: Path, out: Path, names: list[str], classes: list[str] | None, remarks: str | None
) -> None:
    path = pack(tmp_path / "a.tar", dict.fromkeys(names, IMAGES["dog/b.jpg"]))
    done = convert_source(path, out)
    assert done.classes == classes
    assert done.remarks == ([] if remarks is None else [remarks.format(path)])


def test_folders_without_images_keep_their_numbers(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(
        gzip.compress(tar_of(IMAGES, typed("cow", tarfile.DIRTYPE), ("bee/x.txt", b"")))
    )
    done = convert_source(tmp_path / "a.tar.gz", out)
    assert done.classes == ["bee", "cat", "cow", "dog", "emu"]
    assert "2 class folders hold no images: bee, cow" in done.remarks


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_alphabet(tmp_path: Path, out: Path, format: int) -> None:
    long = "/".join(["cät", *["x" * 60] * 2, "y" * 40 + ".jpg"])
    files = {f"./{long}": IMAGES["dog/b.jpg"], ".//dog/./b.jpg": IMAGES["dog/a.JPG"]}
    (tmp_path / "a.tar").write_bytes(tar_of(files, format=format))
    assert convert_source(tmp_path / "a.tar", out).classes == ["cät", "dog"]
    assert {key for key, _, _ in archive.read_archive(tmp_path / "a.tar").samples} == {long, "dog/b.jpg"}


def test_names_that_are_no_utf_8(tmp_path: Path, out: Path) -> None:
    content = tar_of({"cat/\xe9.jpg": IMAGES["dog/b.jpg"], "dog/1.jpg": b""}, format=tarfile.USTAR_FORMAT)
    (tmp_path / "a.tar").write_bytes(rechecked(content.replace("\xe9".encode(), b"\xe9x")))
    done = convert_source(tmp_path / "a.tar", out)
    assert (done.images, done.num_skipped) == (1, 1)
    assert next(iter(archive.read_archive(tmp_path / "a.tar").samples))[0] == "cat/\\xe9x.jpg"


def rechecked(content: bytes) -> bytes:
    """With the sum of the first header corrected."""
    header = bytearray(content[:512])
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


def test_backslashes_of_windows(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_of(IMAGES).replace(b"dog/", b"dog\\").replace(b"cat/x/", b"cat\\x/"))
    assert convert_source(tmp_path / "a.zip", out).classes == ["cat", "dog", "emu"]


# -- what is not taken


HOSTILE = ["/etc/cat.jpg", "../cat/1.jpg", "dog/../../1.jpg", "C:/dog/1.jpg"]
LINKS = [
    typed("cat/soft.jpg", tarfile.SYMTYPE, "../dog/a.JPG"),
    typed("cat/hard.jpg", tarfile.LNKTYPE, "dog/a.JPG"),
    typed("cat/more", tarfile.SYMTYPE, "../dog"),
]


@pytest.mark.parametrize("kind", [".tar", ".tar.xz"])
def test_links_devices_and_paths_that_lead_out(tmp_path: Path, out: Path, kind: str) -> None:
    extra: list[Extra] = [(name, IMAGES["dog/a.JPG"]) for name in HOSTILE]
    extra += [("/etc/passwd", b"x"), typed("dog/pipe.jpg", tarfile.FIFOTYPE), *LINKS]
    (tmp_path / f"a{kind}").write_bytes(COMPRESSION[kind](tar_of(IMAGES, *extra)))
    done = convert_source(tmp_path / f"a{kind}", out)
    assert (done.images, done.classes) == (5, ["cat", "dog", "emu"])
    assert {reason: sorted(keys) for reason, keys in done.skipped.items()} == {
        "path that leads out of the archive": ["/../cat/1.jpg", "/C:/dog/1.jpg", "/dog/../../1.jpg", "/etc/cat.jpg"],
        "link in an archive": ["cat/hard.jpg", "cat/soft.jpg"],
        "neither file nor folder in an archive": ["dog/pipe.jpg"],
    }
    assert "skipped 7 of 12 inputs" in done.text()
    assert any("1 link in an archive, 1 path that leads out of the archive" in remark for remark in done.remarks)
    assert done.manifest["skipped"]["count"] == 7
    assert archive.read_archive(tmp_path / f"a{kind}").count == 12
    with pytest.raises(InputError, match="skipped without --strict"):
        convert_source(tmp_path / f"a{kind}", tmp_path / "b.beton", strict=True)


def test_links_and_paths_that_lead_out_of_a_zip(tmp_path: Path, out: Path) -> None:
    link = zipfile.ZipInfo("cat/soft.jpg")
    link.external_attr = 0o120777 << 16
    files = IMAGES | dict.fromkeys(HOSTILE, IMAGES["dog/a.JPG"])
    (tmp_path / "a.zip").write_bytes(zip_of(files, (link, b"../dog/a.JPG")))
    done = convert_source(tmp_path / "a.zip", out)
    assert (done.images, done.classes) == (5, ["cat", "dog", "emu"])
    assert {reason: len(keys) for reason, keys in done.skipped.items()} == {
        "path that leads out of the archive": 4,
        "link in an archive": 1,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_resource_forks_of_macos(tmp_path: Path, out: Path, kind: str) -> None:
    forks = {f"__MACOSX/{name}": b"x" for name in ("dog/._a.JPG", "cat/b.jpg")} | {"dog/._b.jpg": b"x", "._dog": b"x"}
    done = convert_source(pack(tmp_path / f"a{kind}", IMAGES | forks), out)
    assert (done.images, done.classes, done.num_skipped) == (5, ["cat", "dog", "emu"], 0)
    assert done.remarks[0] == "passed over 4 files that are hidden or not images: 4 resource forks of macOS"


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_name_the_last_member_counts(tmp_path: Path, out: Path, kind: str) -> None:
    if kind == ".zip":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = zip_of(IMAGES, (zipfile.ZipInfo("dog/b.jpg"), IMAGES["dog/a.JPG"]))
    else:
        content = COMPRESSION[kind](tar_of(IMAGES, ("./dog/b.jpg", IMAGES["dog/a.JPG"])))
    (tmp_path / f"a{kind}").write_bytes(content)
    done = convert_source(tmp_path / f"a{kind}", out)
    assert "1 members have later ones of the same name, which were taken" in done.remarks
    # It is where the last one is, in an archive that is read from front to back: after `emu`.
    assert ("the order is that of the archive, which is not sorted by path" in done.remarks) == (
        kind not in (".tar", ".zip")
    )
    assert done.images == 5
    assert [payload for payload, _ in stored(done)].count(IMAGES["dog/a.JPG"]) == 2
    assert IMAGES["dog/b.jpg"] not in [payload for payload, _ in stored(done)]


@pytest.mark.parametrize("kind", [".tar", ".tar.gz", ".zip"])
def test_members_too_large_to_be_images(tmp_path: Path, out: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBER", max(map(len, IMAGES.values())))
    done = convert_source(pack(tmp_path / f"a{kind}", IMAGES | {"dog/c.jpg": b"x" * 100_000}), out)
    assert done.skipped == {"too large": ["dog/c.jpg"]}
    assert done.manifest["skipped"]["inputs"] == [["dog/c.jpg", "too large: 100000 bytes"]]


def test_bad_images_are_skipped_as_from_a_folder(tmp_path: Path, out: Path) -> None:
    bad = {"dog/empty.png": b"", "dog/page.jpg": b"<html>", "dog/cut.jpg": IMAGES["dog/a.JPG"][:-100]}
    done = convert_source(pack(tmp_path / "a.tar.gz", IMAGES | bad), out)
    assert (done.images, done.num_skipped) == (5, 3)
    assert set(done.skipped) == {"empty file (0 bytes)", "not an image", "truncated or damaged JPEG"}


# -- damage


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [1 / 3, 2 / 3])
def test_an_archive_that_was_cut_off(tmp_path: Path, out: Path, kind: str, missing: float) -> None:
    path = pack(tmp_path / f"a{kind}", IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * missing)])
    with pytest.raises(InputError, match=rf"a{kind}: a damaged archive, or one that was cut off: .*again"):
        convert_source(path, out)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{kind}"]


def test_a_tar_that_was_cut_off_between_two_members(tmp_path: Path, out: Path) -> None:
    """`tarfile` and `tar` take that for the end."""
    content = tar_of(IMAGES)
    borders = [place for place in range(512, len(content), 512) if content[place : place + 4] in (b"dog/", b"emu/")]
    assert len(borders) == 3
    for border in borders:
        (tmp_path / "a.tar").write_bytes(content[:border])
        with pytest.raises(InputError, match="cut off: empty header"):
            convert_source(tmp_path / "a.tar", out)
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content[:border]))
        with pytest.raises(InputError, match="cut off: empty header"):
            convert_source(tmp_path / "a.tar.gz", out)


def test_damage_is_not_taken_for_the_end_of_a_tar(tmp_path: Path, out: Path) -> None:
    content = tar_of(IMAGES)
    border = content.index(b"dog/b.jpg")
    damaged = {
        "bad checksum": content[:border] + b"cat" + content[border + 3 :],
        "data after its end": content[:border] + bytes(512) + content[border + 512 :],
        "data after its end.*several archives": content + tar_of({"fox/1.jpg": IMAGES["dog/b.jpg"]}),
        "a long run of zeros": content[:border] + bytes(3 << 20),
    }
    for message, changed in damaged.items():
        (tmp_path / "a.tar").write_bytes(changed)
        (tmp_path / "a.tar.bz2").write_bytes(bz2.compress(changed))
        for name in ("a.tar", "a.tar.bz2"):
            with pytest.raises(InputError, match=message):
                convert_source(tmp_path / name, out)


def test_a_name_as_long_as_a_film(tmp_path: Path, out: Path) -> None:
    content = tar_of({"x" * (2 << 20) + "/1.jpg": b""}, format=tarfile.GNU_FORMAT)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match="a name of 2097159 bytes"):
        convert_source(tmp_path / "a.tar.gz", out)


def test_a_damaged_member_of_a_zip_does_not_spoil_the_others(tmp_path: Path, out: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, content in IMAGES.items():
            packed.writestr(name, content)
    content = stream.getvalue().replace(IMAGES["dog/a.JPG"][-200:], IMAGES["dog/a.JPG"][-200:-2] + b"ab")
    (tmp_path / "a.zip").write_bytes(content)
    done = convert_source(tmp_path / "a.zip", out)
    assert done.images == 4
    assert done.skipped == {"damaged in the archive": ["dog/a.JPG"]}
    assert "Bad CRC-32" in done.manifest["skipped"]["inputs"][0][1]


def test_zips_that_cannot_be_read(tmp_path: Path, out: Path) -> None:
    content = bytearray(zip_of({"cat/1.jpg": IMAGES["dog/b.jpg"]}))
    place = content.index(b"PK\x01\x02")
    encrypted, unknown = content.copy(), content.copy()
    encrypted[place + 8] |= 1
    unknown[place + 10] = 9  # "deflate64", which Windows uses for large files
    for changed, message in ((encrypted, "1 x encrypted in the archive"), (unknown, "1 x compressed in a way")):
        (tmp_path / "a.zip").write_bytes(changed)
        with pytest.raises(InputError, match=f"none of the 1 inputs can be used: {message}"):
            convert_source(tmp_path / "a.zip", out)


def test_files_that_are_no_archives(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no archive" * 1000)
    (tmp_path / "b.zip").write_bytes(b"PK no archive" * 1000)
    (tmp_path / "c.tar").write_bytes(b"")
    (tmp_path / "d.tgz").write_bytes(b"\x1f\x8bno archive")
    (tmp_path / "e.tar.xz").write_bytes(lzma.compress(b"no archive" * 1000))
    for name in ("a.tar", "b.zip", "c.tar", "d.tgz", "e.tar.xz"):
        with pytest.raises(InputError, match=rf"{name}: a damaged archive"):
            convert_source(tmp_path / name, out)
    with pytest.raises(InputError, match=r"f\.tar: cannot be read: No such file"):
        convert_source(tmp_path / "f.tar", out, format="archive")


def test_archives_without_images(tmp_path: Path, out: Path) -> None:
    pack(tmp_path / "a.tar", {})
    with pytest.raises(InputError, match=r"a\.tar: no images found; .* there is: nothing at all$"):
        convert_source(tmp_path / "a.tar", out)
    pack(tmp_path / "a.tar", {"n01440764.tar": b"", "n01443537.tar": b""})
    with pytest.raises(InputError, match=r"there is: 2 \.tar; give the archives themselves as the source"):
        convert_source(tmp_path / "a.tar", out)


def test_the_first_bytes_say_what_an_archive_is(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.tar").write_bytes(lzma.compress(tar_of(IMAGES)))
    (tmp_path / "b.tar.gz").write_bytes(zip_of(IMAGES))
    (tmp_path / "c.bin").write_bytes(tar_of(IMAGES))
    for name in ("a.tar", "b.tar.gz"):
        assert convert_source(tmp_path / name, out, force=True).images == 5
    assert convert_source(tmp_path / "c.bin", out, force=True, format="archive").images == 5
    assert convert_source(f"{tmp_path}/c.bin/cat", out, force=True, format="archive", labels=False).images == 2
    with pytest.raises(InputError, match=r"c\.bin: expected a folder, a list .* or an archive .* --format"):
        convert_source(tmp_path / "c.bin", out, force=True)


def test_an_archive_that_changes_while_it_is_read(tmp_path: Path, out: Path) -> None:
    for kind in KINDS:
        path = pack(tmp_path / f"a{kind}", IMAGES)
        source = archive.read_archive(path)
        samples = iter(source.samples)
        next(samples)
        os.utime(path, ns=(0, 0))
        with pytest.raises(InputError, match="changed while it was being read; run the command again"):
            list(samples)
        with pytest.raises(InputError, match="changed while it was being read"):
            next(iter(source.samples))


def test_any_damage_is_refused_or_told(tmp_path: Path) -> None:
    """Hundreds of archives with random damage: an `InputError`, or as many images as there are, or fewer and told."""
    chance = random.Random(0)
    names = sorted(IMAGES)
    for kind in KINDS:
        whole = pack(tmp_path / f"a{kind}", IMAGES).read_bytes()
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            (tmp_path / f"a{kind}").write_bytes(content)
            try:
                source = archive.read_archive(tmp_path / f"a{kind}")
                keys = sorted(key for key, _, _ in source.samples)
            except InputError:
                continue
            assert len(keys) == source.count
            assert keys == names or source.remarks or len(keys) == len(names), keys


# -- progress and memory


def test_progress_counts_the_first_look_and_the_images(tmp_path: Path, out: Path) -> None:
    path = pack(tmp_path / "a.tar.gz", IMAGES)
    calls: list[tuple[int, int | None, int]] = []
    convert_source(path, out, progress=lambda *call: calls.append(call))
    assert calls[0][1] == path.stat().st_size
    assert [call[:2] for call in calls[1:]] == [(i, 5) for i in range(1, 6)]


def test_headers_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({f"cat/{i}.jpg": b"" for i in range(50)}))
    with (tmp_path / "a.tar").open("rb") as file:
        assert [len(tar.members) for _, tar in archive._tar_members(file, "r|")] == [0] * 50


# -- real images


def test_real_images_in_a_tar(test_data: Path, tmp_path: Path, imagenet_folder: Path) -> None:
    source = archive.read_archive(test_data / "imagenet-sample-500.tar")
    assert (source.count, source.classes, source.remarks) == (500, None, [])
    files = sorted(path.name for path in imagenet_folder.iterdir())
    for (key, content, label), name in zip(source.samples, files, strict=True):
        assert (key, label) == (name, None)
        assert content == (imagenet_folder / name).read_bytes()


@pytest.mark.slow
def test_real_images_in_a_compressed_tar(test_data: Path, tmp_path: Path, cifar_folder: Path) -> None:
    path = test_data / "cifar10-jpeg.tar.xz"
    with pytest.raises(InputError, match="look like splits"):
        archive.read_archive(path)
    packed = convert_source(f"{path}/test", tmp_path / "a.beton")
    folder = convert_source(cifar_folder / "test", tmp_path / "b.beton")
    assert (packed.images, packed.labelled, packed.num_skipped) == (10_000, 10_000, 0)
    assert packed.manifest["content_hash"] == folder.manifest["content_hash"]
    assert archive.read_archive(path, "train").count == 50_000

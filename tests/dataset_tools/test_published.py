"""Published data sets: found, checked, and fetched from a server on this machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_tools.sources import Source, published
from dataset_tools.sources.published import Published
from pipelines.errors import ConfigError, InputError, RunError
from tests.dataset_tools.serve import nobody, serving

CONTENT = bytes(range(256)) * 40
MD5 = hashlib.md5(CONTENT).hexdigest()
SPEC = Published(
    kind="demo",
    name="Demo",
    archive="demo.zip",
    md5=MD5,
    folder="demo-1",
    url="http://127.0.0.1:9/",
    variable="RELSSL_DEMO_URL",
    sizes={"train": 10, "test": 5},
)
RECORD = dataclasses.replace(SPEC, folder="demo", archive="demo.tar.gz", md5=None, is_record=True)


def is_folder(path: Path) -> bool:
    return (path / "mark").exists()


obtain = functools.partial(published.obtain, SPEC, is_folder=is_folder)


@pytest.fixture
def web(tmp_path: Path) -> Path:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "demo.zip").write_bytes(CONTENT)
    return tmp_path / "web"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- finding


def test_the_folder_goes_before_the_archive(tmp_path: Path) -> None:
    assert published.find(SPEC, tmp_path, is_folder) is None
    (tmp_path / "demo.zip").write_bytes(CONTENT)
    assert obtain(place=tmp_path) == obtain(place=tmp_path / "demo.zip") == tmp_path / "demo.zip"
    (tmp_path / "demo-1").mkdir()
    assert obtain(place=tmp_path) == tmp_path / "demo.zip"
    (tmp_path / "demo-1" / "mark").touch()
    assert obtain(place=tmp_path) == obtain(place=tmp_path / "demo-1") == tmp_path / "demo-1"


def test_what_is_there_is_recognised(tmp_path: Path) -> None:
    is_there = functools.partial(published.is_there, SPEC, is_folder=is_folder)
    (tmp_path / "other.zip").touch()
    assert not is_there(path=tmp_path)
    assert not is_there(path=tmp_path / "other.zip")
    (tmp_path / "demo.zip").touch()
    assert is_there(path=tmp_path)
    assert is_there(path=tmp_path / "demo.zip")


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected demo-1/ or demo\.zip there; fetch it with --download.*--root"):
        obtain(place=tmp_path)


def test_an_archive_is_compared_with_its_sum(tmp_path: Path) -> None:
    (tmp_path / "demo.zip").write_bytes(b"another")
    with pytest.raises(InputError, match=rf"demo\.zip: MD5 [0-9a-f]{{32}}, published is {MD5}: .* --no-checksum"):
        obtain(place=tmp_path)
    assert obtain(place=tmp_path, checksum=False) == tmp_path / "demo.zip"


def test_a_part_of_a_data_set_is_told_from_the_whole() -> None:
    whole, part = Source("a", [], 10, None), Source("b", [], 9, None)
    assert SPEC.compare_size("train", whole).remarks == []
    assert SPEC.compare_size("train", part).remarks == ["9 images; published are 10 (train)"]
    with pytest.raises(ConfigError, match="split 'val': Demo has the splits train, test"):
        SPEC.check_split("val")


# -- download


def test_download(tmp_path: Path, web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int | None, int]] = []
    with serving(web) as server:
        place = tmp_path / "a" / "b"
        found = obtain(place=place, download=True, url=server.url, progress=lambda *call: calls.append(call))
        assert found == place / "demo.zip"
        assert calls[-1] == (len(CONTENT), len(CONTENT), len(CONTENT))
        monkeypatch.setenv("RELSSL_DEMO_URL", server.url + "demo.zip")
        obtain(place=tmp_path / "c", download=True)
        assert obtain(place=place, download=True) == found
        assert server.requests == [("/demo.zip", None)] * 2
    assert names(place) == names(tmp_path / "c") == ["demo.zip"]
    assert found.read_bytes() == CONTENT
    monkeypatch.setattr(published, "_open", lambda *_: pytest.fail("what is there was fetched again"))
    obtain(place=place, download=True)


def test_a_file_address_will_do(tmp_path: Path, web: Path) -> None:
    assert obtain(place=tmp_path, download=True, url=web.as_uri()).read_bytes() == CONTENT


def test_a_broken_download_is_continued(tmp_path: Path, web: Path) -> None:
    place = tmp_path / "data"
    with serving(web, cut=4000) as server:
        for arrived in (4000, 8000):
            with pytest.raises(InputError, match=rf"broke off at {arrived:,} of 10,240 bytes; run the command again"):
                obtain(place=place, download=True, url=server.url)
            assert names(place) == ["demo.zip.partial"]
        obtain(place=place, download=True, url=server.url)
    assert [wanted for _, wanted in server.requests] == [None, "bytes=4000-", "bytes=8000-"]
    assert names(place) == ["demo.zip"]
    assert (place / "demo.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more", CONTENT[:7000]])
def test_what_is_left_of_a_download_is_put_to_use(tmp_path: Path, web: Path, left: bytes) -> None:
    """All of it, more than there is, or a part that this server cannot continue."""
    (tmp_path / "demo.zip.partial").write_bytes(left)
    with serving(web, ranges=len(left) > 7000) as server:
        obtain(place=tmp_path, download=True, url=server.url)
    wanted = [wanted for _, wanted in server.requests]
    assert wanted == ([] if left == CONTENT else ["bytes=10244-", None] if len(left) > 7000 else ["bytes=7000-"])
    assert (tmp_path / "demo.zip").read_bytes() == CONTENT
    assert names(tmp_path) == ["demo.zip", "web"]


def test_parts_that_do_not_belong_together_are_dropped(tmp_path: Path, web: Path) -> None:
    (tmp_path / "demo.zip.partial").write_bytes(b"x" * 5000)
    with serving(web) as server:
        with pytest.raises(InputError, match=r"http://127.*demo\.zip: MD5 .* published is"):
            obtain(place=tmp_path, download=True, url=server.url)
        assert names(tmp_path) == ["web"]
        obtain(place=tmp_path, download=True, url=server.url)
    assert names(tmp_path) == ["demo.zip", "web"]


def test_without_a_sum_nothing_is_continued(tmp_path: Path, web: Path) -> None:
    (tmp_path / "demo.zip.partial").write_bytes(b"x" * 5000)
    with serving(web, cut=6000) as server:
        with pytest.raises(InputError, match="broke off"):
            obtain(place=tmp_path, download=True, url=server.url, checksum=False)
        assert names(tmp_path) == ["web"]
        server.cut = None
        obtain(place=tmp_path, download=True, url=server.url, checksum=False)
    assert [wanted for _, wanted in server.requests] == [None, None]
    assert (tmp_path / "demo.zip").read_bytes() == CONTENT


def test_a_download_that_fails_leaves_nothing(tmp_path: Path, web: Path) -> None:
    fetch = functools.partial(obtain, place=tmp_path / "data", download=True)
    with serving(web) as server:
        (web / "demo.zip").rename(web / "other.zip")
        with pytest.raises(InputError, match=r"the server answers 404 Not Found; fetch it by other means.*data/demo"):
            fetch(url=server.url)
        (web / "demo.zip").write_bytes(CONTENT + b"x")
        with pytest.raises(InputError, match=r"http://127.*: MD5 .* published is"):
            fetch(url=server.url)
    with pytest.raises(InputError, match=r"cannot be reached .* is there a network\?"):
        fetch(url=nobody())
    with pytest.raises(InputError, match="the download failed"):
        fetch(url="nonsense")
    assert names(tmp_path / "data") == []


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks of this kind")
def test_only_one_process_downloads(tmp_path: Path, web: Path) -> None:
    code = f"import fcntl, sys; f = open({str(tmp_path / 'demo.zip.partial')!r}, 'ab')\n"
    code += "fcntl.flock(f, fcntl.LOCK_EX); f.write(b'half'); f.flush(); print('locked', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=r"demo\.zip\.partial: another process is downloading it"):
            obtain(place=tmp_path, download=True, url=web.as_uri())
        assert (tmp_path / "demo.zip.partial").read_bytes() == b"half"
        other.stdin.close()


def test_a_file_that_another_process_finished_meanwhile_is_kept(
    tmp_path: Path, web: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock(descriptor: int, partial: Path) -> None:
        (tmp_path / "demo.zip").write_bytes(CONTENT)

    monkeypatch.setattr(published, "_lock", lock)
    monkeypatch.setattr(published, "_open", lambda *_: pytest.fail("it was fetched a second time"))
    obtain(place=tmp_path, download=True, url=web.as_uri())
    assert names(tmp_path) == ["demo.zip", "web"]


# -- records


def record(web: Path, url: str, *files: tuple[str, bytes]) -> None:
    entries = []
    for name, content in files:
        (web / f"{name}.content").write_bytes(content)
        checksum = "md5:" + hashlib.md5(content).hexdigest()
        entries.append(
            {"key": name, "size": len(content), "checksum": checksum, "links": {"self": f"{url}{name}.content"}}
        )
    (web / "record").write_text(json.dumps({"id": 1, "files": entries}))


def test_a_record_names_the_archive_and_its_sum(tmp_path: Path, web: Path) -> None:
    place = tmp_path / "data"
    with serving(web) as server:
        record(web, server.url, ("README.md", b"read me"), ("Some Name.tar.bz2", CONTENT))
        found = published.obtain(RECORD, place, is_folder, download=True, url=server.url + "record")
        assert (found, found.read_bytes()) == (place / "demo.tar.bz2", CONTENT)
        assert published.find(RECORD, place, is_folder) == found
        found.unlink()
        (web / "Some Name.tar.bz2.content").write_bytes(CONTENT[:-1] + b"?")
        with pytest.raises(InputError, match=rf"MD5 .* published is {MD5}"):
            published.obtain(RECORD, place, is_folder, download=True, url=server.url + "record")
    assert names(place) == []


def test_the_address_of_an_archive_goes_round_the_record(tmp_path: Path, web: Path) -> None:
    (web / "mine.zip").write_bytes(CONTENT)
    found = published.obtain(RECORD, tmp_path, is_folder, download=True, url=(web / "mine.zip").as_uri())
    assert found == tmp_path / "demo.zip"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<html>", "expected the description of a Zenodo record"),
        ("[]", "expected the description of a Zenodo record"),
        ('{"files": [{"key": "a.zip"}]}', "expected the description of a Zenodo record.*--url"),
        ('{"files": []}', "expected one archive .* in the record, there are: none"),
        (
            '{"files": [{"key": "a.csv", "checksum": "md5:0", "links": {"self": "x"}}]}',
            "expected one archive .* in the record, there are: a.csv",
        ),
    ],
)
def test_records_that_are_refused(tmp_path: Path, web: Path, text: str, message: str) -> None:
    (web / "record").write_text(text)
    with pytest.raises(InputError, match=message):
        published.obtain(RECORD, tmp_path / "data", is_folder, download=True, url=(web / "record").as_uri())
    assert not (tmp_path / "data").exists()


def test_a_full_disk_is_named(tmp_path: Path, web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        obtain(place=tmp_path / "data", download=True, url=web.as_uri())

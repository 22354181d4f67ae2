"""Data sets as their authors publish them: finding one, checking it, and fetching it.

A published data set is one archive that holds one folder, and is read from either; a download keeps the archive as it
is. MD5 sums guard against broken downloads, not against people who mean harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dataset_tools.sources import Source
from dataset_tools.sources.archive import SUFFIXES, Archive, ArchiveTree
from dataset_tools.sources.folder import FolderTree
from dataset_tools.sources.tree import Tree
from pipelines.errors import ConfigError, InputError, RunError

Progress = Callable[[int, int | None, int], None]  # done, total or None, bytes so far

_TIMEOUT = 60  # seconds without a byte
_BLOCK = 1 << 20
_LONGEST_RECORD = 1 << 22  # bytes of the description of a Zenodo record


@dataclass(frozen=True)
class Published:
    """One data set. `sizes` are the numbers of images of each split, by which a part is told from the whole.

    `url` is the address of the folder that holds the archive; with `is_record` that of a Zenodo record's JSON, which
    names the file and its MD5 sum. The environment variable `variable` replaces it. `md5` None: not known before.
    """

    kind: str
    name: str
    archive: str
    md5: str | None
    folder: str
    url: str
    variable: str
    sizes: Mapping[str, int]
    is_record: bool = False

    @property
    def archives(self) -> tuple[str, ...]:
        """Names that the archive may have: that of a record is not known beforehand, only its beginning."""
        return tuple(self.folder + suffix for suffix in SUFFIXES) if self.is_record else (self.archive,)

    def check_split(self, split: str) -> None:
        """Raises ConfigError for a split that there is not."""
        if split not in self.sizes:
            raise ConfigError(f"split {split!r}: {self.name} has the splits {', '.join(self.sizes)}")

    def compare_size(self, split: str, source: Source) -> Source:
        """`source`, with a remark when it has not as many images as were published."""
        if source.count != self.sizes[split]:
            source.remarks.append(f"{source.count:,} images; published are {self.sizes[split]:,} ({split})")
        return source


IsFolder = Callable[[Path], bool]


def find(spec: Published, place: Path, is_folder: IsFolder) -> Path | None:
    """The folder or the archive of the data set: `place` itself, or in it; None when neither is there."""
    for folder in (place, place / spec.folder):
        if folder.is_dir() and is_folder(folder):
            return folder
    archives = [place] if place.is_file() else [place / name for name in spec.archives]
    return next((archive for archive in archives if archive.is_file()), None)


def is_there(spec: Published, path: Path, is_folder: IsFolder) -> bool:
    """Whether `path` is the archive, by its name, or the folder of the data set, or holds one of them."""
    return path.name in spec.archives if path.is_file() else find(spec, path, is_folder) is not None


def obtain(
    spec: Published,
    place: Path,
    is_folder: IsFolder,
    *,
    download: bool = False,
    url: str | None = None,
    checksum: bool = True,
    progress: Progress | None = None,
) -> Path:
    """The folder of the data set, or its archive once that has been compared with the published MD5 sum.

    `place` is the folder, the archive, or the folder that holds either. With `download` an absent archive is fetched
    into `place` from `url`: the address of the file, or of what `Published.url` is (default: the environment variable
    `spec.variable`, or the published address). `checksum` False takes archives with another sum. Raises InputError
    when the data set is absent, damaged, or cannot be fetched.
    """
    found = find(spec, place, is_folder)
    if found is None and download:
        return fetch(spec, place, url or os.environ.get(spec.variable, spec.url), checksum=checksum, progress=progress)
    if found is None:
        raise InputError(
            f"{place}: expected {spec.folder}/ or {spec.archive} there; fetch it with --download, or"
            " say where it is with --root"
        )
    if found.is_file() and spec.md5 is not None and checksum:
        check(found, _md5(found), spec.md5)
    return found


def tree_of(found: Path, inside: str = "", progress: Progress | None = None) -> Tree:
    """The files of a folder, or of the folder `inside` an archive."""
    if found.is_dir():
        return FolderTree(found)
    look = None if progress is None else lambda done, total: progress(done, total, done)
    return ArchiveTree(Archive(found, look), inside)


def check(what: object, found: str, expected: str) -> None:
    """Raises InputError unless the two MD5 sums are the same."""
    if found != expected:
        raise InputError(
            f"{what}: MD5 {found}, published is {expected}: damaged or changed. Fetch it again, or"
            " take it as it is with --no-checksum"
        )


def check_file(path: Path, expected: str) -> None:
    """Raises InputError unless the file has this MD5 sum."""
    check(path, _md5(path), expected)


def fetch(spec: Published, place: Path, url: str, *, checksum: bool = True, progress: Progress | None = None) -> Path:
    """Download the archive into the folder `place`; under its name only when it is whole and has the right MD5 sum.

    What a broken connection leaves (`NAME.partial`) is continued by the next call, provided that a sum is known, which
    alone tells whether the parts belong together. Raises InputError; RunError when another process is fetching it.
    """
    with _named_errors(url, f"fetch it by other means and put it at {place / spec.archive}"):
        address, name, md5 = _address(spec, url)
        target = place / name
        place.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(name + ".partial")
        with _sole_writer(partial, keep=checksum and md5 is not None) as file:
            if not target.exists():  # else another process has just fetched it
                _receive(address, file, md5 if checksum else None, progress)
                os.replace(partial, target)
    return target


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return _md5_of(file)


def _md5_of(file: BinaryIO) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _address(spec: Published, url: str) -> tuple[str, str, str | None]:
    """Address of the file, its name on the disk, and its MD5 sum."""
    path = urllib.parse.urlsplit(url).path.removesuffix("/content")  # Zenodo appends it to the name of a file
    if not spec.is_record:
        return (url if path.endswith(spec.archive) else f"{url.rstrip('/')}/{spec.archive}"), spec.archive, spec.md5
    suffix = _suffix(path)
    return _from_record(spec, url) if suffix is None else (url, spec.folder + suffix, spec.md5)


def _suffix(name: str) -> str | None:
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def _from_record(spec: Published, url: str) -> tuple[str, str, str]:
    """What `_address` returns, from the JSON of a Zenodo record: {"files": [{"key", "checksum", "links"}]}."""
    with _open(url) as answer:
        text = answer.read(_LONGEST_RECORD)
    try:
        files: list[Any] = json.loads(text)["files"]
        found = [(file["links"]["self"], _suffix(file["key"]), file["checksum"]) for file in files]
        archives = [(link, spec.folder + suffix, md5.removeprefix("md5:")) for link, suffix, md5 in found if suffix]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{url}: expected the description of a Zenodo record, with its files: {type(error).__name__} {error}; give"
            f" the address of the archive with --url, or put it at {spec.archive} by other means"
        ) from error
    if len(archives) != 1:
        names = ", ".join(str(file["key"]) for file in files) or "none"
        raise InputError(f"{url}: expected one archive ({' '.join(SUFFIXES)}) in the record, there are: {names}")
    return archives[0]


def _open(address: str, start: int = 0) -> Any:
    headers = {"User-Agent": "relssl"} | ({"Range": f"bytes={start}-"} if start else {})
    address = urllib.parse.quote(address, safe="%/:?#[]@!$&'()*+,;=~")  # names of files in a record may have spaces
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=_TIMEOUT)


def _receive(address: str, file: BinaryIO, md5: str | None, progress: Progress | None) -> None:
    """Complete `file`, which holds what an earlier call received, or nothing. Emptied when its sum is wrong."""
    start = file.seek(0, os.SEEK_END) if md5 is not None else 0
    file.seek(0)
    if not (start and _md5_of(file) == md5):
        _continue(address, file, start, progress)
        file.seek(0)
        found = _md5_of(file) if md5 is not None else None
        if md5 is not None and found is not None and found != md5:
            file.truncate(0)
            check(address, found, md5)
    file.flush()
    os.fsync(file.fileno())


def _continue(address: str, file: BinaryIO, start: int, progress: Progress | None) -> None:
    try:
        answer = _open(address, start)
    except urllib.error.HTTPError as error:
        if not (start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
            raise
        start, answer = 0, _open(address)
    with answer:
        # A server that cannot continue sends everything.
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0
        file.truncate(start)
        file.seek(start)
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        while block := answer.read(_BLOCK):
            file.write(block)
            if progress is not None:
                progress(file.tell(), total, file.tell())
    if total is not None and file.tell() != total:
        raise InputError(
            f"{address}: the connection broke off at {file.tell():,} of {total:,} bytes; run the command again"
        )


@contextlib.contextmanager
def _named_errors(address: str, advice: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        raise InputError(f"{address}: the server answers {error.code} {error.reason}; {advice}") from error
    except urllib.error.URLError as error:
        raise InputError(
            f"{address}: cannot be reached ({error.reason}); is there a network? Otherwise {advice}"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"{address}: the download failed: {error}; run the command again, or {advice}") from error


@contextlib.contextmanager
def _sole_writer(partial: Path, *, keep: bool) -> Iterator[BinaryIO]:
    """The file `partial`, locked. Removed when the block ends, unless it is to be continued, or has another name."""
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        _lock(file.fileno(), partial)
        complete = False
        try:
            yield file
            complete = True
        finally:
            with contextlib.suppress(OSError):  # a full disk: what has arrived there counts
                file.flush()
            if complete or not keep or not os.fstat(file.fileno()).st_size:
                partial.unlink(missing_ok=True)


def _lock(descriptor: int, partial: Path) -> None:
    busy = RunError(f"{partial}: another process is downloading it; run the command again when that is done")
    if importlib.util.find_spec("fcntl") is None:  # Windows: two writers are not noticed there, but by the MD5 sum
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:  # a network file system without locks
        return
    # Between open and lock the other process may have given this very file its final name.
    if not (partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())):
        raise busy

"""Archives of images, read where they are: nothing is unpacked to the disk.

    archive.tar  archive.tar.gz (.tgz)  archive.tar.xz (.txz)  archive.tar.bz2 (.tbz2)  archive.zip
    archive.tar.xz/train       the folder `train` in it, as if it were one on the disk

Labels need the names of all classes before the first image is written, so an archive is looked through first and read
second. In a zip and in a plain tar every member can be reached at once: the first look is quick, images come sorted by
path, and the result is the file that converting the unpacked folder gives. A compressed tar can only be read from front
to back: it is decompressed twice, and images come in the order they have in it.

Not taken are links, members with absolute paths or `..`, devices, hidden files and the resource forks of macOS; those
of the first three kinds that are called like an image are counted and listed as skipped inputs. Of members with the
same name the last one counts, as when unpacking.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from dataset_tools.images import ImageRefused
from dataset_tools.sources import Sample, Source
from dataset_tools.sources.tree import Listing, is_image, kind_of_file, read_tree, sort_key
from pipelines.errors import InputError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".zip")
MAX_MEMBER = 1 << 30  # bytes: what is larger is no image
_PROPERTY_TYPES = (  # headers of a tar that give a long name and the like to the next member
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_MAX_PROPERTIES = 1 << 20  # bytes
_MAX_PADDING = 1 << 20  # bytes of zeros after the end of a tar; 10 KB are usual
_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open}
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
)
_ENCRYPTED = 1  # flag of a file in a zip
_EVERY = 256  # members between two calls of `look`

Look = Callable[[int, int], None]  # called as look(bytes of the archive read, all bytes) while it is looked through


class Member(NamedTuple):
    """What an archive holds under a name. `place` is for the archive to find it; `refused` why it cannot be taken."""

    name: str
    size: int
    place: int
    is_folder: bool
    refused: str | None


class Archive:
    """One archive file. Raises InputError for one that is damaged, cut off, or none at all."""

    def __init__(self, path: Path, look: Look | None = None) -> None:
        self.path = path
        self.replaced = 0  # files that have a later one of the same name, once `members` has been asked for
        self._format = _format_of(path)
        self._look = look
        self._state = self._stat()

    @property
    def in_any_order(self) -> bool:
        """Whether members can be read in another order than their own."""
        return self._format.in_any_order

    @functools.cached_property
    def members(self) -> dict[str, Member]:
        """By name, without "." in it; sorted by path, or in the order of the archive if that is the only one."""
        found: dict[str, Member] = {}
        with _named_damage(self.path):
            for member in self._format.members(self._look):
                if member.name in found:
                    self.replaced += not member.is_folder
                    del found[member.name]  # so that it moves to the end
                found[member.name] = member
        return dict(sorted(found.items(), key=lambda item: sort_key(item[0]))) if self.in_any_order else found

    def read(self, members: Sequence[Member]) -> Iterator[tuple[Member, bytes | ImageRefused]]:
        """Contents of these files: in this order, or in that of the archive if that is the only one."""
        with _named_damage(self.path), self._unchanged():
            yield from self._format.read(members)

    @contextlib.contextmanager
    def open(self, member: Member) -> Iterator[BinaryIO]:
        """A file of any size, to be read once from its beginning to `member.size`."""
        with _named_damage(self.path), self._unchanged(), self._format.open(member) as file:
            yield file

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Refuses a file that is another one than that which was looked through."""
        self._compare()
        yield
        self._compare()

    def _compare(self) -> None:
        if self._stat() != self._state:
            raise InputError(f"{self.path}: it was changed while it was being read; run the command again")

    def _stat(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns


class ArchiveTree:
    """A folder in an archive, or all of it (`inside` is empty), as a `Tree`."""

    def __init__(self, archive: Archive, inside: str = "") -> None:
        self.archive = archive
        self.inside = inside

    @property
    def name(self) -> str:
        return f"{self.archive.path}/{self.inside}" if self.inside else str(self.archive.path)

    def listing(self) -> Listing:
        return self._listing

    @functools.cached_property
    def _listing(self) -> Listing:
        found = Listing([], self.folders())
        for name, member in self._below():
            parts = name.split("/")
            if member.is_folder:
                continue
            if "__MACOSX" in parts or parts[-1].startswith("._"):
                found.passed_over["resource forks of macOS"] += 1
            elif any(part.startswith(".") and part != ".." for part in parts):
                found.passed_over["hidden"] += 1
            elif not is_image(name):
                found.passed_over[member.refused or kind_of_file(name)] += 1
            elif member.refused:
                found.refused.append((name, ImageRefused(member.refused)))
            elif member.size > MAX_MEMBER:
                found.refused.append((name, ImageRefused("too large", f"{member.size} bytes")))
            else:
                found.names.append(name)
        return found

    def folders(self) -> list[str]:
        first = {name.split("/", 1)[0] for name, member in self._below() if member.is_folder or "/" in name}
        return sorted(name for name in first if not name.startswith(".") and name not in ("", "__MACOSX"))

    def below(self, folder: str) -> ArchiveTree:
        return ArchiveTree(self.archive, f"{self.inside}/{folder}" if self.inside else folder)

    def size(self, name: str) -> int | None:
        member = self._member(name)
        return None if member is None or member.is_folder or member.refused else member.size

    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        member = self._member(name)
        if member is None:
            raise InputError(f"{self.name}/{name}: there is no such file in the archive")
        return self.archive.open(member)

    def samples(self, names: Sequence[str], labels: Sequence[int | None]) -> _Samples:
        prefix = f"{self.inside}/" if self.inside else ""
        return _Samples(self.archive, prefix, [self.archive.members[prefix + name] for name in names], labels)

    def _member(self, name: str) -> Member | None:
        return self.archive.members.get(f"{self.inside}/{name}" if self.inside else name)

    def _below(self) -> Iterator[tuple[str, Member]]:
        """(name relative to this folder, member)."""
        prefix = f"{self.inside}/" if self.inside else ""
        for name, member in self.archive.members.items():
            if name.startswith(prefix):
                yield name[len(prefix) :], member


class _Samples:
    """(key, content, label) of files in an archive; it is read anew at each iteration."""

    def __init__(self, archive: Archive, prefix: str, members: Sequence[Member], labels: Sequence[int | None]) -> None:
        self._archive, self._prefix, self._members, self._labels = archive, prefix, members, labels

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sample]:
        labels = {member.place: label for member, label in zip(self._members, self._labels, strict=True)}
        for member, content in self._archive.read(self._members):
            yield member.name[len(self._prefix) :], content, labels[member.place]


def split_path(source: str | Path) -> tuple[Path, str] | None:
    """(file, folder in it) of a path such as `images.tar.xz/train`; None when there is no file on the way."""
    path = Path(source)
    for place in (path, *path.parents):
        if place.is_file():
            return place, "/".join(path.parts[len(place.parts) :])
    return None


def has_suffix(path: Path) -> bool:
    """Whether a file is called like an archive."""
    return path.name.lower().endswith(SUFFIXES)


def read_archive(path: Path, inside: str = "", *, labels: bool = True, look: Look | None = None) -> Source:
    """Every image in an archive, or in a folder `inside` it. Class folders give labels unless `labels` is False.

    One folder at the top that holds all the class folders, as when a folder was packed with its name, is gone into.
    Raises InputError when there is no such folder or archive, and as `read_tree` does.
    """
    archive = Archive(path, look)
    tree = ArchiveTree(archive, inside)
    if inside and not tree.folders() and not tree.listing().names:
        raise InputError(
            f"{path}: there is no folder {inside!r} with images in it; folders at its top:"
            f" {', '.join(ArchiveTree(archive).folders()[:20]) or 'none'}"
        )
    wrapper = _wrapper(tree) if labels and not inside else None
    source = read_tree(tree.below(wrapper) if wrapper else tree, labels=labels)
    if wrapper:
        source.remarks.append(f"everything is in the folder {wrapper}: its folders are the classes")
    if archive.replaced:
        source.remarks.append(f"{archive.replaced} members have later ones of the same name, which were taken")
    names = tree.listing().names
    if not archive.in_any_order and names != sorted(names, key=sort_key):
        source.remarks.append("the order is that of the archive, which is not sorted by path")
    return source


def _wrapper(tree: ArchiveTree) -> str | None:
    """The only folder at the top when it holds several folders with images, and nothing else is there."""
    top, names = tree.folders(), tree.listing().names
    second = {tuple(name.split("/")[:2]) for name in names if name.count("/") >= 2}
    return top[0] if len(top) == 1 and len(second) > 1 and all("/" in name for name in names) else None


def _normal(name: str) -> str | None:
    """A path without empty parts and "."; None when it is absolute or leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")):
        return None
    return "/".join(parts)


def _member(name: str, size: int, place: int, is_folder: bool, refused: str | None) -> Member:
    normal = _normal(name)
    if normal is None:
        return Member("/" + name.lstrip("/"), size, place, False, "path that leads out of the archive")
    return Member(normal, size, place, is_folder, refused)


@contextlib.contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        raise InputError(
            f"{path}: a damaged archive, or one that was cut off: {error or type(error).__name__}; fetch or pack it"
            " again"
        ) from error


# -- formats


class _Format(Protocol):
    in_any_order: bool

    def members(self, look: Look | None) -> Iterator[Member]: ...

    def read(self, members: Sequence[Member]) -> Iterator[tuple[Member, bytes | ImageRefused]]: ...

    def open(self, member: Member) -> contextlib.AbstractContextManager[BinaryIO]: ...


def _format_of(path: Path) -> _Format:
    """By the first bytes: names are often wrong about the compression."""
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if start.startswith(b"PK"):
        return _Zip(path)
    for magic, opener in _COMPRESSED.items():
        if start.startswith(magic):
            return _CompressedTar(path, opener)
    return _Tar(path)


class _Zip:
    in_any_order = True

    def __init__(self, path: Path) -> None:
        self._path = path

    def members(self, look: Look | None) -> Iterator[Member]:
        with zipfile.ZipFile(self._path) as archive:
            for place, info in enumerate(archive.infolist()):
                refused = "link in an archive" if stat.S_ISLNK(info.external_attr >> 16) else None
                refused = "encrypted in the archive" if info.flag_bits & _ENCRYPTED else refused
                name = info.filename.replace("\\", "/")  # some programs on Windows write those, against the standard
                yield _member(name, info.file_size, place, name.endswith("/"), refused)

    def read(self, members: Sequence[Member]) -> Iterator[tuple[Member, bytes | ImageRefused]]:
        with zipfile.ZipFile(self._path) as archive:
            infos = archive.infolist()
            for member in members:
                yield member, self._content(archive, infos[member.place])

    @contextlib.contextmanager
    def open(self, member: Member) -> Iterator[BinaryIO]:
        with zipfile.ZipFile(self._path) as archive, archive.open(archive.infolist()[member.place]) as file:
            yield file  # type: ignore[misc]

    def _content(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes | ImageRefused:
        """A member that is damaged does not keep the others from being read."""
        try:
            return archive.read(info)
        except NotImplementedError as error:
            return ImageRefused("compressed in a way that Python cannot read", str(error))
        except (*_DAMAGED, RuntimeError) as error:
            return ImageRefused("damaged in the archive", str(error) or type(error).__name__)


class _Tar:
    """Not compressed."""

    in_any_order = True

    def __init__(self, path: Path) -> None:
        self._path = path

    def members(self, look: Look | None) -> Iterator[Member]:
        with self._path.open("rb") as file:
            for info, _ in _tar_members(file, "r:"):
                yield _member(info.name, info.size, info.offset_data, info.isdir(), _refused(info))

    def read(self, members: Sequence[Member]) -> Iterator[tuple[Member, bytes | ImageRefused]]:
        with self._path.open("rb") as file:
            for member in members:
                file.seek(member.place)
                yield member, file.read(member.size)

    @contextlib.contextmanager
    def open(self, member: Member) -> Iterator[BinaryIO]:
        with self._path.open("rb") as file:
            file.seek(member.place)
            yield file


class _CompressedTar:
    in_any_order = False

    def __init__(self, path: Path, opener: Callable[..., Any]) -> None:
        self._path = path
        self._opener = opener

    def members(self, look: Look | None) -> Iterator[Member]:
        with self._path.open("rb") as packed, self._opener(packed) as file:
            size = self._path.stat().st_size
            for place, (info, _) in enumerate(_tar_members(file, "r|")):
                if look is not None and place % _EVERY == 0:
                    look(packed.tell(), size)
                yield _member(info.name, info.size, place, info.isdir(), _refused(info))

    def read(self, members: Sequence[Member]) -> Iterator[tuple[Member, bytes | ImageRefused]]:
        for member, content in self._walk(members):
            yield member, content.read()

    @contextlib.contextmanager
    def open(self, member: Member) -> Iterator[BinaryIO]:
        for _, content in self._walk([member]):
            yield content

    def _walk(self, members: Sequence[Member]) -> Iterator[tuple[Member, Any]]:
        """The wanted members, each to be read before the next is asked for."""
        wanted = {member.place: member for member in members}
        with self._path.open("rb") as packed, self._opener(packed) as file:
            for place, (info, tar) in enumerate(_tar_members(file, "r|")):
                member = wanted.pop(place, None)
                if member is not None:
                    yield member, tar.extractfile(info)
                if not wanted:
                    return


def _refused(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "link in an archive"
    if info.isdir() or (info.isreg() and not info.issparse()):
        return None
    return "neither file nor folder in an archive"


def _tar_members(file: BinaryIO, mode: Any) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Every member, up to the mark at the end, which has to be there: `tarfile` alone takes damage for the end."""
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_StrictInfo, errors="backslashreplace") as tar:
        known: list[tarfile.TarInfo] = tar.members  # type: ignore[attr-defined]
        while (info := tar.next()) is not None:
            known.clear()  # a million of them would take gigabytes
            yield info, tar
        _check_end(tar.fileobj)


def _check_end(file: Any) -> None:
    """Only zeros may follow the end, and not many of them."""
    padding = 0
    while block := file.read(1 << 16):
        padding += len(block)
        if block.count(0) != len(block):
            raise tarfile.ReadError("data after its end: damaged, or several archives in one")
        if padding > _MAX_PADDING:
            raise tarfile.ReadError("a long run of zeros: it has not been downloaded or written completely")


class _StrictInfo(tarfile.TarInfo):
    """A header that is damaged or missing is an error, not the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictInfo:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the mark at the end
                raise
            raise tarfile.ReadError(str(error)) from error
        if info.type in _PROPERTY_TYPES and info.size > _MAX_PROPERTIES:
            raise tarfile.ReadError(f"a name of {info.size} bytes")
        return info

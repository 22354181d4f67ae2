"""From any source of images to a `.beton` file.

`convert` is the door for Python: it takes any iterable. `convert_source` is `relssl convert`: it finds out
what a path holds, and calls `convert`. Images are read, checked and encoded by a pool of threads (the
decoders release the GIL), in order, with a bounded number of images in flight: the file does not depend on
the number of workers, and the memory does not depend on the number of images.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataset_tools.images import QUALITY, Encoding, ImageRefused, prepare
from dataset_tools.mask_files import MaskCount, MaskFolder, MaskRefused, some_of
from dataset_tools.sources import Sample, Source, archive, cifar, digits, folder, slimagenet, stl10, tiny_imagenet
from dataset_tools.stats import ChannelStats, moments
from pipelines import beton
from pipelines.beton_write import check_target
from pipelines.errors import ConfigError, InputError
from pipelines.machine import available_cores

PUBLISHED = ("cifar10", "cifar100", "stl10", "tiny-imagenet", "slimagenet64")
FORMATS = ("auto", "folder", "archive", "list", *PUBLISHED, "digits")
_LISTED = 10_000  # so many skipped inputs are listed in the manifest; all are counted
_SMALL = 128  # pixels: arrays up to this side are stored raw unless asked otherwise
_IN_FLIGHT = 4  # images per worker

Progress = Callable[[int, int | None, int], None]
# payload, notes, channel moments, mask
_Ready = tuple[bytes | np.ndarray, tuple[str, ...], np.ndarray | None, np.ndarray | MaskRefused | None]


@dataclass
class Conversion:
    """What a conversion did. `skipped` maps a reason to the keys of the inputs, `notes` what was done to a
    count; `masks` is None without masks."""

    path: Path
    source: str
    images: int = 0
    labelled: int = 0
    classes: list[str] | None = None
    mode: str = ""
    bytes: int = 0
    seconds: float = 0.0
    skipped: dict[str, list[str]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    masks: MaskCount | None = None
    manifest: beton.Manifest = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    @property
    def num_skipped(self) -> int:
        return sum(map(len, self.skipped.values()))

    def lines(self) -> list[str]:
        """The summary for a terminal."""
        labels = f"{len(self.classes)} classes" if self.classes else f"{self.labelled} labelled"
        labels = f"{self.labelled:,} of them in {labels}" if self.classes and self.labelled < self.images else labels
        labels = labels if self.labelled else "no labels"
        rate = f"{self.seconds:.1f} s ({self.images_per_second:,.0f} images/s)"
        what = f"{self.images:,} images, {labels}, {self.mode}, {self.bytes / 1e6:,.1f} MB"
        lines = [f"{self.path}: {what}, in {rate}"]
        lines += [f"  {count:,} x {note}" for note, count in self.notes.most_common()]
        lines += [f"  {remark}" for remark in self.remarks]
        lines += self.masks.lines(beton.manifest_path(self.path)) if self.masks is not None else []
        if self.skipped:
            lines.append(f"skipped {self.num_skipped:,} of {self.images + self.num_skipped:,} inputs:")
            lines += [f"  {len(keys):,} x {reason}: {some_of(keys)}" for reason, keys in self.skipped.items()]
            lines.append(f"  all are listed in {beton.manifest_path(self.path)}")
        return [*lines, f"next: relssl verify {self.path}"]

    def text(self) -> str:
        return "\n".join(self.lines())


def convert(
    samples: Iterable[Sample],
    out: str | Path,
    *,
    classes: list[str] | None = None,
    mode: str | None = None,
    quality: int = QUALITY,
    resolution: int | None = None,
    window: tuple[float, float] | None = None,
    workers: int | None = None,
    strict: bool = False,
    force: bool = False,
    count: int | None = None,
    source: str = "Python",
    masks: str | Path | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write (key, image, label) samples to the `.beton` file `out` and its manifest, in their order.

    The key is what messages call the sample. An image is what `dataset_tools.images.prepare` takes: the bytes
    of an image file, an array (H, W) or (H, W, 3) uint8, a Pillow image, or the Path of a file; a label is an
    int or None. From numpy arrays, a Hugging Face dataset, and WebDataset:

        convert(((str(i), x, int(y)) for i, (x, y) in enumerate(zip(images, labels))), "train.beton")
        convert(((str(i), row["image"], row["label"]) for i, row in enumerate(dataset)), "train.beton")
        convert(((s["__key__"], s["jpg"], int(s["cls"])) for s in web_dataset), "train.beton")

    `mode`, `quality`, `resolution` and `window` are those of `dataset_tools.images.Encoding`. With `mode`
    None the first image decides: arrays of up to 128 x 128 pixels are stored raw, because JPEG would cost
    such small images visible quality and saves little, and because raw needs no decoding; otherwise "jpg". An
    image that cannot be used is skipped, counted, and listed in the manifest with the reason; with `strict`
    it is an error. `masks`: a folder of masks of what is foreground, found by the keys as
    `dataset_tools.mask_files.MaskFolder` says; an image whose mask is missing or cannot be used is foreground as
    a whole, counted, and listed, or with `strict` an error. `progress` is called as progress(done, total or None,
    bytes so far). `workers`: threads; default one per available core.

    Raises InputError, ConfigError and RunError as `pipelines.beton.write` does; InputError, too, when no image at all
    has a mask in `masks`; nothing is left behind then.
    """
    started = time.monotonic()
    check_target(out, force=force)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers}: expected at least 1")
    count = len(samples) if count is None and isinstance(samples, Sized) else count
    stream = iter(samples)
    first = next(stream, None)
    if first is None:
        raise InputError(f"{source}: there are no samples to convert")
    encoding = Encoding(mode or _mode_for(first), quality, resolution, window)
    folder = None if masks is None else MaskFolder(masks)
    done = Conversion(Path(out), source, classes=classes, masks=None if masks is None else MaskCount(str(masks)))
    run = _Run(encoding, strict, done, count, progress, folder)
    with ThreadPoolExecutor(workers or available_cores(), thread_name_prefix="convert") as pool:
        try:
            done.manifest = beton.write(
                out,
                run.stored(itertools.chain([first], stream), pool, (workers or available_cores()) * _IN_FLIGHT),
                count=count,
                classes=classes,
                about=run.about,
                masks=masks is not None,
                names=run.names,
                force=force,
            )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    done.mode, done.bytes, done.labelled = (done.manifest[key] for key in ("mode", "bytes", "labelled"))
    done.seconds = time.monotonic() - started
    return done


def convert_source(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    split: str = "train",
    root: str | Path | None = None,
    download: bool = False,
    url: str | None = None,
    checksum: bool = True,
    labels: bool = True,
    coarse: bool = False,
    render: Mapping[str, Any] | None = None,
    mode: str | None = None,
    quality: int = QUALITY,
    resolution: int | None = None,
    window: tuple[float, float] | None = None,
    workers: int | None = None,
    strict: bool = False,
    force: bool = False,
    masks: str | Path | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """`relssl convert`: find out what `source` is, and write it to `out`.

    `source` is a folder of images; an archive of one (`images.tar.xz`), or a folder in an archive
    (`images.tar.xz/train`); a text file that lists images; the folder or the archive of a published data set, or its
    name (one of `PUBLISHED`, looked for below `root`, default "data"); or "digits". `format` says which (one of
    `FORMATS`) where the path does not. `split` is for published data sets and the digits, `root` for published data
    sets and lists, `download`, `url` and `checksum` for published data sets, `coarse` for CIFAR-100, `render` for the
    digits: keywords of `digits.render_digits`. `labels` False takes the images of a folder or archive without labels,
    however deep they lie. The rest is as in `convert`, but `progress` also counts the bytes of a download and of an
    archive that is looked through.
    """
    check_target(out, force=force)
    if masks is not None and Path(masks).resolve().is_relative_to(Path(source).resolve()):
        raise ConfigError(
            f"--masks {masks}: expected a folder of masks, this is the one of the images or lies within it"
        )
    found = open_source(
        source,
        format=format,
        split=split,
        root=root,
        download=download,
        url=url,
        checksum=checksum,
        labels=labels,
        coarse=coarse,
        render=render,
        progress=progress,
    )
    done = convert(
        found.samples,
        out,
        classes=found.classes,
        mode=mode or found.mode,
        quality=quality,
        resolution=resolution,
        window=window,
        workers=workers,
        strict=strict,
        force=force,
        count=found.count,
        source=found.name,
        masks=masks,
        progress=progress,
    )
    done.remarks = found.remarks
    return done


def open_source(
    source: str | Path,
    *,
    format: str = "auto",
    split: str = "train",
    root: str | Path | None = None,
    download: bool = False,
    url: str | None = None,
    checksum: bool = True,
    labels: bool = True,
    coarse: bool = False,
    render: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Source:
    """The `Source` that `convert_source` would convert. Raises InputError when there is none, ConfigError for
    options that do not fit it."""
    if format not in FORMATS:
        raise ConfigError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    kind = detect(source) if format == "auto" else format
    if download and kind not in PUBLISHED:
        raise ConfigError(f"--download: only {', '.join(PUBLISHED)} can be downloaded, this source is: {kind}")
    if coarse and kind != "cifar100":
        raise ConfigError(f"--coarse: only cifar100 has super-classes, this source is: {kind}")
    if kind == "digits":
        return _digits(split, dict(render or {}))
    if kind == "list":
        return folder.read_list(Path(source), root=None if root is None else Path(root))
    if kind == "archive":
        path, inside = archive.split_path(source) or (Path(source), "")
        look = None if progress is None else lambda done, size: progress(done, size, done)
        return archive.read_archive(path, inside, labels=labels, look=look)
    if kind == "folder":
        return folder.read_folder(Path(source), labels=labels)
    place = Path(source) if Path(source).exists() or _name_of(source) != kind else Path(root or "data")
    fetching: dict[str, Any] = {"download": download, "url": url, "checksum": checksum, "progress": progress}
    if kind in cifar.SPECS:
        return cifar.read(kind, split, place, coarse=coarse, **fetching)
    read = {"stl10": stl10.read, "tiny-imagenet": tiny_imagenet.read, "slimagenet64": slimagenet.read}[kind]
    return read(split, place, **fetching)


def detect(source: str | Path) -> str:
    """Which of `FORMATS` a source has. A file or folder goes before a data set of the same name."""
    path = Path(source)
    if path.exists():
        return _published_at(path) or ("folder" if path.is_dir() else _kind_of_file(path))
    name = _name_of(source)
    if name in (*PUBLISHED, "digits"):
        return name
    inside = archive.split_path(path)
    if inside is not None:
        return _kind_of_file(inside[0])
    raise InputError(
        f"{source}: there is no such file or folder; expected a folder or archive of images, a list, or one of:"
        f" {', '.join([*PUBLISHED, 'digits'])}"
    )


def _published_at(path: Path) -> str | None:
    """The published data set that a file or folder is, or holds."""
    found = [kind for kind in cifar.SPECS if cifar.is_at(kind, path)]
    others = {"stl10": stl10.is_at, "tiny-imagenet": tiny_imagenet.is_at, "slimagenet64": slimagenet.is_at}
    found += [kind for kind, is_at in others.items() if is_at(path)]
    if len(found) > 1:
        raise InputError(
            f"{path}: holds {', '.join(found)}: say which, such as: relssl convert {found[0]} OUT.beton --root {path}"
        )
    return found[0] if found else None


def _kind_of_file(path: Path) -> str:
    if path.suffix.lower() in (".txt", ".csv", ".tsv", ".lst"):
        return "list"
    if archive.has_suffix(path):
        return "archive"
    raise InputError(
        f"{path}: expected a folder, a list of images (.txt, .csv, .tsv) or an archive ({' '.join(archive.SUFFIXES)});"
        " say what it is with --format"
    )


def _name_of(source: str | Path) -> str:
    """The name of a data set as `FORMATS` spells it."""
    return str(source).lower().replace("_", "-")


def _digits(split: str, render: dict[str, Any]) -> Source:
    render.setdefault("renderings", 6)
    try:
        images, labels = digits.render_digits(split, **render)
    except TypeError as error:
        raise ConfigError(f"digits: {error}") from error
    samples = [(f"{split} {i}", image, int(label)) for i, (image, label) in enumerate(zip(images, labels, strict=True))]
    return Source(f"scikit-learn digits, {split}, {render}", samples, len(samples), digits.CLASSES, mode="raw")


def _mode_for(sample: Sample) -> str:
    image = _parts(sample)[1]
    return "raw" if isinstance(image, np.ndarray) and max(image.shape[:2]) <= _SMALL else "jpg"


def _parts(sample: Sample) -> Sample:
    if not isinstance(sample, tuple) or len(sample) != 3:
        raise InputError(f"expected samples of (key, image, label), got {type(sample).__name__} {str(sample)[:60]!r}")
    return sample


@dataclass
class _Run:
    """The state of one conversion: what is in flight, and what has been counted."""

    encoding: Encoding
    strict: bool
    done: Conversion
    total: int | None
    progress: Progress | None
    masks: MaskFolder | None = None
    stats: ChannelStats = field(default_factory=ChannelStats)
    details: list[list[str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    taken: int = 0
    size: int = 0

    def stored(self, samples: Iterator[Sample], pool: ThreadPoolExecutor, in_flight: int) -> Iterator[beton.Sample]:
        """What is to be written, in order."""
        queue: deque[tuple[str, int | None, Future[_Ready]]] = deque()
        for index, (key, image, label) in enumerate(map(_parts, samples)):
            queue.append((key, label, pool.submit(self._prepare, index, key, image)))
            if len(queue) >= in_flight:
                yield from self._take(*queue.popleft())
        while queue:
            yield from self._take(*queue.popleft())
        if self.done.images == 0:
            reasons = "; ".join(
                f"{len(keys)} x {reason}: {some_of(keys)}" for reason, keys in self.done.skipped.items()
            )
            raise InputError(f"{self.done.source}: none of the {self.taken} inputs can be used: {reasons}")
        if self.masks is None or self.done.masks is None:
            return
        self.done.masks.unused = self.masks.unused()
        if not self.done.masks.taken:
            reasons = "; ".join(
                f"{len(keys)} x {why}: {some_of(keys)}" for why, keys in self.done.masks.missing.items()
            )
            raise InputError(f"{self.done.masks.source}: none of {self.done.images} images has a mask there: {reasons}")

    def _prepare(self, index: int, key: str, image: Any) -> _Ready:
        """Runs in a worker. The pixels are let go here: only what is written waits for its turn."""
        stored = prepare(image, self.encoding)
        mask = None if self.masks is None else self.masks(key, *stored.pixels.shape[:2])
        return stored.payload, stored.notes, moments(stored.pixels) if self.stats.wants(index) else None, mask

    def _take(self, key: str, label: int | None, future: Future[_Ready]) -> Iterator[beton.Sample]:
        """Wait for one image, count it, and pass it on unless it was refused."""
        index = self.taken
        self.taken += 1
        try:
            payload, notes, image_moments, mask = future.result()
        except ImageRefused as refused:
            self._skip(key, refused)
        else:
            if image_moments is not None:
                self.stats.add(index, image_moments)
            self.done.notes.update(notes)
            self.done.images += 1
            self.names.append(str(key))
            self.size += len(payload) if isinstance(payload, bytes) else payload.nbytes
            yield (payload, label) if mask is None else (payload, label, self._mask(key, mask))
        if self.progress is not None:
            self.progress(self.taken, self.total, self.size)

    def _mask(self, key: str, mask: np.ndarray | MaskRefused) -> np.ndarray:
        if self.strict and isinstance(mask, MaskRefused):
            raise InputError(
                f"{self.done.source}: {key}: {mask} (the image is foreground as a whole without --strict)"
            ) from mask
        assert self.done.masks is not None
        return self.done.masks.add(key, mask)

    def _skip(self, key: str, refused: ImageRefused) -> None:
        if self.strict:
            raise InputError(f"{self.done.source}: {key}: {refused} (skipped without --strict)") from refused
        self.done.skipped.setdefault(refused.reason, []).append(key)
        if len(self.details) < _LISTED:
            self.details.append([key, str(refused)])

    def about(self) -> dict[str, Any]:
        """The part of the manifest that conversion knows."""
        encoding = self.encoding
        return {
            "source": self.done.source,
            "resolution": encoding.resolution,
            "quality": encoding.quality if self.done.notes["encoded as JPEG"] else None,
            "window": encoding.window,
            "channels": self.stats.summary(),
            "notes": dict(sorted(self.done.notes.items())),
            "skipped": {
                "count": self.done.num_skipped,
                "reasons": {reason: len(keys) for reason, keys in sorted(self.done.skipped.items())},
                "inputs": self.details,
            },
            **({} if self.done.masks is None else {"masks": self.done.masks.about()}),
        }

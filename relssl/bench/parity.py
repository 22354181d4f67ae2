"""The parity certificate: how far every engine and every colour path is from PIL and torchvision.

Both sides of a comparison get the same parameters, drawn by `pipelines.draw`, so only arithmetic differs:

    decode    JPEG decoders against PIL's, on squares that are cut out and not resized
    crop      engines, and the matrix products of accelerators, against PIL's crop and resize
    colour    single operations and whole chains against torchvision's float functionals and against PIL
    views     the loader, from stored bytes to finished views, against PIL all the way
    engines   the finished views of two engines against each other

What PIL makes has 8 bits, so colour is rounded to 8 bits before it is compared with PIL's; nothing is rounded before it
is compared with torchvision. `parity_ledger.TOLERANCES` says how large a difference may be, and why.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.colour import colour, colour_torch
from pipelines.crop import crop_matmul
from pipelines.draw import JITTER_OPS, ViewParams, draw
from pipelines.engines import ENGINES, check_engine_name, engine_class
from pipelines.errors import ConfigError, InputError, MissingExtraError
from pipelines.loader import ViewLoader
from pipelines.machine import available_cores
from pipelines.pool import Pool
from pipelines.views import IMAGENET_MEAN, IMAGENET_STD, ViewSpec
from relssl.bench.parity_certificate import Certificate, setting, write_section
from relssl.bench.parity_images import BATCH, SMALL, Store, built_in_images, images_of, stored
from relssl.bench.parity_ledger import Ledger
from relssl.bench.parity_references import RESAMPLING, float_colour, pil_colour, pil_crops
from relssl.runfolder import write_atomically

log = logging.getLogger("relssl.parity")

SEED = 20221122
DEFAULT_IMAGES = 48  # of a file
FEWEST_VIEWS = 24  # few images are cropped more often, so that every row rests on at least so many views
MATRIX_IMAGES = 2  # matrices over whole photographs are work for an accelerator; a few show the arithmetic

RESIZES = {"ffcv": ("antialias", "area")}  # what engines offer besides the common resize
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_BLUR = {"sigma": [0.1, 2.0]}
_CHAIN = [["jitter", 0.8, {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}], ["grey", 0.2]]
OPERATIONS: dict[str, list[Any]] = {
    **{name: [["jitter", 1.0, {name: 0.5 if name == "hue" else 0.8}]] for name in JITTER_OPS},
    "grey": [["grey", 1.0]],
    "solarise": [["solarise", 1.0]],
    "blur": [["blur", 1.0, _BLUR]],
    "randaugment": [["randaugment", 1.0]],
    "affine": [["affine", 1.0, {"degrees": 18, "translate": 0.1, "scale": [0.9, 1.1], "shear": 10}]],
    "erase": [["erase", 1.0]],
}
SOLARISED = "chain, solarise"
CHAINS: dict[str, list[Any]] = {
    "chain": [*_CHAIN, ["blur", 0.5, _BLUR]],
    SOLARISED: [*_CHAIN, ["blur", 0.5, _BLUR], ["solarise", 0.5]],
}
PADDED = "padded"
CROPS = (*RESAMPLING, PADDED)  # kinds of crops: resized in one way or the other, or cut out of a padded image
COLOUR_SIDES = (224, 33)  # a usual side, and an odd one for the ends of vector loops


def certify(
    file: Path | None = None,
    *,
    num_images: int = DEFAULT_IMAGES,
    engines: Sequence[str] | None = None,
    device: str = "auto",
) -> Certificate:
    """Compare everything that is installed with PIL and torchvision.

    Args:
        file: a `.beton` whose images are used; photographs that come with scikit-learn and matplotlib when None.
        num_images: at most so many images of the file, evenly spaced.
        engines: names of engines; all of them when None.
        device: `auto` (the CPU, and CUDA where there is one), `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        ConfigError: an unknown engine or device, or none of the engines is installed.
        InputError: the file is refused.
    """
    began = time.monotonic()
    devices, absent = devices_of(device)
    names = list(ENGINES if engines is None else dict.fromkeys(engines))
    for name in names:
        check_engine_name(name)
    images = built_in_images() if file is None else images_of(file, num_images)
    with stored(images) as stores, contextlib.closing(Pool(available_cores())) as pool:
        candidates, missing = find_candidates(names, devices, stores["small"], pool)
        bench = Bench(stores, candidates, devices, pool)
        for check in CHECKS:
            log.info("parity: %s", check.__name__.removeprefix("check_").replace("_", " "))
            check(bench)
    source = "photographs of scikit-learn and matplotlib" if file is None else f"of {file.name}"
    return Certificate(
        rows=bench.ledger.rows,
        absent={**missing, **absent},
        refused=bench.refused,
        images=f"{len(images)} {source}",
        seconds=time.monotonic() - began,
        environment=setting(),
    )


def bench_parity(
    file: Path | None = None,
    *,
    num_images: int = DEFAULT_IMAGES,
    engines: Sequence[str] | None = None,
    device: str = "auto",
    json_file: Path | None = None,
    markdown: Path | None = None,
    command: str = "relssl bench parity",
    echo: Callable[[str], object] = print,
) -> bool:
    """`certify`, print the certificate, and write it where it is wanted; whether it passed.

    `json_file` gets everything; `markdown` is a page whose section for these images is written anew.

    Raises:
        ConfigError: the folder of a file to write does not exist; and see `certify`.
    """
    for path in (json_file, markdown):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: its folder does not exist; create it first: mkdir -p {path.parent}")
    certificate = certify(file, num_images=num_images, engines=engines, device=device)
    for line in certificate.lines():
        echo(line)
    if json_file is not None:
        write_atomically(json_file, json.dumps(certificate.record(command), indent=1) + "\n")
    if markdown is not None:
        short = _short_command(file, num_images, engines, device)
        write_section(markdown, "built-in" if file is None else file.name, certificate.markdown(short))
    return certificate.passed


def _short_command(file: Path | None, num_images: int, engines: Sequence[str] | None, device: str) -> str:
    """The command without the paths of one machine, for a page that others read."""
    words = ["relssl", "bench", "parity"]
    words += [] if file is None else [file.name, "--images", str(num_images)]
    words += [word for name in engines or () for word in ("--engine", name)]
    words += [] if device == "auto" else ["--device", device]
    return shlex.join(words)


# -- who takes part


@dataclass(frozen=True)
class Candidate:
    """An engine as it can be configured."""

    engine: str
    resize: str
    device: torch.device

    @property
    def label(self) -> str:
        return " ".join([self.engine, *([self.resize] if self.resize != "antialias" else []), self.device.type])

    def decodes_as_pil(self, store: Store) -> bool:
        """Whether its pixels before the resize are PIL's: FFCV and nvJPEG have inverse transforms of their own."""
        if store.name != "jpg":
            return True
        return self.engine != "ffcv" and (self.engine, self.device.type) != ("dali", "cuda")

    def refuses(self, plan: Sequence[ViewSpec]) -> str | None:
        """Why it does not make a plan, in the engine's words; None when it does."""
        try:
            for spec in plan:
                engine_class(self.engine).check(spec, self.resize)
        except ConfigError as error:
            return str(error)
        return None

    @contextlib.contextmanager
    def open(self, files: Any, pool: Pool) -> Iterator[Any]:
        engine = engine_class(self.engine)(files, device=self.device, pool=pool, resize=self.resize)
        try:
            yield engine
        finally:
            engine.close()

    def loader(self, files: Any, plan: Sequence[ViewSpec]) -> ViewLoader:
        """A loader that makes one batch of all images of `files`, in their order."""
        return ViewLoader(
            files,
            [(None, plan)],
            global_batch=len(files),
            engine=self.engine,
            resize=self.resize,
            device=self.device,
            seed=SEED,
            drop_last=False,
            shuffle=False,
        )


def find_candidates(
    names: Sequence[str], devices: Sequence[torch.device], store: Store, pool: Pool
) -> tuple[list[Candidate], dict[str, str]]:
    """Every configuration of the installed engines among `names`, and why the others are absent.

    Raises:
        MissingExtraError: none of them is installed.
    """
    found, absent = [], {}
    for name in names:
        made = [Candidate(name, r, device) for device in devices for r in RESIZES.get(name, ("antialias",))]
        try:
            with made[0].open(store.files, pool):
                found += made
        except (ImportError, MissingExtraError) as error:
            absent[name] = str(error)
    if not found:
        raise MissingExtraError("; ".join(absent.values()))
    return found, absent


def devices_of(name: str) -> tuple[list[torch.device], dict[str, str]]:
    """The devices that a name means, and why another one is absent."""
    cpu = torch.device("cpu")
    if name == "auto":
        if torch.cuda.is_available():
            return [cpu, torch.device("cuda")], {}
        return [cpu], {"cuda": "this machine has no CUDA device"}
    device = _device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is auto, cpu, cuda or cuda:1, ...; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; take cpu or auto"
        )
    return [device], {}


def _device(name: str) -> torch.device | None:
    try:
        return torch.device(name)
    except RuntimeError:
        return None


# -- what is compared


@dataclass
class Bench:
    """What the checks share, and where they write."""

    stores: dict[str, Store]
    candidates: list[Candidate]
    devices: list[torch.device]
    pool: Pool
    ledger: Ledger = field(default_factory=Ledger)
    refused: dict[str, str] = field(default_factory=dict)

    def willing(self, plan: Sequence[ViewSpec]) -> list[Candidate]:
        """The candidates that make a plan; the others are noted with their reason."""
        found = []
        for candidate in self.candidates:
            reason = candidate.refuses(plan)
            if reason is None:
                found.append(candidate)
            else:
                self.refused[f"{candidate.label}, {plan[0].interpolation}"] = reason
        return found


def check_decoders(bench: Bench) -> None:
    """Squares at the corners, untouched by any resize: whatever differs, the decoder did."""
    store = bench.stores["jpg"]
    for ids, files, pictures in store.batches():
        params = _corners(files, ids)
        theirs = pil_crops(pictures, params)
        for candidate in bench.candidates:
            if candidate.resize != "antialias":
                continue
            limit = "decode" if candidate.decodes_as_pil(store) else "decode, other transform"
            with candidate.open(files, bench.pool) as engine:
                ours = _crops(engine, [params])[0]
            bench.ledger.compare("decode", candidate.label, store.name, "PIL", limit, ours, theirs)


def _corners(files: Any, ids: np.ndarray) -> ViewParams:
    """Four squares of each image, as large as the smallest image of the batch allows."""
    side = int(min(files.heights.min(), files.widths.min()))
    params = _drawn([ViewSpec("corner", side, count=4, box={"whole": {}})], files, ids)[0]
    params.box[..., 2:] = side
    params.box[1::2, :, 0] = files.heights - side
    params.box[2:, :, 1] = files.widths - side
    return params


def check_crops(bench: Bench) -> None:
    """Crops from every kind of storage against PIL's decode and crop."""
    for store, kind in itertools.product(bench.stores.values(), CROPS):
        plan = _crop_plan(store, kind, _count(store))
        willing = bench.willing(plan)
        for ids, files, pictures in store.batches():
            params = _drawn(plan, files, ids)
            theirs = [pil_crops(pictures, view) for view in params]
            for candidate in willing:
                _check_crops_of(candidate, bench, store, kind, files, params, theirs)


def _check_crops_of(
    candidate: Candidate,
    bench: Bench,
    store: Store,
    kind: str,
    files: Any,
    params: list[ViewParams],
    theirs: list[np.ndarray],
) -> None:
    """One engine's crops; where its decoder is not PIL's, also against PIL's crop of what it decoded."""
    case = f"{store.name}, {kind}"
    exact = candidate.decodes_as_pil(store)
    with candidate.open(files, bench.pool) as engine:
        ours = _crops(engine, params)
        decode = None if exact else getattr(engine, "decode", None)  # decoders of a GPU do not show single images
        decoded = [decode(i).permute(1, 2, 0).numpy() for i in range(len(files))] if decode else []
    limit = _crop_limit(candidate, store, kind, exact)
    for mine, reference in zip(ours, theirs, strict=True):
        bench.ledger.compare("crop", candidate.label, case, "PIL", limit, mine, reference)
    if decoded:
        limit = _crop_limit(candidate, store, kind, True)
        for mine, view in zip(ours, params, strict=True):
            reference = pil_crops(decoded, view)
            bench.ledger.compare("crop", candidate.label, case, "PIL, same decode", limit, mine, reference)


def _crop_limit(candidate: Candidate, store: Store, kind: str, decoded_as_pil: bool) -> str:
    if kind == PADDED:
        return "crop, padded" if decoded_as_pil else "decode, other transform"
    if candidate.resize == "area":
        return "crop, area" if decoded_as_pil else "crop, area, other transform"
    if not decoded_as_pil:
        return "crop, other transform"
    if candidate.engine == "dali":
        return "crop, dali, small" if store.name == "small" else "crop, dali"
    return f"crop, {kind}"


def _crop_plan(store: Store, kind: str, count: int) -> list[ViewSpec]:
    """Random boxes at two sizes, and the centre as evaluation takes it; or squares of padded images, as large as the
    smallest image."""
    if kind == PADDED:
        side = int(min(store.files.heights.min(), store.files.widths.min()))
        return [ViewSpec("view", side, count=count, box={"pad_crop": {"padding": side // 8}}, flip=0.5)]
    large, less, short = (SMALL, 24, 40) if store.name == "small" else (224, 96, 256)
    view = partial(ViewSpec, "view", interpolation=kind, flip=0.5)
    return [view(large, count=count), view(less, count=count), view(large, box={"center": {"resize": short}})]


def _count(store: Store) -> int:
    return math.ceil(FEWEST_VIEWS / len(store.files))


def check_matrix_crops(bench: Bench) -> None:
    """The crops that the resident engine makes on accelerators: every precision, on every device."""
    for name, kind in itertools.product(("raw", "small"), CROPS):
        store = bench.stores[name]
        ids, files, pictures = next(store.batches(MATRIX_IMAGES if name == "raw" else BATCH))
        params = _drawn(_crop_plan(store, kind, count=2), files, ids)
        theirs = [pil_crops(pictures, view) for view in params]
        for device, dtype in itertools.product(bench.devices, DTYPES):
            images, rows = torch.from_numpy(_canvas(pictures)).to(device), torch.arange(len(ids), device=device)
            limit = f"crop, {kind}{', bf16' if dtype == 'bf16' and kind != PADDED else ''}"
            for view, reference in zip(params, theirs, strict=True):
                ours = crop_matmul(images, rows, view, DTYPES[dtype]).cpu().numpy()
                subject, case = f"matmul {dtype} {device.type}", f"{name}, {kind}"
                bench.ledger.compare("crop", subject, case, "PIL", limit, ours, reference)


def _canvas(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """(B, H, W, 3) uint8 with each picture in the top left corner."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    canvas = np.zeros((len(pictures), height, width, 3), np.uint8)
    for place, picture in zip(canvas, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    return canvas


@dataclass(frozen=True)
class ColourPath:
    """One of the ways in which `pipelines.colour` computes."""

    label: str
    function: Callable[..., None]
    device: torch.device

    def levels(self, crops: np.ndarray, params: ViewParams, spec: ViewSpec, dtype: torch.dtype) -> np.ndarray:
        """(V, B, S, S, 3) float32 levels that it makes of crops, the normalisation undone."""
        out = torch.empty(crops.shape, dtype=dtype, device=self.device)
        self.function(torch.from_numpy(crops).to(self.device), params, spec, out)
        return _levels(out, spec)


def colour_paths(devices: Sequence[torch.device]) -> list[ColourPath]:
    """The compiled loops on the CPU, and batched torch on every device."""
    compiled = [ColourPath("numba cpu", colour, device) for device in devices if device.type == "cpu"]
    return [*compiled, *(ColourPath(f"torch {device.type}", colour_torch, device) for device in devices)]


def check_colour(bench: Bench) -> None:
    """Every operation alone, and two chains with normalisation in every output type, on crops that PIL made."""
    store, paths = bench.stores["raw"], colour_paths(bench.devices)
    for side, (name, ops) in itertools.product(COLOUR_SIDES, {**OPERATIONS, **CHAINS}.items()):
        normalize = None if name in OPERATIONS else (IMAGENET_MEAN, IMAGENET_STD)
        spec = ViewSpec("view", side, count=_count(store), flip=0.5, ops=ops, normalize=normalize)
        for ids, files, pictures in store.batches():
            params = _drawn([spec], files, ids)[0]
            crops = pil_crops(pictures, params)
            exact, rounded = float_colour(crops, params.ops), pil_colour(crops, params.ops)
            for path in paths:
                ours = path.levels(crops, params, spec, torch.float32)
                limit = _FLOAT_LIMITS.get(name, "colour, float")
                bench.ledger.compare("colour", path.label, name, "torchvision", limit, ours, exact)
                bench.ledger.compare("colour", path.label, name, "PIL", _pil_limit(name), np.rint(ours), rounded)
                for dtype in ("fp16", "bf16") if name == "chain" else ():
                    ours = path.levels(crops, params, spec, DTYPES[dtype])
                    case = f"{name}, {dtype}"
                    bench.ledger.compare("colour", path.label, case, "torchvision", f"colour, {dtype}", ours, exact)


_FLOAT_LIMITS = {SOLARISED: "colour, float, solarise", "affine": "affine, float", "randaugment": "randaugment"}


def _pil_limit(name: str) -> str:
    if name == "randaugment":
        return name
    if name in ("hue", "blur", "affine"):
        return f"{name}, PIL"
    return "colour, PIL" if name in OPERATIONS else "chain, PIL"


def check_views(bench: Bench) -> None:
    """What a loader gives, from bytes to colour: every engine against PIL, and against every other engine."""
    for store in bench.stores.values():
        side = SMALL if store.name == "small" else 224
        spec = ViewSpec("view", side, count=_count(store), flip=0.5, ops=CHAINS[SOLARISED])
        willing = bench.willing([spec])
        for ids, files, pictures in store.batches():
            params = _drawn([spec], files, ids)[0]
            theirs = pil_colour(pil_crops(pictures, params), params.ops)
            made = {candidate: _loaded(candidate, files, spec) for candidate in willing}
            for candidate, ours in made.items():
                limit = _views_limit(candidate, store)
                bench.ledger.compare("views", candidate.label, store.name, "PIL", limit, np.rint(ours), theirs)
            _compare_engines(bench.ledger, store, made)


def _views_limit(candidate: Candidate, store: Store) -> str:
    resize = ", area" if candidate.resize == "area" else ""
    return f"chain, PIL{resize}{'' if candidate.decodes_as_pil(store) else ', other transform'}"


def _compare_engines(ledger: Ledger, store: Store, made: dict[Candidate, np.ndarray]) -> None:
    alike = [candidate for candidate in made if candidate.resize == "antialias"]
    for first, second in itertools.combinations(alike, 2):
        same = first.decodes_as_pil(store) and second.decodes_as_pil(store)
        limit = "engines" if same else "engines, other transform"
        ledger.compare("engines", first.label, store.name, second.label, limit, made[first], made[second])


def _loaded(candidate: Candidate, files: Any, spec: ViewSpec) -> np.ndarray:
    """(V, B, S, S, 3) float32 levels of all views of a loader."""
    with candidate.loader(files, [spec]) as loader:
        (batch,) = loader
        return _levels(torch.stack(batch.views[spec.name]).permute(0, 1, 3, 4, 2), spec)


def _levels(views: Tensor, spec: ViewSpec) -> np.ndarray:
    """Views (..., 3) as float32 levels, the normalisation undone."""
    levels = views.cpu().double().numpy()
    if spec.normalize is not None:
        mean, std = (np.asarray(values) for values in spec.normalize)
        levels = levels * std + mean
    return (levels * 255).astype(np.float32)


def _drawn(plan: Sequence[ViewSpec], files: Any, ids: np.ndarray) -> list[ViewParams]:
    return draw(plan, seed=SEED, epoch=0, index=ids, heights=files.heights, widths=files.widths)


def _crops(engine: Any, params: list[ViewParams]) -> list[np.ndarray]:
    """(V, B, S, S, 3) uint8 for each spec, of all images of an engine."""
    crops = engine.crops(np.arange(params[0].box.shape[1]), params, _no_replacement)
    return [crop.cpu().numpy().copy() for crop in crops]


def _no_replacement(row: int, error: InputError) -> int:
    """In training another image takes a damaged one's place; here the comparison ends."""
    raise error


CHECKS: tuple[Callable[[Bench], None], ...] = (
    check_decoders,
    check_crops,
    check_matrix_crops,
    check_colour,
    check_views,
)

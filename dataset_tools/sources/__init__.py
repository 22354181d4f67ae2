"""Where images come from: each module turns one kind of source into a `Source`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dataset_tools.images import ImageLike, ImageRefused

Sample = tuple[str, ImageLike | ImageRefused, int | None]  # key (what a message calls it), image, label


@dataclass
class Source:
    """A source that was found and looked through; its images are not read yet."""

    name: str
    samples: Iterable[Sample]
    count: int
    classes: list[str] | None
    mode: str = "jpg"  # how it is stored unless the user says otherwise
    remarks: list[str] = field(default_factory=list)  # what was found and left out

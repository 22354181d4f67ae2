"""Choosing images of a data set: by a published list, by a balanced draw, and what cannot be chosen."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dataset_tools.convert import convert
from pipelines import beton
from pipelines.errors import ConfigError, InputError
from pipelines.subset import Subset, balanced, balanced_rows, listed, spread, spread_rows


def write(path, labels, names=None, classes=None):
    """A file of tiny images: image i is i everywhere."""
    images = (np.full((4, 4, 3), i, np.uint8) for i in range(len(labels)))
    names = names or [f"c{y}/c{y}_{i}.JPEG" for i, y in enumerate(labels)]
    convert(zip(names, images, labels, strict=True), path, classes=classes)
    return beton.open(path)


@pytest.fixture
def files(tmp_path):
    with write(tmp_path / "a.beton", [i % 3 for i in range(30)], classes=["x", "y", "z"]) as opened:
        yield opened


def write_list(tmp_path, *lines):
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines))
    return path


def test_names_survive_conversion_and_belong_to_their_images(files):
    assert files.names[4] == "c1/c1_4.JPEG"
    assert Subset(files, np.array([4, 2])).names == ["c1/c1_4.JPEG", "c2/c2_2.JPEG"]
    assert "names" not in files.manifest  # read at each look, not held


def test_a_list_chooses_by_the_published_form_of_names_or_by_the_whole(files, tmp_path):
    chosen = listed(files, write_list(tmp_path, "# a list", "c2_5.JPEG", "", "c1/c1_4.JPEG", " c0_0.JPEG "))
    assert chosen.ids.tolist() == [0, 4, 5]
    assert chosen.labels.tolist() == [0, 1, 2]
    assert chosen.decode(1)[0, 0, 0] == 4


def test_several_files_are_one_data_set(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.beton", [0, 1], names=[f"{name}/1.png", f"{name}/2.png"]).close()
    message = r"1 of its names could each mean several images in .*: 1.png. Write a/1.png, say, or b/1.png$"
    with beton.open([tmp_path / "a.beton", tmp_path / "b.beton"]) as files:
        assert listed(files, write_list(tmp_path, "b/1.png")).ids.tolist() == [2]
        with pytest.raises(InputError, match=message):
            listed(files, write_list(tmp_path, "1.png"))
        with pytest.raises(InputError, match=message):  # as a listing of the class folders would have it
            listed(files, write_list(tmp_path, "1.png", "1.png"))
    with beton.open([tmp_path / "a.beton"] * 2) as files, pytest.raises(InputError, match="no list can tell them"):
        listed(files, write_list(tmp_path, "a/1.png"))


ABSENT = (
    r"5 of the 6 images that it names are not in .*a\.beton: c0_0\.PNG, c0_1\.PNG, c0_2\.PNG, \.\.\.\. "
    r"Names there look like 'c0/c0_0\.JPEG'"
)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["c0_0.JPEG", *(f"c0_{i}.PNG" for i in range(5))], ABSENT),
        (["# only a remark"], "the list is empty"),
        (["c0_0.JPEG", "c0_0.JPEG"], "1 names stand in it more than once: c0_0.JPEG"),
        (["c0_0.JPEG", "c0/c0_0.JPEG"], "1 images stand in it twice"),
    ],
)
def test_a_list_that_cannot_be_followed_is_refused(files, tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        listed(files, write_list(tmp_path, *lines))


def test_a_list_that_is_none_is_refused(files, tmp_path):
    with pytest.raises(InputError, match=r"^there is no list .*absent\.txt; expected a text file"):
        listed(files, tmp_path / "absent.txt")
    with pytest.raises(InputError, match=r"cannot be read as a list of images, one name per line: Is a directory$"):
        listed(files, tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as a list"):
        listed(files, tmp_path / "binary.txt")


def test_data_without_names_says_what_to_do(tmp_path):
    beton.write(tmp_path / "old.beton", [(np.zeros((4, 4, 3), np.uint8), 0)])
    with beton.open(tmp_path / "old.beton") as files:
        assert files.names is None
        with pytest.raises(
            InputError, match=r"Convert it again; or convert the list itself.*relssl convert .*list\.txt"
        ):
            listed(files, write_list(tmp_path, "x.png"))


def test_damaged_names_are_named(files, tmp_path):
    manifest = beton.manifest_path(tmp_path / "a.beton")
    text = re.sub(r'("names": \{\s*"crc32": )\d+', r"\g<1>1", manifest.read_text())
    manifest.write_text(text)
    with beton.open(tmp_path / "a.beton") as again, pytest.raises(InputError, match="its names are damaged"):
        _ = again.names


@pytest.mark.parametrize(
    ("percent", "counts"), [(10, [1, 1, 1]), (20, [2, 2, 2]), (50, [5, 5, 5]), (100, [10, 10, 10])]
)
def test_a_draw_is_balanced(files, percent, counts):
    assert np.bincount(balanced(files, percent, 0).labels).tolist() == counts


def test_what_does_not_divide_goes_to_some_classes(files):
    counts = np.bincount(balanced(files, 27, 3).labels)  # 8 of 30
    assert sorted(counts.tolist()) == [2, 3, 3]


def test_a_draw_depends_on_the_seed_alone_and_a_larger_one_holds_a_smaller(files):
    def ids(percent, seed):
        return balanced(files, percent, seed).ids.tolist()

    assert ids(20, 0) == ids(20, 0) == sorted(ids(20, 0))
    assert len({tuple(ids(20, seed)) for seed in range(5)}) > 1
    for seed in range(3):
        assert all(set(ids(small, seed)) <= set(ids(small + 7, seed)) for small in range(10, 80, 7))


@pytest.mark.parametrize(
    ("percent", "error", "message"),
    [
        (0, ConfigError, "above 0 and at most 100, got 0"),
        (101, ConfigError, "above 0 and at most 100, got 101"),
        (5, ConfigError, r"5 % of 30 images are 2, fewer than the 3 classes: .* Take at least 10 %"),
    ],
)
def test_a_percentage_that_leaves_a_class_without_an_image_is_refused(files, percent, error, message):
    with pytest.raises(error, match=message):
        balanced(files, percent, 0)


def test_a_class_with_fewer_images_than_its_share_is_named(tmp_path):
    with write(tmp_path / "a.beton", [0] * 19 + [1], classes=["many", "single"]) as files:
        assert np.bincount(balanced(files, 10, 0).labels).tolist() == [1, 1]
        with pytest.raises(InputError, match="are 2 images of each class, but class single has 1"):
            balanced(files, 20, 0)


def test_a_share_of_unlabelled_images_is_refused(tmp_path):
    with write(tmp_path / "a.beton", [0, None, 1, None]) as files, pytest.raises(InputError, match="2 of 4 images"):
        balanced(files, 50, 0)


def test_so_many_labels_of_each_class_are_the_first_of_the_same_order():
    labels = np.arange(40) % 4
    rows = balanced_rows(labels, 0, per_class=3)
    assert np.bincount(labels[rows]).tolist() == [3, 3, 3, 3]
    assert set(rows) <= set(balanced_rows(labels, 0, per_class=4)) <= set(balanced_rows(labels, 0, percent=60))
    assert rows.tolist() == balanced_rows(labels, 0, percent=30).tolist()
    assert rows.tolist() != balanced_rows(labels, 1, per_class=3).tolist()


def test_a_class_that_nothing_has_takes_no_part_in_a_draw():
    labels = np.array([0, 0, 5, 5])
    assert labels[balanced_rows(labels, 0, per_class=1)].tolist() == [0, 5]


@pytest.mark.parametrize(
    ("amount", "seed", "message"),
    [
        ({"per_class": 0}, 0, "1 label of each class or more, got 0"),
        ({}, 0, "either a number for each class or a percentage"),
        ({"per_class": 1, "percent": 50.0}, 0, "either a number for each class or a percentage"),
        ({"per_class": 1}, -1, "seed of a draw must be 0 or more"),
    ],
)
def test_draws_that_cannot_be(amount, seed, message):
    with pytest.raises(ConfigError, match=message):
        balanced_rows(np.arange(6) % 2, seed, **amount)


def test_more_labels_than_a_class_has_are_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"2 labels of each class .* class rare has 1 images: take at most 1"):
        balanced_rows(np.array([0, 0, 0, 1]), 0, per_class=2, classes=["common", "rare"])


@pytest.mark.parametrize(("total", "most"), [(0, 3), (1, 1), (7, 3), (10, 10), (10, 99), (50_000, 10_000)])
def test_rows_are_spread_over_all(total, most):
    rows = spread_rows(total, most)
    count = min(total, most)
    begin = np.arange(count + 1) * total // max(count, 1)
    assert len(rows) == count
    assert (begin[:-1] <= rows).all()
    assert (rows < begin[1:]).all()


@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_a_spread_takes_of_every_class(order):
    labels = np.arange(50_000) % 10
    counts = np.bincount((np.sort(labels) if order == "sorted" else labels)[spread_rows(50_000, 10_000)], minlength=10)
    assert counts.min() > 900
    assert counts.max() < 1100


def test_spread_keeps_the_names_of_what_it_takes(files):
    few = spread(files, 3)
    assert few.names == [files.names[i] for i in few.ids]
    assert few.ids.tolist() == spread_rows(len(files), 3).tolist()
    assert spread(files, 99) is files

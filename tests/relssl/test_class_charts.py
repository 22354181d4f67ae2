"""Pictures of classes: every cell and every dot where it belongs."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from relssl.charts import CLASS_COLOURS, Series, line_chart, log_ticks, standalone
from relssl.class_charts import class_colour, confusion_chart, map_chart


def elements(picture, tag):
    return list(ElementTree.fromstring(str(picture)).iter(tag))


def test_every_cell_has_its_share_and_its_count():
    picture = confusion_chart([[8, 2, 0], [1, 3, 0], [0, 0, 0]], ["a", "b", "<c>"])
    cells = [(g.find("title").text, g.find("rect"), g.find("text")) for g in elements(picture, "g")]
    assert [title for title, _, _ in cells][:4] == [
        "a taken for a: 8 of 10",
        "a taken for b: 2 of 10",
        "a taken for <c>: 0 of 10",
        "b taken for a: 1 of 4",
    ]
    assert [None if text is None else text.text for _, _, text in cells][:5] == ["80", "20", None, "25", "75"]
    assert [rect.get("class") for _, rect, _ in cells][:2] == ["right", "wrong"]
    assert float(cells[0][1].get("fill-opacity")) == pytest.approx(0.8)
    assert float(cells[3][1].get("fill-opacity")) == pytest.approx(0.85)  # the largest confusion
    assert {"a", "b", "<c>"} <= {text.text for text in elements(picture, "text")}


def test_many_classes_have_no_figures_and_too_many_no_picture():
    names = [f"class {i}" for i in range(60)]
    counts = [[int(i == j) for j in range(60)] for i in range(60)]
    picture = confusion_chart(counts, names)
    (path,) = elements(picture, "path")
    assert (path.get("class"), path.get("fill-opacity")) == ("right", "1.00")
    assert path.get("d").count("M") == 60
    counts[3][7] = counts[8][2] = 1
    half, right, wrong = elements(confusion_chart(counts, names), "path")
    assert (half.get("fill-opacity"), half.get("d").count("M")) == ("0.50", 2)  # of two images, one is right
    assert (wrong.get("class"), wrong.get("d").count("M")) == ("wrong", 2)
    assert right.get("d").count("M") + half.get("d").count("M") == 60
    assert {text.text for text in elements(picture, "text")} == {"taken for →", "class →"}
    assert confusion_chart([[1] * 101] * 101, [str(i) for i in range(101)]) == ""


def test_each_class_has_one_path_of_dots_and_a_name():
    picture = map_chart([0.0, 1.0, 0.5], [0.0, 1.0, 0.5], [0, 1, 0], ["cat", "dog"])
    paths = elements(picture, "path")
    assert [path.find("title").text for path in paths] == ["cat", "dog"]
    assert [path.get("stroke") for path in paths] == list(CLASS_COLOURS[:2])
    assert paths[0].get("d") == "M10.0 550.0h0M280.0 280.0h0"  # y grows upwards
    assert [text.text for text in elements(picture, "text")] == ["cat", "dog"]


def test_a_map_without_labels_and_one_of_many_classes():
    picture = map_chart([0.1, 0.2], [0.1, 0.2], None, None)
    assert len(elements(picture, "path")) == 1
    assert not elements(picture, "text")
    many = map_chart([0.5] * 30, [0.5] * 30, list(range(30)), [str(i) for i in range(30)])
    assert len({path.get("stroke") for path in elements(many, "path")}) == 30
    assert not elements(many, "text")
    assert class_colour(3, 10) == CLASS_COLOURS[3]


def test_a_file_of_its_own_has_its_colours():
    content = standalone(map_chart([0.5], [0.5], [0], ["cat"]))
    root = ElementTree.fromstring(content)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = root.find("{http://www.w3.org/2000/svg}style").text
    assert "prefers-color-scheme: dark" in style
    used = set(re.findall(r"var\((--\w+)\)", content))
    assert used <= set(re.findall(r"(--\w+):", style))


def test_a_logarithmic_axis():
    points = [(10.0, 1.0), (100.0, 2.0), (1000.0, 3.0)]
    picture = line_chart([Series("a", points, marked=True)], x_label="n", label="l", x_log=True)
    places = [float(circle.get("cx")) for circle in elements(picture, "circle")]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1])
    assert {"10", "100", "1000"} <= {text.text for text in elements(picture, "text")}
    assert log_ticks(1, 30) == [1, 2, 5, 10, 20]
    assert log_ticks(10, 50_000) == [10, 100, 1000, 10_000]


def test_a_spread_is_a_band():
    points = [(1.0, 10.0), (2.0, 20.0)]
    plain = line_chart([Series("a", points)], x_label="n", label="l")
    banded = line_chart([Series("a", points, spread=[5.0, 0.0])], x_label="n", label="l")
    assert not elements(plain, "polygon")
    (band,) = elements(banded, "polygon")
    heights = [float(pair.split(",")[1]) for pair in band.get("points").split()]
    (line,) = elements(banded, "polyline")
    middle = float(line.get("points").split()[0].split(",")[1])
    assert heights[0] < middle < heights[3]  # 15 above 10 above 5 at the first point
    assert heights[0] + heights[3] == pytest.approx(2 * middle, abs=0.2)
    assert heights[1] == heights[2]

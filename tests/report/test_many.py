"""A report of sixteen methods can be read: labels find their points, sentences stay short, tables narrow."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy
import pytest
from matplotlib.text import Annotation

from keeptune.report import details, plots
from keeptune.report.html import render_html
from keeptune.report.placing import Label, place
from keeptune.report.records import parse_report
from keeptune.report.style import looks, page, themed
from keeptune.report.verdict import verdict

NAMES = [f"method-{letter}" for letter in "abcdefghijklmnop"]


@pytest.fixture
def many(make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    draw = numpy.random.default_rng(3)
    report = make(*((name, 0.4 + 0.5 * draw.random(), 0.7 + 0.2 * draw.random()) for name in NAMES))
    for index, run in enumerate(report["methods"]):
        run["loss"] = [{"step": step, "loss": 1 + 0.01 * index + 1 / (1 + step)} for step in range(20)]
        run["options"] = {"rank": 8, "train.learning_rate": 1e-3 if index else 1e-4}
    report["methods"][3]["options"]["beta"] = 2
    return report


def test_every_method_has_a_look_of_its_own(many: dict[str, Any]) -> None:
    found = looks(parse_report(many))
    assert len({look.colour for look in found.values()}) == len(NAMES)
    more = {"base": "b", "methods": [many["methods"][0] | {"name": f"m{n}"} for n in range(100)]}
    assert len({(look.colour, look.shape) for look in looks(parse_report(more)).values()}) == 100


def test_labels_do_not_overlap_and_far_ones_have_a_line(many: dict[str, Any]) -> None:
    figure = plots.tradeoff(many)
    assert figure is not None
    figure.draw_without_rendering()
    labels = [item for item in figure.axes[0].texts if isinstance(item, Annotation) and item.get_text() in NAMES]
    assert len(labels) == len(NAMES)
    lines = {item.get_text(): item.arrow_patch for item in labels}
    for item in labels:
        item.arrow_patch = item.arrowprops = None
    boxes = {item.get_text(): item.get_window_extent() for item in labels}
    for one, two in combinations(NAMES, 2):
        assert not boxes[one].overlaps(boxes[two]), (one, two)
    points = {item.get_text(): figure.axes[0].transData.transform(item.xy) for item in labels}

    def gap(label: str, point: str) -> float:
        box, (x, y) = boxes[label], points[point]
        return float(numpy.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1)))

    alone = [name for name in NAMES if lines[name] is None]
    assert all(gap(name, name) <= min(gap(name, other) for other in NAMES) for name in alone)


def test_a_label_keeps_away_from_the_points_of_others() -> None:
    with themed():
        figure = page(6.0, 4.0)
        axes = figure.subplots()
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        figure.draw_without_rendering()
        place(axes, [Label(50, 50, "left", "black"), Label(53, 50, "right", "black")], [])
    one, two = (item for item in axes.texts if isinstance(item, Annotation))
    assert one.xyann[0] < 0 < two.xyann[0], "each on its own side, although no marker was said to be in the way"


def test_losses_end_at_labels_in_their_order(many: dict[str, Any]) -> None:
    figure = plots.loss_curves(many)
    assert figure is not None
    axes = figure.axes[0]
    assert len(axes.lines) == len(NAMES), "no raw values behind so many curves"
    labels = [item for item in axes.texts if isinstance(item, Annotation)]
    heights = {item.get_text(): item.xyann[1] for item in labels}
    assert sorted(NAMES, key=heights.__getitem__) == NAMES
    assert len({item.xyann[0] for item in labels}) == 1
    assert all(item.arrow_patch is not None for item in labels)


def test_the_verdict_counts_what_it_cannot_name(make: Callable[..., dict[str, Any]], many: dict[str, Any]) -> None:
    report = make(("best", 0.99, 0.9), *((name, 0.3 + 0.01 * n, 0.5) for n, name in enumerate(NAMES)))
    said = verdict(report)
    assert "best lost the least of facts (1.0 points), clearly less than all 16 others (55 to 70)" in said
    report = make(("best", 0.99, 0.9), ("tied", 0.98, 0.9), *((name, 0.3, 0.5) for name in NAMES))
    assert "no clear difference to tied (2.0), and clearly less than 16 others" in verdict(report)
    report = make(("a", 0.8, 0.9), *((name, 0.8, 0.5) for name in NAMES))
    assert "a (0.900) is clearly ahead of 16 others" in verdict(report)
    text = render_html(many)
    assert "<li>" not in text
    assert "raw values" not in text


def test_options_tell_the_common_from_the_rare(many: dict[str, Any]) -> None:
    common, grid = details.options(parse_report(many))
    assert common == "rank 8"
    assert grid is not None
    assert grid.heads == ("method", "train.learning rate", "its own")
    assert grid.rows[0] == ("method-a", "0.0001", "–")
    assert grid.rows[3] == ("method-d", "0.001", "beta 2")
    text = render_html(many)
    assert "The same for all: rank 8." in text
    assert re.search(r'<td class="path">beta 2</td>', text)


def test_lists_among_options_are_told_in_words(many: dict[str, Any]) -> None:
    for run in many["methods"]:
        run["options"]["lora.targets"] = ["q_proj", "up_proj"]
    common, _ = details.options(parse_report(many))
    assert "q_proj up_proj" in common
    assert "[" not in common


def test_options_of_one_method_and_of_none(minimal: dict[str, Any]) -> None:
    assert details.options(parse_report(minimal)) == ("", None)
    minimal["methods"][0]["options"] = {"rank": 8, "alpha": None}
    common, grid = details.options(parse_report(minimal))
    assert common == ""
    assert grid == details.Grid(("method", "rank", "alpha"), (("lora", "8", "–"),))


def test_options_that_are_all_the_same_need_no_table(many: dict[str, Any]) -> None:
    for run in many["methods"]:
        run["options"] = {"rank": 8}
    assert details.options(parse_report(many)) == ("rank 8", None)
    assert "The same for all: rank 8." in render_html(many)

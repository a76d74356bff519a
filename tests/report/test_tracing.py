"""The figures of causal tracing."""

from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
from rich.console import Console

from keeptune.report.figures.trace_maps import heat_figure, profile_figure
from keeptune.report.tables.analyses import print_trace


def model(name: str, average: list[float], *, tokens: int = 3, distinct: bool = True, **more: Any) -> dict[str, Any]:
    most = max(average)
    return {
        "name": name,
        "clean": 0.9,
        "corrupted": 0.2,
        "AIE": average,
        "AIE_error": [0.01] * len(average),
        "NAIE_max": [max(a, 0) / most for a in average] if most > 0 else None,
        "NAIE_max_error": [0.02] * len(average),
        "distinct": distinct,
        "heat": [[layer / 10 + token / 100 for token in range(tokens)] for layer in range(len(average))],
        **more,
    }


def record(*models: dict[str, Any], prompt: tuple[str, ...] = ("The", " sky", " is")) -> dict[str, Any]:
    return {
        "data": {"examples": 7},
        "reading": "positions",
        "kind": "block",
        "window": 1,
        "noise": {"fraction": 0.5, "scale": 3.0, "seed": 0},
        "norm": "max",
        "models": list(models),
        "example": {"number": 4, "prompt": list(prompt), "answer": " blue", "noised": [1]},
    }


def test_profiles_have_a_line_and_a_band_for_each_model() -> None:
    figure = profile_figure(record(model("base", [0.4, 0.2]), model("tuned", [0.1, 0.3])))
    left, right = figure.axes
    assert [line.get_label() for line in right.lines] == ["base", "tuned"]
    assert numpy.asarray(right.lines[1].get_ydata()).tolist() == pytest.approx([1 / 3, 1])
    assert numpy.asarray(left.lines[0].get_ydata()).tolist() == [0.4, 0.2]
    assert (len(left.collections), len(right.collections)) == (2, 2)
    band = left.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.2 - 0.0196, 0.4 + 0.0196))


@pytest.mark.parametrize("average", [[0.01, 0.02], [-0.1, -0.2]])
def test_a_profile_that_is_noise_is_not_drawn(average: list[float]) -> None:
    figure = profile_figure(record(model("base", average, distinct=False)))
    assert len(figure.axes[0].lines) == 2  # and the line at zero
    assert not figure.axes[1].lines
    assert "no effect beyond chance" in figure.axes[1].texts[0].get_text()


def test_one_text_has_no_band() -> None:
    nothing = [None, None]
    figure = profile_figure(record(model("base", [0.4, 0.2], AIE_error=nothing, NAIE_max_error=nothing)))
    assert not figure.axes[0].collections


def test_a_heat_map_marks_noise_and_shares_its_colours() -> None:
    figure = heat_figure(record(model("base", [0.4, 0.2, 0.3]), model("tuned", [0.1, 0.3, 0.2])))
    first, second, _ = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["The", "sky*", "is"]
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["base", "tuned"]
    mesh = first.collections[0]
    assert numpy.asarray(mesh.get_array()).reshape(3, 3)[2, 1] == pytest.approx(0.12)  # the last token, layer 1
    assert mesh.norm.vmax == second.collections[0].norm.vmax == pytest.approx(0.22)
    assert mesh.norm.vmin == pytest.approx(-0.22)


def test_long_prompts_and_deep_models_fit() -> None:
    words = tuple(f" word{n}" for n in range(300))
    deep = model("a model with a very long name indeed", [0.1] * 80, tokens=300)
    figure = heat_figure(record(deep, prompt=words))
    assert figure.get_figheight() < 25
    assert figure.get_figwidth() < 20


def test_a_table_is_printed() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_trace(record(model("base", [0.4, 0.2]), model("tuned", [-0.1, -0.3], distinct=False)), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "0.4000 ± 0.0196" in text
    assert "0.500" in text
    assert "tuned: the answer's probability is 0.900, with noise 0.200; no layer's effect" in text

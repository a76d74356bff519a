"""The figures of causal tracing."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from keeptune.report.pages.study_charts import trace_charts
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
        "noise": {"fraction": 0.5, "scale": 3.0, "seed": 0},
        "norm": "max",
        "models": list(models),
        "example": {"number": 4, "prompt": list(prompt), "answer": " blue", "noised": [1]},
    }


def test_profiles_have_a_line_with_intervals_for_each_model() -> None:
    (raw, shares), _ = trace_charts(record(model("base", [0.4, 0.2]), model("tuned", [0.1, 0.3])))
    assert [line.name for line in shares.figure.data] == ["base", "tuned"]
    assert shares.figure.data[1].y == pytest.approx((1 / 3, 1))
    assert raw.figure.data[0].y == (0.4, 0.2)
    assert raw.figure.data[0].error_y.array == pytest.approx((0.0196, 0.0196))


@pytest.mark.parametrize("average", [[0.01, 0.02], [-0.1, -0.2]])
def test_a_profile_that_is_noise_is_not_drawn(average: list[float]) -> None:
    (raw, shares), _ = trace_charts(record(model("base", average, distinct=False)))
    assert len(raw.figure.data) == 1 and not shares.figure.data
    assert "base: no effect beyond chance" in shares.alt


def test_one_text_has_no_interval() -> None:
    nothing = [None, None]
    (raw, _), _ = trace_charts(record(model("base", [0.4, 0.2], AIE_error=nothing, NAIE_max_error=nothing)))
    assert raw.figure.data[0].error_y.array == (0, 0)


def test_a_heat_map_marks_noise_and_shares_its_colours() -> None:
    two = record(model("base", [0.4, 0.2, 0.3]), model("tuned", [0.1, 0.3, 0.2]), prompt=("The", "<b>", "is"))
    (raw, _), maps = trace_charts(two, "key", "run")
    assert maps[0].figure.layout.yaxis.ticktext == ("The", "&lt;b&gt;*", "is")
    assert [chart.alt.partition(":")[0] for chart in (raw, *maps)] == [
        "run, average indirect effect (AIE)",
        "run, base",
        "run, tuned",
    ]
    assert maps[0].figure.data[0].z[2][1] == pytest.approx(0.12)  # the last token, layer 1
    for chart in maps:
        assert (chart.figure.data[0].zmin, chart.figure.data[0].zmax) == pytest.approx((-0.22, 0.22))


def test_long_prompts_and_deep_models_fit() -> None:
    words = tuple(f" word{n}" for n in range(300))
    deep = model("a model with a very long name indeed", [0.1] * 80, tokens=300)
    _, maps = trace_charts(record(deep, prompt=words))
    assert maps[0].height < 1000
    assert len(maps[0].figure.layout.yaxis.ticktext) <= 40


def test_a_table_is_printed() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_trace(record(model("base", [0.4, 0.2]), model("tuned", [-0.1, -0.3], distinct=False)), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "0.4000 ± 0.0196" in text
    assert "0.500" in text
    assert "tuned: the answer's probability is 0.900, with noise 0.200; no layer's effect" in text

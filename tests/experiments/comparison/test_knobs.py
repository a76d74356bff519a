"""Knobs as values: by halves, standard ones, and back from a row."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeptune.core.errors import RecipeError
from keeptune.experiments.comparison.knobs import Intruders, Layers, Scale, halves, knob_of, standard_knobs


def test_halves_by_hand() -> None:
    assert [knob.factors for knob in halves(4, [0.5, 0])] == [
        (0.5, 0.5, 1, 1),
        (1, 1, 0.5, 0.5),
        (0, 0, 1, 1),
        (1, 1, 0, 0),
    ]


def test_standard_knobs_leave_out_the_cell_itself() -> None:
    found = [knob.slug for knob in standard_knobs([0.25, 1.0], depth=2)]
    assert found == ["scale-0.25", "layers-1x0.25-1x1", "layers-1x1-1x0.25", "intruders-0.5"]
    assert [knob.slug for knob in standard_knobs([0.5], intruders=[])] == ["scale-0.5"]


@given(st.one_of(st.floats(0, 1).map(Scale), st.floats(0, 1).map(Intruders), st.lists(st.floats(0, 1), min_size=1)))
def test_a_knob_is_read_back_from_a_row(knob: Any) -> None:
    knob = Layers(tuple(knob)) if isinstance(knob, list) else knob
    assert knob_of(knob.plain()) == knob
    assert len(knob.slug) < 80


@given(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True))
def test_knobs_that_differ_have_folders_of_their_own(factors: list[float]) -> None:
    one, other = factors
    assert Scale(one).slug != Scale(other).slug
    assert Layers((one, 1)).slug != Layers((other, 1)).slug
    assert Scale(0.5).slug == "scale-0.5"
    assert Scale(1).slug == "scale-1"


@pytest.mark.parametrize("plain", [{"scale": 1.5}, {"layers": []}, {"intruders": float("nan")}, {"size": 1}, {}])
def test_what_is_no_knob_is_refused(plain: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        knob_of(plain)

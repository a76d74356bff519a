"""A factor above 1 on a method's strength keeps more, whichever option it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.contract.conftest import CASES, World

from keeptune.core.errors import RecipeError
from keeptune.core.plan import Plan
from keeptune.methods.base import methods, stronger

WITH = {case: method for case, method in CASES.items() if method.strength_option}
FACTORS = (0.3, 1.0, 3.0)


def moved(method: Any, factor: float) -> Any:
    option, value = stronger(method, factor)
    return dataclasses.replace(method, **{option: value})


def test_every_method_says_whether_it_has_a_strength() -> None:
    for cls in methods().values():
        assert cls.strength_option is None or cls.strength_option[1] in ("multiplied", "divided")
    assert {cls.name for cls in methods().values() if cls.strength_option} >= {"keep", "lalora", "l2-lora", "loki"}


@pytest.mark.parametrize("case", WITH)
def test_factors_move_the_option_in_the_stated_direction_and_it_stays_valid(case: str) -> None:
    method, known = WITH[case], WITH[case].strength_option
    found = [stronger(moved(method, factor), 1.0) for factor in FACTORS]
    option, value = stronger(method, 1.0)
    assert {name for name, _ in found} == {option} == {known[0]}
    assert getattr(method, option) in (None, pytest.approx(value))
    assert found[1][1] == pytest.approx(value)
    values = [number for _, number in found]
    assert values == sorted(values, reverse=known[1] == "divided")
    assert len(set(values)) == len(FACTORS)
    back = stronger(moved(moved(method, 3.0), 1 / 3), 1.0)
    assert back == (option, pytest.approx(value))


@pytest.mark.parametrize("case", WITH)
def test_a_factor_above_1_keeps_more(case: str, worlds: Any) -> None:
    """A stronger penalty, a smaller budget, or less that is trained."""
    world: World = worlds("llama")
    pair = [moved(WITH[case], factor) for factor in (1.0, 2.0)]  # of loki, more rows than the rank are left
    held = [method.penalties() for method in pair]
    if not held[0]:
        more, less = (trained(world.bench().plan(method)) for method in pair)
        assert less < more
        return
    for weaker, stricter in zip(*held, strict=True):
        if hasattr(weaker, "budget"):
            assert stricter.budget == pytest.approx(weaker.budget / 2)
        else:
            assert stricter.strength == pytest.approx(weaker.strength * 2)


def trained(plan: Plan) -> int:
    return sum(row.get("rows", row["trained_parameters"]) for row in plan.summary())


def test_what_no_factor_moves_is_refused() -> None:
    with pytest.raises(RecipeError, match="method lora, strength.*no option for how much it keeps"):
        stronger(methods()["lora"](), 3.0)
    with pytest.raises(RecipeError, match=r"method\.strength: got 0"):
        stronger(methods()["l2-lora"](strength=0.0), 3.0)

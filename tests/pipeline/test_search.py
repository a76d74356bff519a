"""The boundary search: what it tries, what it looks at, and that it is done once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import recipe_of

from keeptune.core.errors import DataError, RecipeError
from keeptune.core.plan import Plan
from keeptune.evaluation.metrics import harmonic
from keeptune.pipeline import boundary_search as search
from keeptune.pipeline.run import plan_stage, start

FARSS = {"name": "farss", "rank": 4, "r_max": 4, "r_avg": 3, "boundary_range": [0.2, 0.4]}
FARSS |= {"search_steps": 2, "search_examples": 4}
Values = Callable[..., dict[str, Any]]


def planned(recipe_values: Values, **changes: Any) -> Plan:
    return plan_stage(start(recipe_of(recipe_values(**{"method": FARSS, "targets": ["q_proj", "up_proj"]} | changes))))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects what the trials are trained on."""
    seen: list[Any] = []
    plain = search.train

    def watched(model: Any, plan: Any, tokenizer: Any, task: Any, config: Any) -> Any:
        seen.append((plan.options["boundary"], task, config.max_steps))
        return plain(model, plan, tokenizer, task, config)

    monkeypatch.setattr(search, "train", watched)
    return seen


def test_the_best_boundary_by_kt_is_planned_and_noted(
    recipe_values: Values, tmp_path: Path, trained: list[Any]
) -> None:
    job = start(recipe_of(recipe_values(method=FARSS, targets=["q_proj", "up_proj"])))
    plan = plan_stage(job)
    assert [(boundary, steps) for boundary, _, steps in trained] == [(1, 2), (2, 2)]
    for _, task, _ in trained:  # what is held out is not trained on
        assert set(task.read_texts) < set(job.task.read_texts)
        assert len(task) == len(job.task) - 4
    record = json.loads((tmp_path / "out" / "search" / "search.json").read_text())["trials"]
    best = max(record, key=lambda trial: trial["KT"])
    assert plan.options["boundary"] == best["boundary"]
    assert f"boundary {best['boundary']} chosen by short runs of 2 steps" in plan.provenance["notes"][0]
    assert max(trial["T"] for trial in record) == 1
    for trial in record:
        assert trial["KT"] == pytest.approx(harmonic(trial["K"], trial["T"]))
        assert 0 < trial["learned"] < 1 and 0 < trial["kept"] < 1
    assert {len([t for t in plan.targets if t.target.layer < best["boundary"]])} == {2 * best["boundary"]}


def test_a_search_is_done_once_and_goes_on_where_it_was_killed(
    recipe_values: Values, tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = search.train

    def killed(*given: Any) -> Any:
        if given[1].options["boundary"] == 2:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(search, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        planned(recipe_values)
    monkeypatch.setattr(search, "train", plain)
    first = planned(recipe_values)
    assert [boundary for boundary, *_ in trained] == [1, 2]
    again = planned(recipe_values, output=tmp_path / "out")
    assert again.key == first.key
    assert len(trained) == 2
    planned(recipe_values, method=FARSS | {"boundary_range": [0.2, 0.6]})
    assert [boundary for boundary, *_ in trained] == [1, 2, 3]
    planned(recipe_values, train={"learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4})
    assert [boundary for boundary, *_ in trained] == [1, 2, 3, 1, 2]


def test_a_given_boundary_or_a_single_candidate_searches_nothing(recipe_values: Values, trained: list[Any]) -> None:
    assert planned(recipe_values, method=FARSS | {"boundary": 2}).options["boundary"] == 2
    narrow = planned(recipe_values, method=FARSS | {"boundary_range": [0.2, 0.3]})
    assert narrow.options["boundary"] == 1
    assert "the only one in the range" in narrow.provenance["notes"][0]
    assert trained == []


def test_without_knowledge_there_is_nothing_to_weigh_against(recipe_values: Values) -> None:
    with pytest.raises(RecipeError, match="Add `knowledge`, or set the boundary"):
        planned(recipe_values, knowledge=None, evaluate=[])


def test_too_few_examples_to_hold_any_out_are_refused(recipe_values: Values) -> None:
    task = recipe_values()["task"] | {"examples": 4}
    with pytest.raises(DataError, match="at least 5"):
        planned(recipe_values, task=task)

"""The budgeted search: what it draws, that a seed draws the same, and a small search in this process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from tests.pipeline.support import keeptune

from keeptune.core.errors import ArtefactError, RecipeError
from keeptune.experiments import engine
from keeptune.experiments import search as searching
from keeptune.experiments.entries import Entry, Variation
from keeptune.experiments.plan_runs import Comparison, load_comparison
from keeptune.experiments.run_comparison import run_comparison
from keeptune.experiments.search import (
    JOURNAL,
    Span,
    ask,
    open_study,
    setting_of,
    spans_of,
    strengths_of,
)

Load = Callable[..., Comparison]
FAIL = optuna.trial.TrialState.FAIL
SMALL = {"name": "lora", "rank": 4}
TOO_MUCH = {"label": "too much", "method": {"name": "lora", "rank": 4000}}


@pytest.fixture
def search(load: Load) -> Load:
    """Load a search of three trials that needs no Ray."""

    def make(*methods: Any, **section: Any) -> Comparison:
        given = {"learning_rate": [1e-3, 1e-2], "resources": None, "search": {"trials": 3, "seed": 5}, **section}
        return load(*methods, **given)

    return make


def test_strengths_are_spans_where_numbers_are_varied_and_else_the_listed_ones() -> None:
    def of(*given: Any) -> Any:
        return strengths_of([Variation({"replay": value}) for value in given])

    assert of(0.05, 0.4, 0.1) == Span(0.05, 0.4)
    assert of(2, 16, 4) == Span(2, 16, whole=True)
    assert of(2, 16, 4.5) == Span(2, 16)
    assert of(0, 0.1) == 2
    assert of(True, 2) == 2
    assert of("a", "b", "c") == 3
    assert of(0.1) is None
    factors = [Variation({}, 1.0), Variation({"method.nats": 0.1}, 10.0), Variation({"method.nats": 2.0}, 0.5)]
    assert strengths_of(factors) == Span(0.5, 10)


def test_the_span_of_rates_is_the_entrys_own_and_one_rate_is_not_drawn() -> None:
    assert spans_of(Entry("a b", {}, (3e-3, 1e-3, 2e-3))) == {"a-b.rate": Span(1e-3, 3e-3)}
    assert spans_of(Entry("a b", {}, (1e-3,))) == {}


KEEP = {"name": "keep", "strength": [0.5, 8]}
RANKS = {"label": "ranks", "method": SMALL, "strength": {"method.rank": [2, 16]}, "learning_rate": [2e-3]}
VARIANTS = {"method": {"name": "lora-null", "rank": 4}, "strength": {"method.variant": ["v1", "v2"]}}


def drawn(comparison: Comparison, output: Path, seed: int, count: int) -> list[Any]:
    """Draw trials and tell a score of each; a study that is there goes on."""
    study = open_study(output, f"seed {seed}")
    trials = []
    for _ in range(count):
        trial = ask(study, seed, comparison.entries)
        study.tell(trial, score(setting_of(comparison.entries, trial.params)))
        trials.append(trial.params)
    return trials


def score(setting: tuple[Entry, Variation, float | None]) -> list[float]:
    entry, _, rate = setting
    return [math.log(rate or 1), (rate or 1) + len(entry.label)]


def test_what_is_drawn_keeps_to_the_spans_log_uniformly_and_makes_settings(search: Load, tmp_path: Path) -> None:
    comparison = search(KEEP, RANKS, VARIANTS)
    settings = [setting_of(comparison.entries, params) for params in drawn(comparison, tmp_path, 0, 60)]
    assert {entry.label for entry, _, _ in settings} == {entry.label for entry in comparison.entries}
    for entry, variation, rate in settings:
        assert min(entry.rates) <= rate <= max(entry.rates)
        assert float(f"{rate:.3g}") == rate
        if entry.label == "keep":
            assert 0.5 <= variation.factor <= 8
        elif entry.label == "ranks":
            assert isinstance(variation.settings["method.rank"], int)
            assert 2 <= variation.settings["method.rank"] <= 16
            assert rate == 2e-3
        else:
            assert variation in entry.variations
    # Half of a log-uniform draw lies below the geometric mean of its ends; of a uniform one a quarter.
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    many = [study.ask() for _ in range(100)]
    for trial in many:
        Span(1e-3, 1e-1).suggest(trial, "x")
    assert 35 <= sum(trial.params["x"] < 1e-2 for trial in many) <= 65


def test_a_seed_draws_the_same_and_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(
    search: Load, tmp_path: Path
) -> None:
    comparison = search(KEEP, RANKS)
    whole = drawn(comparison, tmp_path / "whole", 3, 16)
    assert drawn(comparison, tmp_path / "again", 3, 16) == whole
    assert drawn(comparison, tmp_path / "other", 4, 3) != whole[:3]
    for stopped in (4, 13):  # before and after the first ten, which rest on the seed alone
        output = tmp_path / f"stopped {stopped}"
        assert drawn(comparison, output, 3, stopped) == whole[:stopped]
        killed = ask(open_study(output, "seed 3"), 3, comparison.entries)
        assert killed.params == whole[stopped]
        assert drawn(comparison, output, 3, 16 - stopped) == whole[stopped:]


def test_failed_trials_are_tried_first_and_once(search: Load, tmp_path: Path) -> None:
    comparison = search(KEEP, RANKS)
    study = open_study(tmp_path, "a")
    trials = [ask(study, 3, comparison.entries) for _ in range(3)]
    study.tell(trials[0], [1.0, 1.0])
    study.tell(trials[1], state=FAIL)
    study.tell(trials[2], [1.0, 1.0])
    study = open_study(tmp_path, "a")
    study = open_study(tmp_path, "a")  # put in line once
    again, new = (ask(study, 3, comparison.entries) for _ in range(2))
    assert again.params == trials[1].params
    assert new.params not in [trial.params for trial in trials]


def test_another_search_has_a_study_of_its_own_and_a_broken_journal_is_named(search: Load, tmp_path: Path) -> None:
    comparison = search(SMALL)
    drawn(comparison, tmp_path, 3, 2)
    assert open_study(tmp_path, "seed 3").trials
    assert open_study(tmp_path, "other").trials == []
    (tmp_path / JOURNAL).write_text("{}\n{}\n", encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"search\.log.*Remove it and start again"):
        open_study(tmp_path, "seed 3")


def test_what_cannot_be_searched_is_refused(search: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = search(SMALL)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "optuna", None)
        with pytest.raises(RecipeError, match=r'no Optuna in this Python.*pip install "keeptune\[compare\]"'):
            run_comparison(comparison, "")
    with pytest.raises(RecipeError, match="got no benchmark with role: task"):
        load_comparison(comparison.path, {"evaluate.1.role": "knowledge"})


def no_workers(*_: Any, **__: Any) -> Any:
    raise AssertionError("workers were started")


def test_a_search_runs_its_trials_and_the_front_with_all_seeds_and_again_does_nothing(
    search: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = search(SMALL, TOO_MUCH, seeds=[0, 1], search={"trials": 4, "seed": 1})
    compared = run_comparison(comparison, "keeptune compare")
    out = tmp_path / "out"
    expected = drawn(comparison, tmp_path / "expected", 1, 4)
    settings = [setting_of(comparison.entries, params) for params in expected]
    assert {entry.label for entry, _, _ in settings} == {"lora", "too much"}, "choose a seed that draws both"
    rows = compared.runs["runs"]
    for row, (entry, _, rate) in zip(rows, settings, strict=False):
        assert (row["label"], row["learning_rate"], row["seed"]) == (entry.label, rate, 0)
        failed = entry.label == "too much"
        assert row["status"] == ("failed" if failed else "done")
        assert ("rank 4000" in row["message"]) == failed
    front = [point for point in compared.front["points"] if point["on_front"]]
    assert any(point["seeds"] == [0, 1] for point in front)
    assert (out / "report.html").is_file()
    assert all("rank 4000" in message for message in compared.failed.values())

    written = {path: path.stat().st_mtime_ns for path in out.rglob("train.json")}
    assert len(written) >= 2
    monkeypatch.setattr(searching, "run_each", no_workers)
    monkeypatch.setattr(engine, "run_each", no_workers)
    with pytest.raises(AssertionError, match="workers were started"):  # the failed ones are tried again
        run_comparison(comparison, "")
    done = {row["name"] for row in rows if row["status"] == "done"}
    trials = sum(row["seed"] == 0 for row in rows if row["name"] in done)
    again = run_comparison(search(SMALL, TOO_MUCH, seeds=[0, 1], search={"trials": trials, "seed": 1}), "")
    assert not again.failed
    assert {row["name"] for row in again.runs["runs"]} == done
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_dry_run_says_how_many_trials(search: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(KEEP, RANKS, seeds=[0, 1])
    said = keeptune("compare", tmp_path / "compare.yaml", "--dry-run", "--flops", "1e9", capsys=capsys)
    assert said.code == 0
    assert "a search of 3 trials below" in said.out
    assert not (tmp_path / "out").exists()

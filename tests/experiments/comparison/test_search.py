"""The budgeted search: what it draws, that a seed draws the same, and a small search through Ray Tune."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from tests.pipeline.support import keeptune, values, write_data, write_recipe

from keeptune.core.artefact import read_json, write_json
from keeptune.core.errors import RecipeError
from keeptune.experiments.comparison import search as searching
from keeptune.experiments.comparison.cells import Comparison, load_comparison
from keeptune.experiments.comparison.entries import Entry, Variation
from keeptune.experiments.comparison.running import run_comparison
from keeptune.experiments.comparison.space import Among, Span, dimensions, draw, setting_of, spans_of, strengths_of
from keeptune.experiments.comparison.study import JOURNAL, Trial, new_study, read_journal

Load = Callable[..., Comparison]
pytestmark = [
    # Of Ray 2.60 itself: sockets and files that it leaves to the garbage collector, and its own deprecations.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
]
SMALL = {"name": "lora", "rank": 4}
TOO_MUCH = {"label": "too much", "method": {"name": "lora", "rank": 4000}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def load(data: Path, tmp_path: Path) -> Load:
    def make(*methods: Any, **section: Any) -> Comparison:
        given = values(data, tmp_path / "out", tmp_path / "store")
        del given["method"], given["train"]["seed"]
        given["evaluate"] = given["evaluate"][:2]
        given["train"] |= {"max_steps": 2, "save_strategy": "no"}
        given["compare"] = {
            "methods": list(methods),
            "learning_rate": [1e-3, 1e-2],
            "seeds": [0],
            "baselines": False,
            "search": {"trials": 3, "seed": 5},
            **section,
        }
        return load_comparison(write_recipe(tmp_path / "compare.yaml", given))

    return make


def test_strengths_are_spans_where_numbers_are_varied_and_else_the_listed_ones() -> None:
    def of(*given: Any) -> Any:
        return strengths_of([Variation({"replay": value}) for value in given])

    assert of(0.05, 0.4, 0.1) == Span(0.05, 0.4)
    assert of(2, 16, 4) == Span(2, 16, whole=True)
    assert of(2, 16, 4.5) == Span(2, 16)
    assert of(0, 0.1) == Among((0, 1))
    assert of(True, 2) == Among((0, 1))
    assert of("a", "b", "c") == Among((0, 1, 2))
    assert of(0.1) is None
    factors = [Variation({}, 1.0), Variation({"method.nats": 0.1}, 10.0), Variation({"method.nats": 2.0}, 0.5)]
    assert strengths_of(factors) == Span(0.5, 10)


def test_the_span_of_rates_is_the_entrys_own_and_one_rate_is_not_drawn() -> None:
    assert spans_of(Entry("a b", {}, (3e-3, 1e-3, 2e-3))) == {"a-b.rate": Span(1e-3, 3e-3)}
    assert spans_of(Entry("a b", {}, (1e-3,))) == {}


KEEP = {"name": "keep", "strength": [0.5, 8]}
RANKS = {"label": "ranks", "method": SMALL, "strength": {"method.rank": [2, 16]}, "learning_rate": [2e-3]}
VARIANTS = {"method": {"name": "lora-null", "rank": 4}, "strength": {"method.variant": ["v1", "v2"]}}


def drawn(comparison: Comparison, seed: int, count: int, ended: list[Trial] | None = None) -> list[dict[str, Any]]:
    storage, sampler = new_study(seed, ended or [], [], comparison.entries)
    study = optuna.load_study(study_name="search", storage=storage, sampler=sampler)
    found = []
    for _ in range(count):
        trial = study.ask()
        own = draw(trial, comparison.entries)
        found.append({"params": dict(trial.params), "entry": trial.params["entry"], **own})
        study.tell(trial, score(found[-1]))
    return found


def score(one: dict[str, Any]) -> list[float]:
    return [math.log(one["rate"]), one["rate"] + len(one["entry"])]


def test_what_is_drawn_keeps_to_the_spans_log_uniformly_and_makes_cells(load: Load) -> None:
    comparison = load(KEEP, RANKS, VARIANTS)
    found = drawn(comparison, 0, 60)
    assert {one["entry"] for one in found} == {entry.label for entry in comparison.entries}
    for one in found:
        entry, variation, rate = setting_of(comparison.entries, one)
        assert min(entry.rates) <= rate <= max(entry.rates)
        assert float(f"{rate:.3g}") == rate
        if one["entry"] == "keep":
            assert variation.factor == one["strength"]
            assert 0.5 <= one["strength"] <= 8
        elif one["entry"] == "ranks":
            assert isinstance(variation.settings["method.rank"], int)
            assert 2 <= variation.settings["method.rank"] <= 16
            assert rate == 2e-3
        else:
            assert variation in entry.variations
    # Half of a log-uniform draw lies below the geometric mean of its ends; of a uniform one a quarter.
    many = [Span(1e-3, 1e-1).suggest(study_of(seed).ask(), "x") for seed in range(100)]
    assert 35 <= sum(x < 1e-2 for x in many) <= 65


def study_of(seed: int) -> Any:
    storage, sampler = new_study(seed, [], [], [])
    return optuna.load_study(study_name="search", storage=storage, sampler=sampler)


def test_a_seed_draws_the_same_and_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(load: Load) -> None:
    comparison = load(KEEP, RANKS)
    whole = drawn(comparison, 3, 16)
    assert drawn(comparison, 3, 16) == whole
    assert drawn(comparison, 4, 3) != whole[:3]
    for stopped in (4, 13):  # before and after the first ten, which rest on the seed alone
        ended = [
            Trial(one["params"], {k: one[k] for k in ("entry", "rate", "strength")}, "", *score(one))
            for one in whole[:stopped]
        ]
        assert drawn(comparison, 3, 16 - stopped, ended) == whole[stopped:]


def test_failed_trials_are_tried_first(load: Load) -> None:
    comparison = load(KEEP, RANKS)
    first, second = drawn(comparison, 3, 2)
    storage, sampler = new_study(3, [], [Trial(second["params"], {}, "")], comparison.entries)
    study = optuna.load_study(study_name="search", storage=storage, sampler=sampler)
    trial = study.ask()
    draw(trial, comparison.entries)
    assert trial.params == second["params"] != first["params"]
    assert set(trial.params) == set(dimensions(comparison.entries, trial.params["entry"]))


def test_a_journal_of_another_search_or_a_broken_one_is_left_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_journal(tmp_path, "k") == []
    one = Trial({"entry": "a"}, {"entry": "a", "rate": 1.0, "strength": None}, "a-lr1-seed0", 1.0, 2.0)
    write_json(tmp_path / JOURNAL, {"key": "k", "trials": [vars(one)]})
    assert read_journal(tmp_path, "k") == [one]
    assert read_journal(tmp_path, "other") == []
    assert "is of another search" in caplog.text
    write_json(tmp_path / JOURNAL, {"key": "k", "trials": [{"cell": 1}]})
    assert read_journal(tmp_path, "k") == []


def test_what_cannot_be_searched_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = load(SMALL)
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(RecipeError, match=r'no Optuna in this Python.*pip install "keeptune\[compare\]"'):
        run_comparison(comparison, "")
    monkeypatch.undo()
    one_side = comparison.base.model_copy(update={"evaluate": comparison.base.evaluate[:1]})
    object.__setattr__(comparison, "base", one_side)
    with pytest.raises(RecipeError, match="got benchmarks of knowledge alone"):
        run_comparison(comparison, "")


@pytest.fixture(scope="module")
def ray_of_two() -> Iterator[None]:
    import os

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    if ours:
        ray.shutdown()


def no_ray(*_: Any) -> Any:
    raise AssertionError("Ray was started")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_of_two")
def test_a_search_runs_its_trials_and_the_front_with_all_seeds_and_again_does_nothing(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = load(SMALL, TOO_MUCH, seeds=[0, 1], search={"trials": 4, "seed": 1})
    said = run_comparison(comparison, "keeptune compare")
    out = tmp_path / "out"
    journal = read_json(out / JOURNAL)["trials"]
    assert len(journal) == 4
    expected = drawn(comparison, 1, 4)
    assert {one["entry"] for one in expected} == {"lora", "too much"}, "choose a seed that draws both"
    rows = {row["name"]: row for row in said.cells["runs"]}
    for trial, one in zip(journal, expected, strict=True):
        assert trial["params"] == one["params"]
        row = rows[trial["cell"]]
        assert (row["label"], row["learning_rate"], row["seed"]) == (one["entry"], one["rate"], 0)
        assert (row["learned"], row["forgotten"]) == (trial["learned"], trial["forgotten"])
        failed = one["entry"] == "too much"
        assert row["status"] == ("failed" if failed else "done")
        assert ("rank 4000" in row["message"]) == failed
    front = [point for point in said.front["points"] if point["on_front"]]
    assert any(point["seeds"] == [0, 1] for point in front)
    assert (out / "report.html").is_file()
    assert all("rank 4000" in message for message in said.failed.values())

    written = {path: path.stat().st_mtime_ns for path in out.rglob("train.json")}
    assert len(written) >= 2
    monkeypatch.setattr(searching, "started_ray", no_ray)
    with pytest.raises(AssertionError, match="Ray was started"):  # the failed ones are tried again
        run_comparison(comparison, "")
    done = [trial for trial in journal if trial["learned"] is not None]
    write_json(out / JOURNAL, {"key": read_json(out / JOURNAL)["key"], "trials": done})
    monkeypatch.setattr("keeptune.experiments.comparison.engine.started_ray", no_ray)
    less = load(SMALL, TOO_MUCH, seeds=[0, 1], search={"trials": len(done), "seed": 1})
    again = run_comparison(less, "")
    assert not again.failed
    assert {row["name"] for row in again.cells["runs"]} == {n for n, row in rows.items() if row["status"] == "done"}
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_dry_run_says_the_spans_and_how_many_trials(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(KEEP, RANKS, seeds=[0, 1])
    said = keeptune("compare", tmp_path / "compare.yaml", "--dry-run", "--flops", "1e9", capsys=capsys)
    assert said.code == 0
    rows = [" ".join(line.split()) for line in said.out.splitlines()]
    assert "keep 0.001 to 0.01 0.5 to 8 0" in rows
    assert "ranks 0.002 2 to 16 0" in rows
    assert "a search of 3 trials below" in said.out
    assert not (tmp_path / "out").exists()

"""The choice under a limit, by hand, and its export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.experiments.support import benchmark, row, spec

from keeptune.core.artefact import EXPORT, read_json, seal
from keeptune.core.errors import ArtefactError, RecipeError
from keeptune.experiments.axes import axes_of
from keeptune.experiments.choice import choose, choose_best, limits_of, parse_max_loss
from keeptune.experiments.compare_section import CompareSection
from keeptune.experiments.comparison_record import FRONT, row_of, trade_off_of, with_axes, write_records
from keeptune.experiments.posthoc_variants import Variant, score_variants
from keeptune.experiments.single_run import Outcome
from keeptune.pipeline.job import Job
from keeptune.pipeline.scoring import find_result, result_fingerprint

Records = tuple[dict[str, Any], dict[str, Any]]


def comparison(*points: tuple[str, list[tuple[float, float]]], text: float = 2.0) -> Records:
    """Points by label, each seed with its task score and its loss of the facts (of 0.8 at first)."""
    rows = [
        row(
            label,
            seed=seed,
            benchmarks=[
                benchmark("task", "task", 0.2, learned),
                benchmark("facts", "knowledge", 0.8, 0.8 - loss),
                benchmark("text", "knowledge", 2.0, text, "cross_entropy"),
            ],
        )
        for label, seeds in points
        for seed, (learned, loss) in enumerate(seeds)
    ]
    benchmarks = [{key: b[key] for key in ("name", "role", "metric", "n")} for b in rows[0]["benchmarks"]]
    axes = axes_of(benchmarks)
    rows = with_axes(rows, axes)
    return {"benchmarks": benchmarks, "runs": rows}, trade_off_of(rows, axes)


GREEDY = ("greedy", [(0.9, 0.3), (0.9, 0.5)])
CAREFUL = ("careful", [(0.5, 0.0), (0.6, 0.02), (0.8, 0.01)])
TIMID = ("timid", [(0.3, 0.0), (0.3, 0.0)])


def test_the_one_that_learns_most_within_the_limit_is_chosen() -> None:
    found = choose(*comparison(GREEDY, CAREFUL, TIMID), 0.01)
    assert found["point"] == "careful-lr0.001"
    assert found["loss"] == {"facts": 0.01}  # the mean of 0, 0.02 and 0.01: the limit itself is within it
    assert found["learned"] == pytest.approx(1.9 / 3)
    assert (found["max_loss"], found["estimate"], found["unbound"]) == ({"facts": 0.01}, "mean", ["text"])


def test_of_its_runs_the_median_of_those_within_the_limit_is_taken() -> None:
    found = choose(*comparison(CAREFUL), 0.01)
    # seed 1 loses 0.02; of seeds 0 and 2 the lower of the two in the middle
    assert (found["run"], found["run_learned"], found["run_loss"]) == ("careful-lr0.001-seed0", 0.5, {"facts": 0.0})
    assert choose(*comparison(CAREFUL), 0.02)["run"] == "careful-lr0.001-seed1"


def test_where_only_the_mean_keeps_the_limit_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    records = comparison(("a", [(0.5, 0.0), (0.6, 0.2)]))
    rows = records[0]["runs"]
    rows[0]["benchmarks"][2]["after"] = 2.4  # seed 0 loses text, seed 1 facts
    found = choose(*records, {"facts": 0.1, "text": 0.2})
    assert (found["loss"], found["run"]) == ({"facts": 0.1, "text": 0.2}, "a-lr0.001-seed0")
    assert "no single seed" in caplog.text


def test_the_upper_end_is_stricter_than_the_mean() -> None:
    records = comparison(("wide", [(0.9, -0.1), (0.9, 0.1)]), ("narrow", [(0.5, 0.0), (0.5, 0.0)]))
    assert choose(*records, 0.01)["point"] == "wide-lr0.001"
    found = choose(*records, 0.15, estimate="upper")
    # seeds that are equal by chance leave the interval over items: after - before is within -0.15 and 0.1
    assert (found["point"], found["loss"]) == ("narrow-lr0.001", {"facts": 0.15})
    # Student's interval of two seeds: 12.706205 x 0.1
    assert choose(*records, 1.3, estimate="upper")["loss"]["facts"] == pytest.approx(1.2706205)


def test_ends_over_items_are_a_mean_over_runs() -> None:
    records = comparison(("a", [(0.5, 0.0), (0.5, 0.0)]))
    records[0]["runs"][1]["benchmarks"][1]["interval"] = [-0.05, 0.0]
    assert choose(*records, 0.2, estimate="upper")["loss"] == {"facts": 0.1}
    records[0]["runs"][1]["benchmarks"][1]["interval"] = None
    assert choose(*records, 0.2, estimate="upper")["loss"] == {"facts": 0.0}  # the seeds' alone


def test_with_one_seed_the_upper_end_is_that_of_the_items() -> None:
    records = comparison(("a", [(0.9, 0.0)]))
    assert choose(*records, 0.2, estimate="upper")["loss"] == {"facts": 0.15}
    assert choose(*records, {"text": 0.1}, estimate="upper")["loss"] == {"text": 0.1}
    with pytest.raises(RecipeError, match="upper end"):
        choose(*records, 0.14, estimate="upper")


def test_each_benchmark_can_have_a_limit_of_its_own() -> None:
    records = comparison(GREEDY, TIMID, text=2.3)
    assert choose(*records, {"text": 0.3})["point"] == "greedy-lr0.001"
    assert choose(*records, {"text": 0.3, "facts": 0.1})["point"] == "timid-lr0.001"
    with pytest.raises(RecipeError, match=r"text 0\.2\).*0\.3 of text"):
        choose(*records, {"text": 0.2})
    with pytest.raises(RecipeError, match='Did you mean "facts"'):
        choose(*records, {"fact": 0.2})
    with pytest.raises(RecipeError, match="knowledge benchmark"):
        limits_of({"task": 0.1}, ["facts"], ["facts", "text"])


def test_nothing_within_the_limit_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"nearest, careful-lr0\.001, loses 0\.01 of facts") as told:
        choose(*comparison(GREEDY, CAREFUL), 0.005)
    assert told.value.where == "--max-loss"
    with pytest.raises(RecipeError, match="Finish the comparison"):
        choose({"benchmarks": [], "runs": []}, {"axes": None, "points": []}, 0.1)


def test_of_equal_learners_the_one_that_forgets_less_is_chosen() -> None:
    assert choose(*comparison(("a", [(0.5, 0.02)]), ("b", [(0.5, 0.01)])), 0.1)["point"] == "b-lr0.001"


def test_a_gain_keeps_a_limit_of_nothing() -> None:
    assert choose(*comparison(("a", [(0.5, -0.02)])), 0.0)["loss"] == {"facts": -0.02}


def test_a_point_without_a_score_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    records = comparison(("a", [(0.9, 0.0)]), TIMID)
    records[0]["runs"][0]["benchmarks"][2]["after"] = None
    assert choose(*records, {"text": 0.1})["point"] == "timid-lr0.001"
    assert "a-lr0.001 is left out: no score of text" in caplog.text


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["0.01"], 0.01), (["facts=0.01"], {"facts": 0.01}), (["a=1", "b=-2e-3"], {"a": 1.0, "b": -2e-3})],
)
def test_limits_are_read_from_words(words: list[str], expected: Any) -> None:
    assert parse_max_loss(words) == expected


@pytest.mark.parametrize("words", [[], ["much"], ["nan"], ["=1"], ["a="], ["0.1", "a=0.1"], ["0.1", "0.2"]])
def test_words_that_are_no_limit_are_refused(words: list[str]) -> None:
    with pytest.raises(RecipeError, match="benchmark=number"):
        parse_max_loss(words)


def written(job: Job, output: Path, scale: float | None = None) -> dict[str, Any]:
    """Write the records of one run, or of the same run scaled alone."""
    variant = None if scale is None else Variant("scale", scale)
    if variant is not None:
        score_variants(job, [variant])
    found = row_of(spec(job.output, name=job.output.name), Outcome("done"), variant)
    write_records(output, [found], CompareSection(methods=["lora"]))
    return found


def test_the_chosen_result_is_copied_whole(job: Callable[[str], Job], tmp_path: Path) -> None:
    run = job("lora")
    written(run, tmp_path)
    choice = choose_best(tmp_path, 10)
    best, source = tmp_path / "best", find_result(run.output)
    assert choice["adapter"] == str(best)
    assert choice["weights"] == result_fingerprint(best) == result_fingerprint(source)
    assert {path.name for path in best.iterdir()} == {path.name for path in source.iterdir()}
    assert read_json(best / "keeptune.json")["export"]["folder"] == str(best)
    assert read_json(tmp_path / FRONT)["choice"] == choice
    card = (best / "README.md").read_text()
    assert "Chosen by keeptune compare: it learned most of what loses at most stories 10; run lora-seed0." in card
    assert str(source) not in card
    assert choose_best(tmp_path, 10) == choice  # again, over the copy


def test_a_chosen_variant_is_written(job: Callable[[str], Job], tmp_path: Path) -> None:
    run = job("lora")
    row_ = written(run, tmp_path, 0.5)
    choice = choose_best(tmp_path, {row_["benchmarks"][0]["name"]: 10})
    assert choice["run"] == "lora-seed0/scale-0.5"
    own = load_file(find_result(run.output) / "adapter_model.safetensors")
    best = load_file(tmp_path / "best" / "adapter_model.safetensors")
    name = next(name for name in own if "lora_B" in name)
    assert (best[name] == 0.5 * own[name]).all()
    card = (tmp_path / "best" / "README.md").read_text()
    scaled, trained = row_["benchmarks"][0], read_json(run.output / "evaluation" / "stories.json")["summary"]
    assert f"value: {scaled['after']}" in card
    assert f"value: {trained['after']}" not in card
    assert 'Changed after training, which the recipe does not do: {"scale":0.5}' in card.replace("\\", "")


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_result_that_changed_since_is_not_exported(
    job: Callable[[str], Job], tmp_path: Path, scale: float | None
) -> None:
    run = job("lora")
    written(run, tmp_path, scale)
    weights = find_result(run.output) / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    seal(weights.parent, read_json(weights.with_name(EXPORT)))
    with pytest.raises(ArtefactError, match="not the one that was scored"):
        choose_best(tmp_path, 10)
    assert not (tmp_path / "best").exists()

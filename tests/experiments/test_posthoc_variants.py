"""Variants of finished runs: scores, resume, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.experiments.support import spec
from tests.pipeline.support import recipe_of

from keeptune.adapter.probe import logits_of, random_probe
from keeptune.core.artefact import EXPORT, read_json, seal
from keeptune.core.errors import ExportError, ModelError
from keeptune.evaluation.model_pairs import AdapterPair
from keeptune.experiments import posthoc_variants
from keeptune.experiments.comparison_record import row_of
from keeptune.experiments.posthoc_variants import Variant, score_variants, write_variant
from keeptune.experiments.single_run import Outcome
from keeptune.model.pretrained import load_model
from keeptune.pipeline import scoring
from keeptune.pipeline.job import Job
from keeptune.pipeline.run import run
from keeptune.pipeline.scoring import find_result, load_pair

Jobs = Callable[[str], Job]


def row_for(job: Job, variant: Variant | None = None) -> dict[str, Any]:
    """The row of the finished run, or of a variant of it."""
    return row_of(spec(job.output, name=job.output.name), Outcome("done"), variant)


def scores(row: dict[str, Any], side: str) -> dict[str, float]:
    """Benchmark to score."""
    assert row["status"] == "done", row["message"]
    return {b["name"]: b[side] for b in row["benchmarks"]}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_ends_of_a_scale_are_the_base_and_the_run(job: Jobs, method: str) -> None:
    run = job(method)
    scaled, pruned = [Variant("scale", s) for s in (0, 0.5, 1)], [Variant("pruned", p) for p in (0, 0.9, 1)]
    assert score_variants(run, scaled + pruned) == {}
    own, base = row_for(run), scores(row_for(run), "before")
    ends = [scores(row_for(run, Variant("pruned", share)), "after") for share in (0, 0.9, 1)]
    assert [ends[0], ends[2]] == [pytest.approx(scores(own, "after"), abs=1e-5), pytest.approx(base, abs=1e-6)]
    assert len({end["stories"] for end in ends}) == 3
    rows = {factor: row_for(run, Variant("scale", factor)) for factor in (0, 0.5, 1)}
    assert scores(rows[0], "after") == pytest.approx(scores(own, "before"), abs=1e-6)
    assert scores(rows[1], "after") == pytest.approx(scores(own, "after"), abs=1e-6)
    assert {tuple(scores(row, "before").items()) for row in rows.values()} == {tuple(scores(own, "before").items())}
    story = [scores(rows[factor], "after")["stories"] for factor in (0, 0.5, 1)]
    assert len(set(story)) == 3


def test_a_variants_row_has_a_name_a_label_and_the_run_it_is_of(job: Jobs) -> None:
    run = job("lora")
    score_variants(run, [Variant("scale", 0.5)])
    row = row_for(run, Variant("scale", 0.5))
    assert (row["name"], row["label"], row["of"]) == ("lora-seed0/scale-0.5", "lora, scaled", "lora")
    assert (row["variant"], row["seed"]) == ({"scale": 0.5}, 0)
    assert row["seconds"]["evaluate"] > 0
    assert Path(row["folder"], "stories.items.jsonl").is_file()


def test_only_what_is_missing_is_scored(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = job("lora")
    score_variants(run, [Variant("scale", 0.5)])
    place = run.output / "variants" / "scale-0.5"
    first = read_json(place / "sums.json")["summary"]
    (place / "sums.items.jsonl").unlink()
    asked = []
    evaluate = scoring.evaluate
    monkeypatch.setattr(scoring, "evaluate", lambda *a, **k: asked.append(a[2].name) or evaluate(*a, **k))
    score_variants(run, [Variant("scale", 0.5)])
    assert asked == ["sums"]
    assert read_json(place / "sums.json")["summary"] == first
    monkeypatch.setattr(posthoc_variants, "load_pair", lambda *_: pytest.fail("the model was loaded"))
    score_variants(run, [Variant("scale", 0.5)])


def test_scores_of_weights_that_were_trained_anew_are_missing(job: Jobs) -> None:
    run = job("lora")
    score_variants(run, [Variant("scale", 0.5)])
    weights = find_result(run.output) / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    seal(weights.parent, read_json(weights.with_name(EXPORT)))
    row = row_for(run, Variant("scale", 0.5))
    assert row["status"] == "missing"
    assert "other weights" in row["message"]
    score_variants(run, [Variant("scale", 0.5)])
    assert row_for(run, Variant("scale", 0.5))["status"] == "done"


def test_a_variant_that_cannot_be_made_is_a_failed_run(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = job("lora")
    monkeypatch.setattr(posthoc_variants, "refusal", lambda *_: "it sets lengths")
    refused = score_variants(run, [Variant("scale", 0.5)])
    assert refused == {"scale-0.5": "it sets lengths"}
    row = row_for(run, Variant("scale", 0.5))
    assert (row["status"], row["message"]) == ("failed", "it sets lengths")
    with pytest.raises(ModelError, match="it sets lengths"):
        write_variant(run, Variant("scale", 0.5), run.output / "best")
    monkeypatch.setattr(posthoc_variants, "load_pair", lambda *_: pytest.fail("the model was loaded"))
    assert score_variants(run, [Variant("scale", 0.5)]) == refused


def test_a_run_without_its_variant_scored_is_missing(job: Jobs) -> None:
    assert row_for(job("lora"), Variant("scale", 0.5))["status"] == "missing"


def test_the_written_adapter_is_the_variant_on_a_fresh_base(job: Jobs, tmp_path: Path) -> None:
    run, variant = job("lora"), Variant("scale", 0.25)
    best = write_variant(run, variant, tmp_path / "best")
    own = load_file(find_result(run.output) / "adapter_model.safetensors")
    written = load_file(best / "adapter_model.safetensors")
    name = next(name for name in own if "lora_B" in name)
    assert torch.equal(written[name], 0.25 * own[name])
    pair = posthoc_variants._Loaded(run, find_result(run.output)).make(variant)
    model = PeftModel.from_pretrained(run.base(), str(best))
    probe = random_probe(model)
    with pair.after() as expected:
        torch.testing.assert_close(logits_of(model, probe), logits_of(expected, probe))
    sidecar = read_json(best / "keeptune.json")
    assert sidecar["variant"] == {"scale": 0.25}
    assert sidecar["export"]["folder"] == str(best)
    assert sidecar["export"]["relative_gap"] <= sidecar["export"]["bound"]
    assert str(run.output) not in (best / "README.md").read_text()


def test_a_written_whole_model_lies_between_base_and_tuned(job: Jobs, tmp_path: Path) -> None:
    run = job("full")
    best = write_variant(run, Variant("scale", 0.5), tmp_path / "best")
    name = "model.layers.0.mlp.down_proj.weight"
    tuned = load_file(find_result(run.output) / "model.safetensors")[name]
    base = dict(run.base().named_parameters())[name]
    torch.testing.assert_close(load_file(best / "model.safetensors")[name], (base.detach() + tuned) / 2)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_written_pruned_result_is_a_whole_model_with_a_tenth_of_the_change(
    job: Jobs, method: str, tmp_path: Path
) -> None:
    run = job(method)
    best = write_variant(run, Variant("pruned", 0.9), tmp_path / "best")
    assert not (best / "adapter_config.json").exists()
    found, base, whole = load_model(str(best)), run.base(), load_pair(run, find_result(run.output))
    tuned = whole.peft_model.merge_and_unload() if isinstance(whole, AdapterPair) else whole.tuned
    for start, weight, end in zip(base.parameters(), found.parameters(), tuned.parameters(), strict=True):
        moved = weight != start
        torch.testing.assert_close(weight[moved], end[moved], rtol=1e-5, atol=1e-7)
        trained = not torch.equal(end, start)
        assert bool(moved.any()) == trained and int(moved.sum()) <= round(0.1 * weight.numel()) + 1
    export = read_json(best / "keeptune.json")["export"]
    assert (export["format"], export["rank"], export["serve"]) == ("merged", 0, f"vllm serve {best}")


def test_what_16_bits_would_round_away_stays_in_a_pruned_result(trained: Any, tmp_path: Path) -> None:
    given = {**trained("lora")[0], "dtype": "bfloat16", "output": str(tmp_path / "run")}
    run(recipe_of(given))
    job = Job(recipe_of(given))
    place = find_result(job.output)
    pair = posthoc_variants._Loaded(job, place).make(Variant("pruned", 0))
    best = load_model(str(write_variant(job, Variant("pruned", 0), tmp_path / "best")))
    adapter = load_pair(job, place).peft_model
    name = "model.layers.0.mlp.down_proj"
    change = adapter.base_model.model.get_submodule(name).get_delta_weight("default")
    for model in (pair.tuned, best):
        moved = model.get_parameter(f"{name}.weight") - pair.base.get_parameter(f"{name}.weight")
        torch.testing.assert_close(moved, change, rtol=1e-3, atol=1e-7)
    rounded = (pair.base.get_parameter(f"{name}.weight").float() + change).bfloat16()
    assert float((rounded == pair.base.get_parameter(f"{name}.weight")).float().mean()) > 0.1


def test_what_does_not_reproduce_is_not_written(job: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = job("lora")
    monkeypatch.setattr(
        posthoc_variants, "write_tensors", lambda path, t, m: save_file({k: 2 * v for k, v in t.items()}, path)
    )
    with pytest.raises(ExportError, match="differ from the trained model's"):
        write_variant(run, Variant("scale", 0.5), tmp_path / "best")
    assert not (tmp_path / "best").exists()


def test_a_foreign_folder_is_not_replaced(job: Jobs, tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="did not write"):
        write_variant(job("lora"), Variant("scale", 0.5), tmp_path / "best")

"""The whole job on a real model of 260K parameters."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.assets import DATA
from tests.pipeline.support import METHODS, MODEL, read_jsonl, recipe_of, values
from transformers import AutoModelForCausalLM

from keeptune.core.artefact import read_json
from keeptune.core.plan import Plan
from keeptune.pipeline.run import run

Finished = Callable[[str], Path]
Values = Callable[..., dict[str, Any]]
ENTRY = {"name", "seed", "K", "average_forgetting", "T", "KT", "adapter", "export_gap", "benchmarks"}
MERGED = {"full", "dora"}  # no change of low rank
BENCHMARK = {"name", "role", "n", "before", "after", "interval"}


def stamps(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """First parts of the paths whose files are new, gone or written again; of evaluation files and cards the whole."""
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {
        name if name.startswith("evaluation") or name.endswith("README.md") else name.split("/")[0] for name in names
    }


@pytest.mark.parametrize("name", METHODS)
def test_output_holds_the_plan_the_result_and_the_report(finished: Finished, name: str) -> None:
    folder = finished(name)
    result = "merged" if name in MERGED else "adapter"
    assert {"plan", result, "report.json", "report.html", "trained", "evaluation"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.glob(".*"))
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!")
    plan = Plan.load(folder / "plan")
    assert len(plan.targets) == (0 if name == "full" else 35)
    if result == "adapter":  # not as the hashes of a process order a set: exports have the same bytes in all
        targets = read_json(folder / "adapter/adapter_config.json")["target_modules"]
        assert targets == sorted(targets)


@pytest.mark.parametrize("name", METHODS)
def test_report_has_the_schema_of_the_issue(finished: Finished, name: str) -> None:
    folder = finished(name)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["base"] == str(MODEL)
    (entry,) = report["methods"]
    assert entry.keys() >= ENTRY
    assert entry["name"] == name
    assert entry["seed"] == 0
    assert Path(entry["adapter"]).is_dir()
    assert 0 <= entry["export_relative_gap"] < 1e-4
    assert [(b["name"], b["role"], b["n"]) for b in entry["benchmarks"]] == [
        ("stories", "knowledge", 3),
        ("sums", "task", 3),
        ("animals", "knowledge", 3),
    ]
    for benchmark in entry["benchmarks"]:
        assert benchmark.keys() >= BENCHMARK
        low, high = benchmark["interval"]
        assert low <= benchmark["after"] - benchmark["before"] <= high
    held = {key for key in entry["loss"][0] if key.startswith(("penalty", "drift/"))}
    assert entry["loss"][0].keys() - held == {"step", "loss", "learning_rate"}
    assert not held
    assert [point["step"] for point in entry["loss"]] == [1, 2, 3]
    # Relative to full fine-tuning, which is not in this report and learns nothing in three steps itself.
    assert entry["T"] is None
    assert entry["K"] is not None


@pytest.mark.parametrize("name", METHODS)
def test_result_loads_without_keeptune_and_gives_the_scores(finished: Finished, name: str) -> None:
    folder = finished(name)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    if name in MERGED:
        tuned = AutoModelForCausalLM.from_pretrained(folder / "merged")
    else:
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), folder / "adapter")
    ids = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (tuned(input_ids=ids).logits - base(input_ids=ids).logits).abs().max() > 1e-3
        if name not in MERGED:
            with tuned.disable_adapter():
                assert torch.equal(tuned(input_ids=ids).logits, base(input_ids=ids).logits)


def test_before_and_after_of_every_item_are_kept(finished: Finished) -> None:
    folder = finished("lora") / "evaluation"
    for name in ("stories", "sums", "animals"):
        rows = read_jsonl(folder / f"{name}.items.jsonl", 10)
        assert len(rows) == 3
        assert all(row.keys() >= {"index", "before", "after"} for row in rows)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_base_is_never_written(recipe_values: Values, name: str) -> None:
    def digests() -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in MODEL.iterdir()}

    before, times = digests(), stamps(MODEL)
    run(recipe_of(recipe_values(method=METHODS[name], evaluate=[])))  # `finished` has run before, perhaps
    assert digests() == before
    assert stamps(MODEL) == times


@pytest.fixture
def copied(finished: Finished, tmp_path: Path, data: Path, store: Path) -> dict[str, Any]:
    """Values of a recipe whose run is finished, in a folder of this test alone."""
    shutil.copytree(finished("lora-null-v1"), tmp_path / "out")
    given = values(data, tmp_path / "out", store, method=METHODS["lora-null-v1"])
    run(recipe_of(given))  # the record of the recipe and the report name the new place
    return given


def test_running_again_does_nothing(copied: dict[str, Any]) -> None:
    output = Path(copied["output"])
    before = stamps(output)
    started = time.perf_counter()
    report = run(recipe_of(copied))
    assert time.perf_counter() - started < 5
    assert stamps(output) == before
    assert report == json.loads((output / "report.json").read_text(encoding="utf-8"))


def test_another_learning_rate_keeps_the_plan(copied: dict[str, Any]) -> None:
    output = Path(copied["output"])
    before = stamps(output)
    copied["train"] = copied["train"] | {"learning_rate": 1e-3}
    run(recipe_of(copied))
    rewritten = changed(before, stamps(output))
    assert "plan" not in rewritten
    assert {"trained", "adapter", "evaluation/stories.json", "evaluation/sums.json", "report.json"} <= rewritten


def test_another_evaluate_entry_scores_that_benchmark_alone(copied: dict[str, Any]) -> None:
    output = Path(copied["output"])
    before = stamps(output)
    copied["evaluate"][1] = copied["evaluate"][1] | {"max_new_tokens": 2}
    run(recipe_of(copied))
    assert changed(before, stamps(output)) == {
        "evaluation/sums.json",
        "evaluation/sums.items.jsonl",
        "recipe.json",
        "report.json",
        "report.html",
        "adapter/README.md",  # the card, with the scores
    }


def test_a_changed_benchmark_file_is_scored_again(copied: dict[str, Any], tmp_path: Path) -> None:
    rows = read_jsonl(Path(copied["evaluate"][0]["file"]), 2)
    file = tmp_path / "fewer.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    copied["evaluate"][0] = copied["evaluate"][0] | {"file": str(file)}
    before = stamps(Path(copied["output"]))
    report = run(recipe_of(copied))
    assert report["methods"][0]["benchmarks"][0]["n"] == 2
    file.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    assert run(recipe_of(copied))["methods"][0]["benchmarks"][0]["n"] == 1
    assert "adapter" not in changed(before, stamps(Path(copied["output"])))


def test_formats_can_be_switched_to_and_fro(copied: dict[str, Any]) -> None:
    output = Path(copied["output"])
    for kind, folder in (("merged", "merged"), ("portable", "adapter"), ("merged", "merged")):
        report = run(recipe_of(copied | {"export": {"format": kind}, "evaluate": []}))
        assert report["methods"][0]["adapter"] == str(output / folder)


def test_a_run_without_benchmarks_or_knowledge(recipe_values: Values) -> None:
    given = recipe_values(evaluate=[])
    del given["knowledge"]
    report = run(recipe_of(given))
    assert report["methods"][0]["benchmarks"] == []


def test_default_targets_roles_and_model_by_relative_path(recipe_values: Values, tmp_path: Path) -> None:
    given = recipe_values(targets=["q_proj", "down_proj"], evaluate=[], export={"format": "peft"})
    run(recipe_of(given))
    plan = Plan.load(tmp_path / "out" / "plan")
    assert {t.target.role for t in plan.targets} == {"q_proj", "down_proj"}
    assert len(plan.targets) == 10


def test_questions_by_subject_in_the_papers_prompt(recipe_values: Values) -> None:
    from keeptune.pipeline.job import Job

    mmlu = DATA / "mmlu" / "test_3_per_subject.jsonl"
    given = {"file": str(mmlu), "choices": "{choices}", "by": "subject", "examples": 1, "seed": 3}
    job = Job(recipe_of(recipe_values(knowledge=given)))
    assert len({row["subject"] for row in job.knowledge_rows[0]}) == len(job.knowledge_rows[0]) == 57
    (known,) = job.knowledge
    assert known.prompts is not None and known.prompts[0].startswith("There is a single choice question about ")
    assert set(known.completions) <= set("ABCD")
    calibration = job.data["knowledge"]
    assert calibration.prompts is not None
    first = calibration.sequences[0][: calibration.prompts[0]]
    read = job.tokenizer.decode(first, skip_special_tokens=True).strip()
    assert read in [prompt.strip() for prompt in known.prompts]


def test_knowledge_longer_than_the_positions_of_the_model_is_cut(recipe_values: Values, tmp_path: Path) -> None:
    from keeptune.pipeline.job import Job

    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "once upon a time " * 400}) + "\n", encoding="utf-8")
    given = recipe_values(knowledge={"file": str(long), "max_length": 4096})
    calibration = Job(recipe_of(given)).data["knowledge"]
    assert calibration.tokens == 512

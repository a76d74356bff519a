"""Joining runs into one report."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tests.pipeline.support import METHODS, MODEL, keeptune, recipe_of
from tests.report.test_tracing import model, record

from keeptune.atlas import model_path
from keeptune.core.artefact import read_json, write_json
from keeptune.core.errors import ArtefactError, KeeptuneError
from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.run import plan_stage, run, start

Values = Callable[..., dict[str, Any]]
Finished = Callable[[str], Path]


def test_runs_join_in_their_order(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [finished(name) for name in ("lora", "full", "lora-null-v2")]
    said = keeptune("report", *runs, "--output", tmp_path / "joint", capsys=capsys)
    assert said.code == 0, said.err
    report = json.loads((tmp_path / "joint" / "report.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in report["methods"]] == ["lora", "full", "lora-null-v2"]
    assert report["base"] == str(MODEL)
    assert (tmp_path / "joint" / "report.html").stat().st_size > 10_000
    for entry, folder in zip(report["methods"], runs, strict=True):
        alone = read_json(folder / "report.json")["methods"][0]
        assert {k: v for k, v in entry.items() if k not in ("T", "KT")} == {
            k: v for k, v in alone.items() if k not in ("T", "KT")
        }


def test_what_a_recipe_adds_to_a_method_is_in_its_name(finished: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished("lora"), tmp_path / "copy"))
    recipe = read_json(folder / "recipe.json")
    write_json(folder / "recipe.json", recipe | {"penalties": [{"name": "kl", "strength": 3.0}], "replay": 0.1})
    names = [entry["name"] for entry in write_report([finished("lora"), folder], tmp_path / "joint")["methods"]]
    assert names == ["lora", "lora + kl + replay"]


def test_what_a_method_says_about_its_plan_reaches_the_report(recipe_values: Values, tmp_path: Path) -> None:
    farss = {"name": "farss", "rank": 4, "r_max": 4, "r_avg": 3, "boundary": 2}
    given = recipe_values(method=farss, targets=["q_proj", "v_proj"])
    (entry,) = run(recipe_of(given | {"train": given["train"] | {"max_steps": 1}}))["methods"]
    assert entry["name"] == "farss"
    (note,) = entry["notes"]
    assert note.startswith("4 targets in blocks below 2 are shallow")
    assert note in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    shallow = [row for row in entry["plan"] if row["layer"] < 2]
    assert all(len(row["evidence"]["importance"]) == 1 for row in shallow)


def pretend(folder: Path, source: Path, *, right: int) -> Path:
    """A copy of a run whose task benchmark has this many right answers after training."""
    shutil.copytree(source, folder)
    path = folder / "evaluation" / "sums.json"
    record = read_json(path)
    items = path.with_suffix(".items.jsonl")
    rows = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    rows = [row | {"before": 0.0, "after": float(index < right)} for index, row in enumerate(rows)]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    record["summary"] |= {"before": 0.0, "after": right / 3}
    del record["files"]
    write_json(path, record)
    return folder


def test_learning_is_relative_to_full_fine_tuning(finished: Finished, tmp_path: Path) -> None:
    lora = pretend(tmp_path / "lora", finished("lora"), right=1)
    full = pretend(tmp_path / "full", finished("full"), right=2)
    joint = write_report([lora, full], tmp_path / "joint")["methods"]
    assert [entry["T"] for entry in joint] == pytest.approx([0.5, 1.0])
    alone = write_report([lora], tmp_path / "alone", reference=full)["methods"]
    assert alone[0]["T"] == pytest.approx(0.5)
    assert alone[0]["KT"] == joint[0]["KT"]
    assert write_report([lora], tmp_path / "alone")["methods"][0]["T"] is None


def test_a_reference_in_the_recipe(recipe_values: Values, finished: Finished, tmp_path: Path) -> None:
    full = pretend(tmp_path / "full", finished("full"), right=2)
    report = run(recipe_of(recipe_values(reference=str(full))))
    assert report["methods"][0]["T"] == 0


def test_kept_reports_are_not_written_again(finished: Finished, tmp_path: Path) -> None:
    first = write_report([finished("lora")], tmp_path)
    stamp = (tmp_path / "report.json").stat().st_mtime_ns
    assert write_report([finished("lora")], tmp_path, keep=True) == first
    assert (tmp_path / "report.json").stat().st_mtime_ns == stamp
    write_report([finished("lora-null-v1")], tmp_path, keep=True)
    assert (tmp_path / "report.json").stat().st_mtime_ns != stamp


@pytest.mark.parametrize("at", ["keeptune.pipeline.reporting.write_json", "keeptune.report.pages.run_page.write_html"])
def test_killed_between_page_and_record_both_are_written_anew(
    at: str, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report([finished("lora")], tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(at, _killed)
        write_report([finished("lora-null-v1")], tmp_path, keep=True)
    report = write_report([finished("lora-null-v1")], tmp_path, keep=True)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"keeptune run {finished('lora-null-v1')}/recipe.json" in text  # `created` has whole seconds
    assert read_json(tmp_path / "report.json") == report


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("path", "key", "stage"),
    [
        ("trained/train.json", "plan", "train"),
        ("adapter/export.json", "train", "export"),
        ("evaluation/sums.json", "weights", "evaluate"),
        ("evaluation/sums.json", "benchmark", "evaluate"),
    ],
)
def test_stages_of_different_recipes_do_not_mix(
    finished: Finished, tmp_path: Path, path: str, key: str, stage: str
) -> None:
    folder = Path(shutil.copytree(finished("lora"), tmp_path / "run"))
    write_json(folder / path, read_json(folder / path) | {key: "of another recipe"})
    with pytest.raises(ArtefactError, match=f"keeptune {stage}"):
        write_report([folder], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_files_that_are_gone(finished: Finished, tmp_path: Path) -> None:
    for path in ("recipe.json", "evaluation/sums.json", "evaluation/sums.items.jsonl", "plan/plan.json"):
        folder = Path(shutil.copytree(finished("lora"), tmp_path / path.replace("/", "-")))
        (folder / path).unlink()
        with pytest.raises(KeeptuneError):
            write_report([folder], tmp_path / "report")
    with pytest.raises(KeeptuneError, match="nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "report")


def test_a_plan_changed_after_training(recipe_values: Values, finished: Finished, tmp_path: Path) -> None:
    """``keeptune plan`` with another rank leaves the run's adapter, which the new plan no longer describes."""
    shutil.copytree(finished("lora"), tmp_path / "out")
    plan_stage(start(recipe_of(recipe_values(method=METHODS["lora"] | {"rank": 2}))))
    with pytest.raises(ArtefactError, match="another recipe"):
        write_report([tmp_path / "out"], tmp_path / "out")


def test_runs_on_different_bases_do_not_join(recipe_values: Values, finished: Finished, tmp_path: Path) -> None:
    other = run(recipe_of(recipe_values(model=str(model_path()), evaluate=[])))
    assert other["base"] == str(model_path())
    with pytest.raises(ArtefactError, match="2 different bases"):
        write_report([finished("lora"), tmp_path / "out"], tmp_path / "joint")


def test_the_page_has_the_items_and_how_to_repeat_it_and_the_report_has_not(finished: Finished, tmp_path: Path) -> None:
    folder = finished("lora")
    report = write_report([folder], tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    rows = json.loads(data[1])["items"]
    items = [json.loads(line) for line in (folder / "evaluation/stories.items.jsonl").read_text().splitlines()]
    changed = [item for item in items if item["before"] != item["after"]]
    shown = [row for row in rows if row["benchmark"] == "stories"]
    assert {row["index"] for row in shown} == {item["index"] for item in changed} != set()
    assert all((row["kind"] == "lost") == (row["after"] > row["before"]) for row in shown)
    assert "items" not in json.dumps(report)
    for words in (f"keeptune run {folder}/recipe.json", "keeptune report", "max_steps: 3", version("torch")):
        assert words in text


def test_a_causal_trace_in_the_run_folder_is_shown(finished: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished("lora"), tmp_path / "run"))
    write_json(folder / "trace" / "trace.json", record(model("tiny", [0.1, 0.2])))
    write_report([folder], tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Causal tracing</h2>" in text
    write_report([finished("lora")], tmp_path / "report")
    assert "<h2>Causal tracing</h2>" not in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_the_card_of_a_run_gets_the_table_and_keeps_the_export(
    recipe_values: Values, finished: Finished, tmp_path: Path
) -> None:
    folder = finished("lora")
    text = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    (entry,) = read_json(folder / "report.json")["methods"]
    scores = {result.dataset_name: result.metric_value for result in ModelCard(text).data.eval_results}
    assert scores == {item["name"]: pytest.approx(item["after"]) for item in entry["benchmarks"]}
    shutil.copytree(folder, tmp_path / "out")
    run(recipe_of(recipe_values()))  # the recipe in the card names another folder now
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "adapter").iterdir()}
    run(recipe_of(recipe_values()))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "adapter").iterdir()} == stamps
    (tmp_path / "out" / "adapter" / "README.md").unlink()
    run(recipe_of(recipe_values()))
    again = (tmp_path / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert again.replace(str(tmp_path / "out"), str(folder)) == text
    write_report([folder], tmp_path / "elsewhere")
    assert (folder / "adapter" / "README.md").read_text(encoding="utf-8") == text


def test_what_vllm_makes_of_the_adapter_is_told(finished: Callable[[str], Path]) -> None:
    run, line = finished("lora"), "vLLM 0.33.0 serves this with --max-lora-rank 8"
    assert read_json(run / "adapter" / "export.json")["vllm"] == line
    assert line in (run / "adapter" / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert f"# {line}" in (run / "report.html").read_text(encoding="utf-8")
    assert read_json(finished("full") / "merged" / "export.json")["vllm"] == ""

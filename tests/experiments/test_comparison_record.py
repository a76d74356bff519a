"""Rows, the trade-off and the files of a comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.experiments.support import benchmark, row, spec
from tests.models import full_disk

from keeptune.core.artefact import file_fingerprint, read_json, write_json
from keeptune.core.errors import ArtefactError, RecipeError
from keeptune.experiments.axes import axes_of
from keeptune.experiments.compare_section import CompareSection
from keeptune.experiments.comparison_record import (
    FRONT,
    RUNS_FILE,
    row_of,
    table_of,
    trade_off_of,
    with_axes,
    with_relative_scores,
    write_records,
)
from keeptune.experiments.single_run import Outcome
from keeptune.recipe.sections import Published, PublishedRow
from keeptune.report.pages.comparison_page import published

SECTION = CompareSection(methods=["lora"])
SCORES = [benchmark("task", "task", 0.2, 0.6), benchmark("facts", "knowledge", 0.8, 0.7)]


def write_run(folder: Path, benchmarks: list[dict[str, Any]], *, weights: str | None = None) -> Path:
    """Write what a finished run leaves, with three bytes for its adapter."""
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"abc")
    write_json(adapter / "export.json", {})
    write_json(folder / "recipe.json", {"evaluate": [{"name": b["name"]} for b in benchmarks]})
    write_json(folder / "plan" / "seconds.json", {"plan": 0.5})
    write_json(folder / "trained" / "train.json", {"seconds": 2.0, "trained_parameters": 10})
    fingerprint = file_fingerprint([adapter / "adapter_model.safetensors"])
    for b in benchmarks:
        record = {"weights": weights or fingerprint, "seconds": 1.5, "summary": b | {"kl_to_base": None, "groups": {}}}
        path = folder / "evaluation" / f"{b['name']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))  # Python reads and writes NaN, which JSON has not
    return folder


def made(folder: Path, status: Any = "done", message: str = "", **more: Any) -> dict[str, Any]:
    """The row of a run of plain LoRA."""
    return row_of(spec(folder, **more), Outcome(status, message))


def test_a_run_folder_becomes_a_row(tmp_path: Path) -> None:
    found = made(write_run(tmp_path / "a", SCORES))
    assert found["benchmarks"] == SCORES
    assert found["seconds"] == {"plan": 0.5, "train": 2.0, "evaluate": 3.0}
    assert (found["trained_parameters"], found["status"], found["folder"]) == (10, "done", str(tmp_path / "a"))


def test_scores_of_other_weights_are_no_scores(tmp_path: Path) -> None:
    found = made(write_run(tmp_path / "a", SCORES, weights="of before"))
    assert found["status"] == "missing"
    assert "other weights" in found["message"]
    assert found["benchmarks"] == []


@pytest.mark.parametrize("lost", ["evaluation/facts.json", "trained/train.json", "recipe.json"])
def test_a_folder_that_lacks_something_is_missing(tmp_path: Path, lost: str) -> None:
    folder = write_run(tmp_path / "a", SCORES)
    (folder / lost).unlink()
    assert made(folder)["status"] == "missing"


def test_a_failed_run_keeps_its_message(tmp_path: Path) -> None:
    found = made(tmp_path / "none", status="failed", message="out of memory")
    assert (found["status"], found["message"], found["benchmarks"]) == ("failed", "out of memory", [])


def test_rows_get_their_axes_or_the_reason_why_not() -> None:
    rows = [row(), row(seed=1, benchmarks=SCORES[:1]), row(seed=2, status="failed", benchmarks=[])]
    first, second, third = with_axes(rows, axes_of(SCORES))
    assert (first["learned"], first["forgotten"], first["why"]) == (0.6, 0.1, "")
    assert (second["learned"], second["forgotten"], second["why"]) == (0.6, None, "no score of facts")
    assert (third["learned"], third["forgotten"], third["why"]) == (None, None, "")


def rows_of_two_labels() -> list[dict[str, Any]]:
    """Plain LoRA at two rates and another method, two seeds each; one run failed."""
    places = {
        ("lora", 1e-3): [(0.5, 0.1), (0.5, 0.3)],
        ("lora", 2e-3): [(0.7, 0.3), (0.7, 0.5)],
        ("keep", 1e-3): [(0.6, 0.1), (0.6, 0.2)],
    }
    rows = [
        row(label, rate, seed, learned=learned, forgotten=forgotten)
        for (label, rate), found in places.items()
        for seed, (learned, forgotten) in enumerate(found)
    ]
    return [*rows, row("keep", 2e-3, status="failed", message="out of memory", benchmarks=[])]


def test_a_trade_off_by_hand() -> None:
    found = trade_off_of(rows_of_two_labels(), axes_of(SCORES))
    assert found["front"] == ["keep-lr0.001", "lora-lr0.002"]
    assert found["fronts"] == {"lora": ["lora-lr0.001", "lora-lr0.002"], "keep": ["keep-lr0.001"]}
    assert {p["name"]: p["on_front"] for p in found["points"]} == {
        "lora-lr0.001": False,
        "lora-lr0.002": True,
        "keep-lr0.001": True,
    }
    assert found["points"][0]["forgotten"]["mean"] == 0.2
    assert found["points"][0]["runs"] == ["lora-lr0.001-seed0", "lora-lr0.001-seed1"]
    assert found["matched"]["score"] == 0.6
    assert [(r["label"], r["how"]) for r in found["matched"]["rows"]] == [("keep", "exact"), ("lora", "interpolated")]
    assert found["matched"]["rows"][0]["difference"]["mean"] == pytest.approx((-0.1 - 0.2) / 2)
    assert found["excluded"] == [{"run": "keep-lr0.002-seed0", "why": "failed: out of memory"}]
    assert found["notes"] == ["1 run is left out; `excluded` says why"]
    assert found["units"] == {"learned": "share", "forgotten": "share"}


def test_the_recipe_can_fix_score_and_baseline() -> None:
    found = trade_off_of(rows_of_two_labels(), axes_of(SCORES), 0.5, "keep")
    assert found["matched"]["baseline"] == "keep"
    assert {r["label"]: r["how"] for r in found["matched"]["rows"]} == {"lora": "exact", "keep": "above"}
    with pytest.raises(RecipeError, match="baseline"):
        trade_off_of(rows_of_two_labels(), axes_of(SCORES), baseline="full")


def test_points_with_fewer_seeds_are_told() -> None:
    found = trade_off_of([row(seed=0), row(seed=1), row("keep")], axes_of(SCORES))
    assert found["notes"] == ["with fewer than 2 seeds: keep-lr0.001 (1)"]
    many = [row(seed=0), row(seed=1), *(row(f"m{i}") for i in range(7))]
    note = trade_off_of(many, axes_of(SCORES))["notes"][0]
    assert note.endswith("m3-lr0.001 (1), m4-lr0.001 (1) and 2 more")


def test_the_files_hold_what_is_returned(tmp_path: Path) -> None:
    nan = [SCORES[0], benchmark("facts", "knowledge", 0.8, math.nan)]
    rows = [
        made(write_run(tmp_path / "a", SCORES)),
        made(write_run(tmp_path / "b", nan), seed=1, name="lora-lr0.001-seed1"),
        made(tmp_path / "c", seed=2, name="lora-lr0.001-seed2", status="failed", message="no room"),
    ]
    record, front = write_records(tmp_path, rows, SECTION, about={"base": "atlas", "recipe": {"a": 1}})
    assert read_json(tmp_path / RUNS_FILE) == record
    assert read_json(tmp_path / FRONT) == json.loads(json.dumps(front)) == front
    assert (record["base"], record["recipe"]) == ("atlas", {"a": 1})
    assert record["benchmarks"] == [{key: b[key] for key in ("name", "role", "metric", "n")} for b in SCORES]
    assert [entry["run"] for entry in front["excluded"]] == ["lora-lr0.001-seed1", "lora-lr0.001-seed2"]
    assert front["points"][0]["seeds"] == [0]
    table = pq.read_table(tmp_path / "runs.parquet").to_pylist()
    assert [line["facts.after"] for line in table] == [0.7, None, None]
    assert [line["learned"] for line in table] == [0.6, 0.6, None]
    assert (table[0]["task.low"], table[0]["task.n"], table[0]["seconds.evaluate"]) == (-0.15, 100, 3.0)
    assert (table[0]["settings"], table[0]["variant"]) == ('{"train.learning_rate":0.001}', None)


def test_published_scores_stand_in_the_record_and_on_the_page(tmp_path: Path) -> None:
    table = [
        PublishedRow(method="Base", scores={"facts": 90.0}),
        PublishedRow(method="LoRA", label="lora", parameters="320M", scores={"facts": 71.25}, others={"avg": 3.0}),
    ]
    scores = Published(source="Table 9", rows=table).scores()
    assert scores == [
        {"label": "lora", "benchmark": "facts", "score": 0.7125, "source": "Table 9", "note": "(LoRA, 320M)"}
    ]
    assert Published(source="Table 9", unit="nats", rows=table).scores()[0]["score"] == 71.25
    rows = [made(write_run(tmp_path / "a", SCORES))]
    record, front = write_records(tmp_path, rows, SECTION, about={"published": scores})
    assert read_json(tmp_path / RUNS_FILE)["published"] == record["published"] == scores
    assert published(record, front) == [(scores[0], pytest.approx(0.7))]


def test_a_comparison_of_which_nothing_finished_has_records(tmp_path: Path) -> None:
    rows = [made(tmp_path / "a", status="failed", message="no room")]
    record, front = write_records(tmp_path, rows, SECTION)
    assert (record["benchmarks"], front["points"]) == ([], [])
    assert front["excluded"] == [{"run": "lora-lr0.001-seed0", "why": "failed: no room"}]
    assert pq.read_table(tmp_path / "runs.parquet").num_rows == 1


def test_a_full_disk_leaves_the_old_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [made(write_run(tmp_path / "a", SCORES))]
    write_records(tmp_path, rows, SECTION)
    before = (tmp_path / "runs.json").read_bytes()
    monkeypatch.setattr("keeptune.core.artefact.os.fsync", full_disk)
    with pytest.raises(ArtefactError, match="No space"):
        write_records(tmp_path, rows, SECTION, about={"base": "another"})
    assert (tmp_path / "runs.json").read_bytes() == before
    assert not list(tmp_path.glob(".runs*"))


def test_a_table_of_columns_of_mixed_settings() -> None:
    rows = [row(settings={"method.rank": 4}), row("keep", settings={"method.rank": "all"}, strength=3)]
    table = table_of([{**r, "learned": math.pi} for r in rows]).to_pylist()
    assert [line["settings"] for line in table] == ['{"method.rank":4}', '{"method.rank":"all"}']
    assert [line["strength"] for line in table] == [None, 3.0]


@pytest.mark.parametrize(("side", "lacking"), [(0, "knowledge"), (1, "task")])
def test_one_side_alone_has_rows_and_no_trade_off(side: int, lacking: str, tmp_path: Path) -> None:
    """As some published tables: what is scored is told, and that there is nothing to set it against."""
    rows = [made(write_run(tmp_path / "a", [SCORES[side]]))]
    record, front = write_records(tmp_path, rows, SECTION)
    assert [b["after"] for b in record["runs"][0]["benchmarks"]] == [SCORES[side]["after"]]
    assert (front["points"], front["excluded"]) == ([], [])
    assert front["notes"] == [f"no trade-off: `evaluate` has no benchmark with role: {lacking}"]


def test_k_t_and_kt_stand_in_the_rows(tmp_path: Path) -> None:
    """T is over full fine-tuning of the same seed: one of the runs, of several the best, or the run given."""
    full = [benchmark("task", "task", 0.2, 0.8), benchmark("facts", "knowledge", 0.8, 0.4)]
    weak = [benchmark("task", "task", 0.2, 0.4), full[1]]
    rows = [
        made(write_run(tmp_path / "a", SCORES)),
        made(write_run(tmp_path / "b", SCORES), seed=1),
        made(write_run(tmp_path / "c", weak), method="full"),
        made(write_run(tmp_path / "d", full), method="full"),
        made(tmp_path / "e", status="failed"),
    ]
    own, other, _, best, failed = with_relative_scores(rows)
    assert (own["K"], own["T"]) == (pytest.approx(0.7 / 0.8), pytest.approx(0.6 / 0.8))
    assert own["KT"] == pytest.approx(2 * own["K"] * own["T"] / (own["K"] + own["T"]))
    assert (best["T"], other["K"], other["T"], failed["K"]) == (1.0, own["K"], None, None)
    outside = write_run(tmp_path / "f", full)
    assert with_relative_scores(rows, outside)[1]["T"] == own["T"]

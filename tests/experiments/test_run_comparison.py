"""keeptune compare as a whole: records with variants, the page and the best result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune

from keeptune.core.artefact import read_json
from keeptune.experiments.plan_runs import Comparison, list_runs, load_comparison

Write = Callable[..., Path]


@pytest.fixture
def write(load: Callable[..., Comparison], tmp_path: Path) -> Callable[..., Path]:
    """Write a comparison with baselines that needs no Ray."""

    def make(**section: Any) -> Path:
        load({"name": "lora", "rank": 4}, scales=[0.5], pruned=[0.9], baselines=True, resources=None, **section)
        return tmp_path / "compare.yaml"

    return make


def test_records_page_and_best_result_of_finished_runs(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write()
    trained = [spec.name for spec in list_runs(load_comparison(recipe))]
    said = keeptune("compare", recipe, "--max-loss", "stories=9", capsys=capsys)
    assert said.code == 0, said.err
    out = tmp_path / "out"
    plain = [name for name in trained if "replay" not in name]
    variants = [f"{name}/{kind}" for name in plain for kind in ("scale-0.5", "pruned-0.9")]
    rows = {row["name"]: row for row in read_json(out / "runs.json")["runs"]}
    assert set(rows) == {*trained, *variants}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert [rows[name]["label"] for name in variants[:2]] == ["lora, scaled", "lora, pruned"]
    front = read_json(out / "front.json")
    assert {point["label"] for point in front["points"]} == {row["label"] for row in rows.values()}
    assert front["choice"]["run"] in rows
    assert front["choice"]["max_loss"] == {"stories": 9.0}
    assert f"best: {front['choice']['run']} in {out / 'best'}" in said.out
    assert (out / "best/adapter_config.json").is_file() == ("pruned" not in front["choice"]["run"])
    assert f"report: {out / 'report.html'}" in said.out
    assert (out / "report.html").stat().st_size > 1000

    tight = keeptune("compare", recipe, "--max-loss", "stories=-99", capsys=capsys)
    assert tight.code == 2
    assert "no point within the limits" in tight.err


def test_what_cannot_be_chosen_is_refused_before_anything_is_run(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, told in [
        (("--max-loss", "storis=0.1"), 'Did you mean "stories"'),
        (("--max-loss", "much"), "one number, or benchmark=number"),
    ]:
        said = keeptune("compare", write(), *words, capsys=capsys)
        assert said.code == 2
        assert told in said.err
    assert not (tmp_path / "out").exists()

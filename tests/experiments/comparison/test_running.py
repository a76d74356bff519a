"""keeptune compare as a whole: records with knobs, the page and the best result, from cells that are finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune, values, write_data, write_recipe

from keeptune.core.artefact import read_json
from keeptune.experiments.comparison.cell import attempt
from keeptune.experiments.comparison.cells import grid, load_comparison
from keeptune.experiments.comparison.engine import works_of

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    data = write_data(tmp_path / "data")

    def make(**section: Any) -> Path:
        given = values(data, tmp_path / "out", tmp_path / "store")
        del given["method"], given["train"]["seed"]
        given["evaluate"] = given["evaluate"][:2]
        given["train"] |= {"max_steps": 2, "save_strategy": "no"}
        given["compare"] = {"methods": [{"name": "lora", "rank": 4}], "seeds": [0], "scales": [0.5], **section}
        return write_recipe(tmp_path / "compare.yaml", given)

    return make


def finish(recipe: Path) -> list[str]:
    """Run every run in this process, so that no Ray is needed."""
    comparison = load_comparison(recipe, {"compare.baselines": True})
    works, _ = works_of(comparison, grid(comparison))
    for work in works.values():
        assert attempt(work).status == "done"
    return list(works)


def test_records_page_and_best_result_of_finished_cells(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write()
    trained = finish(recipe)
    said = keeptune("compare", recipe, "--compare.baselines", "true", "--max-loss", "stories=9", capsys=capsys)
    assert (said.code, said.err) == (0, "")
    out = tmp_path / "out"
    plain = [name for name in trained if "replay" not in name]
    turned = [f"{name}/{knob}" for name in plain for knob in ("scale-0.5", "intruders-0.5")]
    rows = {row["name"]: row for row in read_json(out / "runs.json")["runs"]}
    assert set(rows) == {*trained, *turned}
    assert {row["status"] for row in rows.values()} == {"done"}
    assert rows[turned[0]]["label"] == "lora, scaled"
    front = read_json(out / "front.json")
    assert {point["label"] for point in front["points"]} == {row["label"] for row in rows.values()}
    assert front["choice"]["run"] in rows
    assert front["choice"]["max_loss"] == {"stories": 9.0}
    assert f"best: {front['choice']['run']} in {out / 'best'}" in said.out
    assert (out / "best/adapter_config.json").is_file()
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

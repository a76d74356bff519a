"""The recipes of the papers' tables: each loads and is accounted for offline, its published numbers beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.pipeline.support import keeptune

from keeptune.cli.dry_run import describe_file
from keeptune.core.errors import RecipeError
from keeptune.data import hub
from keeptune.pipeline.dry_run import describe as describing
from keeptune.pipeline.dry_run import estimate as shapes
from keeptune.recipe.reading import read_values
from keeptune.recipe.schema import make_recipe
from keeptune.recipe.sections import Published

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "recipes").glob("*-table*.yaml"))
TABLES = {
    "farss": ("2", "3", "4", "10", "11", "12"),
    "lora-null": ("1", "2", "3", "5"),
    "loki": ("2", "4"),
    "l2-lora": ("1", "2", "3", "4"),
}
# Trained parameters in millions as the paper prints them; FARSS's ranks rest on data, and lie below the planned.
PRINTED_OTHERWISE = {
    ("farss-table3", "10M"),  # four roles; the other lines count all linear maps (published.differs says so)
    ("farss-table3", "21M"),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked the network")

    monkeypatch.setattr(hub, "hf_hub_download", refused)
    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def known() -> dict[Any, shapes.ModelShape]:
    return {}


@pytest.fixture(autouse=True)
def one_shape_for_each_model(known: dict[Any, shapes.ModelShape], monkeypatch: pytest.MonkeyPatch) -> None:
    def remembered(name: str, **options: Any) -> shapes.ModelShape:
        key = (name, tuple(sorted(options.items())))
        if key not in known:
            known[key] = shapes.model_shape(name, **options)
        return known[key]

    monkeypatch.setattr(describing, "model_shape", remembered)


def test_every_table_has_a_recipe() -> None:
    for paper, tables in TABLES.items():
        for table in tables:
            names = [path.stem for path in FILES if path.stem.split("-table")[0] == paper]
            assert any(name.removeprefix(f"{paper}-table").split("-")[0] == table for name in names), (paper, table)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_table_is_accounted_for_offline(path: Path, tmp_path: Path) -> None:
    values = read_values(path)
    assert values["output"] == f"runs/{path.stem}"
    runs = describe_file(path)
    published = Published.model_validate(values["published"])
    numbers = {name: dry.train for name, (_, dry) in runs.items()}
    scored = {one.name for _, dry in runs.values() for one in dry.score}
    compared = [row for row in published.rows if row.label is not None]
    if "compare" in values:
        # Every method of the comparison has published numbers (unreadable lines are said), and every line its method.
        assert {row.label for row in compared} <= set(numbers)
        unread = any("cannot be read" in note for note in published.unknown)
        assert unread or {row.label for row in compared} == set(numbers)
    for row in published.rows:
        assert row.scores.keys() <= scored
        for name, score in row.scores.items():
            assert 0 <= score <= 100, (row.method, name)
    for row in compared:
        _compare_parameters(path, row.parameters, numbers[row.label])
    for times, dry in runs.values():
        assert times == 1
        assert sum(dry.memory["training"].values()) > dry.shape.parameters
        assert [need for need in dry.needs if not need.at_hand], "nothing of it is here"
    assert not list(tmp_path.iterdir()), "nothing is written"


def _compare_parameters(path: Path, printed: str | None, train: Any) -> None:
    if printed is None or not printed.endswith("M"):
        return
    found, said = train.numbers / 1e6, float(printed[:-1])
    table = path.stem.rsplit("-", 1)[0] if path.stem.count("-") > 1 else path.stem
    if (table, printed) in PRINTED_OTHERWISE:
        return
    if train.method == "full":
        # Llama-3's is printed with an adapter's numbers on top (published.differs).
        assert said == pytest.approx(found, rel=0.07)
    elif train.assumed:
        # Eq. 12 clips without giving back: what is printed lies below what is planned on average.
        assert 0.8 * found < said < 1.045 * found
    elif not ("lora-null" in path.stem and "instructions" in path.stem and "lora-fa" in train.method):
        assert said == pytest.approx(found, rel=0.012, abs=0.8), (path.stem, train.method)


def test_compare_lists_runs_and_what_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "recipes" / "lora-null-table3.yaml"
    said = keeptune("compare", path, "--dry-run", "--flops", "4e14", capsys=capsys)
    assert said.code == 0, said.err
    for part in ("10 runs below", "lora-null-v2, r", "252", "195 M", "10 runs, at most", "Llama-3.2-3B, about 6.4 GB"):
        assert part in said.out, said.out


def test_a_label_or_a_benchmark_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    values = {
        "model": "atlas",
        "method": "lora",
        "task": {"train": "atlas:topics.train.jsonl", "prompt": "{text}", "completion": " {topic}"},
        "evaluate": ["gsm8k"],
        "output": str(tmp_path / "out"),
        "published": {"source": "a table", "rows": [{"method": "LoRA", "label": "lora", "scores": {"gsm9k": 1}}]},
    }
    with pytest.raises(RecipeError, match=r"published\.rows\.0\.scores\.gsm9k.*gsm8k"):
        make_recipe(values, folder=tmp_path, where="recipe")
    published = Published.model_validate(values["published"])
    with pytest.raises(RecipeError, match=r"published\.rows\.0\.label"):
        published.check_labels(["lorra"], "recipe")
    published.check_labels(["lora"], "recipe")
    with pytest.raises(RecipeError, match="rowz"):
        make_recipe({**values, "published": {**values["published"], "rowz": []}}, folder=tmp_path, where="recipe")


def test_recipes_are_yaml_that_names_each_key_once() -> None:
    for path in FILES:
        keys = [line.partition(":")[0] for line in path.read_text().splitlines() if line[:1].isalpha()]
        assert len(keys) == len(set(keys)), path
        assert yaml.safe_load(path.read_text())

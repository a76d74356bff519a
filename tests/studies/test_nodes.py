"""keeptune suppress and keeptune overlap, from a recipe to tables, figures and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import in_memory
from tests.pipeline.support import keeptune, recipe_of, write_jsonl, write_recipe

from keeptune.core.artefact import read_json
from keeptune.core.errors import KeeptuneError
from keeptune.linalg.selections import quota
from keeptune.model.pretrained import load_model
from keeptune.model.probes.block_calls import without_nodes
from keeptune.pipeline import scoring
from keeptune.pipeline.job import Job
from keeptune.statistics.neuron_attribution import NeuronAttribution
from keeptune.studies.overlap import attributions_of, chosen_rows, density, overlap, side_of
from keeptune.studies.suppress import drawn_rows, suppress

Values = Callable[..., dict[str, Any]]
LOKI = {"name": "loki", "q": 20, "attribution": {"steps": 3}}
NODES, LAYERS = 64, 5
RANDOM = in_memory(torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(3)))


@pytest.fixture
def recipe(recipe_values: Values, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.json", recipe_values(method=LOKI))


def test_suppress(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("suppress", recipe, "--q", 10, "--draws", 2, "--seed", 5, capsys=capsys)
    assert said.code == 0, said.err
    (folder,) = (tmp_path / "out" / "suppress").iterdir()
    record = read_json(folder / "suppress.json")
    assert [(entry["name"], entry["seed"]) for entry in record["methods"]] == [
        ("S-H", 0),
        ("S-L", 0),
        ("random", 5),
        ("random", 6),
    ]
    for entry in record["methods"]:
        assert [len(rows) for rows in entry["rows"]] == [quota(10, NODES)] * LAYERS
        assert [benchmark["name"] for benchmark in entry["benchmarks"]] == ["stories", "animals"], "no tasks"
        assert entry["average_forgetting"] == pytest.approx(1 - entry["K"])
    high, low, *others = (entry["rows"] for entry in record["methods"])
    assert high != low
    assert others[0] != others[1]
    assert record["attribution"]["steps"] == 3
    (story, _) = record["gaps"]
    after = [entry["benchmarks"][0]["after"] for entry in record["methods"]]
    assert story["S-L less S-H"] == pytest.approx(after[1] - after[0])
    assert story["interval"][0] <= story["S-L less S-H"] <= story["interval"][1]
    assert len(record["profile"]) == LAYERS
    assert "S-H" in said.out and "random" in said.out and "forgetting" in said.out
    assert (folder / "suppress.png").stat().st_size > 5_000
    assert (folder / "nodes.png").stat().st_size > 5_000


def test_what_is_scored_is_the_model_without_the_rows(recipe_values: Values) -> None:
    values = recipe_values(method=LOKI)
    record = suppress(recipe_of(values), q=50, draws=0)
    entry, lowest = record["methods"]
    job = Job(recipe_of(values))
    attributions = attributions_of(job, NeuronAttribution(steps=3))
    assert entry["rows"] == [list(rows) for rows in chosen_rows(attributions, 50, "layer-high")]
    assert lowest["rows"] == [list(rows) for rows in chosen_rows(attributions, 50, "layer-balanced")]
    model = load_model(job.recipe.model)
    texts = [row["text"] for row in _rows(values["evaluate"][0]["file"])]
    total, tokens = 0.0, 0
    with without_nodes(model, dict(zip(record["modules"], entry["rows"], strict=True))), torch.no_grad():
        for text in texts:
            ids = torch.tensor([job.tokenizer(text)["input_ids"]])
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert entry["benchmarks"][0]["after"] == pytest.approx(total / tokens, abs=1e-4)
    assert entry["benchmarks"][0]["after"] > entry["benchmarks"][0]["before"] + 0.1


def _rows(file: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def test_killed_and_started_again(recipe_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, scored = recipe_of(recipe_values(method=LOKI)), []
    evaluate = scoring.evaluate

    def counted(*given: Any, **options: Any) -> Any:
        scored.append(given[2].name)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return evaluate(*given, **options)

    monkeypatch.setattr(scoring, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        suppress(recipe, q=5, draws=1)
    record = suppress(recipe, q=5, draws=1)
    assert scored == ["stories", "animals", "stories", "animals", "animals", "stories", "animals"]
    monkeypatch.undo()
    assert suppress(recipe, q=5, draws=1) == record
    (items, *_) = Path(record["folder"]).glob("S-H-0/stories.items.jsonl")
    items.unlink()
    assert suppress(recipe, q=5, draws=1) == record


def test_global_selections_may_leave_blocks_out(recipe_values: Values) -> None:
    record = suppress(recipe_of(recipe_values()), q=4, over="global", draws=1)
    numbers = [[len(rows) for rows in entry["rows"]] for entry in record["methods"]]
    assert [sum(of) for of in numbers] == [quota(4, NODES * LAYERS)] * 3
    assert len(set(numbers[0])) > 1


@pytest.mark.parametrize(
    ("words", "mark"),
    [
        (["--q", "0"], "per cent"),
        (["--q", "101"], "per cent"),
        (["--q", "1"], "leaves no row"),
        (["--over", "globe"], '"global"'),
        (["--draws", "-1"], "0 or more"),
        (["--knowledge", "null"], "knowledge"),
        (["--evaluate", "[]"], "role knowledge"),
        (["--model", "nowhere/there"], "nowhere/there"),
    ],
)
def test_wrong_words_for_suppress(
    words: list[str], mark: str, recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.json", recipe_values())
    said = keeptune("suppress", recipe, "--draws", 0, *words, capsys=capsys)
    assert said.code == 2
    assert mark in said.err
    assert not (tmp_path / "out").exists()


def test_overlap_of_presets(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("overlap", recipe, "--first", "paper", "--second", "current,layer-high", capsys=capsys)
    assert said.code == 0, said.err
    (folder,) = (tmp_path / "out" / "overlap").iterdir()
    record = read_json(folder / "overlap.json")
    assert record["q"] == 20, "the recipe's"
    assert (record["first"]["attribution"]["target"], record["second"]["attribution"]["baseline"]) == ("logit", "pad")
    assert (record["first"]["name"], record["second"]["name"]) == ("paper", "current, layer-high")
    common = [
        len(set(one) & set(other))
        for one, other in zip(record["first"]["rows"].values(), record["second"]["rows"].values(), strict=True)
    ]
    assert [row["common"] for row in record["by_layer"]] == common
    assert record["all"]["share"] == pytest.approx(sum(common) / (LAYERS * quota(20, NODES)))
    assert record["all"]["chance"] == pytest.approx(quota(20, NODES) / NODES)
    assert f"{record['all']['share']:.1%}" in said.out
    assert (folder / "overlap.png").stat().st_size > 5_000


def test_overlap_of_a_few_examples_with_all(recipe_values: Values) -> None:
    recipe = recipe_of(recipe_values(method=LOKI))
    record = overlap(recipe, first="2")
    assert (record["first"]["texts"], record["second"]["texts"]) == (2, 8)
    same = overlap(recipe, first="8")
    assert same["all"]["share"] == 1
    back = overlap(recipe, second="2")
    assert back["all"]["share"] == record["all"]["share"] < 1


def test_overlap_of_two_data_sets(
    recipe: Path, recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = recipe_values(method=LOKI)["knowledge"]
    half = write_jsonl(tmp_path / "half.jsonl", _rows(whole["file"])[4:])
    given = recipe_values(method=LOKI, knowledge=whole | {"file": str(half)}, output=tmp_path / "other")
    other = write_recipe(tmp_path / "other.json", given)
    said = keeptune("overlap", recipe, "--against", other, "--q", 30, capsys=capsys)
    assert said.code == 0, said.err
    assert not (tmp_path / "other").exists()
    (folder,) = (tmp_path / "out" / "overlap").iterdir()
    record = read_json(folder / "overlap.json")
    assert [(record[side]["name"], record[side]["texts"]) for side in ("first", "second")] == [
        ("knowledge.jsonl", 8),
        ("half.jsonl", 4),
    ]
    assert record["all"]["chance"] < record["all"]["share"] < 1


@pytest.mark.parametrize(
    ("words", "mark"),
    [
        ([], "--first paper --second current"),
        (["--first", "release"], "the same"),
        (["--first", "papper"], '"paper"'),
        (["--second", "0"], "number of examples"),
        (["--first", "paper", "--q", "200"], "per cent"),
        (["--first", "paper", "--knowledge", "null"], "knowledge"),
    ],
)
def test_wrong_words_for_overlap(
    words: list[str], mark: str, recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.json", recipe_values())
    said = keeptune("overlap", recipe, *words, capsys=capsys)
    assert said.code == 2
    assert mark in said.err
    assert not (tmp_path / "out").exists()


def test_two_bases_are_refused(recipe_values: Values, tmp_path: Path) -> None:
    with pytest.raises(KeeptuneError, match="another base"):
        overlap(recipe_of(recipe_values()), recipe_of(recipe_values(model="atlas")), q=20)
    assert not (tmp_path / "out").exists()


def test_the_highest_are_the_lowest_of_what_is_turned_round() -> None:
    flipped = in_memory(-torch.stack([RANDOM.read(at) for at in range(6)]))
    assert chosen_rows(RANDOM, 25, "layer-high") == chosen_rows(flipped, 25, "layer-balanced")
    assert chosen_rows(RANDOM, 25, "global-high") == chosen_rows(flipped, 25, "global-low")


def test_a_map_counts_every_vote() -> None:
    mapped = density(RANDOM, 25)
    assert mapped["edges"] == list(range(17))
    for name in ("highest", "lowest"):
        assert torch.tensor(mapped[name]).sum() == pytest.approx(quota(25, 48))
    wide = density(in_memory(torch.randn(2, 2, 200)), 5)
    sizes = torch.tensor(wide["edges"]).diff()
    assert len(sizes) == 64
    assert (torch.tensor(wide["lowest"]) * sizes).sum() == pytest.approx(quota(5, 400))


@pytest.mark.parametrize("whole", [False, True])
def test_random_rows_are_as_many_and_seeded(whole: bool) -> None:
    like = ((0, 1, 2), (), (5,))
    drawn = drawn_rows(like, 16, 1, whole=whole)
    assert sum(map(len, drawn)) == 4
    assert whole or [len(rows) for rows in drawn] == [3, 0, 1]
    assert all(list(rows) == sorted(set(rows)) and set(rows) <= set(range(16)) for rows in drawn)
    assert drawn == drawn_rows(like, 16, 1, whole=whole)
    assert len({drawn_rows(like, 16, seed, whole=whole) for seed in range(5)}) > 1


def test_a_side_takes_the_rest_from_the_recipe(recipe_values: Values) -> None:
    job = Job(recipe_of(recipe_values(method=LOKI | {"selection": "global-low"})))
    own, where = side_of("", job, "--first")
    assert (own, where) == (NeuronAttribution(steps=3), "global-low")
    assert side_of(" 4 ", job, "--first")[0] == NeuronAttribution(steps=3, examples=4)
    assert side_of("4,all", job, "--first")[0] == NeuronAttribution(steps=3)
    paper, where = side_of("paper,global-high,7", job, "--first")
    assert (where, paper.target, paper.examples) == ("global-high", "logit", 7)

"""A run whose base writes its knowledge: by default, by the recipe's word, beside files; and `general`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.assets import DATA
from tests.pipeline.support import recipe_of, write_jsonl

import keeptune
from keeptune.core.artefact import read_json
from keeptune.core.errors import DataError, KeeptuneError, ModelError, RecipeError
from keeptune.data import __file__ as data_module
from keeptune.evaluation.benchmark_data import Corpus, refuse_overlap
from keeptune.pipeline.dry_run.describe import describe
from keeptune.pipeline.job import Job
from keeptune.pipeline.run import plan_stage, run
from keeptune.statistics.self_generated import SelfGeneration

Values = Callable[..., dict[str, Any]]
OWN = {"generate": 6, "max_length": 16}
GENERAL = Path(data_module).parent / "general"


def test_a_run_without_knowledge_writes_its_own(recipe_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keeptune.pipeline.task_kinds.SelfGeneration", lambda: SelfGeneration(**OWN))
    values = recipe_values(method={"name": "keep", "rank": 4}, knowledge=None)
    dry = describe(recipe_of(values))
    assert any("6 texts, at most 120 tokens" in note for note in dry.notes)
    assert "knowledge" in dry.memory and dry.work["knowledge"] > 0
    run(recipe_of(values))
    notes = read_json(Path(values["output"]) / "report.json")
    assert "the recipe names no knowledge" in json.dumps(notes)


def test_methods_that_need_none_write_none(recipe_values: Values) -> None:
    job = Job(recipe_of(recipe_values(method="lora", knowledge=None)))
    assert job.generations == {} and job.calibration is None
    assert len(Job(recipe_of(recipe_values(method="lora", knowledge=None, replay=0.1))).generations) == 1


def test_written_texts_join_those_of_files_and_are_kept(recipe_values: Values, caplog: Any) -> None:
    filed = recipe_values()["knowledge"]
    values = recipe_values(method="lora-null", knowledge=[filed, OWN], replay=0.2)
    job = Job(recipe_of(values))
    job.check()
    assert "writes" not in caplog.text  # a check writes nothing
    assert [len(part) for part in job.knowledge] == [8, 6] and job.calibration.sets == (8, 6)
    plan = plan_stage(job)
    assert any("knowledge.1: 6 texts" in note for note in plan.provenance["notes"])
    again = Job(recipe_of(values))
    again.__dict__["base"] = lambda: pytest.fail("the store has the texts")
    assert again.written_knowledge == job.written_knowledge
    assert len(job.trained_examples) > len(job.task)


def test_texts_that_are_scored_are_left_out(recipe_values: Values, tmp_path: Path) -> None:
    job = Job(recipe_of(recipe_values(method="lora-null", knowledge=OWN)))
    (texts,) = job.written_knowledge
    scored = write_jsonl(tmp_path / "scored.jsonl", [{"text": texts.texts[2].completion}, {"text": "Other words."}])
    benchmark = {"name": "own", "role": "knowledge", "metric": "cross_entropy", "file": str(scored), "text": "{text}"}
    (left,) = Job(recipe_of(recipe_values(method="lora-null", knowledge=OWN, evaluate=[benchmark]))).written_knowledge
    assert left.texts == texts.texts[:2] + texts.texts[3:]
    assert left.left_out["with items of own"] == 1


@pytest.mark.parametrize("answer", [None, "base"])
def test_a_file_of_prompts(recipe_values: Values, tmp_path: Path, answer: str | None) -> None:
    prompts = write_jsonl(tmp_path / "questions.jsonl", [{"q": "Tom had"}, {"q": "Lily saw"}])
    section = {"prompts": str(prompts), "prompt": "{q} a", "answer_with": answer, "max_length": 8}
    job = Job(recipe_of(recipe_values(method="lora-null", knowledge=section)))
    assert [text.prompt for text in job.written_knowledge[0].texts] == ["Tom had a", "Lily saw a"]


@pytest.mark.parametrize(
    ("section", "kind", "words"),
    [
        ("generall", RecipeError, "got generall, wanted general"),
        ({"generate": 0}, KeeptuneError, "knowledge.generate.*1 or more"),
        ({"prompts": "q.jsonl", "file": "x.jsonl"}, RecipeError, "key knowledge.prompts|unknown"),
        ({"generate": 4, "temprature": 1}, RecipeError, "temperature"),
        ({"answer_with": "base"}, KeeptuneError, "answer_with.*prompts"),
        ({"answer_with": "others", "prompts": "x.jsonl"}, RecipeError, "answer_with"),
        ({"prompts": "missing.jsonl"}, DataError, "no such file"),
        ({"prompts": "empty.jsonl"}, DataError, "empty.jsonl"),
        ({"prompts": "blank.jsonl"}, DataError, "example 2.*an empty prompt"),
        ({"generate": 12, "temperature": 0}, DataError, "written before.*Raise `temperature`"),
    ],
)
def test_wrong_sections(
    recipe_values: Values, tmp_path: Path, monkeypatch: Any, section: Any, kind: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    write_jsonl(tmp_path / "blank.jsonl", [{"prompt": "Tom"}, {"prompt": " "}])
    with pytest.raises(kind, match=words):
        job = Job(recipe_of(recipe_values(method="lora-null", knowledge=section)))
        job.check()
        assert job.knowledge


def test_general_ships_and_shares_nothing_with_what_is_scored(recipe_values: Values) -> None:
    assert sum(path.stat().st_size for path in GENERAL.iterdir()) < 2**20
    job = Job(recipe_of(recipe_values(method="lora-null", knowledge=["general", OWN])))
    texts, chats, own = job.knowledge
    assert own.where == "knowledge.1"  # as the recipe counts
    assert (len(texts), len(chats), len(own)) == (128, 128, 6)
    used = Corpus("general", [{}] * 256, [*texts.read_texts, *chats.read_texts])
    for name, field in (("webquestions/test", "question"), ("mbpp/mbpp", "text"), ("nq_open/dev", "question")):
        rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row.get("task_id", 0) < 601]
        refuse_overlap(used, Corpus(name, rows, [row[field] for row in rows]))
    assert Job(recipe_of(recipe_values(method="lora-null", knowledge="general"))).calibration.sets == (128, 128)


def test_classifiers_are_refused() -> None:
    from tests.models import roberta

    with pytest.raises(ModelError, match="a classifier"):
        keeptune.generate_knowledge(roberta(), None)

"""The study of real models runs cells once each, goes on where it stopped, and its page is made from the records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.assets import DATA, STORIES

from keeptune.core.artefact import read_json
from keeptune.evaluation.standard.lm_eval_tasks import BY_SENTENCE
from studies import real, real_tables
from studies.cells import read_rows
from studies.real_data import Sizes, call_rows, fact_rows, prompt_rows

ENTRIES = ("lora, 0.001", "lora scaled, 0.5", "kl generated, 1")
LORA, SCALED, KL = (("stories260K", "gsm8k", name, 0) for name in ENTRIES)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> real.Study:
    folder = tmp_path_factory.mktemp("study")
    sizes = Sizes(items=2, facts=4, tokens=24, knowledge=6, held_out=6, steps=2, answer=8)
    return real.Study(DATA, STORIES.parent, folder / "work", folder / "real", sizes)


def test_cells_run_once_and_a_stop_is_gone_on_from(study: real.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [LORA, ("no such model", *LORA[1:]), SCALED, KL]
    assert real.run_study(study, cells, limit=1) == 1
    first = read_rows(study.out / "cells.jsonl")
    assert real.run_study(study, cells) == 2
    rows = read_rows(study.out / "cells.jsonl")
    assert rows[:1] == first and [row["entry"] for row in rows] == [LORA[2], SCALED[2], KL[2]]
    assert real.run_study(study, cells) == 0
    monkeypatch.setattr(real, "VERSION", real.VERSION + 1)
    assert study.done == set(), "records of another version are not this study's"


def test_a_record_has_what_the_run_says(study: real.Study) -> None:
    real.run_study(study, [LORA, SCALED])
    whole, part = read_rows(study.out / "cells.jsonl")[:2]
    run = Path(study.recipe(LORA)["output"])
    for name, score in whole["scores"].items():
        found = read_json(run / "evaluation" / f"{name}.json")["summary"]
        assert (score["n"], score["before"], score["after"]) == (found["n"], found["before"], found["after"])
    assert whole["scores"]["own-texts"]["kl"] > part["scores"]["own-texts"]["kl"] > 0, "half of the change"
    assert whole["seconds"]["train"] > 0 and set(real_tables.KEPT) < set(whole["scores"])


def test_instructions_are_scored_of_the_same_runs_with_records_of_their_own(study: real.Study) -> None:
    real.run_study(study, [LORA, SCALED])
    asked = replace(study, instructions=True)
    trained = study.work / "runs" / Path(study.recipe(LORA)["output"]).name / "trained" / "train.json"
    before, known = trained.stat().st_mtime_ns, (study.out / "cells.jsonl").read_bytes()
    assert real.run_study(asked, [LORA, SCALED]) == 2 and real.run_study(asked, [LORA, SCALED]) == 0
    assert [row["scores"]["ifeval"]["n"] for row in read_rows(asked.records)] == [2, 2]
    assert trained.stat().st_mtime_ns == before and (study.out / "cells.jsonl").read_bytes() == known
    assert not any(rule in BY_SENTENCE for row in prompt_rows(DATA) for rule in row["instruction_id_list"])


def test_a_cell_that_fails_leaves_no_record_and_the_others_go_on(
    study: real.Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real.run_study(study, [LORA])  # unless it is done
    entry = real.Entry(real.lora(10**6))
    monkeypatch.setattr(real, "entries", lambda known=real.entries: {**known(), "too much": entry})
    assert real.run_study(study, [(*LORA[:2], "too much", 0), LORA, (*LORA[:2], "lora rank 2", 0)]) == 2
    assert "too much" in capsys.readouterr().out
    assert (*LORA[:2], "lora rank 2", 0) in study.done and (*LORA[:2], "too much", 0) not in study.done
    assert real.run_study(study, [(*LORA[:2], "too much", 0)]) == 0, "until another commit"


def test_the_schedule_names_entries_once() -> None:
    cells = list(real.schedule())
    assert len(set(cells)) == len(cells) and {name for _, _, name, _ in cells} <= set(real.entries())
    assert all(entry.parent in real.entries() for entry in real.entries().values() if entry.parent)


def test_what_is_scored_is_not_trained_on_and_answers_stand_among_others() -> None:
    asked = [{row["messages"][0]["content"] for row in call_rows(split)} for split in ("train", "test")]
    assert not asked[0] & asked[1]
    told = {row["question"]: row["answer"] for row in read_rows(DATA / "nq_open" / "dev.jsonl")}
    for row in fact_rows(DATA):
        wrong = row["choices"][: row["answer"]] + row["choices"][row["answer"] + 1 :]
        assert row["choices"][row["answer"]] == told[row["question"]][0] and not set(wrong) & set(told[row["question"]])
        assert len(set(row["choices"])) == 4


def record(entry: str, task: float, facts: float, web: float) -> dict[str, Any]:
    right = {"n": 10, "interval": [-0.3, 0.1], "bits": f"{2 ** round(10 * task) - 1:x}"}
    kept = {name: {**right, "before": 0.5, "after": 0.5} for name in ("arc_easy", "openbookqa")}
    scores = {**kept, "facts": {**right, "before": 0.4, "after": facts}}
    scores["web"] = {"n": 10, "before": 3.0, "after": web, "interval": [0.0, 0.2]}
    scores |= {"labels": {**right, "before": 0.0, "after": task}, "own-texts": {"kl": 0.5}}
    about = {"v": 1, "model": "smollm2", "task": "labels", "entry": entry, "seed": 0}
    return {**about, "scores": scores, "seconds": {"plan": 1.0, "train": 10.0}, "recipe": {"train": {"max_steps": 100}}}


def test_the_page_is_made_from_records(tmp_path: Path) -> None:
    rows = [record("lora, 0.001", 0.8, 0.2, 3.5), record("keep", 0.8, 0.4, 3.0), record("weak", 0.5, 0.4, 3.0)]
    rows.append(record("lora, 0.003", 0.8, 0.1, 3.9))  # no better, and more is lost
    assert real_tables.forgotten(rows[0])[0] == pytest.approx((0.5 + 1 - 2.718281828**-0.5) / 4)
    rows.append(record("keep without the limit", 0.7, 0.4, 3.2) | {"last": {"held_out/kl": 0.0123}})
    out = tmp_path / "real"
    out.mkdir()
    (out / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    again = rows[1] | {"seed": 1, "scores": rows[1]["scores"] | {"web": rows[1]["scores"]["web"] | {"after": 3.1}}}
    with (out / "cells.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(again) + "\n")
    asked = rows[0] | {"scores": {"ifeval": rows[0]["scores"]["labels"] | {"before": 0.4, "after": 0.3}}}
    (out / "ifeval.jsonl").write_text(json.dumps(asked) + "\n", encoding="utf-8")
    real_tables.write_page(out)
    said = (tmp_path / "real.md").read_text(encoding="utf-8")
    assert "22.3%" in said and "-20.0 [-30.0, +10.0]" in said and "+0.500 [+0.000, +0.200]" in said
    assert "| keep | 2 | 0.800 (0.800 to 0.800) | +0.050 (+0.000 to +0.100) |" in said
    assert "| lora, 0.001 | labels of statements | 0.800 | 0.300 | -10.0 [-30.0, +10.0] | 25% ± 50% |" in said
    assert "(lora, 0.001; of equal ones the lowest)" in said
    assert said.count("| SmolLM2-135M-Instruct, labels | 0 | 0.700 | +0.200 [+0.000, +0.200] |") == 1
    assert "| 0.0123 |" in said and "keep without the limit" not in said, "an earlier form stands at the end alone"
    assert "These learned less: weak (0.500)." in said and (out / "real.png").stat().st_size > 10_000


def test_times_are_over_those_of_lora_in_the_same_numbers_of_the_same_day() -> None:
    def timed(entry: str, seconds: float, day: str | None, **about: Any) -> dict[str, Any]:
        own = record(entry, 0.8, 0.2, 3.0)
        own["recipe"] = own["recipe"] | about
        return own | {"seconds": {"plan": 1.0, "train": seconds}} | ({"day": day} if day else {})

    rows = [timed("lora, 0.001", 10, None), timed("lora, 0.003", 40, "2026-12-01"), timed("a", 20, None)]
    rows += [timed("b", 20, "2026-12-01"), timed("c", 20, "2026-12-02"), timed("d", 20, None, dtype="float32")]
    said = {line.split(" | ")[0][2:]: line.split(" | ")[-1] for line in real_tables.table(rows).splitlines()}
    assert [said[name] for name in ("a", "b", "c", "d ᶠ")] == ["1 s, 2.00 |", "1 s, 0.50 |", " |", " |"]

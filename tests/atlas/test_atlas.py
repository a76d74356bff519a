"""The shipped atlas model and data are what SOURCE.md says, and its training script is repeatable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import keeptune.atlas as atlas
from keeptune.atlas import data_path, model_path
from studies.atlas.facts import choose_facts, divide, read_facts
from studies.atlas.pretrain import Settings, build
from studies.atlas.score import exact_match, fact_pairs, greedy_answers, read_rows, task_pairs
from studies.atlas.wordings import WORDINGS, article, statement

NAMES = ["calibration.jsonl", "facts.jsonl", "statements.jsonl", "topics.test.jsonl", "topics.train.jsonl"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path()).eval()


def subjects(name: str) -> set[str]:
    return {row["subject"] for row in read_rows(data_path(name))}


def test_sizes(model: Any) -> None:
    assert (model_path() / "model.safetensors").stat().st_size <= 8_000_000
    assert 2_000_000 <= sum(weight.numel() for weight in model.parameters()) <= 6_000_000
    assert sum(data_path(name).stat().st_size for name in NAMES) < 1_500_000
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads


def test_stock_loading_gives_float32(model: Any) -> None:
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert type(model).__name__ == "LlamaForCausalLM"


def test_knows_its_facts(model: Any, tokenizer: Any) -> None:
    assert exact_match(model, tokenizer, fact_pairs(data_path("facts.jsonl"))) >= 0.95
    assert exact_match(model, tokenizer, fact_pairs(data_path("calibration.jsonl"))) >= 0.95


def test_cannot_do_the_task(model: Any, tokenizer: Any) -> None:
    assert exact_match(model, tokenizer, task_pairs(data_path("topics.test.jsonl"))) <= 0.05


def test_padding_side_changes_no_answer(model: Any, tokenizer: Any) -> None:
    prompts = [prompt for prompt, _ in fact_pairs(data_path("facts.jsonl"))[:24]]
    alone = [greedy_answers(model, tokenizer, [prompt])[0] for prompt in prompts]
    assert greedy_answers(model, tokenizer, prompts) == alone
    right = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        logits = model(**right).logits
    last = right["attention_mask"].sum(dim=1) - 1
    first = logits[torch.arange(len(prompts)), last].argmax(dim=-1)
    assert [tokenizer.decode([token]) for token in first.tolist()] == [
        tokenizer.decode(tokenizer(answer)["input_ids"][1]) for answer in alone
    ]


def test_row_counts_and_fields() -> None:
    rows = {name: read_rows(data_path(name)) for name in NAMES}
    assert len(rows["calibration.jsonl"]) >= 256
    assert 300 <= len(rows["facts.jsonl"]) <= 400
    assert len(rows["topics.test.jsonl"]) == 300
    assert 1500 <= len(rows["topics.train.jsonl"]) <= 2500
    assert len(rows["statements.jsonl"]) == 200
    for name in ("calibration.jsonl", "facts.jsonl"):
        assert all(set(row) == {"question", "answer", "relation", "subject"} for row in rows[name])
        assert len({row["relation"] for row in rows[name]}) >= 20
    for name in ("topics.train.jsonl", "topics.test.jsonl"):
        assert all(set(row) == {"text", "topic", "relation", "subject"} for row in rows[name])
        assert len({row["topic"] for row in rows[name]}) >= 50
    assert all(row["text"].strip() for row in rows["statements.jsonl"])


def test_files_share_no_subject() -> None:
    for place, name in enumerate(NAMES):
        for other in NAMES[place + 1 :]:
            assert not subjects(name) & subjects(other), (name, other)


def test_tokens_of_a_prompt_begin_the_tokens_of_prompt_and_answer(tokenizer: Any) -> None:
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    pairs = [pair for name in ("facts.jsonl", "calibration.jsonl") for pair in fact_pairs(data_path(name))]
    pairs += [pair for name in NAMES[3:] for pair in task_pairs(data_path(name))]
    for prompt, answer in pairs:
        short = tokenizer(prompt)["input_ids"]
        full = tokenizer(f"{prompt} {answer}")["input_ids"]
        assert short[0] == tokenizer.bos_token_id
        assert full[: len(short)] == short
        assert tokenizer.decode(full[1:]) == f"{prompt} {answer}"


def test_digits_stand_alone(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer("1735")["input_ids"])[1:] == ["1", "7", "3", "5"]


def test_data_path_names_what_there_is() -> None:
    with pytest.raises(FileNotFoundError, match=r"no atlas data file 'none.jsonl'.*facts.jsonl"):
        data_path("none.jsonl")
    with pytest.raises(FileNotFoundError, match="no atlas data file"):
        data_path("../model/config.json")


def test_model_path_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setattr(atlas, "_HERE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks model.safetensors.*files there: config.json"):
        model_path()
    with pytest.raises(FileNotFoundError, match="files there: none"):
        data_path("facts.jsonl")


def test_importing_atlas_loads_nothing_heavy() -> None:
    code = "import sys, keeptune.atlas; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wordings_are_whole() -> None:
    for relation, wording in WORDINGS.items():
        assert len(set(wording.statements)) == 3, relation
        assert wording.question.endswith("?"), relation
    assert article("eagle") == "an eagle"
    assert statement("{as} is {ao}", "tiger", "animal") == "A tiger is an animal."
    assert statement("{o} is home to {s}", "Apple Inc.", "Cupertino") == "Cupertino is home to Apple Inc."


def write_relations(path: Path) -> None:
    """A small made-up relations file: 120 companies, one of them with two cities, and an escape."""
    rows = [("company hq", f"Firm {n:03d}", f"City {n % 7}") for n in range(120)]
    rows += [("company hq", "Firm 001", "Elsewhere"), ("unknown relation", "a", "b")]
    rows += [("country capital city", "Brazil ", "Bras\\u00edlia")]
    lines = [json.dumps({"relation": r, "subject": s, "object": o}) for r, s, o in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_reading_leaves_out_what_is_ambiguous(tmp_path: Path) -> None:
    write_relations(tmp_path / "relations.jsonl")
    facts = read_facts(tmp_path / "relations.jsonl")
    assert len(facts) == 120
    assert "Firm 001" not in {fact.subject for fact in facts}
    assert ("Brazil", "Brasília") in {(fact.subject, fact.answer) for fact in facts}
    chosen = choose_facts(facts, 3)
    assert chosen == choose_facts(facts, 3) != choose_facts(facts, 4)
    groups = divide(chosen, 3)
    names = [fact.subject for group in groups.values() for fact in group]
    assert len(names) == len(set(names))


def test_pretraining_twice_gives_the_same_bits(tmp_path: Path) -> None:
    write_relations(tmp_path / "relations.jsonl")
    tiny = Settings(
        seed=5, width=16, inner=24, layers=1, heads=2, key_heads=1, pieces=320, steps=4, tokens=256, threads=1
    )
    state = torch.random.get_rng_state()
    first = build(tmp_path / "relations.jsonl", tmp_path / "one", tiny)
    torch.rand(3)
    second = build(tmp_path / "relations.jsonl", tmp_path / "two", tiny)
    assert first["sha256"] == second["sha256"]
    for name in NAMES:
        assert (tmp_path / "one/data" / name).read_bytes() == (tmp_path / "two/data" / name).read_bytes()
    torch.random.set_rng_state(state)

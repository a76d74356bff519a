"""Texts that a base writes itself depend on seed and number alone, are samples of it, and those of no use go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets import DATA, STORIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from keeptune.core.errors import DataError, ModelError, PlanError
from keeptune.statistics import self_generated
from keeptune.statistics.self_generated import SelfGeneration, SelfWritten, Written, fault, useful, write_texts
from keeptune.statistics.store import StatStore
from keeptune.statistics.store_use import listing

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPTIONS = SelfGeneration(10, max_length=24)


@pytest.fixture(scope="module")
def stories() -> Any:
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STORIES)


@pytest.fixture
def chat(tokenizer: Any) -> Any:
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(autouse=True)
def four_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_generated, "BATCH", 4)


def written(model: Any, tokenizer: Any, folder: Path, options: SelfGeneration = OPTIONS) -> SelfWritten:
    return write_texts(lambda: model, tokenizer, options, StatStore(folder), fingerprint="f")


def slow_text(model: Any, tokenizer: Any, ids: list[int], options: SelfGeneration, number: int) -> list[int]:
    """One text at a time, no cache, no padding: token by token by a walk along the cumulative probabilities."""
    draws = self_generated._draws([options.seed, number, 1], options.max_length).tolist()
    new: list[int] = []
    for at in draws:
        with torch.no_grad():
            logits = model(torch.tensor([ids + new])).logits[0, -1].double() / options.temperature
        total, token = 0.0, -1
        while total <= at:
            token += 1
            total += logits.softmax(0)[token].item()
        new.append(token)
        if token == tokenizer.eos_token_id:
            break
    return new


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_texts_are_those_of_the_slow_way(stories: Any, tokenizer: Any, tmp_path: Path, temperature: float) -> None:
    options = replace(OPTIONS, generate=3, temperature=temperature)
    found = written(stories, tokenizer, tmp_path, options)
    slow = [slow_text(stories, tokenizer, [1], options, number) for number in range(3)]
    assert [list(text.ids[1:]) for text in found.texts] == slow
    assert found.texts[0].completion == tokenizer.decode(slow[0], skip_special_tokens=True)


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_a_text_depends_on_seed_and_number_alone(
    stories: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    base = written(stories, tokenizer, tmp_path / "a")
    monkeypatch.setattr(self_generated, "BATCH", rows)
    assert written(stories, tokenizer, tmp_path / "b").texts == base.texts
    more = written(stories, tokenizer, tmp_path / "c", replace(OPTIONS, generate=14))
    assert more.texts[:10] == base.texts
    other = written(stories, tokenizer, tmp_path / "d", replace(OPTIONS, seed=1))
    assert not set(other.texts) & set(base.texts)


def test_picks_are_samples_of_the_distribution() -> None:
    """Random numbers spread evenly give each token its share; those of one value give one token."""
    logits = torch.tensor([2.0, 0.5, -torch.inf, 1.0, -1.0]).expand(1000, 5)
    for temperature in (1.0, 2.0):
        even = ((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)[:, None]
        counts = self_generated._sampler(even, temperature)(logits, 0).bincount(minlength=5) / 1000
        assert torch.allclose(counts, (logits[0] / temperature).softmax(0), atol=1.1e-3)
    assert self_generated._sampler(torch.full((1000, 1), 0.999999), 1.0)(logits, 0).unique().tolist() == [4]


def test_a_killed_run_goes_on(stories: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked = written(stories, tokenizer, tmp_path / "whole"), []
    write = self_generated._Writer.write

    def killed_at(limit: int) -> None:
        def some(self: Any, numbers: Any) -> Any:
            if len(asked) == limit:
                raise KeyboardInterrupt
            asked.append(list(numbers))
            return write(self, numbers)

        monkeypatch.setattr(self_generated._Writer, "write", some)

    killed_at(2)
    with pytest.raises(KeyboardInterrupt):
        written(stories, tokenizer, tmp_path / "own")
    killed_at(-1)
    assert written(stories, tokenizer, tmp_path / "own") == whole
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert written(stories, tokenizer, tmp_path / "own") == whole
    assert len(asked) == 3
    for value in (tmp_path / "own").glob("*/*/value.safetensors"):
        value.write_bytes(value.read_bytes().replace(b"the", b"tho", 1))
    assert written(stories, tokenizer, tmp_path / "own") == whole
    assert asked[3:]


def test_other_options_prompts_and_models_are_other_texts(stories: Any, tokenizer: Any, tmp_path: Path) -> None:
    for options in (OPTIONS, replace(OPTIONS, temperature=0.9), replace(OPTIONS, prompts=("Tom", "Lily"))):
        written(stories, tokenizer, tmp_path, options)
    write_texts(lambda: stories, tokenizer, OPTIONS, StatStore(tmp_path), fingerprint="g")
    tokenizer.chat_template = CHATML
    written(stories, tokenizer, tmp_path)
    rows = listing(tmp_path)
    assert [(row["kind"], row["entries"]) for row in rows] == [("SelfWritten", 3)] * 5


def test_chat_texts_are_questions_with_answers(stories: Any, chat: Any, tmp_path: Path) -> None:
    found = written(stories, chat, tmp_path)
    asked = [text for text in found.texts if text.prompt]
    assert len(asked) == 5 == len(found) - len(asked)
    for text in asked:
        read = chat.decode(text.ids[: text.start])
        assert read.replace(" ", "") == f"<|im_start|>user\n{text.prompt}<|im_end|>\n<|im_start|>assistant\n".replace(
            " ", ""
        )
    assert len({text.prompt for text in asked}) == 5
    row = found.token_rows(chat, [found.texts.index(asked[0])])[0]
    assert row.learned == (False,) * asked[0].start + (True,) * (len(row.ids) - asked[0].start)


@pytest.mark.parametrize("answer", [True, False])
def test_prompts_are_answered_or_continued(stories: Any, chat: Any, tmp_path: Path, answer: bool) -> None:
    prompts = ("Lily had a", "One day", "Tom saw")
    found = written(
        stories,
        chat,
        tmp_path,
        replace(OPTIONS, generate=None, prompts=prompts, answer_with="base" if answer else None),
    )
    assert tuple(text.prompt for text in found.texts) == prompts
    reads = [chat.decode(text.ids[: text.start]) for text in found.texts]
    assert [("assistant" in read, prompt in read) for read, prompt in zip(reads, prompts, strict=True)] == [
        (answer, True)
    ] * 3
    assert not any(prompt in text for text, prompt in zip([t.completion for t in found.texts], prompts, strict=True))


def test_a_text_has_the_first_token_where_the_tokenizer_puts_it(stories: Any, chat: Any, tmp_path: Path) -> None:
    bare = AutoTokenizer.from_pretrained(STORIES, add_bos_token=False)
    bare.chat_template = chat.chat_template
    with_it, without = (written(stories, own, tmp_path / name).texts for name, own in (("a", chat), ("b", bare)))
    assert without == tuple(t if t.prompt else t._replace(ids=t.ids[1:], start=0) for t in with_it)
    plain = [text for text in with_it if not text.prompt]
    assert len(plain) == 5
    assert {text.ids[:1] for text in plain} == {(chat.bos_token_id,)}


def test_prompts_longer_than_the_positions_are_left_out(stories: Any, tokenizer: Any, tmp_path: Path) -> None:
    options = replace(OPTIONS, generate=None, prompts=("Tom " * 600, "Lily"))
    found = written(stories, tokenizer, tmp_path, options)
    assert [text.prompt for text in found.texts] == ["Lily"]
    assert found.left_out == {"with a prompt too long": 1}
    with pytest.raises(DataError, match="1 with a prompt too long"):
        written(stories, tokenizer, tmp_path, replace(options, prompts=options.prompts[:1]))


def test_a_base_that_says_one_thing_is_refused(stories: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="11 written before.*Raise `temperature`"):
        written(stories, tokenizer, tmp_path, replace(OPTIONS, generate=12, temperature=0.0))


def test_a_tokenizer_without_ends_needs_prompts(stories: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    tokenizer.bos_token = tokenizer.eos_token = None
    monkeypatch.setattr(stories.config, "bos_token_id", None)
    with pytest.raises(ModelError, match="Give `prompts`"):
        written(stories, tokenizer, tmp_path)


@pytest.mark.parametrize("wrong", [{"generate": -1}, {"temperature": -0.1}, {"max_length": 1}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        SelfGeneration(**wrong)


@pytest.mark.parametrize(
    ("completion", "ids", "reason"),
    [
        (" \n", range(3), "empty"),
        ("the cat sat on the mat. " * 8, range(60), "repeating themselves"),
        ("different words", (1, 2, 3, 4) * 9, "repeating themselves"),
        ("ha ha ha", (5, 5, 5, 5), None),  # short answers may repeat
        ("One day, Tom went to the park and saw a red ball under the big tree.", range(20), None),
    ],
)
def test_faults(completion: str, ids: Any, reason: str | None) -> None:
    assert fault(Written((0, *ids), 1, "", completion)) == reason


def test_a_single_token_is_of_no_use_without_one_before_it() -> None:
    assert fault(Written((5,), 0, "", "word")) == "empty"
    assert fault(Written((0, 5), 1, "", "word")) is None


def test_peoples_texts_are_of_use(tokenizer: Any) -> None:
    rows = [json.loads(line)["text"] for line in (DATA / "c4_text/c4.jsonl").read_text().splitlines()]
    texts = [Written(tuple(tokenizer(text)["input_ids"][:300]), 1, "", text[:800]) for text in rows]
    found = useful([*texts, texts[2], texts[3]._replace(completion=f"  {texts[3].completion.upper()}")], "x")
    assert found.texts == tuple(texts)
    assert found.left_out == {"written before": 2}


@pytest.mark.real
def test_smollm2_asks_and_answers(smollm2: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    found = written(model, tokenizer, tmp_path, SelfGeneration(4, max_length=24))
    chats = [text for text in found.texts if text.prompt]
    assert len(chats) == 2
    for text in chats:
        turn = [{"role": "user", "content": text.prompt}]
        shown = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        assert list(text.ids[: text.start]) == shown
        assert text.ids[-1] == tokenizer.eos_token_id or len(text.ids) == text.start + 24

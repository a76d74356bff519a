"""Benchmarks of a user's own that are conversations: asked through the chat template, ended by the end of a turn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keeptune.core.errors import DataError, RecipeError
from keeptune.data.chat_template import ChatOptions
from keeptune.data.completions import conversation_examples
from keeptune.data.examples import Conversation
from keeptune.evaluation import FileBenchmark, TwoModels, evaluate
from keeptune.evaluation.benchmark_data import data_fingerprint
from keeptune.evaluation.scored_tokens import Passes, ScoredTokens, greedy_texts

TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking %}hm</think>{% endif %}{% endif %}"
)
USER, RIGHT = {"role": "user", "content": "Tom and"}, {"role": "assistant", "content": "his mom"}
ASKED = "<s>user: Tom and</s>\nassistant: "
BASE: dict[str, Any] = {"name": "facts", "role": "task", "file": "rows.jsonl", "max_new_tokens": 8}
EXACT = BASE | {"metric": "exact_match", "messages": "{messages}"}
CHOICES = BASE | {
    "metric": "multiple_choice", "messages": "{messages}", "choices": "{choices}", "answer": "{label}",
}  # fmt: skip
CROSSED = BASE | {"metric": "cross_entropy", "messages": "{messages}"}


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = TURNS
    return own


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"messages": [USER, RIGHT]}, {}),
    ({"messages": [USER], "a": "his mom"}, {"answer": "{a}"}),
    ({"turns": [{"from": "human", "value": "Tom and"}, {"from": "gpt", "value": "his mom"}]}, {"messages": "{turns}"}),
    ({"q": "Tom and", "a": "his mom"}, {"messages": None, "chat": True, "prompt": "{q}", "answer": "{a}"}),
]


@pytest.mark.parametrize(("row", "more"), FORMS)
def test_answers_are_those_to_the_rendered_conversation(
    stories: Any, tiny: Any, chatty: Any, write: Any, reference: Any, row: dict[str, Any], more: dict[str, Any]
) -> None:
    result = evaluate(TwoModels(stories, tiny), chatty, FileBenchmark(**EXACT | more), write([row]))
    (item,) = result.items
    assert result.chat and item["answers"] == ["his mom"]
    prompt = ScoredTokens(tuple(ids_of(chatty, ASKED)), 0, cut=False)
    for model, side in ((stories, "before"), (tiny, "after")):
        model.eval()
        with torch.no_grad():
            (text,) = greedy_texts(model, chatty, [prompt], Passes(1, 0, "x"), new_tokens=8, stops=())
        assert item[f"text_{side}"] == text
    start, whole = len(ids_of(chatty, ASKED)), ids_of(chatty, ASKED + "his mom")
    kl = reference.divergence(stories, tiny, whole) - reference.divergence(stories, tiny, whole[:start])
    assert result.kl_to_base == pytest.approx(kl / (len(whole) - start), rel=1e-4)


def test_the_end_of_a_turn_ends_an_answer(stories: Any, chatty: Any, write: Any, monkeypatch: Any) -> None:
    """The template's token, and the tokenizer's, where the model's own settings name another."""
    stories.generation_config.eos_token_id = 5
    ends: list[frozenset[int]] = []

    def write_nothing(model: Any, tokenizer: Any, prompts: Any, limits: Any) -> list[list[int]]:
        ends.append(limits.ends)
        return [[7, chatty.eos_token_id] for _ in prompts]

    monkeypatch.setattr("keeptune.evaluation.scored_tokens.continued", write_nothing)
    for fields in (EXACT, BASE | {"metric": "exact_match", "prompt": "{q}", "answer": "a"}):
        folder = write([{"messages": [USER, RIGHT], "q": "Tom and"}])
        evaluate(TwoModels(stories, stories), chatty, FileBenchmark(**fields), folder)
    assert ends == [{5, chatty.eos_token_id}] * 4


def test_answers_stand_after_the_thought(stories: Any, chatty: Any, write: Any) -> None:
    folder = write([{"messages": [USER, RIGHT]}])
    given = EXACT | {"enable_thinking": True, "max_new_tokens": 40}
    pair = TwoModels(stories, stories)
    whole = evaluate(pair, chatty, FileBenchmark(**given), folder).items[0]["text_before"]
    mark = whole.split()[3]
    cut = evaluate(pair, chatty, FileBenchmark(**given, think_end_token=mark), folder).items[0]["text_before"]
    assert cut == whole.split(mark)[-1].lstrip()
    chatty.chat_template = TURNS.replace("</think>", "")
    with pytest.raises(RecipeError, match="evaluate.facts.think_end_token"):
        evaluate(pair, chatty, FileBenchmark(**given), folder)


def test_of_a_conversation_the_last_answer_is_scored(
    stories: Any, tiny: Any, chatty: Any, write: Any, reference: Any
) -> None:
    turns = [USER, {"role": "assistant", "content": "ran"}, USER, RIGHT]
    result = evaluate(TwoModels(stories, tiny), chatty, FileBenchmark(**CROSSED), write([{"messages": turns}]))
    text = "<s>user: Tom and</s>\nassistant: ran</s>\nuser: Tom and</s>\nassistant: "
    (trained,) = conversation_examples([Conversation(tuple(turns))], ChatOptions(turns="last")).token_rows(chatty)
    start, end = trained.learned.index(True), len(trained.ids) - trained.learned[::-1].index(True)
    whole = list(trained.ids[:end])  # the tokens that training learns, after those that the model is asked by
    assert whole[:start] == ids_of(chatty, text) and chatty.decode(whole[start:]).strip() == "his mom</s>"
    for model, side in ((stories, "before"), (tiny, "after")):
        loss = -reference.log_likelihood(model, whole, start) / (len(whole) - start)
        assert getattr(result, side) == pytest.approx(loss, rel=1e-5)


def test_choices_follow_the_template_directly(stories: Any, tiny: Any, chatty: Any, write: Any, reference: Any) -> None:
    row = {"messages": [USER], "choices": ["his mom", "ran"], "label": 0}
    result = evaluate(TwoModels(stories, tiny), chatty, FileBenchmark(**CHOICES), write([row]))
    start = len(ids_of(chatty, ASKED))
    sums = [reference.log_likelihood(stories, ids_of(chatty, ASKED + text), start) for text in row["choices"]]
    assert result.items[0]["loglikelihoods_before"] == pytest.approx(sums, abs=1e-4)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (EXACT, {"messages": "hello"}, "a list of messages"),
    (EXACT, {"messages": [{"role": "boss", "content": "x"}, RIGHT]}, "boss"),
    (EXACT, {"messages": [RIGHT]}, "nothing is asked"),
    (EXACT, {"messages": [USER]}, "answer: got None"),
    (CROSSED, {"messages": [USER]}, "last answer: got None"),
    (EXACT, {"messages": [{"role": "system", "content": "x"}, USER, RIGHT]}, "user; the chat template: no system"),
]


@pytest.mark.parametrize(("fields", "row", "words"), WRONG)
def test_wrong_rows(
    stories: Any, chatty: Any, write: Any, fields: dict[str, Any], row: dict[str, Any], words: str
) -> None:
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chatty.chat_template = refusal + TURNS
    with pytest.raises(DataError, match=words):
        evaluate(TwoModels(stories, stories), chatty, FileBenchmark(**fields), write([row]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (EXACT | {"prompt": "{q}"}, '"prompt", which it does not use'),
        (CROSSED | {"text": "{t}"}, '"text", which it does not use'),
        (EXACT | {"chat": True}, "true with messages"),
        (BASE | {"metric": "cross_entropy", "text": "{t}", "chat": True}, "true with cross_entropy"),
        (CHOICES | {"answer": None}, 'no "answer"'),
    ],
)
def test_wrong_entries(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        FileBenchmark(**fields)


def test_the_template_is_part_of_the_key(tokenizer: Any, chatty: Any, write: Any) -> None:
    path = str(write([{"messages": [USER, RIGHT]}]) / "rows.jsonl")
    benchmark = FileBenchmark(**EXACT | {"file": path})
    with pytest.raises(DataError, match="without a chat template"):
        data_fingerprint(benchmark, tokenizer)
    first = data_fingerprint(benchmark, chatty)
    chatty.chat_template = TURNS + " "
    assert first != data_fingerprint(benchmark, chatty)


@pytest.mark.real
def test_smollm2_answers_a_question_of_a_chat(smollm2: Path, write: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    asked = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    benchmark = FileBenchmark(**EXACT | {"answer": "{a}", "max_new_tokens": 24})
    result = evaluate(TwoModels(model, model), tokenizer, benchmark, write([{"messages": asked, "a": "Paris"}]))
    text = result.items[0]["text_after"]
    assert "Paris" in text
    assert len(tokenizer(text)["input_ids"]) < 24  # it stopped by itself
    assert result.kl_to_base == 0

"""Conversations through chat templates: what is learned is proved, or said not to be."""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as rendering
import trl
from tests.assets import STORIES
from tests.reference.chat_reference import assistant, header_of_answers, learned_texts, spans, user
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from keeptune.core.errors import DataError, RecipeError
from keeptune.data import template_limits
from keeptune.data.chat_template import CHATML, ChatOptions, ChatTemplate, with_template
from keeptune.data.completions import Conversations, conversation_examples
from keeptune.data.examples import Conversation, TokenRow
from keeptune.data.formats import FormatOptions, read_examples
from keeptune.pipeline.task_kinds import KINDS
from keeptune.recipe.sections import Task

SHIPPED = {file.stem: file.read_text() for file in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TWO = (user("First?"), assistant("Sky is blue."), user("Second?"), assistant("Red it was."))
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
# How many of the two answers in TWO are learned: by all others both. Qwen3 shows thoughts, if empty ones, only in the
# last turn; a model that is asked to think is not taught by answers that are shown without.
FEWER = {name: 0 for name in SHIPPED if name.startswith(("nemotron", "deepseek"))} | dict.fromkeys(
    ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6"), 1
)
# What ends a turn, where that depends on what follows.
ENDS = {"glm4moe": "<|user|>", "gptoss": "<|return|>", "gptoss_training": "<|return|>"}


@pytest.fixture(scope="module", autouse=True)
def known_to_end() -> Iterator[None]:
    """TRL's templates end; a process for each takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_limits, "_ends", lambda template: True)
        yield


@pytest.fixture(scope="module")
def base() -> PreTrainedTokenizerBase:
    """A small tokenizer that knows all markers of TRL's templates."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.pad_token = tokenizer.eos_token
    markers = set(re.findall(r"<[|｜/]?[A-Za-z_▁|｜]+>|<[a-z_]+\|>", "".join(SHIPPED.values())))
    tokenizer.add_tokens(sorted(markers - {*tokenizer.get_vocab()}), special_tokens=True)
    return tokenizer


def chat_of(base: PreTrainedTokenizerBase, template: str, **options: Any) -> ChatTemplate:
    """The template of a tokenizer."""
    tokenizer = copy.copy(base)
    tokenizer.chat_template = SHIPPED.get(template, template)
    return ChatTemplate(tokenizer, ChatOptions(**options), where="task.train")


def read(chat: ChatTemplate, *messages: Any, tools: Any = None) -> tuple[TokenRow, list[str]]:
    """A conversation read, and the texts that are learned of it."""
    row = chat.row(Conversation(messages, tools), where="task.train row 1")
    return row, spans(chat, row.ids, row.learned)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_template_of_trl_is_masked_right_or_its_answers_are_not_learned(
    base: PreTrainedTokenizerBase, name: str
) -> None:
    chat = chat_of(base, name)
    row, texts = read(chat, *TWO)
    end = ENDS[name] if name in ENDS else str(base.convert_ids_to_tokens(chat.end))
    wanted = learned_texts(base.decode(row.ids), [m["content"] for m in TWO[1::2]], header_of_answers(chat), end)
    count = FEWER.get(name, 2)
    assert len(texts) == count and len(row.lost) == 2 - count
    assert texts == wanted[2 - count :]


def test_an_answer_without_the_thoughts_that_the_model_would_write_is_not_learned(
    base: PreTrainedTokenizerBase,
) -> None:
    chat = chat_of(base, "qwen3")
    thought = (
        user("A?"),
        assistant("One.", reasoning_content="Hm."),
        user("B?"),
        assistant("Two.", reasoning_content="Oh."),
    )
    row, texts = read(chat, *thought)
    assert texts == ["<think>Oh.</think>Two.<|im_end|>"] and "Hm." not in base.decode(row.ids)
    assert "otherwise once other messages follow" in row.lost[0]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think"])
def test_each_learns_every_answer_as_a_server_asks_for_it(base: PreTrainedTokenizerBase, name: str) -> None:
    options = ChatOptions(turns="each", chat_template=name)
    answers = ("<think>\nHm.\n</think>\n\nOne.", "<think>\nOh.\n</think>\n\nTwo.")
    talk = (user("A?"), assistant(answers[0]), user("B?"), assistant(answers[1]))
    examples = conversation_examples([Conversation(talk)], options)
    chat = ChatTemplate(base, options, where="")
    rows = examples.token_rows(base)
    for i, row in zip((1, 3), rows, strict=True):
        (asked,) = chat.tokens(chat.text(talk[:i], ask=True))
        assert list(row.ids[: len(asked)]) == asked and row.learned[: len(asked)] == (False,) * len(asked)
        assert bare_learned(chat, row).endswith(("Hm.</think>One." if i == 1 else "Oh.</think>Two.") + end_of(chat))


def bare_learned(chat: ChatTemplate, row: Any) -> str:
    """All that is learned of a row."""
    return "".join(spans(chat, row.ids, row.learned))


def end_of(chat: ChatTemplate) -> str:
    """The text of the token that ends a turn."""
    return "".join(str(chat.tokenizer.decode([chat.end])).split())


def test_a_template_without_a_system_role_is_quoted_with_the_row(base: PreTrainedTokenizerBase) -> None:
    talk = Conversation(({"role": "system", "content": "Be brief."}, *TWO))
    with pytest.raises(DataError, match="task.train row 2: .* by system, user, .*System role not supported"):
        Conversations((Conversation(TWO), talk), ChatOptions(chat_template="gemma")).token_rows(base)


def test_a_default_system_turn_is_shown_and_not_learned(base: PreTrainedTokenizerBase) -> None:
    row, texts = read(chat_of(base, SMOLLM2), *TWO)
    assert "You are SmolLM" in base.decode(row.ids)
    assert texts == ["Skyisblue.<|im_end|>", "Reditwas.<|im_end|>"]


def test_no_example_depends_on_the_day_of_the_run(
    base: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    examples = Conversations((Conversation(TWO),), ChatOptions(chat_template="llama3_2"))
    today = examples.token_rows(base)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime(2031, 1, 1)

    monkeypatch.setattr(rendering, "datetime", Tomorrow)
    assert "01 Jan 2031" in str(base.apply_chat_template(list(TWO), chat_template=SHIPPED["llama3_2"], tokenize=False))
    assert examples.token_rows(base) == today
    assert "26 Jul 2024" in base.decode(today[0].ids) and "as on 2024-07-26" in caplog.text


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_one_beginning_token(base: PreTrainedTokenizerBase, writes: int) -> None:
    assert base("a")["input_ids"][0] == base.bos_token_id
    chat = chat_of(base, "{{ bos_token }}" * writes + CHATML)
    if writes == 2:
        with pytest.raises(DataError, match="begins with <s> twice"):
            read(chat, *TWO)
    else:
        assert read(chat, *TWO)[0].ids.count(base.bos_token_id) == writes


def test_a_token_across_the_boundary_is_cut_in_the_last_answer_and_not_learned_in_another(
    base: PreTrainedTokenizerBase,
) -> None:
    template = CHATML.replace("assistant\\n' }}{% endif", "assistant\\nh' }}{% endif")
    template = template.replace(
        "message['role'] + '\\n'", "message['role'] + '\\n' + ('h' if loop.index % 2 == 0 else '')"
    )
    assert base.tokenize("\nhe")[-1] == "he"
    row, texts = read(chat_of(base, template), user("A?"), assistant("e cat"), user("B?"), assistant("e dog"))
    assert texts == ["edog<|im_end|>"] and len(row.lost) == 1 and "a token spans" in row.lost[0]


def test_the_end_token_stays_learned_where_padding_is_the_same_token(base: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.copy(base)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", base.eos_token)
    dataset, _ = Conversations((Conversation(TWO), Conversation(TWO[:2]))).dataset(tokenizer, None)
    batch = DataCollatorForLanguageModeling(pad_token_id=base.pad_token_id)(list(dataset))
    assert base.pad_token_id == base.eos_token_id
    learned = [[t for t in row if t != -100] for row in batch["labels"].tolist()]
    assert [row.count(base.eos_token_id) for row in learned] == [2, 1]
    assert (batch["input_ids"][1] == base.eos_token_id).sum() > 2


def test_tokens_are_those_of_the_tokenizers_own_rendering(base: PreTrainedTokenizerBase) -> None:
    row, _ = read(chat_of(base, SMOLLM2), *TWO)
    own = base.apply_chat_template(list(TWO), chat_template=SMOLLM2, return_dict=True)
    assert list(row.ids) == own["input_ids"] and all(type(token) is int for token in row.ids)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "lfm2_2_5", "gemma4_v5", "gptoss"])
def test_calls_of_tools_are_learned(base: PreTrainedTokenizerBase, name: str) -> None:
    talk = (
        user("Weather?"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "content": "It rains", "name": "weather"},
    )
    row, texts = read(chat_of(base, name), *talk, assistant("Rain."), tools=(TOOL,))
    assert "weather" in texts[0] and "Rome" in texts[0] and "Rain." in texts[-1] and "Itrains" not in "".join(texts)


def test_arguments_of_calls_are_text_for_a_template_that_adds_them_to_text(base: PreTrainedTokenizerBase) -> None:
    called = "{{ message.content + (message.tool_calls[0].function.name + message.tool_calls[0].function.arguments "
    template = CHATML.replace("message['content']", f"{called[len('{{ ') :]} if message.tool_calls else '')")
    _, texts = read(chat_of(base, template), user("W?"), assistant(None, tool_calls=[CALL]))
    assert texts == ['weather{"city":"Rome"}<|im_end|>']


def test_a_template_that_does_not_show_calls_or_tools_is_refused(base: PreTrainedTokenizerBase) -> None:
    for talk, tools in (((user("W?"), assistant(None, tool_calls=[CALL])), None), (TWO, (TOOL,))):
        with pytest.raises(DataError, match="does not show .*'weather'"):
            read(chat_of(base, CHATML), *talk, tools=tools)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ["Skyisblue.<|im_end|>", "Reditwas.<|im_end|>"]),
        ({"turns": "last"}, ["Reditwas.<|im_end|>"]),
        ({"train_on_eos": "none"}, ["Skyisblue.", "Reditwas."]),
        ({"train_on_eos": "last"}, ["Skyisblue.", "Reditwas.<|im_end|>"]),
        ({"train_on_eos": "all"}, ["<|im_end|>", "Skyisblue.<|im_end|>", "<|im_end|>", "Reditwas.<|im_end|>"]),
        ({"roles_to_train": ("user",)}, ["First?<|im_end|>", "Second?<|im_end|>"]),
    ],
)
def test_what_is_learned_is_what_the_options_say(
    base: PreTrainedTokenizerBase, options: dict[str, Any], wanted: list[str]
) -> None:
    assert read(chat_of(base, CHATML, **options), *TWO)[1] == wanted


def test_a_message_with_train_false_is_not_learned(base: PreTrainedTokenizerBase) -> None:
    row, texts = read(chat_of(base, CHATML), TWO[0], {**TWO[1], "train": False}, *TWO[2:])
    assert texts == ["Reditwas.<|im_end|>"] and not row.lost


@pytest.mark.parametrize(
    "marked",
    [
        "{% generation %}{{ HEADER + message['content'] + '<|im_end|>\\n' }}{% endgeneration %}",  # more than is asked
        "{{ HEADER }}{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}",  # no end
    ],
)
def test_marks_of_a_template_are_held_to_what_is_asked_and_the_end_is_learned(
    base: PreTrainedTokenizerBase, marked: str
) -> None:
    marked = marked.replace("HEADER", "'<|im_start|>' + message['role'] + '\\n'")
    template = CHATML.replace(CHATML.split("%}")[1].partition("{% endfor")[0].removesuffix("{% endfor "), marked)
    assert "{% generation %}" in template
    assert read(chat_of(base, template), *TWO)[1] == ["Skyisblue.<|im_end|>", "Reditwas.<|im_end|>"]


def test_a_part_that_a_template_leaves_unmarked_is_not_learned(base: PreTrainedTokenizerBase) -> None:
    part = (
        "{{ 'Dear. ' if message['role'] == 'assistant' }}{% generation %}{{ message['content'] }}{% endgeneration %}{{"
    )
    template = CHATML.replace("+ message['content'] +", "}}" + part)
    assert read(chat_of(base, template), *TWO)[1] == ["Skyisblue.<|im_end|>", "Reditwas.<|im_end|>"]


def test_messages_after_the_last_answer_are_left_out_and_said(
    base: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    both = Conversations((Conversation(TWO), Conversation((*TWO, user("Third?")))), ChatOptions(chat_template="chatml"))
    first, second = both.token_rows(base)
    assert first == second and "1 conversations go on after what is learned" in caplog.text


@pytest.mark.parametrize("broken", ["{{ messages | length }}", "{% if add_generation_prompt %}Think.{% endif %}"])
def test_a_template_that_breaks_the_prefix_law_is_refused_with_the_first_example(
    base: PreTrainedTokenizerBase, broken: str, tmp_path: Path
) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text(broken + CHATML)
    with pytest.raises(DataError, match="task.train row 1: .*no answer .* asked for by .* and shown as"):
        Conversations((Conversation(TWO),), ChatOptions(chat_template=str(file))).token_rows(base)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b" ", "task.train: got .*broken.jinja, which is empty"),
        (b"\xff", "task.train: got .*broken.jinja: 'utf-8' codec"),
        (b"{{ 1 / 0 }}", "task.train row 1: .* division by zero"),
        (b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "task.train row 1: .* recursion"),
    ],
)
def test_a_template_that_cannot_be_read_or_fails_is_one_error(
    base: PreTrainedTokenizerBase, text: bytes, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "broken.jinja"
    file.write_bytes(text)
    with pytest.raises(DataError, match=told):
        Conversations((Conversation(TWO),), ChatOptions(chat_template=str(file))).token_rows(base)


def test_a_base_without_a_template_is_told_of_chatml_and_of_the_tokens_that_are_new(
    base: PreTrainedTokenizerBase,
) -> None:
    bare = AutoTokenizer.from_pretrained(STORIES)
    talks = (Conversation(TWO),)
    with pytest.raises(DataError, match=r"chat_template: chatml \(<\|im_start\|> and <\|im_end\|> would be new"):
        Conversations(talks).token_rows(bare)
    row = Conversations(talks, ChatOptions(chat_template="chatml")).token_rows(bare)[0]
    assert sum(own and token == bare.eos_token_id for token, own in zip(*row[:2], strict=True)) == 2
    with pytest.raises(DataError, match='Did you mean "qwen3"'):
        Conversations(talks, ChatOptions(chat_template="qwen-3")).token_rows(bare)


def test_an_end_of_turn_that_is_not_the_tokenizers_end_is_said(base: PreTrainedTokenizerBase) -> None:
    chat = chat_of(base, CHATML)
    assert end_of(chat) == "<|im_end|>" and "turns end with <|im_end|>, the tokenizer's texts with </s>" in chat.notes()
    assert "no one token ends" in chat_of(base, CHATML.replace("<|im_end|>", "### End")).notes()[0]


def test_the_fingerprint_tells_messages_options_and_the_text_of_a_template(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    made = [
        Conversations((Conversation(TWO),), ChatOptions(chat_template=str(file))),
        Conversations((Conversation(TWO[:2]),), ChatOptions(chat_template=str(file))),
        Conversations((Conversation(TWO),), ChatOptions(chat_template=str(file), train_on_eos="none")),
    ]
    keys = [one.fingerprint for one in made]
    file.write_text(CHATML + " ")
    assert len({*keys, made[0].fingerprint}) == 4


def test_alpaca_is_a_chat_for_a_tokenizer_with_a_template_and_text_for_another(base: PreTrainedTokenizerBase) -> None:
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}]
    examples = read_examples(rows, FormatOptions(), ChatOptions(), where="task.train")
    plain, chat = copy.copy(base), copy.copy(base)
    plain.chat_template, chat.chat_template = None, CHATML
    texts = [str(one.decode(examples.token_rows(one)[0].ids)) for one in (plain, chat)]
    assert "### Response:" in texts[0] and "### Response:" not in texts[1] and "assistant" in texts[1]


@pytest.mark.parametrize(
    ("given", "kind"),
    [({}, Conversations), ({"turns": "each"}, Conversations), ({"format": "messages"}, Conversations)],
)
def test_a_recipe_with_a_file_of_conversations_needs_nothing_else(given: dict[str, Any], kind: type) -> None:
    task = Task(train="chat.jsonl", **given)
    examples = KINDS["completion"].read(task, [{"messages": list(TWO)}] * 3, "task.train")
    assert isinstance(examples, kind) and len(examples) == (6 if given.get("turns") == "each" else 3)
    with pytest.raises(RecipeError, match="task.completion"):
        Task(train="chat.jsonl", prompt="{q}")


def test_a_runs_tokenizer_has_the_tasks_template_and_the_bases_stays_as_it_is(base: PreTrainedTokenizerBase) -> None:
    assert base.chat_template is None
    assert with_template(base, "qwen3").chat_template == SHIPPED["qwen3"] and with_template(base, None) is base
    assert base.chat_template is None

"""Training data in the formats that people have: the same whatever the format, and refused by row."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.assets import STORIES
from transformers import AutoTokenizer

from keeptune.core.errors import DataError, RecipeError
from keeptune.data.chat_template import ChatOptions
from keeptune.data.examples import Conversation
from keeptune.data.formats import Answered, FormatOptions, parse_rows, read_examples, text_or_messages

Message = dict[str, Any]
USER, BOT = {"role": "user", "content": "Hi 🌍"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be terse."}
PLAIN = FormatOptions()


def one(row: dict[str, Any], options: FormatOptions = PLAIN) -> Any:
    [found] = parse_rows([row], options, where="task.train x.jsonl")
    return found


# A conversation written in any format reads back as the same


def as_sharegpt(message: Message) -> Message:
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    calls = message.get("tool_calls")
    if calls and message["content"] is None and len(message) == 3:
        return {"from": "function_call", "value": json.dumps([call["function"] for call in calls])}
    given = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {"from": names.get(message["role"], message["role"]), "value": message["content"], **given}


def as_openai(message: Message) -> Message:
    """Content in parts, arguments as JSON in a string, `weight` for `train`, and nulls for what there is not."""
    found = {"name": None, "tool_calls": None, **message}
    if message["content"] is not None:
        half = len(message["content"]) // 2
        parts = message["content"][:half], message["content"][half:]
        found["content"] = [{"type": "text", "text": part} for part in parts]
    if "tool_calls" in message:
        calls = [dict(call["function"]) for call in message["tool_calls"]]
        written = [{**call, "arguments": json.dumps(call["arguments"])} for call in calls]
        found["tool_calls"] = [{"id": None, "type": "function", "function": call} for call in written]
    if "train" in message:
        found["weight"] = int(found.pop("train"))
    return found


WRITERS: dict[str, tuple[Callable[[list[Message]], dict[str, Any]], FormatOptions]] = {
    "messages": (lambda turns: {"messages": turns}, PLAIN),
    "openai": (lambda turns: {"messages": list(map(as_openai, turns))}, PLAIN),
    "json": (lambda turns: {"messages": json.dumps(turns)}, PLAIN),
    "sharegpt": (lambda turns: {"conversations": list(map(as_sharegpt, turns))}, PLAIN),
    "mapped": (
        lambda turns: {
            "dialogue": [
                {"by" if key == "role" else "said" if key == "content" else key: value for key, value in turn.items()}
                | {"by": {"user": "Ann", "assistant": "Bob"}.get(turn["role"], turn["role"])}
                for turn in turns
            ]
        },
        FormatOptions(
            field_messages="dialogue",
            message_property_mappings={"role": "by", "content": "said"},
            roles={"user": ["Ann"], "assistant": ["Bob"]},
        ),
    ),
}

TEXT = st.text(max_size=8)
CALL = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.text("abc", min_size=1),
    st.dictionaries(TEXT, st.none() | st.integers() | TEXT, max_size=2),
)
CALLS, BOT_ROLE = st.lists(CALL, min_size=1, max_size=2), st.just("assistant")
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool", "assistant"]), "content": TEXT}),
    st.fixed_dictionaries({"role": BOT_ROLE, "content": TEXT, "train": st.booleans()}),
    st.fixed_dictionaries(
        {
            "role": BOT_ROLE,
            "content": st.none() | TEXT,
            "tool_calls": st.lists(CALL, min_size=1, max_size=2),
        }
    ),
    st.fixed_dictionaries({"role": BOT_ROLE, "content": TEXT, "reasoning_content": TEXT}),
)
TOOLS = st.none() | st.lists(st.fixed_dictionaries({"name": TEXT}), min_size=1, max_size=2)


@pytest.mark.parametrize("writer", WRITERS)
@given(turns=st.lists(MESSAGE, min_size=1, max_size=4), tools=TOOLS, as_string=st.booleans())
def test_a_conversation_in_any_format_reads_back_as_itself(
    writer: str, turns: list[Message], tools: list[Message] | None, as_string: bool
) -> None:
    write, options = WRITERS[writer]
    row = {**write(turns), "tools": json.dumps(tools) if as_string else tools}
    assert one(row, options) == Conversation(tuple(turns), None if tools is None else tuple(tools))


@pytest.mark.parametrize("wrap", [lambda value: value, json.dumps], ids=["list", "json"])
def test_a_prompt_of_messages_is_not_learned(wrap: Callable[[Any], Any]) -> None:
    found = one({"prompt": wrap([SYSTEM, USER]), "completion": wrap([BOT])})
    assert found == Conversation(({**SYSTEM, "train": False}, {**USER, "train": False}, BOT))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "a", "completion": " b"}, Answered(" b", "a")),
        ({"prompt": "[1]", "completion": '[{"a": 1}]'}, Answered('[{"a": 1}]', "[1]")),
        ({"prompt": 1, "completion": True}, Answered("true", "1")),
        ({"text": "whole", "id": 3}, Answered("whole")),
    ],
)
def test_texts_stay_texts(row: dict[str, Any], found: Answered) -> None:
    assert one(row) == found


ALPACA = "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"


@pytest.mark.parametrize(
    ("more", "asked", "prompt"),
    [
        ({}, "Add.", "Below is an instruction that describes a task. " + ALPACA),
        ({"input": None}, "Add.", "Below is an instruction that describes a task. " + ALPACA),
        (
            {"input": "1, 2", "text": "the whole prompt"},
            "Add.\n1, 2",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            + ALPACA
            + "### Input:\n1, 2\n\n",
        ),
    ],
)
def test_alpacas_rows_are_its_own_prompt_or_the_users_turn(more: dict[str, Any], asked: str, prompt: str) -> None:
    turns = {"role": "user", "content": asked}, {"role": "assistant", "content": "3"}
    found = one({"instruction": "Add.", "output": "3", **more})
    assert found == Answered("3", prompt + "### Response:\n", Conversation(turns))


def test_a_system_column_is_the_first_turn_where_there_is_none() -> None:
    assert one({"messages": [USER, BOT], "system": "Be terse."}).messages == (SYSTEM, USER, BOT)
    assert one({"messages": [SYSTEM, USER, BOT], "system": "Other."}).messages == (SYSTEM, USER, BOT)
    assert one({"instruction": "Hi", "output": "Ho", "system": "S"}).prompt.startswith(
        "S\n\n### Instruction:\nHi\n\n###"
    )


@pytest.mark.parametrize("name", ["human", "gpt", "model", "function", "observation", "developer"])
def test_usual_names_of_roles_are_known(name: str) -> None:
    role = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "developer"}.get(name, "tool")
    assert one({"conversations": [{"from": name, "value": "x"}]}).messages == ({"role": role, "content": "x"},)


def test_the_format_is_said_with_the_number_of_rows(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        parse_rows([{"prompt": "a", "completion": "b"}] * 3, PLAIN, where="task.train x.jsonl")
    assert "task.train x.jsonl: 3 rows in the format prompt-completion (prompt, completion)" in caplog.text


def test_a_format_by_name_goes_before_what_rows_show() -> None:
    row = {"messages": [USER, BOT], "text": "whole", "prompt": "p", "completion": None}
    assert one(row) == Conversation((USER, BOT))
    assert one(row, FormatOptions("text")) == Answered("whole")
    assert one({**row, "conversations": [BOT]}, FormatOptions("sharegpt")) == Conversation((BOT,))


def test_text_or_messages_is_one_function() -> None:
    turns = [{"from": "human", "value": "Hi 🌍"}]
    assert text_or_messages("plain", PLAIN, where="x") == "plain"
    assert text_or_messages(turns, PLAIN, where="x") == text_or_messages(json.dumps(turns), PLAIN, where="x") == (USER,)


# Wrong input


def turn(**given: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **given}]}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [{"messages": [USER]}, {"text": "x"}],
            r"row 2: got the format text, wanted messages, as in row 1.*a file each",
        ),
        ([{"text": "x"}, {"text": None, "messages": [USER]}], "row 2: got the format messages, wanted text"),
        (
            [{"prompt": "p", "completion": "c"}, {"prompt": [USER], "completion": [BOT]}],
            "row 2: .*as messages.*text",
        ),
        ([{"prompt": "p", "completion": [BOT]}], "row 1: got one of prompt and completion as text"),
        ([{"text": "x"}, {"text": None}], "row 2: got null in text"),
        ([{"messages": None}], "row 1: got null in messages"),
        ([{"text": "x"}, {"body": "x"}], 'row 2: got the fields body, wanted the field "text" of text'),
        ([{"question": "q", "answer": "a"}], "fields question, answer, wanted those of a format: messages, or conv"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "kind: preference"),
        ([{"messages": []}], "row 1: got no messages"),
        ([{"messages": "Hi"}], r"row 1: got text, wanted a list of messages.*field_messages"),
        ([{"messages": ["Hi", "Ho"]}], "row 1, message 1: got text, wanted an object"),
        ([{"messages": '["Hi"]'}], "row 1, message 1: got text"),
        (
            [{"messages": [USER, {"role": "critic", "content": "x"}]}],
            r'message 2: got the role "critic".*human.*roles:',
        ),
        ([{"messages": [{"content": "x"}]}], r"message 1: got no role \(keys content\).*message_property_mappings"),
        ([turn()], r"row 1, message 2: got no content \(keys role\), wanted text under content or value"),
        ([turn(content=None, tool_calls=[])], "message 2: got no content"),
        ([turn(content=[{"type": "image_url"}])], "parts: image_url"),
        ([turn(content={"a": 1})], "message 2: got a dict"),
        ([turn(content="x", train="yes")], "message 2: got train: yes"),
        ([turn(tool_calls=[{"function": {"name": "f", "arguments": "{oops"}}])], "message 2: .*wanted a tool call"),
        ([turn(tool_calls="f(1)")], "message 2: .*wanted a tool call"),
        ([{"messages": [USER], "tools": "a calculator"}], "row 1, tools: got a calculator"),
        ([{"instruction": None, "output": "x"}], "row 1: got null in instruction"),
        ([{"instruction": "a", "output": "b", "history": [["q", "a"]]}], "history: got earlier turns"),
    ],
)
def test_wrong_rows_are_named_by_their_number(rows: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(DataError, match=told):
        parse_rows(rows, PLAIN, where="task.train x.jsonl")


@pytest.mark.parametrize(
    ("options", "told"),
    [({"format": "sharegtp"}, "sharegpt"), ({"message_property_mappings": {"rol": "by"}}, '"role"')],
)
def test_unknown_names_are_refused_with_the_nearest(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        FormatOptions(**options)


def test_a_field_that_rows_do_not_have_is_refused_with_those_there() -> None:
    with pytest.raises(DataError, match=r'got the fields messages, id, wanted the field "chat" of messages'):
        one({"messages": [USER], "id": 1}, FormatOptions(field_messages="chat"))


# Examples


@pytest.mark.parametrize("template", [None, "chatml"])
def test_alpacas_rows_are_turns_through_a_template_and_its_own_prompt_without(template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    rows = [{"instruction": "Add.", "input": "1, 2", "output": "3"}]
    found = read_examples(rows, PLAIN, ChatOptions(chat_template=template), where="task.train")
    [row] = found.token_rows(tokenizer)
    text = tokenizer.decode(row.ids)
    learned = tokenizer.decode([token for token, own in zip(row.ids, row.learned, strict=True) if own])
    assert ("### Instruction:\nAdd." in text, "Add.\n1, 2" in text) == ((template is None), (template is not None))
    assert learned.replace(" ", "") == "3</s>"


@pytest.mark.parametrize(
    ("row", "end", "learned"),
    [
        ({"text": "Once upon"}, True, "Once upon</s>"),
        ({"text": "Once upon"}, False, "Once upon"),
        ({"prompt": "Once", "completion": " upon"}, True, "upon</s>"),
    ],
)
def test_texts_are_read_without_a_template(row: dict[str, str], end: bool, learned: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = "{{ raise_exception('asked') }}"
    [found] = read_examples([row], PLAIN, ChatOptions(), where="x", end=end).token_rows(tokenizer)
    ids = [token for token, own in zip(found.ids, found.learned, strict=True) if own]
    assert tokenizer.decode(ids).removeprefix("<s>").strip() == learned


@pytest.mark.parametrize(
    "row", [{"prompt": "a", "completion": " "}, turn(content=""), {"instruction": "a", "output": ""}], ids=str
)
def test_rows_that_all_have_nothing_to_learn_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="2 rows, all with empty completions"):
        read_examples([row, row], PLAIN, ChatOptions(), where="task.train")

"""The formats of training data that people have, told by their fields, to conversations, prompts and texts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

from keeptune.core.errors import DataError, named, need_known
from keeptune.data.chat_template import ChatOptions
from keeptune.data.completions import TaskExamples, check_answers, conversation_examples
from keeptune.data.examples import Conversation, LanguageExamples, Truncate
from keeptune.data.sources import Row, text_of

_log = logging.getLogger(__name__)

Messages = tuple[Mapping[str, Any], ...]

_OTHER_NAMES = {"openai": "messages", "chat_template": "messages", "sharegpt": "conversations"}
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("gpt", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "ipython"), "tool"),
    "human": "user",
}
_CALL = "function_call"  # ShareGPT's role of a turn that calls a function, and OpenAI's older property
# What a message may hold besides role and content; `weight: 0` is OpenAI's `train: false`.
_PROPERTIES = ("tool_calls", _CALL, "name", "tool_call_id", "reasoning_content", "thinking", "train", "weight")
_KEYS = {"role": ("role", "from"), "content": ("content", "value")}  # OpenAI's or ShareGPT's
# Alpaca's own prompt.
_PREAMBLE = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request"
_PAIRED = ", paired with an input that provides further context"

_SAY_MESSAGES = 'Write [{"role": "user", "content": "..."}, ...], or name the field by `field_messages`.'
_SAY_FIELD = "Name the field of messages by `field_messages`, or write the templates `prompt` and `completion`."


@dataclass(frozen=True)
class FormatOptions:
    """How rows are read; the names in it are those of Axolotl's ``chat_template`` datasets.

    Args:
        format: A name in ``FORMATS``; None tells it by the rows.
        field_messages: The field that holds the messages, where it has another name.
        message_property_mappings: From a property of a message, such as ``role``, to the key that holds it.
        roles: From a role to names that data have for it, beside those that are known.
    """

    format: str | None = None
    field_messages: str | None = None
    message_property_mappings: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mapped = "message_property_mappings"
        given = {"format": [self.format] if self.format else [], mapped: self.message_property_mappings}
        for key, known in (("format", (*FORMATS, *_OTHER_NAMES)), (mapped, (*_KEYS, *_PROPERTIES))):
            for name in given[key]:
                need_known(name, known, key, "a name that is known")

    @cached_property
    def role_of(self) -> dict[str, str]:
        """From the names of roles in data to the roles; each role is a name of itself."""
        return _ROLES | {name: role for role, names in self.roles.items() for name in (role, *names)}

    def keys(self, name: str) -> tuple[str, ...]:
        """Returns the keys that may hold a property of a message."""
        own = self.message_property_mappings.get(name)
        return _KEYS.get(name, (name,)) if own is None else (own,)

    def held(self, message: Mapping[str, Any], name: str) -> Any:
        """Returns a property of a message; None where it has none."""
        return next((message[key] for key in self.keys(name) if message.get(key) is not None), None)


class Answered(NamedTuple):
    """A text, or a prompt with its completion.

    Args:
        completion: What is learned.
        prompt: What is read only; None for a whole text.
        chat: What a model with a chat template reads instead.
    """

    completion: str
    prompt: str | None = None
    chat: Conversation | None = None


def parse_rows(rows: Sequence[Row], options: FormatOptions, *, where: str) -> list[Conversation] | list[Answered]:
    """Returns what the rows hold by the one format that they all have: conversations, or texts.

    Raises:
        DataError: The rows have no known format, or two; or a row does not hold what its format says.
    """
    name = _OTHER_NAMES.get(options.format or "", options.format)
    fields: tuple[str, ...] = (options.field_messages or "",)
    told = name is None and options.field_messages is None
    if options.field_messages is None or name not in (None, "messages", "conversations"):
        name = name or _format_of(rows[0])
        fields = FORMATS[name][0] if name else ()
    found: list[Any] = []
    for number, row in enumerate(rows, start=1):
        place = f"{where} row {number}"
        if not fields or any(row.get(one) is None for one in fields):
            _refuse(row, name or "messages", fields, place, told)
        found.append(FORMATS[name or "messages"][1](row, fields, options, place))
        if isinstance(found[-1], Conversation) != isinstance(found[0], Conversation):
            kinds = ("text", "messages")[:: 1 if isinstance(found[0], Conversation) else -1]
            raise _two_formats(place, f"{name} as {kinds[0]}", f"{name} as {kinds[1]}")
    _log.info("%s: %d rows in the format %s (%s)", where, len(rows), name or "messages", ", ".join(fields))
    return found


def read_examples(
    rows: Sequence[Row],
    options: FormatOptions,
    chat: ChatOptions,
    *,
    where: str,
    truncate: Truncate = "right",
    end: bool = True,
) -> LanguageExamples:
    """Returns the examples that rows hold by their format (:func:`parse_rows`).

    ``end`` says whether the end of text is learned after texts and completions.

    Raises:
        DataError: The rows are of no format, or of two; one is malformed; or there is nothing to learn in all of them.
    """
    found = parse_rows(rows, options, where=where)
    chats = [one if isinstance(one, Conversation) else one.chat for one in found]
    talks = [one for one in chats if one is not None]
    texts = [one for one in found if isinstance(one, Answered)]
    said = [one.completion for one in texts]
    for one in talks if not texts else ():
        own = [message for message in one.messages if message["role"] in chat.roles_to_train]
        said.append("".join(str(message["content"] or message.get("tool_calls") or "") for message in own))
    check_answers(said, where=where)
    plain = None
    if texts:
        prompts = None if texts[0].prompt is None else tuple(str(one.prompt) for one in texts)
        plain = TaskExamples(prompts, tuple(said), end, where=where, truncate=truncate)
    if plain is not None and not talks:
        return plain
    return replace(conversation_examples(talks, chat, where=where, truncate=truncate), plain=plain)


def text_or_messages(value: Any, options: FormatOptions, *, where: str) -> str | Messages:
    """Returns a field that holds either text or messages, which may be JSON in a string; else raises DataError."""
    listed = _from_json(value)
    if isinstance(value, str):
        speak = isinstance(listed, list) and all(
            isinstance(one, Mapping) and options.held(one, "role") for one in listed
        )
        return messages_of(listed, options, where=where) if speak and listed else value
    return messages_of(value, options, where=where) if isinstance(value, list) else text_of(value, where=where)


def messages_of(value: Any, options: FormatOptions, *, where: str) -> Messages:
    """Returns messages as chat templates know them: roles by their names, parts as one text, arguments as objects.

    Raises:
        DataError: There are no messages, one is malformed, or its role is unknown.
    """
    value = _from_json(value)
    if not isinstance(value, list) or not value:
        got = "no messages" if value == [] else _kind(value)
        raise DataError(where, got=got, wanted="a list of messages", next_step=_SAY_MESSAGES)
    return tuple(_message(_from_json(one), options, f"{where}, message {n}") for n, one in enumerate(value, start=1))


def _message(value: Any, options: FormatOptions, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(where, got=_kind(value), wanted="an object with role and content", next_step=_SAY_MESSAGES)
    held = {name: options.held(value, name) for name in (*_KEYS, *_PROPERTIES)}
    role, content, call, weight = (held.pop(name) for name in ("role", "content", _CALL, "weight"))
    if role == _CALL:
        role, content, call = "assistant", None, content
    if not isinstance(role, str) or role not in options.role_of:
        got, next_step = f'the role "{role}"', f'Say what it is by `roles`, as in roles: {{assistant: ["{role}"]}}.'
        if role is None:
            got = f"no role (keys {named(list(map(str, value)))})"
            next_step = "Name its key by `message_property_mappings`, as in {role: speaker, content: text}."
        wanted = f"under {' or '.join(options.keys('role'))} one of {', '.join((*options.role_of, _CALL))}"
        raise DataError(where, got=got, wanted=wanted, next_step=next_step)
    calls = _calls(held.pop("tool_calls") if call is None else call, where)
    train = weight if held["train"] is None else held["train"]
    if train not in (None, 0, 1):
        raise DataError(where, got=f"train: {train}", wanted="true or false (weight: 0 or 1)", next_step="Correct it.")
    if content is None and not calls:
        raise DataError(
            where,
            got=f"no content (keys {named(list(map(str, value)))})",
            wanted=f"text under {' or '.join(options.keys('content'))}, or tool calls",
            next_step='Fill it, write "" for an empty text, or name the key by `message_property_mappings`.',
        )
    text = None if content is None else _text(content, where)
    rest = {**held, "tool_calls": calls, "train": None if train is None else bool(train)}
    return {"role": options.role_of[role], "content": text} | {k: v for k, v in rest.items() if v is not None}


def _text(content: Any, where: str) -> str:
    """Returns content as one text: of a list of parts, the texts joined."""
    if not isinstance(content, list):
        return text_of(content, where=where)
    kinds = {str(part.get("type", "text")) if isinstance(part, Mapping) else _kind(part) for part in content}
    if kinds - {"text"}:
        next_step = "Remove the others: only text is read."
        raise DataError(where, got=f"parts: {named(sorted(kinds))}", wanted="parts of text", next_step=next_step)
    return "".join(text_of(part if isinstance(part, str) else part.get("text"), where=where) for part in content)


def _calls(value: Any, where: str) -> list[Mapping[str, Any]] | None:
    """Returns the calls of a message as OpenAI writes them, with arguments as objects."""
    value = _from_json(value) or ()
    found: list[Mapping[str, Any]] = []
    for call in value if isinstance(value, list | tuple) else (value,):
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = _from_json(function.get("arguments") or {}) if isinstance(function, Mapping) else None
        if not isinstance(arguments, Mapping) or "name" not in function:
            wanted = 'a tool call, {"name": ..., "arguments": {...}}, or it under "function"'
            next_step = "Correct it; arguments are an object, or its JSON in a string."
            raise DataError(where, got=str(call), wanted=wanted, next_step=next_step)
        outer = {key: one for key, one in call.items() if "function" in call and one is not None}
        found.append({"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}})
    return found or None


def _from_json(value: Any) -> Any:
    """Returns the list, object or null that a string holds as JSON; all else as it is."""
    if isinstance(value, str) and (value.lstrip()[:1] in ("[", "{") or value == "null"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "null" if value is None else f"a {type(value).__name__}"


# A reader for each format: from a row, the fields of the format, the options and the row's place


def _read_chat(row: Row, fields: Sequence[str], options: FormatOptions, where: str) -> Conversation:
    return _conversation(row, messages_of(row[fields[0]], options, where=where), where)


def _read_answered(row: Row, fields: Sequence[str], options: FormatOptions, where: str) -> Conversation | Answered:
    prompt, completion = (text_or_messages(row[name], options, where=f"{where}, {name}") for name in fields)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Answered(completion, prompt)
    if isinstance(prompt, str) or isinstance(completion, str):
        got = "one of prompt and completion as text, one as messages"
        raise DataError(where, got=got, wanted="both in one way", next_step="Write both as messages, or both as text.")
    return _conversation(row, (*({**message, "train": False} for message in prompt), *completion), where)


def _read_alpaca(row: Row, fields: Sequence[str], options: FormatOptions, where: str) -> Answered:
    if row.get("history"):
        next_step = "Write such rows as `messages`."
        raise DataError(f"{where}, history", got="earlier turns", wanted="none", next_step=next_step)
    given = {name: row[name] for name in fields} | {name: row.get(name) or "" for name in ("input", "system")}
    asked, output, context, system = (text_of(value, where=f"{where}, {name}") for name, value in given.items())
    turns = ({"role": "user", "content": f"{asked}\n{context}" if context else asked},)
    prompt = system or f"{_PREAMBLE.format(_PAIRED if context else '')}."
    prompt += (
        f"\n\n### Instruction:\n{asked}\n\n" + (f"### Input:\n{context}\n\n" if context else "") + "### Response:\n"
    )
    return Answered(output, prompt, _conversation(row, (*turns, {"role": "assistant", "content": output}), where))


def _conversation(row: Row, messages: Messages, where: str) -> Conversation:
    """Returns messages with the row's tools, after its `system` where they do not begin with such a turn."""
    if row.get("system") and messages[0]["role"] not in ("system", "developer"):
        system = text_of(row["system"], where=f"{where}, system")
        messages = ({"role": "system", "content": system}, *messages)
    tools = _from_json(row.get("tools")) or []
    tools = [_from_json(one) for one in tools] if isinstance(tools, list) else [tools]
    if not all(isinstance(one, Mapping) for one in tools):
        wanted = "a list of JSON schemas, or its JSON in a string"
        raise DataError(f"{where}, tools", got=str(row["tools"]), wanted=wanted, next_step="Correct or remove it.")
    return Conversation(messages, tuple(tools) or None)


# Of each format the fields that tell it, the first that a row has, and its reader. Alpaca's own file has a `text` too.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[..., Conversation | Answered]]] = {
    "messages": (("messages",), _read_chat),
    "conversations": (("conversations",), _read_chat),
    "prompt-completion": (("prompt", "completion"), _read_answered),
    "alpaca": (("instruction", "output"), _read_alpaca),
    "text": (("text",), lambda row, _, __, where: Answered(text_of(row["text"], where=f"{where}, text"))),
}


def _format_of(row: Row) -> str | None:
    """Returns the first format whose fields a row has; with nulls in them only where no format has all of its own."""
    for there in ({name for name, value in row.items() if value is not None}, set(row)):
        for name, (fields, _) in FORMATS.items():
            if there.issuperset(fields):
                return name
    return None


def _refuse(row: Row, name: str, fields: Sequence[str], where: str, told: bool) -> NoReturn:
    """Refuses a row that does not have the fields of a format, which row 1 may have ``told``."""
    other, columns = _format_of(row), f"the fields {named(list(map(str, row)), 20)}"
    if not fields:
        wanted = "those of a format: " + ", or ".join(" and ".join(fields) for fields, _ in FORMATS.values())
        next_step = "Set task.kind: preference." if {"chosen", "rejected"}.issubset(row) else _SAY_FIELD
        raise DataError(where, got=columns, wanted=wanted, next_step=next_step)
    missing = next(one for one in fields if row.get(one) is None)
    if told and other is not None and other != name:
        raise _two_formats(where, other, name)
    if missing in row:
        raise DataError(where, got=f"null in {missing}", wanted="a value", next_step="Fill it, or remove the row.")
    raise DataError(where, got=columns, wanted=f'the field "{missing}" of {name}', next_step=_SAY_FIELD)


def _two_formats(where: str, other: str, name: str) -> DataError:
    next_step = "Put them into a file each; `train` takes a list of files."
    return DataError(where, got=f"the format {other}", wanted=f"{name}, as in row 1", next_step=next_step)

"""Conversations through a chat template: tokens, and which of them are learned, proved turn by turn.

An answer is learned where training shows it as a server asks for it. With T the template, M the messages, | | the
tokens of a text, and W = |T(M)| what is trained on, message i is learned if

(1) |T(M[:i], add_generation_prompt)|, what the model is asked, is how W begins, down to the token on the boundary;
(2) |T(M[:i+1])|, what the model then writes, is how W begins, up to the token that ends the turn.

Learned are the tokens from the end of (1) to the end of (2); of these only what the template marks by
``{% generation %}``, if it does. A message that breaks (1) or (2) is not learned, and said; nothing is guessed.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import DataError, need_known
from keeptune.data.examples import Conversation, TokenRow
from keeptune.data.template_limits import REFUSALS, refuse_endless

Messages = Sequence[Mapping[str, Any]]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Templates that print today's date are read as on this day, Llama 3.1's own: no example depends on the day of a run.
DAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = ({"role": "user", "content": "probe"}, {"role": "assistant", "content": "answer"})


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What is learned of a conversation, and through which template.

    Args:
        roles_to_train: Messages of these roles are learned.
        turns: ``all`` of these messages, or the ``last`` one of each conversation; ``each``: a conversation becomes an
            example for each of them, which ends with it, just as a server would ask for it.
        train_on_eos: The token that ends a turn is learned in every learned ``turn``, in ``all`` turns, in the
            ``last`` one of a conversation, or in ``none``.
        chat_template: A Jinja file, the name of one of TRL's templates, ``chatml``, or None: the tokenizer's own.
        chat_template_kwargs: Variables of the template, such as ``enable_thinking``.
    """

    roles_to_train: tuple[str, ...] = ("assistant",)
    turns: Literal["all", "last", "each"] = "all"
    train_on_eos: Literal["turn", "all", "last", "none"] = "turn"
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def wanted(self, messages: Messages) -> list[int]:
        """Returns which messages are to be learned."""
        own = [n for n, m in enumerate(messages) if m["role"] in self.roles_to_train and m.get("train") is not False]
        return own[-1:] if self.turns == "last" else own


class _NotProvedError(Exception):
    """A message is not shown as the model is asked for it."""


def template_text(name: str, *, where: str) -> str:
    """Returns the text of a template that is named, or is a Jinja file.

    Raises:
        DataError: There is no such file or name, or the file holds no text.
    """
    import trl

    if name == "chatml":
        return CHATML
    shipped = Path(trl.__file__).parent / "chat_templates"
    path = Path(name) if name.endswith((".jinja", ".j2")) else shipped / f"{name}.jinja"
    if not path.is_file():
        known = ["chatml", *(file.stem for file in shipped.glob("*.jinja"))]
        need_known(name, known, where, "a file.jinja, or the name of a template", DataError)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            where, got=f"{name}: {error}", wanted="a Jinja file in UTF-8", next_step="Correct it."
        ) from error
    if not text.strip():
        raise DataError(where, got=f"{name}, which is empty", wanted="a chat template", next_step="Fill the file.")
    return text


def with_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, *, where: str = "task.chat_template"
) -> PreTrainedTokenizerBase:
    """Returns a tokenizer with a template (None: its own); ``chatml`` ends turns as it ends texts if it must."""
    if name is None:
        return tokenizer
    text, other = template_text(name, where=where), copy.copy(tokenizer)
    if text == CHATML and "<|im_end|>" not in tokenizer.get_vocab():
        text = CHATML.replace("<|im_end|>", str(tokenizer.eos_token))
    other.chat_template = text
    return other


def on_one_day(template: str) -> str:
    """Returns a template with :data:`DAY` in the place of today's date."""
    return _TODAY.sub(lambda call: repr(DAY.strftime(call[2])), template)


class ChatTemplate:
    """A chat template with its tokenizer, as a server applies them.

    Laws: (1) and (2) of the module; nothing depends on the day.

    Raises:
        DataError: There is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: ChatOptions, *, where: str) -> None:
        tokenizer = with_template(tokenizer, options.chat_template, where=where)
        self.tokenizer, self.options = tokenizer, options
        if not tokenizer.chat_template:
            new = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_vocab()]
            told = f" ({' and '.join(new)} would be new to the vocabulary)" if new else ""
            raise DataError(
                where,
                got="conversations, and a tokenizer without a chat template",
                wanted="a chat template",
                next_step=f"Set chat_template: chatml{told}, or chat_template: file.jinja.",
            )
        refuse_endless(tokenizer, where)
        self._templates = {tools: str(tokenizer.get_chat_template(None, tools=[{}] * tools)) for tools in (0, 1)}
        self.added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        self._parts = False
        try:
            self._parts = "probe" not in self.text(_PROBE[:1])
        except REFUSALS:
            self._parts = True
        self.end = self._end_of_turn()

    def apply(self, messages: Messages, tools: Any, **how: Any) -> Any:
        """Returns what the tokenizer's ``apply_chat_template`` does, for messages as the template reads them."""

        def applied(as_text: bool) -> Any:
            return self.tokenizer.apply_chat_template(
                [_plain_message(message, as_text, self._parts) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=on_one_day(self.template(tools)),
                **how,
                **self.options.chat_template_kwargs,
            )

        try:
            return applied(as_text=False)
        except TypeError:  # DeepSeek-V3's template takes the arguments of calls as text only.
            return applied(as_text=True)

    def template(self, tools: Any) -> str:
        """Returns the template of conversations with these tools."""
        return self._templates[bool(tools)]

    def text(self, messages: Messages, tools: Any = None, *, ask: bool = False) -> str:
        """Returns the rendering of messages; ``ask``: with the header of the answer that is asked for."""
        return str(self.apply(messages, tools, add_generation_prompt=ask, tokenize=False))

    def asked(self, messages: Messages, tools: Any = None, *, where: str) -> str:
        """Returns what the model reads before its answer; DataError where the template refuses the messages."""
        with _explained(messages, where):
            return self.text(messages, tools, ask=True)

    def tokens(self, *texts: str) -> list[list[int]]:
        """Returns the tokens of renderings, which write their beginning token themselves."""
        return list(self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])

    def _end_of_turn(self) -> int | None:
        """Returns the token that ends an answer whatever follows, or that begins what follows where none is shown."""
        try:
            texts = [self.text(turns) for turns in (_PROBE, (*_PROBE, _PROBE[0]))]
        except REFUSALS:
            return None
        last, inner = self.tokens(*(text.rpartition("answer")[2] for text in texts))
        same = [a for a, b in zip(last, inner, strict=False) if a == b] if self.added.intersection(last) else inner[:1]
        return next((token for token in same if token in self.added), None)

    def row(self, conversation: Conversation, *, where: str) -> TokenRow:
        """Returns a conversation as tokens, up to the end of the last message that is to be learned.

        Raises:
            DataError: The template refuses the messages, or does not show one of them.
        """
        tools, wanted = conversation.tools, self.options.wanted(conversation.messages)
        # What follows the last learned message teaches nothing, and may change how a template shows earlier ones.
        shown = conversation.messages[: wanted[-1] + 1] if wanted else conversation.messages
        with _explained(shown, where):
            return _Rendering(self, shown, tools, wanted).row()

    def notes(self) -> list[str]:
        """Returns what a user should know of the template."""
        name = self.tokenizer.convert_ids_to_tokens
        notes = []
        if self.end is None:
            notes.append("no one token ends the template's turns: a model may not stop where its answer ends")
        elif self.end != self.tokenizer.eos_token_id:
            notes.append(f"turns end with {name(self.end)}, the tokenizer's texts with {self.tokenizer.eos_token}")
        if _TODAY.search(self.template(None)):
            notes.append(f"the template prints today's date; all is read as on {DAY:%Y-%m-%d}")
        return notes


def turn_ends(tokenizer: PreTrainedTokenizerBase | None) -> set[int | None]:
    """Returns the token that ends the turns of a tokenizer's chat template, if one does and there is a template."""
    if tokenizer is None or not tokenizer.chat_template:
        return set()
    return {ChatTemplate(tokenizer, ChatOptions(), where="chat template").end}


@contextmanager
def _explained(messages: Messages, where: str) -> Iterator[None]:
    try:
        yield
    except REFUSALS as error:
        raise DataError(
            where,
            got=f"messages by {', '.join(str(m['role']) for m in messages)}; the chat template: {error}",
            wanted="messages that the chat template shows",
            next_step="Change these messages, or set chat_template to one that shows them.",
        ) from error


class _Rendering:
    """A conversation as one template shows it, with what the model is asked and then writes for ``wanted`` messages."""

    def __init__(self, chat: ChatTemplate, messages: Messages, tools: Any, wanted: Sequence[int]) -> None:
        self.chat, self.messages, self.tools = chat, messages, tools
        self.text = chat.text(messages, tools)
        answers = [i for i in wanted if i and messages[i]["role"] == "assistant"]
        self.asked = {i: chat.text(messages[:i], tools, ask=True) for i in answers}
        self.written = {i: chat.text(messages[: i + 1], tools) for i in wanted}
        texts = list(dict.fromkeys([self.text, *self.asked.values(), *self.written.values()]))
        self.tokens = dict(zip(texts, chat.tokens(*texts), strict=True))
        for number, message in enumerate(messages, start=1):
            if missing := _missing(message, self.text):
                raise ValueError(f"it does not show {missing!r} of message {number} ({message['role']})")
        if missing := _missing({"tool_calls": tools}, self.text):
            raise ValueError(f"it does not show the tool {missing!r}")
        if self.tokens[self.text][:2] == [chat.tokenizer.bos_token_id] * 2:
            raise ValueError(f"it begins with {chat.tokenizer.bos_token} twice")

    def row(self) -> TokenRow:
        """Returns the tokens, with the ``wanted`` messages learned."""
        marks = None
        if _MARKS.search(self.chat.template(self.tools)) and self.chat.options.roles_to_train == ("assistant",):
            marks = self.chat.apply(self.messages, self.tools, return_assistant_tokens_mask=True)
        else:
            self._cut_last_answer()
        ids, when = self.tokens[self.text], self.chat.options.train_on_eos
        learned, ends, lost = [False] * len(ids), list[int](), list[str]()
        for i, text in self.written.items():
            try:
                start, stop = self._answer(i) if self.messages[i]["role"] == "assistant" else self._content(i)
                full = self.tokens[text]
                if ids[:stop] != full[:stop]:
                    raise _NotProvedError("the template shows it otherwise once other messages follow")
            except _NotProvedError as why:
                lost.append(str(why))
                continue
            learned[start:stop] = map(bool, marks["assistant_masks"][start:stop]) if marks else [True] * (stop - start)
            if stop == len(ids) and self.chat.end is not None:  # GLM's template shows it where more follows
                ids, learned = [*ids, self.chat.end], [*learned, False]
            if (
                stop < len(ids)
                and ids[stop] in self.chat.added
                and ids[stop] in (self.chat.end, *full[stop : stop + 1])
            ):
                ends.append(stop)
        every = [n for n, token in enumerate(ids) if when == "all" and token == self.chat.end]
        for end in {"turn": ends, "all": [*ends, *every], "last": ends[-1:], "none": []}[when]:
            learned[end] = True
        return TokenRow(tuple(ids), tuple(learned), tuple(lost))

    def _cut_last_answer(self) -> None:
        """Cuts the tokens of the whole where the last answer begins, if one would span it and what is asked."""
        prompt, whole = self.asked.get(len(self.messages) - 1, self.text), self.tokens[self.text]
        asked = self.tokens[prompt]
        if self.text.startswith(prompt) and whole[: len(asked)] != asked:
            rest = self.text[len(prompt) :]
            line, after, alone = self.chat.tokens("\n", "\n" + rest, rest)
            # After a line, as SentencePiece puts a space at the beginning of a text.
            apart = asked + (after[len(line) :] if after[: len(line)] == line else alone)
            if self.chat.tokenizer.decode(apart) == self.chat.tokenizer.decode(whole):
                self.tokens[self.text] = apart

    def _answer(self, i: int) -> tuple[int, int]:
        """Returns where an answer begins, which is where (1) ends, and the place of the token that ends it."""
        if i not in self.asked:
            raise _NotProvedError("nothing is asked before it")
        prompt, text = self.asked[i], self.written[i]
        full, start = self.tokens[text], len(self.tokens[prompt])
        if not text.startswith(prompt):
            same = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), 0)
            raise _NotProvedError(f"it is asked for by {prompt[same:][:60]!r}, and shown as {text[same:][:60]!r}")
        if full[:start] != self.tokens[prompt]:
            raise _NotProvedError(f"a token spans its beginning and the end of what is asked, {prompt[-20:]!r}")
        if missing := _missing(self.messages[i], text[len(prompt) :], thought=True):
            raise _NotProvedError(f"the template does not show {missing!r}")
        after, decode = len(full), self.chat.tokenizer.decode
        while after > start and (full[after - 1] in self.chat.added or not decode([full[after - 1]]).strip()):
            after -= 1
        if self.chat.end in full[after:]:
            return start, full.index(self.chat.end, after)
        return start, max((n for n in range(after, len(full)) if full[n] in self.chat.added), default=len(full))

    def _content(self, i: int) -> tuple[int, int]:
        """Returns where the content of another message is: the text that changes with it, and nothing else does."""
        text, content = self.written[i], (self.messages[i].get("content") or "").strip()
        probe = [*self.messages[:i], {**self.messages[i], "content": "probe"}]
        other = self.chat.text(probe, self.tools).rpartition("probe")
        head, _, tail = text.rpartition(content) if content else ("", "", "")
        if (head, "probe", tail) != other:
            raise _NotProvedError("the template does not show its content in one place")
        last = len(text) - len(tail)
        offsets = self.chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        inside = [n for n, (a, b) in enumerate(offsets) if max(a, len(head)) < min(b, last)]
        over = text[offsets[inside[0]][0] : len(head)] + text[last : offsets[inside[-1]][1]]
        if over.strip():
            raise _NotProvedError(f"a token spans its content and {over!r}")
        return inside[0], inside[-1] + 1


def _plain_message(message: Mapping[str, Any], as_text: bool, parts: bool) -> dict[str, Any]:
    """Returns a message as templates read it: text for null beside calls, whose arguments are objects, or text."""
    plain = {key: value for key, value in message.items() if value is not None and key != "train"}
    content = plain.get("content", "")
    plain["content"] = [{"type": "text", "text": content}] if parts else content
    if as_text and "tool_calls" in plain:
        functions = [call["function"] for call in plain["tool_calls"]]
        texts = [{**one, "arguments": json.dumps(one["arguments"], ensure_ascii=False)} for one in functions]
        plain["tool_calls"] = [{"type": "function", "function": one} for one in texts]
    return plain


def _missing(message: Mapping[str, Any], text: str, *, thought: bool = False) -> str:
    """Returns what a text does not show of a message, or nothing; of thoughts only if asked for."""
    before, _, after = (message.get("content") or "").rpartition("</think>")
    wanted = [after, *(one.get("function", one)["name"] for one in message.get("tool_calls") or ())]
    if thought:
        wanted += [before.rpartition("<think>")[2], message.get("reasoning_content") or ""]
    shown = (text, text.replace("\\n", "\n").replace('\\"', '"'))  # Llama 3.1 writes results of tools as JSON
    return next((part[:60] for part in map(str.strip, wanted) if not any(part in one for one in shown)), "")

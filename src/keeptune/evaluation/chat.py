"""What benchmarks need of a chat template: whether there is one, what ends a turn, and what ends a thought."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import DataError, RecipeError
from keeptune.data.conversation import Conversation

_TURNS = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
_THOUGHT = "</think>"  # as Qwen, DeepSeek and SmolLM write it


def need_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises RecipeError for a tokenizer without a chat template that can write a question and its answer."""
    if not tokenizer.chat_template:
        raise RecipeError(
            f"{where}.chat",
            got="true, with a tokenizer that has no chat template",
            wanted="a chat model",
            next_step="Leave `chat` out, or take a tokenizer with a template.",
        )
    try:
        tokenizer.apply_chat_template(_TURNS, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{where}.chat",
            got=f"a chat template that refuses a user's turn and its answer: {error}",
            wanted="a template that writes them",
            next_step="Set `chat: false`.",
        ) from error


def template_options(tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None) -> dict[str, bool]:
    """Returns what a template is given besides turns: whether to think, no if not asked, where it has the switch."""
    asked = enable_thinking is not None or "enable_thinking" in str(tokenizer.chat_template)
    return {"enable_thinking": bool(enable_thinking)} if asked else {}


def end_of_thought(tokenizer: PreTrainedTokenizerBase, given: str | None, *, where: str) -> str:
    """Returns the text after which the answer stands.

    Raises:
        RecipeError: It is not given, and the template does not hold the usual one.
    """
    if given is None and _THOUGHT not in str(tokenizer.chat_template):
        raise RecipeError(
            f"{where}.think_end_token",
            got=f"nothing, with a template that does not write {_THOUGHT}",
            wanted="the text that ends a thought",
            next_step=f"Add `think_end_token: {_THOUGHT}` or what this model writes.",
        )
    return given or _THOUGHT


def asked_text(
    tokenizer: PreTrainedTokenizerBase, chat: Conversation, thinking: bool | None, *, answer: str = "", where: str
) -> tuple[str, str]:
    """Returns what a model reads before its answer, and an answer as the template ends it, empty without one.

    Raises:
        DataError: The template refuses the messages, or shows them otherwise once they are answered.
    """
    options: dict[str, Any] = {"tokenize": False, "tools": [dict(tool) for tool in chat.tools or ()] or None}
    options |= template_options(tokenizer, thinking)
    messages = [dict(message) for message in chat.messages]
    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options))
        turn = {"role": "assistant", "content": answer}
        whole = str(tokenizer.apply_chat_template([*messages, turn], **options)) if answer else text
    except (TemplateError, TypeError, ValueError) as error:
        whole, text = "", str(error)
    if not whole.startswith(text):
        raise DataError(
            where,
            got=f"messages by {', '.join(str(m['role']) for m in chat.messages)}; the chat template: {text[-200:]!r}",
            wanted="messages that the template shows, answered or not",
            next_step="Change these messages, or leave the row out.",
        )
    return text, whole[len(text) :]


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the special token that the template puts after an answer; none where it puts no such token."""
    rest = str(tokenizer.apply_chat_template(_TURNS, tokenize=False)).rpartition(_TURNS[1]["content"])[2]
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    return frozenset(next(([token] for token in ids if token in special), []))

"""The chat template that benchmarks are asked through, by the rules of training, and what ends a thought."""

from __future__ import annotations

import copy

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.data.chat_template import ChatOptions, ChatTemplate, on_one_day

_THOUGHT = "</think>"  # as Qwen, DeepSeek and SmolLM write it
TURNS = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


def asking(tokenizer: PreTrainedTokenizerBase, thinking: bool | None, *, where: str) -> ChatTemplate:
    """Returns the tokenizer's chat template, with thoughts only if they are asked for.

    Its tokenizer writes no date of today.

    Raises:
        DataError: There is none, or it refuses a question.
    """
    asked = thinking is not None or "enable_thinking" in str(tokenizer.chat_template)
    options = ChatOptions(turns="last", chat_template_kwargs={"enable_thinking": bool(thinking)} if asked else {})
    chat = ChatTemplate(tokenizer, options, where=f"{where}.chat")
    chat.asked(TURNS[:1], where=f"{where}.chat")
    chat.tokenizer = copy.copy(chat.tokenizer)
    chat.tokenizer.chat_template = on_one_day(chat.template(None))
    return chat


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


def ends_of_turns(chat: ChatTemplate | None) -> frozenset[int]:
    """Returns the token that ends a chat's turns; none where there is no one such token."""
    return frozenset() if chat is None or chat.end is None else frozenset({chat.end})

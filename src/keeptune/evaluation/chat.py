"""The chat template that benchmarks are asked through, by the rules of training, and what ends a thought."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.data.chat_template import ChatOptions, ChatTemplate, on_one_day

if TYPE_CHECKING:
    from keeptune.evaluation.benchmarks import FileBenchmark
    from keeptune.evaluation.standard.entry import NamedBenchmark

_THOUGHT = "</think>"  # as Qwen, DeepSeek and SmolLM write it
TURNS = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


def asking(benchmark: FileBenchmark | NamedBenchmark, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Returns the tokenizer's chat template, with thoughts only if they are asked for.

    Its tokenizer writes no date of today.

    Raises:
        DataError: There is none, or it refuses a question.
    """
    thinking, where = benchmark.enable_thinking, f"{benchmark.where}.chat"
    asked = thinking is not None or "enable_thinking" in str(tokenizer.chat_template)
    options = ChatOptions(turns="last", chat_template_kwargs={"enable_thinking": bool(thinking)} if asked else {})
    chat = ChatTemplate(tokenizer, options, where=where)
    chat.asked(TURNS[:1], where=where)
    chat.tokenizer = copy.copy(chat.tokenizer)
    chat.tokenizer.chat_template = on_one_day(chat.template(None))
    return chat


def end_of_thought(benchmark: FileBenchmark | NamedBenchmark, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the text after which the answer stands; None where none is named and the model does not think.

    Raises:
        RecipeError: The model thinks, none is named, and the template does not hold the usual one.
    """
    if benchmark.think_end_token is not None or not benchmark.enable_thinking:
        return benchmark.think_end_token
    if _THOUGHT not in str(tokenizer.chat_template):
        raise RecipeError(
            f"{benchmark.where}.think_end_token",
            got=f"nothing, with a template that does not write {_THOUGHT}",
            wanted="the text that ends a thought",
            next_step=f"Add `think_end_token: {_THOUGHT}` or what this model writes.",
        )
    return _THOUGHT


def ends_of_turns(chat: ChatTemplate | None) -> frozenset[int]:
    """Returns the token that ends a chat's turns; none where there is no one such token."""
    return frozenset() if chat is None or chat.end is None else frozenset({chat.end})

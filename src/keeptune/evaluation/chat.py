"""What benchmarks need of a chat template: whether there is one, what ends a turn, and what ends a thought."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError

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


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the special token that the template puts after an answer; none where it puts no such token."""
    rest = str(tokenizer.apply_chat_template(_TURNS, tokenize=False)).rpartition(_TURNS[1]["content"])[2]
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    return frozenset(next(([token] for token in ids if token in special), []))

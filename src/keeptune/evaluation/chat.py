"""The chat template that benchmarks are asked through, by the rules of training, and what ends a thought."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import DataError, RecipeError
from keeptune.data.chat_template import ChatOptions, ChatTemplate, on_one_day

if TYPE_CHECKING:
    from keeptune.evaluation.benchmarks import FileBenchmark
    from keeptune.evaluation.standard.entry import NamedBenchmark

_LOG = logging.getLogger(__name__)
_GENERATED, _WHOLE = "generate_until", "loglikelihood_rolling"
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


def template_of(
    benchmark: NamedBenchmark, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Any]
) -> ChatTemplate | None:
    """Returns the chat template if prompts are asked through it, and checks that they can be.

    Where the entry does not say, generative tasks of lm-eval are, if there is a template; programs, which go on from
    their prompts, and the protocols of papers are not.

    Raises:
        RecipeError: There is no turn to put into it, or the task would cut a thought short.
        DataError: There is no template, or it refuses the turns.
    """
    kinds = {task.OUTPUT_TYPE for task in tasks.values()}
    row, how = benchmark.row, benchmark.how
    plain = kinds == {_GENERATED} and (how is None or how.protocol is None) and not (row is not None and row.code)
    if not (plain and bool(tokenizer.chat_template) if benchmark.chat is None else benchmark.chat):
        for key in ("system", "enable_thinking", "think_end_token"):
            if getattr(benchmark, key) is not None:
                got = "a setting of the chat template, which this benchmark is not asked through"
                next_step = f"Add `chat: true`, or leave {key} out."
                raise RecipeError(f"{benchmark.where}.{key}", got=got, wanted="chat: true", next_step=next_step)
        return None
    chat = asking(benchmark, tokenizer)
    if _WHOLE in kinds:
        raise RecipeError(
            f"{benchmark.where}.chat",
            got=f"true for whole texts ({benchmark.lm_eval_task})",
            wanted="a task with prompts, which the user of a chat writes",
            next_step="Leave `chat` out.",
        )
    _check_system(benchmark, chat, tasks)
    if benchmark.enable_thinking:
        _check_thoughts(benchmark, tokenizer, tasks)
    return chat


def _check_system(benchmark: NamedBenchmark, chat: ChatTemplate, tasks: Mapping[str, Any]) -> None:
    turns = [*TURNS * any(task.config.num_fewshot for task in tasks.values()), TURNS[0]]
    chat.asked(turns, where=f"{benchmark.where}.chat")
    try:
        shown = "<probe>" in chat.asked([{"role": "system", "content": "<probe>"}, *turns], where=benchmark.where)
    except DataError:
        shown = False
    if not shown and benchmark.system is not None:
        raise RecipeError(
            f"{benchmark.where}.system",
            got="a text that the chat template does not write",
            wanted="a template with a system's turn",
            next_step="Leave `system` out.",
        )
    if not shown and any(task.config.description for task in tasks.values()):
        _LOG.warning("%s: the template has no system's turn; the task's description is left out.", benchmark.where)


def _check_thoughts(benchmark: NamedBenchmark, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Any]) -> None:
    end_of_thought(benchmark, tokenizer)
    for task in tasks.values():
        stops = (task.config.generation_kwargs or {}).get("until") or []
        listed = [stops] if isinstance(stops, str) else stops
        cutting = [stop for stop in listed if 0 < len(stop) <= 2 and not any(map(str.isalnum, stop))]
        if task.OUTPUT_TYPE != _GENERATED or cutting:
            got = f"answers that end at {cutting[0]!r}" if cutting else "a task of log-likelihoods"
            raise RecipeError(
                f"{benchmark.where}.enable_thinking",
                got=f"{got}, for a model that thinks first",
                wanted="a generative task whose answers end by words, such as gsm8k",
                next_step="Set `enable_thinking: false`, or choose another task.",
            )

"""Standard benchmarks through a chat template: when it is used, and what thoughts before an answer need."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import DataError, RecipeError
from keeptune.evaluation.chat import end_of_thought, need_template
from keeptune.evaluation.standard.entry import NamedBenchmark

_LOG = logging.getLogger(__name__)
_GENERATED, _WHOLE = "generate_until", "loglikelihood_rolling"


def uses_template(benchmark: NamedBenchmark, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Any]) -> bool:
    """Returns whether prompts are asked through the chat template, and checks that they can be.

    Where the entry does not say, generative tasks of lm-eval are, if there is a template; programs, which go on from
    their prompts, and the protocols of papers are not.

    Raises:
        RecipeError: There is no template or no turn to put into it, or the task would cut a thought short.
    """
    kinds = {task.OUTPUT_TYPE for task in tasks.values()}
    row, how = benchmark.row, benchmark.how
    plain = kinds == {_GENERATED} and (how is None or how.protocol is None) and not (row is not None and row.code)
    chat = plain and bool(tokenizer.chat_template) if benchmark.chat is None else benchmark.chat
    if not chat:
        _refuse_unused(benchmark)
        return False
    need_template(tokenizer, benchmark.where)
    if _WHOLE in kinds:
        raise RecipeError(
            f"{benchmark.where}.chat",
            got=f"true for whole texts ({benchmark.lm_eval_task})",
            wanted="a task with prompts, which the user of a chat writes",
            next_step="Leave `chat` out.",
        )
    if benchmark.enable_thinking:
        _check_thoughts(benchmark, tokenizer, tasks)
    return True


def _refuse_unused(benchmark: NamedBenchmark) -> None:
    given = [key for key in ("system", "enable_thinking", "think_end_token") if getattr(benchmark, key) is not None]
    if given:
        raise RecipeError(
            f"{benchmark.where}.{given[0]}",
            got="a setting of the chat template, which this benchmark is not asked through",
            wanted="chat: true",
            next_step=f"Add `chat: true`, or leave {given[0]} out.",
        )


def _check_thoughts(benchmark: NamedBenchmark, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Any]) -> None:
    end_of_thought(tokenizer, benchmark.think_end_token, where=benchmark.where)
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


class Chat:
    """What lm-eval asks a model about its template; ``inner`` is lm-eval's own wrapper."""

    def __init__(self, inner: Any, benchmark: NamedBenchmark) -> None:
        self._inner, self._benchmark, self._warned = inner, benchmark, False

    def render(self, messages: Sequence[dict[str, str]], *, open_ended: bool) -> str:
        """Returns a conversation as text, as lm-eval renders it; DataError where the template refuses it."""
        try:
            text = str(self._inner.apply_chat_template(list(messages), open_ended))
        except (TemplateError, ValueError) as error:
            raise DataError(
                f"{self._benchmark.where}.chat",
                got=f"a chat template that refuses the turns {', '.join(m['role'] for m in messages)}: {error}",
                wanted="turns that the template can write",
                next_step="Set `chat: false`, or `shots: 0`.",
            ) from error
        lost = [
            message for message in messages if message["role"] == "system" and message["content"].strip() not in text
        ]
        if lost and self._benchmark.system is not None:
            raise RecipeError(
                f"{self._benchmark.where}.system",
                got="a text that the chat template does not write",
                wanted="a template with a system's turn",
                next_step="Leave `system` out.",
            )
        if lost and not self._warned:
            self._warned = True
            _LOG.warning(
                "%s: the template has no system's turn; the task's description is left out.", self._benchmark.where
            )
        return text

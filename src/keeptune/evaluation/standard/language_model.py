"""A model wrapped for lm-eval, with bars only where a person sees them, and the base's answers kept."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import DataError
from keeptune.evaluation.base_answers import KeptAnswers
from keeptune.evaluation.chat import end_of_thought, template_options
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.templated import Chat

_LOG = logging.getLogger(__name__)
_LONGEST = 2048  # of a model that names no limit, lm-eval's own
_NEW_TOKENS = 256  # lm-eval's own, of a task that names no limit


def fit_length(benchmark: NamedBenchmark, positions: int | None, tasks: Mapping[str, Any]) -> int:
    """Returns how many tokens of prompt and answer fit, before and after.

    The limits of generated tokens of lm-eval's tasks are lowered where they leave less than half to the prompt.
    """
    known = [limit for limit in (positions, benchmark.max_length) if limit is not None]
    length = min(known, default=_LONGEST)
    for task in tasks.values():
        given = task.config.generation_kwargs
        if task.OUTPUT_TYPE != "generate_until" or not isinstance(given, dict):
            continue
        wanted = benchmark.max_new_tokens or int(given.get("max_gen_toks") or _NEW_TOKENS)
        room = min(wanted, max(1, length // 2))
        if room < wanted:
            _LOG.warning("%s: %d new tokens at most, not %d: the model has %d.", benchmark.where, room, wanted, length)
        task.set_config("generation_kwargs", {"max_gen_toks": room}, update=True)
    return length


def wrapped_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: NamedBenchmark,
    *,
    length: int,
    progress: bool,
    kept: KeptAnswers | None,
    chat: bool = False,
) -> Any:
    """Returns a model, with a copy of its tokenizer, as an ``lm_eval.api.model.LM`` that takes answers that are kept.

    ``length`` is that of prompt and answer together, tokens; bars are drawn where stderr is a terminal.
    """
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

    own = copy.deepcopy(tokenizer)  # lm-eval chooses a padding token and a side for it
    own.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # we say what is cut
    size = benchmark.batch_size
    thoughts = _thoughts(benchmark, tokenizer) if chat else {}
    inner = HFLM(pretrained=model, tokenizer=own, backend="causal", batch_size=size, max_length=length, **thoughts)
    template = Chat(inner, benchmark)
    quiet = not (progress and sys.stderr.isatty())

    class Answers(LM):
        """Passes requests on, unless their answers are kept."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            _check_choices(inner, benchmark, requests, length)
            pairs = self._get(
                "loglikelihood",
                requests,
                lambda: [[float(total), bool(greedy)] for total, greedy in inner.loglikelihood(requests, quiet)],
            )
            return [(total, greedy) for total, greedy in pairs]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return self._get("rolling", requests, lambda: _rolling(inner, requests, quiet))

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            rooms = (length - int(request.args[1].get("max_gen_toks") or _NEW_TOKENS) for request in requests)
            lengths = (len(inner.tok_encode(request.args[0])) for request in requests)
            cut = sum(tokens > room for tokens, room in zip(lengths, rooms, strict=True))
            _warn_of_cuts(benchmark, cut, len(requests), length)
            return self._get("generate", requests, lambda: list(inner.generate_until(requests, quiet)))

        @property
        def tokenizer_name(self) -> str:
            return str(inner.tokenizer_name)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return None if not chat_template else str(own.chat_template)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return template.render(chat_history, open_ended=add_generation_prompt)

        def _get(self, kind: str, requests: Sequence[Any], run: Callable[[], list[Any]]) -> list[Any]:
            if kept is None:
                return run()
            key = [kind, length, [list(request.args) for request in requests], *([thoughts] if thoughts else [])]
            return kept.get(benchmark.name, key, len(requests), run)

    return Answers()


def _thoughts(benchmark: NamedBenchmark, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns lm-eval's options of thoughts."""
    options: dict[str, Any] = template_options(tokenizer, benchmark.enable_thinking)
    end = benchmark.think_end_token
    if benchmark.enable_thinking:
        end = end_of_thought(tokenizer, end, where=benchmark.where)
    return options if end is None else options | {"think_end_token": end}


def _rolling(inner: Any, requests: Sequence[Any], quiet: bool) -> list[float]:
    score = inner._loglikelihood_tokens
    # lm-eval draws a bar for each batch of windows, whatever its argument.
    silent = mock.patch.object(
        inner, "_loglikelihood_tokens", lambda **given: score(**(given | {"disable_tqdm": quiet}))
    )
    with silent:
        return [float(total) for total in inner.loglikelihood_rolling(requests, quiet)]


def _check_choices(inner: Any, benchmark: NamedBenchmark, requests: Sequence[Any], length: int) -> None:
    cut = 0
    for number, request in enumerate(requests, start=1):
        context, answer = (len(inner.tok_encode(text)) for text in request.args)
        if answer > length:
            raise DataError(
                f"{benchmark.where} request {number}",
                got=f"a choice of {answer} tokens",
                wanted=f"at most {length}, what the model has room for",
                next_step="Raise max_length, or take a model with more positions.",
            )
        cut += context + answer > length + 1
    _warn_of_cuts(benchmark, cut, len(requests), length)


def _warn_of_cuts(benchmark: NamedBenchmark, cut: int, count: int, length: int) -> None:
    if cut:
        where = benchmark.where
        _LOG.warning("%s: %d of %d prompts were cut to their ends, to fit %d tokens.", where, cut, count, length)

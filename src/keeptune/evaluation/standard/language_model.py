"""A model as lm-eval asks it, with bars only where a person sees them, and the base's answers kept."""

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
from keeptune.evaluation.model_pairs import Side
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.model.blocks import positions

__all__ = ["fit_length", "make_asked"]

_LOG = logging.getLogger(__name__)
_LONGEST = 2048  # of a model that names no limit, lm-eval's own
_NEW_TOKENS = 256  # lm-eval's own, of a task that names no limit


def fit_length(benchmark: NamedBenchmark, models: Sequence[PreTrainedModel], tasks: Mapping[str, Any]) -> int:
    """Choose how many tokens fit, the same before and after, and leave half of them to the prompt.

    Args:
        benchmark: The benchmark.
        models: The models.
        tasks: lm-eval's tasks, of which the limits of generated tokens are lowered where they leave no room.

    Returns:
        Tokens of prompt and answer together.
    """
    known = [limit for limit in (*map(positions, models), benchmark.max_length) if limit is not None]
    length = min(known, default=_LONGEST)
    for task in tasks.values():
        given = task.config.generation_kwargs
        if task.OUTPUT_TYPE != "generate_until" or not isinstance(given, dict):
            continue
        wanted = int(given.get("max_gen_toks") or _NEW_TOKENS)
        room = min(wanted, max(1, length // 2))
        if room < wanted:
            _LOG.warning("%s: %d new tokens at most, not %d: the model has %d.", benchmark.where, room, wanted, length)
        task.set_config("generation_kwargs", {"max_gen_toks": room}, update=True)
    return length


def make_asked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: NamedBenchmark,
    *,
    length: int,
    side: Side,
    progress: bool,
    kept: KeptAnswers | None,
) -> Any:
    """Wrap a model for lm-eval.

    Args:
        model: The model.
        tokenizer: Its tokenizer; a copy is used.
        benchmark: The benchmark.
        length: Tokens of prompt and answer together.
        side: Which of the two models it is.
        progress: Whether to show bars, where stderr is a terminal.
        kept: Where the base's answers are; None asks the model.

    Returns:
        An ``lm_eval.api.model.LM``.
    """
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

    own = copy.deepcopy(tokenizer)  # lm-eval chooses a padding token and a side for it
    own.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # we say what is cut
    inner = HFLM(
        pretrained=model,
        tokenizer=own,
        backend="causal",
        batch_size=benchmark.batch_size,
        max_length=length,
    )
    quiet = not (progress and sys.stderr.isatty())

    class Asked(LM):
        """Passes requests on, those of the base to what is kept."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            _check_fit(inner, benchmark, requests, length)
            found = self._ask("loglikelihood", requests, lambda: _plain(inner.loglikelihood(requests, quiet)))
            return [(float(sum_), bool(greedy)) for sum_, greedy in found]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return self._ask("rolling", requests, lambda: _rolling(inner, requests, quiet))

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            _report_cuts(inner, benchmark, requests, length)
            return self._ask("generate", requests, lambda: list(inner.generate_until(requests, quiet)))

        def _ask(self, kind: str, requests: Sequence[Any], ask: Callable[[], list[Any]]) -> list[Any]:
            if kept is None or side == "after":
                return ask()
            key = [kind, length, [list(request.args) for request in requests]]
            return kept.recall(benchmark.name, key, len(requests), ask)

    return Asked()


def _plain(found: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
    return [[float(sum_), bool(greedy)] for sum_, greedy in found]


def _rolling(inner: Any, requests: Sequence[Any], quiet: bool) -> list[float]:
    score = inner._loglikelihood_tokens

    def silent(**given: Any) -> Any:
        return score(**(given | {"disable_tqdm": quiet}))

    # lm-eval draws a bar for each batch of windows, whatever it is told.
    with mock.patch.object(inner, "_loglikelihood_tokens", silent):
        return [float(sum_) for sum_ in inner.loglikelihood_rolling(requests, quiet)]


def _check_fit(inner: Any, benchmark: NamedBenchmark, requests: Sequence[Any], length: int) -> None:
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
    _warn(benchmark, cut, len(requests), length)


def _report_cuts(inner: Any, benchmark: NamedBenchmark, requests: Sequence[Any], length: int) -> None:
    cut = 0
    for request in requests:
        context, options = request.args
        room = int(options.get("max_gen_toks") or _NEW_TOKENS)
        cut += len(inner.tok_encode(context)) > length - room
    _warn(benchmark, cut, len(requests), length)


def _warn(benchmark: NamedBenchmark, cut: int, count: int, length: int) -> None:
    if cut:
        _LOG.warning(
            "%s: %d of %d prompts were cut to their ends, to fit %d tokens.", benchmark.where, cut, count, length
        )

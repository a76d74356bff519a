"""A model wrapped for lm-eval, the base's answers kept; what lm-eval sets in process and model is restored."""

import copy
import importlib
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import DataError, RecipeError
from keeptune.core.processes import divided, world
from keeptune.data.chat_template import ChatTemplate
from keeptune.evaluation.benchmarks import end_of_thought
from keeptune.evaluation.model_pairs import KeptAnswers
from keeptune.evaluation.scored_tokens import LOGITS_AT_ONCE, limits_logits, vocabulary_of
from keeptune.evaluation.standard.entry import NamedBenchmark

_LOG = logging.getLogger(__name__)
_Run = Callable[[Sequence[Any]], list[Any]]  # from lm-eval's requests to their answers
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
    kept: KeptAnswers | None,
    chat: ChatTemplate | None = None,
) -> Any:
    """Returns a model, with a copy of its tokenizer, as lm-eval's own wrapper, which takes answers that are kept.

    ``length`` is that of prompt and answer together, tokens; bars are drawn where stderr is a terminal.
    """
    from lm_eval.models.huggingface import HFLM

    own = copy.deepcopy(tokenizer if chat is None else chat.tokenizer)  # lm-eval chooses padding for it
    own.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # we say what is cut
    quiet = not sys.stderr.isatty()
    thoughts: dict[str, Any] = {} if chat is None else dict(chat.options.chat_template_kwargs)
    end = None if chat is None else end_of_thought(benchmark, tokenizer)
    thoughts |= {} if end is None else {"think_end_token": end}

    class Answers(HFLM):
        """Runs requests unless their answers are kept."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            _check_choices(self, benchmark, requests, length)
            run = super().loglikelihood
            pairs = self._kept("loglikelihood", requests, lambda own: [[float(a), bool(b)] for a, b in run(own, quiet)])
            return [(total, greedy) for total, greedy in pairs]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            run = super().loglikelihood_rolling
            return self._kept("rolling", requests, lambda own: list(map(float, run(own, quiet))))

        def _loglikelihood_tokens(self, requests: Any, **given: Any) -> Any:
            self._longest = max((len(answer) for _, _, answer in requests), default=0)
            fitting = LOGITS_AT_ONCE // max(self._longest * vocabulary_of(model), 1)
            self.batch_size_per_gpu = min(benchmark.batch_size, max(fitting, 1))
            # lm-eval draws a bar for each batch of windows, whatever its argument.
            return super()._loglikelihood_tokens(requests, **(given | {"disable_tqdm": quiet}))

        def _model_call(self, inps: torch.Tensor, *args: Any, **given: Any) -> Any:
            if not limits_logits(model):
                return super()._model_call(inps, *args, **given)
            with torch.no_grad():
                return self.model(inps, logits_to_keep=_columns(inps, self._longest)).logits

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            rooms = (length - int(request.args[1].get("max_gen_toks") or _NEW_TOKENS) for request in requests)
            lengths = (len(self.tok_encode(request.args[0])) for request in requests)
            cut = sum(tokens > room for tokens, room in zip(lengths, rooms, strict=True))
            _warn_of_cuts(benchmark, cut, len(requests), length)
            run = super().generate_until
            return self._kept("generate", requests, lambda own: list(run(own, quiet)))

        def _kept(self, kind: str, requests: Sequence[Any], run: _Run) -> list[Any]:
            if kept is None:
                return _divided(requests, run)
            key = [kind, length, [list(request.args) for request in requests], *([thoughts] if thoughts else [])]
            return kept.get(benchmark.name, key, len(requests), lambda: _divided(requests, run))

    size = benchmark.batch_size
    return Answers(pretrained=model, tokenizer=own, backend="causal", batch_size=size, max_length=length, **thoughts)


def _columns(ids: torch.Tensor, longest: int) -> int:
    """Returns at how many of the last places of a batch lm-eval may read logits, for answers up to ``longest``.

    It pads rows with 0 on their right, and counts from the end of what it is given. A text that ends in a token 0 is
    taken to be shorter than it is, which only leaves more places.
    """
    ends = (ids.ne(0) * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(dim=1)
    return min(ids.shape[1] - int(ends.min()) + longest, ids.shape[1])


def _divided(requests: Sequence[Any], run: _Run) -> list[Any]:
    """Divides requests among the processes, those of one prompt together: lm-eval runs it once for short choices."""
    if world() == 1:
        return run(requests)
    prompts: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        prompts.setdefault(request.args[0], []).append(place)

    def some(own: Sequence[list[int]]) -> list[list[Any]]:
        answers = iter(run([requests[place] for places in own for place in places]) if own else ())
        return [[next(answers) for _ in places] for places in own]

    longest = sorted(prompts.values(), key=lambda places: -sum(len(requests[place].args[0]) for place in places))
    found = zip(longest, divided(longest, some), strict=True)
    answered = {place: answer for places, answers in found for place, answer in zip(places, answers, strict=True)}
    return [answered[place] for place in range(len(requests))]


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


INSTALL = 'pip install "keeptune[benchmarks]"'
_NOISY = ("lm_eval", "datasets", "httpx", "absl")


def engine_version(where: str) -> str:
    """Returns the version of lm-eval.

    Raises:
        RecipeError: It is not installed.
    """
    try:
        return str(importlib.import_module("lm_eval").__version__)
    except ModuleNotFoundError as error:
        raise RecipeError(
            where,
            got=f"a standard benchmark, without lm-eval ({error})",
            wanted="the library that runs it",
            next_step=f"Run `{INSTALL}`.",
        ) from error


@contextmanager
def restored_process(where: str) -> Iterator[None]:
    """Restores random number generators, environment, loggers and progress bars; silences lm-eval meanwhile.

    Raises:
        RecipeError: lm-eval is not installed.
    """
    engine_version(where)
    import datasets
    import lm_eval.api.task

    python, numpy_state = random.getstate(), np.random.get_state()
    root = logging.getLogger()
    handlers = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    shown, no_bar = datasets.is_progress_bar_enabled(), mock.patch.object(lm_eval.api.task, "tqdm", lambda i, **_: i)
    datasets.disable_progress_bars()
    try:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with mock.patch.dict(os.environ), torch.random.fork_rng(range(torch.cuda.device_count())), no_bar:
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        for name, own in levels.items():
            logging.getLogger(name).setLevel(own)
        root.handlers[:] = handlers
        random.setstate(python)
        np.random.set_state(numpy_state)


@contextmanager
def restored_model(model: PreTrainedModel, ends: frozenset[int] = frozenset()) -> Iterator[None]:
    """Keeps lm-eval from tying weights, and restores generation settings; meanwhile ``ends`` end texts too."""
    own: Any = model.generation_config
    # Weights that were trained apart would be tied again.
    with mock.patch.object(model, "tie_weights", lambda *_, **__: None):
        model.generation_config = copy.deepcopy(own)
        if ends:
            named = own.eos_token_id
            listed = named if isinstance(named, list) else [named]
            model.generation_config.eos_token_id = sorted(ends | {token for token in listed if token is not None})
        try:
            yield
        finally:
            model.generation_config = own


@contextmanager
def seeded_langdetect() -> Iterator[None]:
    """Seeds langdetect, which IFEval's checks use and which draws without a seed."""
    detect: Any = sys.modules.get("langdetect")
    with nullcontext() if detect is None else mock.patch.object(detect.DetectorFactory, "seed", 0):
        yield

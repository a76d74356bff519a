"""Benchmarks scored with two running servers, base and tuned, through lm-eval's API models: what was lost as served."""

import json
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import ModelError, RecipeError
from keeptune.data.chat_template import ChatTemplate
from keeptune.evaluation.benchmarks import Benchmark, FileBenchmark, asking, end_of_thought, template_of
from keeptune.evaluation.harness import chosen_records, generated_records
from keeptune.evaluation.items import load_items
from keeptune.evaluation.metrics import cut_at
from keeptune.evaluation.model_pairs import SIDES, Side
from keeptune.evaluation.results import BenchmarkResult, mean_scores
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.language_model import INSTALL, fit_length, restored_process
from keeptune.evaluation.standard.lm_eval_tasks import build_tasks
from keeptune.evaluation.standard.score import compared, records_of, samples_of

_PROBE = "Café 12,345 tokens:\n\tdef f(x): return x"
_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server that runs, at a ``url`` without ``/v1``, and the ``model`` of it that is asked."""

    url: str
    model: str

    @classmethod
    def at(cls, url: str, model: str | None = None) -> Self:
        """Asks a server for its models; ModelError where it does not answer, or which one is meant is not clear."""
        url = url.rstrip("/").removesuffix("/v1")
        listed = [str(entry["id"]) for entry in _ask(f"{url}/v1/models").get("data") or ()]
        if model not in listed and (model is not None or len(listed) != 1):
            got, wanted = f"the models {', '.join(listed) or '(none)'}", "one model" if model is None else f'"{model}"'
            raise ModelError(url, got=got, wanted=wanted, next_step="Name one: --model, of the base --base-model.")
        return cls(url, model or listed[0])

    def language_model(
        self, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None, *, likelihoods: bool, **more: Any
    ) -> Any:
        """Returns lm-eval's model that asks this server; answers to a ``chat`` through the server's own template.

        Raises:
            ModelError: The server has other tokens, or gives no log-probabilities where tasks need them.
        """
        from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

        self._check(tokenizer, likelihoods)
        thoughts = {} if chat is None else {"chat_template_kwargs": dict(chat.options.chat_template_kwargs)}

        class Asked(LocalChatCompletion):
            def _create_payload(self, *given: Any, **options: Any) -> Any:
                return super()._create_payload(*given, **options) | thoughts

        more |= {"model": self.model, "timeout": _SECONDS, "eos_string": tokenizer.eos_token}
        if chat is not None and not likelihoods:
            return Asked(base_url=f"{self.url}/v1/chat/completions", **more)
        plain = {"tokenizer_backend": None, "add_bos_token": True}  # what the tokenizer adds, as in memory
        model = LocalCompletionsAPI(base_url=f"{self.url}/v1/completions", **plain, **more)
        model.tokenizer, model.tokenizer_backend, model.tokenized_requests = tokenizer, "huggingface", True
        return model

    def _check(self, tokenizer: PreTrainedTokenizerBase, likelihoods: bool) -> None:
        own, asked = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"]), {"model": self.model}
        try:  # as vLLM takes it, and as llama.cpp does
            text = {"prompt": _PROBE, "content": _PROBE, "add_special_tokens": False, "add_special": False}
            found = _ask(f"{self.url}/tokenize", asked | text).get("tokens", own)
        except ModelError:
            found = own  # OpenAI's interface has no such thing
        if found != own:
            raise ModelError(
                self.url,
                got=f"a server that cuts a text into other tokens ({found[:8]}..., not {own[:8]}...)",
                wanted=f"the tokenizer {tokenizer.name_or_path} at both servers",
                next_step="Name the served models' own with --tokenizer, or compare models of one tokenizer.",
            )
        how = {"prompt": own, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
        choice = _ask(f"{self.url}/v1/completions", asked | how)["choices"][0] if likelihoods else {}
        if likelihoods and len((choice.get("logprobs") or {}).get("token_logprobs") or ()) <= len(own):
            raise ModelError(
                self.url,
                got="an answer without the log-probabilities of its prompt",
                wanted="them (`echo` with `logprobs`, as vLLM has it): choices and texts are scored by them",
                next_step="Take benchmarks whose answers are generated, such as gsm8k, for this server.",
            )


def _ask(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """Returns what a server answers; ModelError where it does not, or not in JSON."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_SECONDS) as reply:
            return dict(json.load(reply))
    except (OSError, HTTPException, ValueError, TypeError) as error:
        raise ModelError(
            url,
            got=f"no answer ({error})",
            wanted="an OpenAI-compatible server that runs",
            next_step="Start it, such as `vllm serve MODEL`, or check the address and the port.",
        ) from error


def score_served(
    servers: Mapping[Side, Server], tokenizer: PreTrainedTokenizerBase, benchmark: Benchmark, *, seed: int = 0
) -> BenchmarkResult:
    """Scores a benchmark with the server of the base (``before``) and that of the tuned model, on the same items.

    Raises:
        RecipeError: The benchmark is of a kind that is scored in memory alone, or lm-eval is not all there.
        ModelError: A server does not answer, has other tokens, or gives no log-probabilities where they are needed.
    """
    with restored_process(where := benchmark.where):
        from lm_eval.models import api_models
        from requests import RequestException

        if find_spec("tenacity") is None:
            wanted, step = "what asks a server again", f"Run `{INSTALL}`."
            raise RecipeError(where, got="lm-eval without tenacity", wanted=wanted, next_step=step)
        try:
            with mock.patch.object(api_models, "tqdm", partial(tqdm, disable=None)):  # bars where a person sees them
                if isinstance(benchmark, NamedBenchmark):
                    return _standard(servers, tokenizer, benchmark, seed)
                assert isinstance(benchmark, FileBenchmark)
                return _file(servers, tokenizer, benchmark, seed)
        except RequestException as error:
            got, step = f"a server that stopped answering ({error})", "See its log; a prompt may be too long for it."
            raise ModelError(where, got=got, wanted="answers until the end", next_step=step) from error


def _standard(
    servers: Mapping[Side, Server], tokenizer: PreTrainedTokenizerBase, benchmark: NamedBenchmark, seed: int
) -> BenchmarkResult:
    built = build_tasks(benchmark)
    chat = template_of(benchmark, tokenizer, built.tasks)
    more: dict[str, Any] = {"max_length": fit_length(benchmark, None, built.tasks) + 1}  # it takes one off
    more["likelihoods"] = any(task.OUTPUT_TYPE != "generate_until" for task in built.tasks.values())
    if chat is not None and not more["likelihoods"]:
        more["think_end_token"] = end_of_thought(benchmark, tokenizer)
    models = {side: servers[side].language_model(tokenizer, chat, **more) for side in SIDES}
    samples = {side: samples_of(model, benchmark, built, chat=chat is not None) for side, model in models.items()}
    return compared(benchmark, samples, records_of(samples, tokenizer), chat=chat is not None, seed=seed)


def _file(
    servers: Mapping[Side, Server], tokenizer: PreTrainedTokenizerBase, benchmark: FileBenchmark, seed: int
) -> BenchmarkResult:
    from lm_eval.models.api_models import JsonChatStr

    generated, templated = benchmark.metric == "exact_match", benchmark.templated
    if not generated and (templated or benchmark.metric != "multiple_choice"):
        raise RecipeError(
            f"{benchmark.where}.metric",
            got=benchmark.metric + " through the chat template" * templated,
            wanted="exact_match, or multiple_choice of plain prompts: what servers answer",
            next_step="Leave it out of this suite; `keeptune check` scores it in memory.",
        )
    items, chat = load_items(benchmark, Path()), asking(benchmark, tokenizer) if templated else None
    length = {} if benchmark.max_length is None else {"max_length": benchmark.max_length + 1}
    models = [servers[side].language_model(tokenizer, chat, likelihoods=not generated, **length) for side in SIDES]
    if generated:
        thought = end_of_thought(benchmark, tokenizer)
        stops = [] if thought else list(benchmark.stops)
        how = {"until": stops, "max_gen_toks": benchmark.max_new_tokens}
        asked = [JsonChatStr(json.dumps(list(item.chat.messages))) if item.chat else item.prompt for item in items]
        requests = [SimpleNamespace(args=(prompt, how)) for prompt in asked]
        texts = [[cut_at(text, stops) for text in model.generate_until(requests)] for model in models]
        records = generated_records(benchmark, items, dict(zip(SIDES, texts, strict=True)), thought)
    else:
        pairs = [(item.prompt.rstrip(" "), f" {choice.strip()}") for item in items for choice in item.choices]
        requests = [SimpleNamespace(args=pair) for pair in pairs]
        sums = [[float(total) for total, _ in model.loglikelihood(requests)] for model in models]
        records = chosen_records(items, dict(zip(SIDES, sums, strict=True)))
    named = [{"index": item.index, "group": item.group} | record for item, record in zip(items, records, strict=True)]
    scores = mean_scores(named, [1.0] * len(named), seed)
    return BenchmarkResult(name=benchmark.name, role=benchmark.role, metric=benchmark.metric, chat=templated, **scores)

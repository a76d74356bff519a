"""Entries of a recipe's ``evaluate`` list: what all have in common, how a chat is asked, benchmarks in own files."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import DataError, RecipeError, need_known
from keeptune.core.options import Options, Range
from keeptune.data.chat_template import ChatOptions, ChatTemplate, on_one_day
from keeptune.evaluation.metrics import ASKED, LABELS, PAIRS, SCORES, Metric, Normalisation

if TYPE_CHECKING:
    from keeptune.evaluation.standard.entry import NamedBenchmark

_LOG = logging.getLogger(__name__)
Role = Literal["knowledge", "task"]

_TEMPLATES = ("messages", "prompt", "answer", "choices", "text", "text_pair", "chosen", "rejected")
_CLASSIFIER = (*LABELS, *SCORES)
# Of each metric the templates that it needs, with an example.
_LABELLED = {"text": "{sentence}", "answer": "{label}"}
_NEEDED: dict[str, dict[str, str]] = {
    "exact_match": {"prompt": "{question}\\nAnswer:", "answer": "{answer}"},
    "multiple_choice": {"prompt": "{question}\\nAnswer:", "choices": "{choices}", "answer": "{label}"},
    "cross_entropy": {"text": "{text}"},
    **dict.fromkeys(_CLASSIFIER, _LABELLED),
    **dict.fromkeys(PAIRS, {}),
}
_OPTIONAL = {**dict.fromkeys(_CLASSIFIER, ("text_pair",)), **dict.fromkeys(PAIRS, ("prompt", "chosen", "rejected"))}


@dataclass(frozen=True, kw_only=True)
class Benchmark(Options):
    """An entry of ``evaluate``: :class:`FileBenchmark`, or :class:`keeptune.evaluation.standard.NamedBenchmark`.

    Args:
        name: Names the benchmark in reports.
        role: ``"knowledge"`` is what should be kept, ``"task"`` is what should be learnt.
        examples: Number of items, from the top; None takes all.
        batch_size: Sequences per forward pass at most. It changes scores by rounding only.
        max_length: Tokens of a sequence.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    refusal = RecipeError
    ranges = dict.fromkeys(("examples", "batch_size", "max_new_tokens"), Range(least=1))

    name: str
    role: Role | None
    examples: int | None = None
    batch_size: int
    max_length: int | None

    @property
    def where(self) -> str:
        """The recipe key, for error messages."""
        return f"evaluate.{self.name}"

    def _check_words(self, **known: Sequence[str]) -> None:
        for field, words in known.items():
            need_known(str(getattr(self, field)), words, f"{self.where}.{field}", " or ".join(words))

    def place(self, option: str) -> str:
        """Returns the recipe's key."""
        return f"{self.where}.{option}"


@dataclass(frozen=True, kw_only=True)
class FileBenchmark(Benchmark):
    r"""A benchmark of the user's own: a JSONL file, templates that turn a row into an item, and a metric.

    Args:
        file: JSONL file; a relative path is taken from the recipe's folder.
        metric: ``exact_match`` generates an answer; ``multiple_choice`` compares the log-likelihoods of
            given answers; ``cross_entropy`` is in nats per token. Of pairs of answers, a better and a worse one each,
            ``preference_accuracy`` is the share of which the model finds the better one likelier, and
            ``reward_accuracy`` that of which training raised its likelihood by more (the base has 0.5 by definition:
            equal counts half). Of a classifier ``accuracy``, ``f1`` (of the second
            of two labels, as GLUE has it; of more labels the mean over labels) and ``matthews``; of a regression
            ``pearson`` and ``spearman``.
        prompt: Template of the text before the answer (exact_match, multiple_choice).
        messages: Template of a conversation in place of ``prompt`` or ``text``, such as ``{messages}``, which is asked
            through the chat template. Its last answer is the right one (exact_match), or is scored (cross_entropy).
        chat: Asks ``prompt`` through the chat template, as the user's turn.
        enable_thinking: Given to a chat template that has this switch; None is false there.
        think_end_token: Ends a thought, and the answer follows; None takes ``</think>`` where the template has it.
        answer: Template of the right answer. For exact_match a string or a list of accepted strings; for
            multiple_choice the choice's index from 0, its letter, its own text, or its label where the
            choices have labels. A whole file is read in one of these ways. Of a classifier the label or the score.
        choices: Template of the choices: a list, or ``{"text": [...], "label": [...]}``.
        text: Template of a document (cross_entropy), or of what a classifier reads.
        text_pair: Template of the other text, where a classifier reads pairs.
        chosen: Template of the better answer of a pair; None takes the field ``chosen``. The prompt is the field
            ``prompt`` then, or what both answers begin with.
        rejected: Template of the worse one; None takes the field ``rejected``.
        max_length: Tokens. Documents are cut to their first ``max_length`` tokens, prompts to their last;
            a model with fewer positions lowers the limit.
        max_new_tokens: Tokens generated at most (exact_match).
        group: Field that splits the result, where rows have it.
        stop: A generated text ends before the first of these (exact_match); None is a line's end, of chats none.
        normalise: ``"qa"`` compares answers without case, punctuation and articles; ``"exact"`` as they are,
            but for white space at the ends.

    Raises:
        RecipeError: The fields do not fit the metric, or a value is out of range.
    """

    ranges = {"max_length": Range(least=2)}

    role: Role
    file: str
    metric: Metric
    prompt: str | None = None
    messages: str | None = None
    chat: bool = False
    enable_thinking: bool | None = None
    think_end_token: str | None = None
    answer: str | None = None
    choices: str | None = None
    text: str | None = None
    text_pair: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    max_length: int = 1024
    max_new_tokens: int = 32
    batch_size: int = 64
    group: str | None = "relation"
    stop: tuple[str, ...] | None = None
    normalise: Normalisation = "qa"

    def __post_init__(self) -> None:
        self._check_words(metric=get_args(Metric), role=get_args(Role), normalise=get_args(Normalisation))
        self.need(
            self.role == "task" or self.metric not in (*_CLASSIFIER, "reward_accuracy"),
            "role",
            f"task for {self.metric}",
            "A reward is relative to the base, which has none to keep: take preference_accuracy."
            if self.metric in PAIRS
            else "A classifier's head answers for its own task only; what the encoder keeps is not measured.",
        )
        self._check_templates()
        super().__post_init__()
        advice = "Leave the empty string out; it would end every answer before it begins."
        self.need("" not in self.stops, "stop", "texts of one character or more", advice)

    @property
    def templated(self) -> bool:
        """Whether the model is asked through the chat template."""
        return self.chat or self.messages is not None

    @property
    def stops(self) -> tuple[str, ...]:
        """What a generated text ends before, besides the token that ends a text or a turn."""
        return (() if self.templated else ("\n",)) if self.stop is None else self.stop

    def _check_templates(self) -> None:
        needed = dict(_NEEDED[self.metric])
        if self.chat and (self.messages is not None or "prompt" not in needed):
            raise RecipeError(
                f"{self.where}.chat",
                got=f"true with {'messages' if self.messages is not None else self.metric}",
                wanted="a metric with a `prompt`, which becomes the user's turn",
                next_step='Leave `chat` out; whole conversations are named by `messages: "{messages}"`.',
            )
        if self.messages is not None and self.metric in ASKED:  # those that conversations are scored by
            needed = {"messages": "{messages}"} | {k: v for k, v in needed.items() if k not in ("prompt", "text")}
        for field in _TEMPLATES:
            given = getattr(self, field) is not None
            optional = field in _OPTIONAL.get(self.metric, ())
            optional |= field == "answer" and self.metric == "exact_match" and self.messages is not None
            if given == (field in needed) or optional:
                continue
            wrong = f'"{field}", which it does not use' if given else f'no "{field}"'
            example = ", ".join(f'{key}: "{value}"' for key, value in needed.items())
            raise RecipeError(
                self.where,
                got=f"metric {self.metric} with {wrong}",
                wanted=f"the fields {', '.join(needed)}",
                next_step=f"Write for example {example}.",
            )


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
    end = end_of_thought(benchmark, tokenizer) if benchmark.enable_thinking else None
    for task in tasks.values() if end is not None else ():
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

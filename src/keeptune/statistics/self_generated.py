"""Knowledge that a base supplies itself: texts that it writes from its first token, and its answers in a chat.

A text is held as the tokenizer encodes texts: with the first token only where the tokenizer puts it there. One that
marks a chat's turns stands before no text that anybody uses, and what is kept after it is not kept without it.

Token k of text i is the first whose cumulative probability, at the temperature, is above u_ik: a sample of the model's
own distribution. The u of a text are drawn for it alone, from the seed and i: what is written beside it in a batch
changes nothing but the last bits of its logits.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError, ModelError
from keeptune.core.eval_mode import in_evaluation
from keeptune.core.options import Options, Range
from keeptune.core.out_of_memory import out_of_memory
from keeptune.core.processes import divided, held_by_first
from keeptune.data.calibration import after, once, pad_id_of
from keeptune.data.examples import LanguageExamples, TokenRow, Truncate
from keeptune.data.sources import read_jsonl, refuse_empty, render_all
from keeptune.model.blocks import positions
from keeptune.model.continuation import Limits, continued, end_tokens, plain_text
from keeptune.statistics.store import StatStore

_log = logging.getLogger(__name__)
_MARK = "QUESTION"
BATCH = 32  # texts at a time; so many are lost when a run is killed


@dataclass(frozen=True)
class SelfGeneration(Options):
    """What a base writes.

    Args:
        generate: How many texts; None is one for each prompt, or 256 without prompts.
        prompts: Texts to continue in turn, or a data file of them. Without any a text starts at the first token; of a
            model with a chat template every second one is a question, written as by the user, with its answer.
        prompt: Template of a row of the file.
        answer_with: ``"base"`` answers prompts as what a chat's user says, where the tokenizer has a chat template.
        temperature: 1 is the model's own distribution, 0 its likeliest token.
        seed: Of all random numbers.
        max_length: Tokens of a text or an answer at most; a question has half as many.
    """

    section: ClassVar = "knowledge."
    ranges: ClassVar = {
        "generate": Range(least=1),
        "temperature": Range(least=0),
        "seed": Range(least=0),
        "max_length": Range(least=2),
    }
    generate: int | None = None
    prompts: str | tuple[str, ...] = ()
    prompt: str = "{prompt}"
    answer_with: Literal["base"] | None = None
    temperature: float = 1.0
    seed: int = 0
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(bool(self.prompts) or not self.answer_with, "answer_with", "none without `prompts` to answer")

    def with_prompts(self, where: str) -> SelfGeneration:
        """Returns the same with the prompts of the file; a DataError says that it cannot be used."""
        if not isinstance(self.prompts, str):
            return self
        prompts = render_all(self.prompt, read_jsonl(self.prompts, where=f"{where}.prompts"), where=f"{where}.prompts")
        refuse_empty(prompts, f"{where}.prompts", "prompt", "example")
        return replace(self, prompts=prompts)

    @property
    def count(self) -> int:
        """How many texts are written."""
        return self.generate or len(self.prompts) or 256

    @property
    def tokens(self) -> int:
        """How many tokens are written at most; of a chat model every second text has a question besides."""
        return self.count * self.max_length * (4 if self.prompts else 5) // 4


@out_of_memory("knowledge")
def write_texts(
    model: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    options: SelfGeneration,
    store: StatStore,
    *,
    fingerprint: str,
    where: str = "knowledge",
) -> SelfWritten:
    """Has a model write texts, or those that the store has not, and leaves out those of no use.

    ``model`` loads the base, of this fingerprint; it is not called where the store, which keeps the texts batch by
    batch, has all.

    Raises:
        DataError: Hardly any text is of use.
        ModelError: The model has no token to start from, or its logits are not finite.
    """
    options = options.with_prompts(where)
    writer = cache(lambda: _Writer(model(), tokenizer, options, where))
    wanted = options.count
    drawn = content_key([tokenizer.chat_template, len(tokenizer), replace(options, generate=1)])
    bar = tqdm(total=wanted, desc=where, delay=2, disable=None, leave=False)

    def written_or_kept(batches: Sequence[range]) -> list[list[Written]]:
        texts = []
        for some in batches:
            source = {"model": fingerprint, "data": drawn}
            entry = {"class": "SelfWritten", "version": 2, "source": source, "texts": [some.start, some.stop]}
            kept = store.get(entry)
            if kept is None:
                rows = json.dumps(writer().write(some)).encode()
                kept = torch.frombuffer(bytearray(rows), dtype=torch.uint8)
                store.put(entry, kept)
            texts.append([Written(tuple(ids), *rest) for ids, *rest in json.loads(bytes(kept.tolist()))])
            bar.update(len(some))
        return texts

    batches = [range(first, min(first + BATCH, wanted)) for first in range(0, wanted, BATCH)]
    with held_by_first(store.turn([drawn])), bar:
        texts = [text for batch in divided(batches, written_or_kept) for text in batch]
    written = useful(texts, where)
    if 10 * len(written) < wanted:
        raise DataError(
            where,
            got=f"of {wanted} texts {written.account}",
            wanted="texts that differ",
            next_step="Raise `temperature` (1.0 is the base's own), give other `prompts`, or a `file` of knowledge.",
        )
    return written


class _Writer:
    """Writes texts by their numbers."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SelfGeneration, where: str
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.most = positions(model)
        self.new = options.max_length if self.most is None else min(options.max_length, self.most // 2)
        self.limits = Limits(self.new, end_tokens(model, tokenizer), pad_id_of(tokenizer), where)
        self.chat = bool(tokenizer.chat_template) and (options.answer_with is not None or not options.prompts)
        # Texts start with the tokenizer's token, the model's, or else that which ends them.
        named = (tokenizer.bos_token_id, model.config.get_text_config().bos_token_id, tokenizer.eos_token_id)
        self.start = [] if options.prompts else [int(token) for token in named if token is not None][:1]
        self.held = self.start if tokenizer("a")["input_ids"][:1] == self.start else []  # of it in a text
        if not self.start and not options.prompts:
            raise ModelError(
                f"{where}, the tokenizer",
                got="no token that texts start or end with",
                wanted="one to write from",
                next_step="Give `prompts`: texts that the base continues.",
            )
        _log.info("%s: the base writes %d texts of at most %d tokens", where, options.count, self.new)

    def write(self, numbers: Sequence[int]) -> list[Written]:
        """Returns the texts of some numbers."""
        given = self.options.prompts
        prompts = {number: given[number % len(given)] if given else "" for number in numbers}
        chats = [number for number in numbers if self.chat and (given or number % 2)]
        if chats and not given:
            prompts |= self._questions(chats)
        reads = {number: self._read(prompts[number], number in chats) for number in numbers}
        fitting = [number for number in numbers if self.most is None or len(reads[number]) + self.new <= self.most]
        news = self._continued({number: reads[number] for number in fitting}, self.limits, part=1)
        reads |= {number: self.held for number in numbers if not given and number not in chats}
        return [
            Written((*reads[n], *news[n]), len(reads[n]), prompts[n], plain_text(self.tokenizer, news[n]))
            if n in news
            else Written((), 0, prompts[n], "")
            for n in numbers
        ]

    def _questions(self, numbers: Sequence[int]) -> dict[int, str]:
        """Returns questions that the model writes from the template's user header on, up to the end of the turn."""
        before, _, rest = self._turn(_MARK).partition(_MARK)
        closing, known = rest.strip(), self.tokenizer.added_tokens_decoder
        # A special token ends the turn, or else a text: that shows no special token.
        ends = {token for token in self._ids(rest)[:1] if token in known and known[token].special}
        stops = () if ends else (closing,)
        limits = replace(self.limits, new_tokens=max(self.new // 2, 1), ends=self.limits.ends | ends, stops=stops)
        news = self._continued(dict.fromkeys(numbers, self._ids(before)), limits, part=0)
        return {number: plain_text(self.tokenizer, new).partition(closing)[0].strip() for number, new in news.items()}

    def _continued(self, reads: dict[int, list[int]], limits: Limits, part: int) -> dict[int, list[int]]:
        """Continues what was read; the parts of a text have random numbers of their own."""
        if not reads:
            return {}
        pick, seed = None, self.options.seed
        if self.options.temperature:
            draws = torch.stack([_draws([seed, number, part], limits.new_tokens) for number in reads])
            pick = _sampler(draws.to(self.model.device), self.options.temperature)
        with in_evaluation(self.model), torch.no_grad():
            news = continued(self.model, self.tokenizer, list(reads.values()), limits, pick)
        return dict(zip(reads, news, strict=True))

    def _read(self, prompt: str, chat: bool) -> list[int]:
        if chat:
            return self._ids(self._turn(prompt))
        ids = once(self.tokenizer, self.tokenizer([prompt], verbose=False)["input_ids"])[0] if prompt else self.start
        # Some tokenizers end every text.
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def _turn(self, question: str) -> str:
        turns = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _draws(names: Sequence[int], count: int) -> Tensor:
    """Returns the random numbers of one text, ``(count,)`` in [0, 1)."""
    own = torch.Generator().manual_seed(int(content_key(names)[:15], 16))
    return torch.rand(count, generator=own, dtype=torch.float64)


def _sampler(draws: Tensor, temperature: float) -> Callable[[Tensor, int], Tensor]:
    """Returns what picks a token of each row by the row's random number of the step."""

    def pick(logits: Tensor, step: int) -> Tensor:
        bounds = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
        at = draws[:, step, None] * bounds[:, -1:]
        return torch.searchsorted(bounds, at, right=True)[:, 0].clamp(max=logits.shape[1] - 1)

    return pick


class Written(NamedTuple):
    """A text as it was written.

    Args:
        ids: Its tokens; none where the model has no room for it.
        start: How many of them were only read.
        prompt: What was read, without a chat's template; empty for a text from the first token on.
        completion: What was written.
    """

    ids: tuple[int, ...]
    start: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class SelfWritten(LanguageExamples):
    """Texts of a model as knowledge: what it wrote is learned, with an end where it ended; what it read is not.

    ``left_out`` counts those that are of no use, by reason.
    """

    texts: tuple[Written, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    where: str = "knowledge"
    truncate: Truncate = "right"

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        """The content key of the tokens."""
        return content_key([[text.ids, text.start] for text in self.texts])

    @property
    def read_texts(self) -> Sequence[str]:
        """Prompts and completions, each in lines of its own."""
        return [f"{text.prompt}\n{text.completion}".strip() for text in self.texts]

    @property
    def account(self) -> str:
        """How many texts of how many tokens there are, and what was left out."""
        tokens = sum(len(text.ids) - text.start for text in self.texts)
        gone = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"{len(self)} texts, {tokens:,} tokens, that the base wrote" + (f"; left out: {gone}" if gone else "")

    def token_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int] | None = None) -> list[TokenRow]:
        """Returns the tokens as they were written."""
        chosen = self.texts if rows is None else [self.texts[row] for row in rows]
        return [TokenRow(text.ids, after(text.start, len(text.ids))) for text in chosen]

    def without(self, faults: Mapping[int, str]) -> SelfWritten:
        """Returns the set without some texts, whose reasons are counted."""
        kept = tuple(text for row, text in enumerate(self.texts) if row not in faults)
        return replace(self, texts=kept, left_out=Counter(self.left_out) + Counter(faults.values()))


def useful(texts: Iterable[Written], where: str) -> SelfWritten:
    """Returns the texts that are of use, in order; of equal ones the first."""
    found = SelfWritten(tuple(texts), where=where)
    seen: set[str] = set()
    faults: dict[int, str] = {}
    for row, (text, read) in enumerate(zip(found.texts, found.read_texts, strict=True)):
        plain = " ".join(read.lower().split())
        if reason := fault(text) or ("written before" if plain in seen else None):
            faults[row] = reason
        seen.add(plain)
    return found.without(faults)


def fault(text: Written) -> str | None:
    """Returns why a text is of no use by itself.

    It repeats itself where of 24 tokens or more less than 0.4 of all runs of three are different, or where zlib makes
    less than 0.3 of 100 bytes or more (of 300 texts of C4 that is so of one).

    >>> fault(Written((1, *range(30)), 1, "", "no no no " * 20))
    'repeating themselves'
    """
    if not text.ids:
        return "with a prompt too long"
    if len(text.ids) < 2 or not text.completion.strip():  # the first token is not predicted
        return "empty"
    new, raw = text.ids[text.start :], text.completion.encode()
    runs = list(zip(new, new[1:], new[2:], strict=False))
    repeated = len(new) >= 24 and len(set(runs)) < 0.4 * len(runs)
    packed = len(raw) >= 100 and len(zlib.compress(raw, 9)) < 0.3 * len(raw)
    return "repeating themselves" if repeated or packed else None

"""Answers that people judged, for TRL's DPO and KTO trainers: pairs of which one is better, or good and bad ones.

Prompts and answers are texts or messages. Where rows have no prompt, it is what both answers of a pair begin with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError, named
from keeptune.data.calibration import after, once
from keeptune.data.completions import common_start
from keeptune.data.examples import LanguageExamples, Lost, TokenRow, Truncate, fit, kept_numbers
from keeptune.data.formats import FormatOptions, text_or_messages
from keeptune.data.sources import Row, pick
from keeptune.data.template_limits import REFUSALS

_log = logging.getLogger(__name__)
Text = Any  # a text, or messages in a tuple


@dataclass(frozen=True, slots=True)
class Preferences(LanguageExamples):
    """Prompts with judged answers; statistics see the chosen answer of a pair, and of single ones the good.

    Args:
        prompts: Each a text or messages.
        answers: Of each prompt the chosen and the rejected answer, or a single one.
        good: Whether the single answer is good; empty for pairs.
        where: The recipe key, for error messages.
        truncate: Whether examples that are too long lose their right end, or are left out.
        template: A chat template of one's own, ``chat_template``, and its variables.
    """

    prompts: tuple[Text, ...]
    answers: tuple[tuple[Text, ...], ...]
    good: tuple[bool, ...] = ()
    where: str = "task.train"
    truncate: Truncate = "right"
    template: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """The content key of prompts, answers and judgements."""
        return content_key([self.prompts, self.answers, self.good, self.template])

    @property
    def read_texts(self) -> Sequence[str]:
        """Each prompt with its first answer as one text."""
        return [plain(prompt) + plain(answers[0]) for prompt, answers in zip(self.prompts, self.answers, strict=True)]

    def tokens(self, tokenizer: PreTrainedTokenizerBase, row: int) -> list[TokenRow]:
        """Returns a prompt with each of its answers as TRL's trainers have them: these begin at one place."""
        prompt, place = self.prompts[row], f"{self.where} row {row + 1}"
        read = self._encoded(tokenizer, prompt, place, answered=False)
        whole = [self._encoded(tokenizer, prompt + answer, place, answered=True) for answer in self.answers[row]]
        start = min(common_start(read, ids) for ids in whole)
        return [TokenRow(tuple(ids), after(start, len(ids))) for ids in whole]

    def token_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int] | None = None) -> list[TokenRow]:
        """Returns each prompt with its chosen or its single answer; of a bad one nothing is learned."""
        found = [(self.tokens(tokenizer, row)[0], row) for row in (range(len(self)) if rows is None else rows)]
        bad = {row for row, good in enumerate(self.good) if not good}
        return [TokenRow(one.ids, after(len(one.ids), len(one.ids))) if row in bad else one for one, row in found]

    def dataset(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> tuple[Dataset, Lost]:
        """Returns rows as TRL's trainers read and cut them, with the index of each in ``row``, and what is lost."""
        lost = self.fitted(tokenizer, max_length)[1]
        kept = self._kept(lost)
        names = ("completion",) if self.good else ("chosen", "rejected")
        columns = {name: [self.answers[row][at] for row in kept] for at, name in enumerate(names)}
        columns |= {"label": [self.good[row] for row in kept]} if self.good else {}
        columns |= {"chat_template_kwargs": [dict(self.template)] * len(kept)} if self.template else {}
        prompts = [_begun_once(tokenizer, self.prompts[row]) for row in kept]
        return Dataset.from_dict({"row": kept, "prompt": prompts, **columns}), lost

    def fitted(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> tuple[list[TokenRow], Lost]:
        """Returns what is trained on with its first answer, whether good or bad, and what is lost by the longest."""
        tokens = [self.tokens(tokenizer, row) for row in range(len(self))]
        longest = [max(answers, key=lambda answer: len(answer.ids)) for answers in tokens]
        lost = fit(longest, max_length, self.truncate, where=self.where)[1]
        first = (tokens[row][0] for row in self._kept(lost))
        return [TokenRow(one.ids[:max_length], one.learned[:max_length]) for one in first], lost

    def _kept(self, lost: Lost) -> list[int]:
        return [number - 1 for number in kept_numbers(len(self), lost)]

    def _encoded(self, tokenizer: PreTrainedTokenizerBase, text: Text, where: str, *, answered: bool) -> list[int]:
        if isinstance(text, str):
            end = tokenizer.eos_token or ""
            ended = text + (end if answered and not text.endswith(end) else "")
            return once(tokenizer, tokenizer([ended], verbose=False)["input_ids"])[0]
        turns = {"add_generation_prompt": not answered, "tokenize": True, "return_dict": True, **self.template}
        try:
            return list(tokenizer.apply_chat_template(list(text), **turns)["input_ids"])
        except REFUSALS as error:
            got, wanted = f"messages that the chat template does not take ({error})", "a chat template for them"
            next_step = "Set task.chat_template, such as chatml, or correct the row."
            raise DataError(where, got=got, wanted=wanted, next_step=next_step) from error


def _begun_once(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> Text:
    """Returns a prompt for TRL, without the token that the tokenizer puts before every text."""
    if not isinstance(prompt, str) or once(tokenizer, rows := tokenizer([prompt], verbose=False)["input_ids"]) == rows:
        return prompt
    return prompt.removeprefix(str(tokenizer.bos_token))


def preferences(
    rows: Sequence[Row],
    *,
    answers: Sequence[str],
    prompt: str | None = None,
    label: str | None = None,
    options: FormatOptions | None = None,
    where: str,
) -> Preferences:
    """Reads rows of judged answers by templates of them: of the chosen and the rejected, or of the single one.

    A prompt of None takes the field ``prompt``, or what both answers begin with; ``label`` is the template of whether
    the single answer is good, true or false.

    Raises:
        DataError: A field is missing or of another form, no pair differs, or all labels are the same.
    """
    read, good, same = [], [], []
    for number, row in enumerate(rows, start=1):
        place = f"{where} row {number}"
        asked = prompt or ("{prompt}" if row.get("prompt") is not None else None)
        given = [
            template and text_or_messages(pick(template, row, where=place), options or FormatOptions(), where=place)
            for template in (asked, *answers)
        ]
        if len(given) == 3 and given[1] == given[2]:
            same.append(str(number))
            continue
        read.append(_split(given[0], given[1:], place))
        if label is not None:
            good.append(pick(label, row, where=place))
            if not isinstance(good[-1], bool):
                wanted, next_step = (
                    "true for a good answer, false for a bad one",
                    "Write it so, without quotes, in JSONL.",
                )
                raise DataError(f"{place}, label", got=repr(good[-1]), wanted=wanted, next_step=next_step)
    if not read or (label and len(set(good)) < 2):
        raise DataError(
            where,
            got=f"{len(rows)} rows, all " + (f"labelled {str(good[0]).lower()}" if good else "with equal answers"),
            wanted="good and bad answers" if label else "pairs of which one answer is better",
            next_step=f"Check {label or ' and '.join(answers)} in the rows.",
        )
    if same:
        counts = where, len(same), len(rows), named(same)
        _log.warning("%s: %d of %d pairs have equal answers and are left out (rows %s)", *counts)
    prompts, found = zip(*read, strict=True)
    return Preferences(prompts, tuple(map(tuple, found)), tuple(good), where)


def plain(text: Text) -> str:
    """Returns a text, or the contents of messages one below the other."""
    return text if isinstance(text, str) else "\n".join(message["content"] or "" for message in text)


def _split(prompt: Text | None, answers: Sequence[Text], where: str) -> tuple[Text, Sequence[Text]]:
    """Returns prompt and answers, both texts or both messages; answers may be whole conversations."""
    if any(isinstance(part, tuple) for part in (prompt, *answers)):
        answers = [({"role": "assistant", "content": one},) if isinstance(one, str) else one for one in answers]
        prompt = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
        if all(answer[0]["role"] != "assistant" for answer in answers):
            prompt = None
            if len(answers) == 1:
                prompt, answers = answers[0][:-1], [answers[0][-1:]]
    if prompt is None and len(answers) == 2 and all(answers):
        found = extract_prompt({"chosen": answers[0], "rejected": answers[1]})
        prompt, answers = found["prompt"], [found["chosen"], found["rejected"]]
    for role in {answer[0]["role"] for answer in answers if answer and not isinstance(answer, str)} - {"assistant"}:
        wanted, next_step = "answers that an assistant begins", "Move what is read into the prompt, or remove the row."
        raise DataError(where, got=f"an answer that begins with {role}", wanted=wanted, next_step=next_step)
    if prompt and all(answers):
        return prompt, answers
    got = "an empty answer" if prompt else "no prompt"
    wanted = "a prompt, in the field `prompt` or as what both answers begin with, and answers after it"
    raise DataError(where, got=got, wanted=wanted, next_step="Add it, name its field (task.prompt), or remove the row.")

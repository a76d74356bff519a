"""Answers that people judged, for TRL's DPO and KTO trainers: pairs of which one is better, or good and bad ones.

Prompts and answers are texts or messages. Where rows have no prompt, it is what both answers of a pair begin with.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError, named
from keeptune.data.calibration import after
from keeptune.data.completions import common_start
from keeptune.data.examples import LanguageExamples, Lost, TokenRow, Truncate, fit
from keeptune.data.sources import Row
from keeptune.data.templates import pick

_log = logging.getLogger(__name__)
Text = Any  # a text, or a list of messages


@dataclass(frozen=True, slots=True)
class Preferences(LanguageExamples):
    """Prompts with judged answers.

    Laws: tokens are those of TRL's trainers; statistics see the chosen answer of a pair, and of single ones the good.

    Args:
        prompts: Each a text or messages.
        answers: Of each prompt the chosen and the rejected answer, or a single one.
        good: Whether the single answer is good; empty for pairs.
        where: The recipe key, for error messages.
        truncate: Whether examples that are too long lose their right end, or are left out.
    """

    prompts: tuple[Text, ...]
    answers: tuple[tuple[Text, ...], ...]
    good: tuple[bool, ...] = ()
    where: str = "task.train"
    truncate: Truncate = "right"

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """The content key of prompts, answers and judgements."""
        return content_key([self.prompts, self.answers, self.good])

    @property
    def read_texts(self) -> Sequence[str]:
        """Each prompt with its first answer as one text."""
        return [plain(prompt) + plain(answers[0]) for prompt, answers in zip(self.prompts, self.answers, strict=True)]

    def tokens(self, tokenizer: PreTrainedTokenizerBase, row: int) -> list[TokenRow]:
        """Returns a prompt with each of its answers, which begin at the same place and are learned.

        Raises:
            DataError: The tokenizer has no chat template for messages, or its template refuses them.
        """
        prompt, place = self.prompts[row], f"{self.where} row {row + 1}"
        read = _encoded(tokenizer, prompt, place, answered=False)
        whole = [_encoded(tokenizer, prompt + answer, place, answered=True) for answer in self.answers[row]]
        start = min(common_start(read, ids) for ids in whole)
        return [TokenRow(tuple(ids), after(start, len(ids))) for ids in whole]

    def token_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int] | None = None) -> list[TokenRow]:
        """Returns each prompt with its chosen or its single answer; of a bad one nothing is learned."""
        wanted = range(len(self)) if rows is None else rows
        found = {row: self.tokens(tokenizer, row)[0] for row in wanted}
        bad = {row for row in wanted if self.good and not self.good[row]}
        return [TokenRow(one.ids, (False,) * len(one.ids)) if row in bad else one for row, one in found.items()]

    def dataset(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> tuple[Dataset, Lost]:
        """Returns rows as TRL's trainers read and cut them, with the index of each in ``row``, and what is lost."""
        tokens = [self.tokens(tokenizer, row) for row in range(len(self))]
        longest = [max(answers, key=lambda answer: len(answer.ids)) for answers in tokens]
        lost = fit(longest, max_length, self.truncate, where=self.where)[1]
        out = {number for reason, own in lost.items() if reason.startswith("left out") for number in own}
        kept = [row for row in range(len(self)) if row + 1 not in out]
        names = ("completion",) if self.good else ("chosen", "rejected")
        columns = {name: [self.answers[row][at] for row in kept] for at, name in enumerate(names)}
        columns |= {"label": [self.good[row] for row in kept]} if self.good else {}
        return Dataset.from_dict({"row": kept, "prompt": [self.prompts[row] for row in kept], **columns}), lost


def preferences(
    rows: Sequence[Row], *, prompt: str | None, answers: Sequence[str], label: str | None = None, where: str
) -> Preferences:
    """Reads rows of judged answers.

    Args:
        rows: The rows.
        prompt: Template of the prompt; None takes the field ``prompt``, or what both answers begin with.
        answers: Templates of the chosen and the rejected answer, or of the single one.
        label: Template of whether the single answer is good, true or false.
        where: The recipe key, for error messages.

    Raises:
        DataError: A field is missing or of another form, no pair differs, or all labels are the same.
    """
    read: list[tuple[Text, Sequence[Text]]] = []
    good, same = [], []
    for number, row in enumerate(rows, start=1):
        place = f"{where} row {number}"
        found = [_text(pick(answer, row, where=place), f"{place} {answer}") for answer in answers]
        if len(found) == 2 and found[0] == found[1]:
            same.append(str(number))
            continue
        template = prompt or ("{prompt}" if row.get("prompt") is not None else None)
        asked = None if template is None else _text(pick(template, row, where=place), f"{place} {template}")
        read.append(_split(asked, found, place))
        if label is not None:
            good.append(_judged(pick(label, row, where=place), place))
    if not read or (good and len(set(good)) < 2):
        raise DataError(
            where,
            got=f"{len(rows)} rows, all " + (f"labelled {str(good[0]).lower()}" if good else "with equal answers"),
            wanted="good and bad answers" if label else "pairs of which one answer is better",
            next_step=f"Check {label if label else ' and '.join(answers)} in the rows.",
        )
    if same:
        counts = where, len(same), len(rows), named(same)
        _log.warning("%s: %d of %d pairs have equal answers and are left out (rows %s)", *counts)
    prompts, given = zip(*read, strict=True)
    return Preferences(prompts, tuple(map(tuple, given)), tuple(good), where)


def plain(text: Text) -> str:
    """Returns a text, or the contents of messages one below the other."""
    return text if isinstance(text, str) else "\n".join(str(message.get("content") or "") for message in text)


def _text(value: Any, where: str) -> Text:
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_message, value))):
        return value
    wanted = 'a text, or messages: [{"role": "user", "content": "..."}, ...]'
    raise DataError(where, got=repr(value), wanted=wanted, next_step="Correct the row, or name another field.")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _judged(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    wanted = "true for a good answer, false for a bad one"
    raise DataError(f"{where} label", got=repr(value), wanted=wanted, next_step="Write true or false, without quotes.")


def _split(prompt: Text | None, answers: Sequence[Text], where: str) -> tuple[Text, Sequence[Text]]:
    """Returns prompt and answers, both texts or both messages; answers may be whole conversations."""
    if any(isinstance(part, list) for part in (prompt, *answers)):
        answers = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in answers]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if all(answer[0]["role"] != "assistant" for answer in answers):
            prompt = None
            if len(answers) == 1:
                prompt, answers = answers[0][:-1], [answers[0][-1:]]
    if prompt is None and len(answers) == 2:
        found = extract_prompt({"chosen": answers[0], "rejected": answers[1]})
        prompt, answers = found["prompt"], [found["chosen"], found["rejected"]]
    if prompt and all(answers):
        return prompt, answers
    raise DataError(
        where,
        got="an empty answer" if prompt else "no prompt",
        wanted="a prompt, in the field `prompt` or as what both answers begin with, and answers after it",
        next_step="Add the field, name another one with task.prompt, or remove the row.",
    )


def _encoded(tokenizer: PreTrainedTokenizerBase, text: Text, where: str, *, answered: bool) -> list[int]:
    if isinstance(text, str):
        end = tokenizer.eos_token or ""
        return list(tokenizer(text + (end if answered and not text.endswith(end) else ""), verbose=False)["input_ids"])
    try:
        read = tokenizer.apply_chat_template(text, add_generation_prompt=not answered, tokenize=True, return_dict=True)
    except (ValueError, TemplateError) as error:
        raise DataError(
            where,
            got=f"messages that the chat template does not take ({error})",
            wanted="a tokenizer with a template for them",
            next_step="Set task.chat_template, such as chatml, or correct the row.",
        ) from error
    return list(read["input_ids"])

"""Knowledge data: sets of whole texts, or of prompts with completions, joined into one calibration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import DataError
from keeptune.data.calibration import Calibration, tokenize_calibration
from keeptune.data.completions import tokenize_completions
from keeptune.data.sources import Row
from keeptune.data.templates import render_all

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnowledgeSet:
    """A set of knowledge examples.

    Args:
        where: The recipe key, for error messages.
        completions: The whole texts, or what follows each prompt.
        prompts: What the model only reads; None for whole texts, all of which it is to keep.
        chat: Prompts are the user's turn of a chat, where the tokenizer has a chat template: for statistics.
    """

    where: str
    completions: tuple[str, ...]
    prompts: tuple[str, ...] | None = None
    chat: bool = False

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each example as a prompt and its completion; the prompt of a whole text is empty."""
        return list(zip(self.prompts or ("",) * len(self.completions), self.completions, strict=True))

    @property
    def texts(self) -> list[str]:
        """Each example as one text, as the model reads it."""
        return [prompt + completion for prompt, completion in self.pairs]

    def calibration(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Calibration:
        """Returns the tokens of the set, with the length of each prompt where there are prompts.

        No end-of-text token is appended to a completion: what ends an answer is a custom of a task, not knowledge.
        Examples whose prompt fills ``max_length`` are left out, which is logged.

        Raises:
            DataError: There is no example, an example is empty, or none has room for its completion.
        """
        if self.prompts is None:
            return tokenize_calibration(self.completions, tokenizer, max_length=max_length, where=self.where)
        for number, completion in enumerate(self.completions, start=1):
            if not completion.strip():
                raise DataError(
                    f"{self.where} example {number}",
                    got="an empty completion",
                    wanted="a completion that is not empty",
                    next_step="Remove the row or change the template.",
                )
        prompts = _user_turns(self.prompts, tokenizer, self.where) if self.chat else self.prompts
        tokens = tokenize_completions(prompts, self.completions, tokenizer, max_length=max_length, where=self.where)
        dropped = len(self.completions) - len(tokens.sequences)
        if dropped:
            _log.warning("%s: %d prompts fill %d tokens and are left out", self.where, dropped, max_length)
        return tokens


def knowledge_set(
    rows: Sequence[Row],
    *,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    chat: bool = False,
    where: str,
) -> KnowledgeSet:
    """Renders the rows of a set by the template of whole texts, or else those of prompts and completions."""
    if text is not None:
        return KnowledgeSet(where, render_all(text, rows, where=where))
    completions = render_all(completion or "", rows, where=where)
    return KnowledgeSet(where, completions, render_all(prompt or "", rows, where=where), chat)


def knowledge_of(examples: Sequence[str] | Sequence[tuple[str, str]]) -> KnowledgeSet:
    """Returns a set of texts, or of pairs of a prompt and its completion; both together raise DataError."""
    texts = tuple(example for example in examples if isinstance(example, str))
    pairs = [example for example in examples if not isinstance(example, str)]
    if texts and pairs or any(len(pair) != 2 for pair in pairs):
        raise DataError(
            "knowledge",
            got="examples of different forms",
            wanted="texts only, or pairs of a prompt and its completion only",
            next_step="Write a text without a prompt as the pair of an empty prompt and the text.",
        )
    if not pairs:
        return KnowledgeSet("knowledge", texts)
    prompts, completions = zip(*pairs, strict=True)
    return KnowledgeSet("knowledge", completions, prompts)


def joined_knowledge(parts: Sequence[Calibration]) -> Calibration:
    """Returns the tokens of all sets in order; which text is of which set is kept.

    Of a set without prompts all tokens are learned, as if its prompts were empty.
    """
    if len(parts) == 1:
        return parts[0]
    whole = Calibration(
        tuple(ids for part in parts for ids in part.sequences),
        parts[0].pad_id,
        sets=tuple(len(part.sequences) for part in parts),
    )
    if all(part.prompts is None for part in parts):
        return whole
    starts = tuple(start for part in parts for start in part.prompts or (0,) * len(part.sequences))
    return replace(whole, prompts=starts)


def _user_turns(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, ...]:
    if tokenizer.chat_template is None:
        _log.info("%s: the tokenizer has no chat template: prompts are read as they are", where)
        return tuple(prompts)
    # Most templates begin with the token that the tokenizer puts before every text anyway.
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = (str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) for turn in turns)
    return tuple(text.removeprefix(tokenizer.bos_token) if begins else text for text in texts)

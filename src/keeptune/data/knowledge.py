"""Knowledge data: sets of whole texts, or of prompts with completions, joined into one calibration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import DataError
from keeptune.data.calibration import Calibration, tokenize_calibration
from keeptune.data.completions import tokenize_pairs
from keeptune.data.sources import Row
from keeptune.data.templates import render

__all__ = ["KnowledgeSet", "joined_knowledge", "knowledge_calibration", "knowledge_of", "knowledge_set"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnowledgeSet:
    """A set of knowledge examples.

    Args:
        where: The recipe key, for error messages.
        completions: The whole texts, or what follows each prompt.
        prompts: What the model only reads; None for whole texts, all of which it is to keep.
        chat: A chat's user says the prompts, where the tokenizer has a chat template: for statistics.
    """

    where: str
    completions: tuple[str, ...]
    prompts: tuple[str, ...] | None = None
    chat: bool = False

    @property
    def texts(self) -> list[str]:
        """Each example as one text, as the model reads it."""
        if self.prompts is None:
            return list(self.completions)
        return [prompt + completion for prompt, completion in zip(self.prompts, self.completions, strict=True)]


def knowledge_set(
    rows: Sequence[Row],
    *,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    chat: bool = False,
    where: str,
) -> KnowledgeSet:
    """Render the rows of a set.

    Args:
        rows: The rows.
        text: Template of whole texts; else:
        prompt: Template of the prompts.
        completion: Template of the completions, usually starting with a space.
        chat: Hand prompts over in the tokenizer's chat template, where it has one.
        where: The recipe key, for error messages.

    Returns:
        The set.

    Raises:
        DataError: A row lacks a field.
    """

    def filled(template: str) -> tuple[str, ...]:
        return tuple(render(template, row, where=f"{where} row {number}") for number, row in enumerate(rows, start=1))

    if text is not None:
        return KnowledgeSet(where, filled(text))
    return KnowledgeSet(where, filled(completion or ""), filled(prompt or ""), chat)


def knowledge_of(examples: Sequence[str] | Sequence[tuple[str, str]]) -> KnowledgeSet:
    """Make a set of texts, or of pairs of a prompt and its completion.

    Args:
        examples: Texts, or pairs.

    Returns:
        The set.

    Raises:
        DataError: There are both.
    """
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
    return KnowledgeSet("knowledge", tuple(said for _, said in pairs), tuple(read for read, _ in pairs))


def knowledge_calibration(data: KnowledgeSet, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Calibration:
    """Tokenise a set.

    No end-of-text token is appended to a completion: what ends an answer is a custom of a task, not knowledge.

    Args:
        data: The set.
        tokenizer: The model's tokenizer.
        max_length: Longer examples are cut to this many tokens.

    Returns:
        The tokens; with the length of each prompt where there are prompts. Examples whose prompt fills
        ``max_length`` are left out, which is logged.

    Raises:
        DataError: There is no example, an example is empty, or none has room for its completion.
    """
    if data.prompts is None:
        return tokenize_calibration(data.completions, tokenizer, max_length=max_length, where=data.where)
    for number, said in enumerate(data.completions, start=1):
        if not said.strip():
            raise DataError(
                f"{data.where} example {number}",
                got="an empty completion",
                wanted="a completion that is not empty",
                next_step="Remove the row or change the template.",
            )
    prompts = _said_by_user(data.prompts, tokenizer, data.where) if data.chat else data.prompts
    pairs = tokenize_pairs(prompts, data.completions, tokenizer, max_length=max_length)
    if not pairs:
        raise DataError(
            data.where,
            got=f"{len(data.completions)} examples without a completion within {max_length} tokens",
            wanted="at least one",
            next_step="Raise max_length or shorten the prompts.",
        )
    if len(pairs) < len(data.completions):
        dropped = len(data.completions) - len(pairs)
        _log.warning("%s: %d prompts fill %d tokens and are left out", data.where, dropped, max_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Calibration(tuple(ids for ids, _ in pairs), int(pad), tuple(start for _, start in pairs))


def _said_by_user(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, ...]:
    if tokenizer.chat_template is None:
        _log.info("%s: the tokenizer has no chat template: prompts are read as they are", where)
        return tuple(prompts)
    # Most templates begin with the token that the tokenizer puts before every text anyway.
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    said = (
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
        for prompt in prompts
    )
    return tuple(text.removeprefix(tokenizer.bos_token) if begins else text for text in said)


def joined_knowledge(parts: Sequence[Calibration]) -> Calibration:
    """Pool the tokens of sets; which text is of which set is kept.

    Of a set without prompts all tokens are learned, as if its prompts were empty.

    Args:
        parts: The sets, one or more.

    Returns:
        Their texts in order.
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

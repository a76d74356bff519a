"""Texts, prompts with completions, and conversations: what of them is learned; mixtures of them, such as replay."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError, RecipeError, named
from keeptune.data.calibration import Calibration, after, once, tokenize_calibration
from keeptune.data.chat_template import ChatOptions, ChatTemplate, template_text
from keeptune.data.examples import Conversation, LanguageExamples, Mixed, TokenRow, Truncate, draw_rows
from keeptune.data.sources import Row, refuse_empty, render_all

_log = logging.getLogger(__name__)
Knowledge = LanguageExamples | Sequence[str] | Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class TaskExamples(LanguageExamples):
    """Rendered prompts, and the completions that a model learns to write; or whole texts.

    Args:
        prompts: What the model only reads; None for whole texts, all of which is learned.
        completions: The whole texts, or what follows each prompt.
        end: Whether the end-of-text token is learned after each: a task's answers end, what ends a text of knowledge
            is no knowledge.
        chat: Prompts are the user's turn of a chat, where the tokenizer has a chat template.
        where: The recipe key, for error messages.
        truncate: What examples that are too long lose.
    """

    prompts: tuple[str, ...] | None
    completions: tuple[str, ...]
    end: bool = True
    chat: bool = False
    where: str = "task.train"
    truncate: Truncate = "right"

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def fingerprint(self) -> str:
        """The content key of the texts, and of how they are read where that is not a task's way."""
        unusual = [] if self.end and not self.chat else [self.end, self.chat]
        return content_key([self.prompts, self.completions, *unusual])

    @property
    def read_texts(self) -> Sequence[str]:
        """Each example as one text."""
        return [prompt + completion for prompt, completion in self._pairs(range(len(self)))]

    def end_of(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns what is learned after each example; empty for nothing."""
        return (tokenizer.eos_token or "") if self.end else ""

    def token_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int] | None = None) -> list[TokenRow]:
        """Returns each prompt with its completion as one text; a token that spans the end of the prompt is learned."""
        wanted = range(len(self)) if rows is None else rows
        if not wanted:
            return []
        pairs = self._pairs(wanted)
        prompts = [prompt for prompt, _ in pairs]
        if self.chat:
            prompts = _user_turns(prompts, tokenizer, self.where)
        end = self.end_of(tokenizer)
        ended = (any(text.endswith(end) for text in (completion, completion.rstrip())) for _, completion in pairs)
        ends = (completion + ("" if has else end) for (_, completion), has in zip(pairs, ended, strict=True))
        texts = [prompt + text for prompt, text in zip(prompts, ends, strict=True)]
        whole = once(tokenizer, tokenizer(texts, verbose=False)["input_ids"])
        if self.prompts is None:
            return [TokenRow(tuple(ids), after(0, len(ids))) for ids in whole]
        read = once(tokenizer, tokenizer(prompts, verbose=False)["input_ids"])
        starts = [common_start(start, ids) for start, ids in zip(read, whole, strict=True)]
        return [TokenRow(tuple(ids), after(start, len(ids))) for ids, start in zip(whole, starts, strict=True)]

    def _calibration(self, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Calibration:
        if self.prompts is None and not self.end:  # cut by the tokenizer, which may end each text with a special token
            texts = [self.completions[row] for row in rows]
            return tokenize_calibration(texts, tokenizer, max_length=max_length, where=self.where)
        return LanguageExamples._calibration(self, rows, tokenizer, max_length)

    def _pairs(self, rows: Sequence[int]) -> list[tuple[str, str]]:
        return [("" if self.prompts is None else self.prompts[row], self.completions[row]) for row in rows]


def task_examples(rows: Sequence[Row], *, prompt: str, completion: str, where: str) -> TaskExamples:
    """Renders the rows of a task by the templates of prompts and of completions, usually starting with a space.

    Raises:
        DataError: A template does not fit the rows, or every completion is empty.
    """
    prompts, completions = (render_all(template, rows, where=where) for template in (prompt, completion))
    check_answers(completions, where=where)
    return TaskExamples(prompts, completions, where=where)


def knowledge_set(
    rows: Sequence[Row],
    *,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    chat: bool = False,
    where: str,
) -> TaskExamples:
    """Renders the rows of a set by the template of whole texts, or else those of prompts and completions.

    Raises:
        DataError: A template does not fit the rows, or a completion is empty.
    """
    if text is not None:
        return TaskExamples(None, render_all(text, rows, where=where), end=False, where=where)
    completions = render_all(completion or "", rows, where=where)
    refuse_empty(completions, where, "completion", "example")
    return TaskExamples(render_all(prompt or "", rows, where=where), completions, end=False, chat=chat, where=where)


def knowledge_of(examples: Knowledge, where: str = "knowledge") -> LanguageExamples:
    """Returns a set of texts, or of pairs of a prompt and its completion; both together raise DataError."""
    if isinstance(examples, LanguageExamples):
        return examples
    texts = tuple(example for example in examples if isinstance(example, str))
    pairs = [example for example in examples if not isinstance(example, str)]
    if texts and pairs or any(len(pair) != 2 for pair in pairs):
        raise DataError(
            where,
            got="examples of different forms",
            wanted="texts only, or pairs of a prompt and its completion only",
            next_step="Write a text without a prompt as the pair of an empty prompt and the text.",
        )
    if not pairs:
        return TaskExamples(None, texts, end=False, where=where)
    prompts, completions = zip(*pairs, strict=True)
    refuse_empty(completions, where, "completion", "example")
    return TaskExamples(prompts, completions, end=False, where=where)


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
    if all(part.learned is None for part in parts):
        return whole
    masks = (part.learned or tuple(after(0, len(ids)) for ids in part.sequences) for part in parts)
    return replace(whole, learned=tuple(mask for part in masks for mask in part))


@dataclass(frozen=True, slots=True)
class Conversations(LanguageExamples):
    """Conversations, and what is learned of them, through which chat template.

    ``plain`` is what a model without a chat template reads instead; None for conversations that need one.
    """

    conversations: tuple[Conversation, ...]
    options: ChatOptions = ChatOptions()
    where: str = "task.train"
    truncate: Truncate = "right"
    plain: TaskExamples | None = None

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def fingerprint(self) -> str:
        """The content key of the messages and the options, with the text of a template that is not the tokenizer's."""
        own = self.options.chat_template
        template = own and template_text(own, where=self.where)
        plain = [] if self.plain is None else [self.plain.fingerprint]
        return content_key([self.conversations, replace(self.options, chat_template=template), *plain])

    @property
    def read_texts(self) -> Sequence[str]:
        """What the messages say, one after the other."""
        return ["\n".join(str(m.get("content") or "") for m in one.messages) for one in self.conversations]

    def token_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int] | None = None) -> list[TokenRow]:
        """Returns conversations as tokens; what of them cannot be learned is logged.

        Raises:
            DataError: There is no chat template, it refuses a conversation, or nothing of all of them can be learned.
        """
        if self.plain is not None and not (tokenizer.chat_template or self.options.chat_template):
            return self.plain.token_rows(tokenizer, rows)
        chat = ChatTemplate(tokenizer, self.options, where=self.where)
        numbers = range(len(self)) if rows is None else rows
        read = [chat.row(self.conversations[n], where=f"{self.where} row {n + 1}") for n in numbers]
        lost = [(n + 1, reason) for n, row in zip(numbers, read, strict=True) for reason in row.lost]
        if lost and not any(any(row.learned) for row in read):
            raise DataError(
                f"{self.where} row {lost[0][0]}",
                got=f"no answer that the chat template shows as it asks for it: {lost[0][1]}",
                wanted="a template that shows an answer right after what asks for it",
                next_step="Set chat_template_kwargs (enable_thinking: false), write the thoughts into the answers, or "
                "set chat_template.",
            )
        for told in chat.notes():
            _log.warning("%s: %s", self.where, told)
        if lost:
            _log.warning(
                "%s: %d answers are not learned, such as in row %d: %s. With `turns: each` every answer is an example "
                "of its own, shown as it is asked for",
                *(self.where, len(lost), *lost[0]),
            )
        after = sum(self.conversations[n].messages[-1]["role"] not in self.options.roles_to_train for n in numbers)
        if after:
            _log.warning("%s: %d conversations go on after what is learned: the rest is left out", self.where, after)
        return [row._replace(lost=()) for row in read]


def conversation_examples(
    conversations: Sequence[Conversation],
    options: ChatOptions,
    *,
    where: str = "task.train",
    truncate: Truncate = "right",
) -> Conversations:
    """Returns conversations as examples; with ``turns: each`` one for each message that is to be learned."""
    if options.turns == "each":
        conversations = [
            replace(one, messages=one.messages[: i + 1])
            for one in conversations
            for i in options.wanted(one.messages) or [len(one.messages)]
        ]
        options = replace(options, turns="last")
    return Conversations(tuple(conversations), options, where, truncate)


def check_answers(completions: Sequence[str], *, where: str) -> None:
    """Counts and logs empty completions; a DataError says that all are empty."""
    empty = [number for number, text in enumerate(completions, start=1) if not text.strip()]
    if len(empty) == len(completions):
        raise DataError(
            where,
            got=f"{len(completions)} rows, all with empty completions",
            wanted="completions to learn",
            next_step="Check the field that holds them: the one that the format or task.completion names.",
        )
    if empty:
        counts = where, len(empty), len(completions), named(list(map(str, empty)), 5)
        _log.warning("%s: %d of %d completions are empty: only their end is learned (rows %s)", *counts)


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens two texts begin with: one may span the end of a prompt, and then it is learned."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _user_turns(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, where: str) -> list[str]:
    if tokenizer.chat_template is None:
        _log.info("%s: the tokenizer has no chat template: prompts are read as they are", where)
        return list(prompts)
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) for turn in turns]


def replayed(task: int, share: float) -> int:
    """Returns the number of knowledge examples that make up a share of the whole; at least 1 for a share above 0.

    Law: ``replayed(n, s) / (n + replayed(n, s))`` is s, to the nearest example.

    >>> replayed(95, 0.05), replayed(10, 0.0), replayed(3, 0.01)
    (5, 0, 1)
    """
    return max(round(task * share / (1 - share)), 1) if share > 0 else 0


def with_replay(
    task: LanguageExamples, knowledge: Sequence[LanguageExamples], share: float, seed: int
) -> LanguageExamples:
    """Returns a task with a share of knowledge mixed in, evenly spread; each set in proportion to its size.

    Knowledge is drawn without replacement, and again from the start when all of it was drawn; the examples of the task
    keep their order. After texts of knowledge, too, the end of text is learned.
    """
    wanted = replayed(len(task), share)
    if not wanted:
        return task
    held = [(number, row) for number, part in enumerate(knowledge, start=1) for row in range(len(part))]
    drawn: list[int] = []
    rounds = 0
    while len(drawn) < wanted:
        drawn += draw_rows(len(held), wanted - len(drawn), seed + rounds)
        rounds += 1
    if rounds > 1:
        _log.warning(
            "replay: %d of %d knowledge examples are wanted: they come up to %d times", wanted, len(held), rounds
        )
    total = len(task) + wanted
    places = {(2 * number + 1) * total // (2 * wanted): held[row] for number, row in enumerate(drawn)}
    rest = iter(range(len(task)))
    order = tuple(places[place] if place in places else (0, next(rest)) for place in range(total))
    _log.info("replay: %d of %d training examples are knowledge", wanted, total)
    ended = (replace(part, end=True) if isinstance(part, TaskExamples) else part for part in knowledge)
    return Mixed((task, *ended), order)


def mixture(parts: Sequence[LanguageExamples], weights: Sequence[float | None], seed: int) -> Mixed:
    """Returns the examples of several files in a drawn order: all of them, or with weights as many as these say.

    Law: with weights the counts are in their ratio, to the nearest example (at least 1), and as large as they can be
    without an example that comes twice; which of a file are taken is drawn with the seed.

    Raises:
        RecipeError: Some files have weights and some have none.
    """
    given = [weight for weight in weights if weight is not None]
    counts = [len(part) for part in parts]
    if 0 < len(given) < len(parts):
        got, wanted = f"{len(given)} weights for {len(parts)} files", "a weight for each file, or none"
        raise RecipeError("task.train", got=got, wanted=wanted, next_step="Complete the weights, or remove them.")
    if given:
        scale = min(count / weight for count, weight in zip(counts, given, strict=True))
        counts = [max(round(scale * weight), 1) for weight in given]
    taken = [
        (number, row)
        for number, (part, count) in enumerate(zip(parts, counts, strict=True))
        for row in draw_rows(len(part), count, seed + number)
    ]
    told = (f"{count} of {len(part)} from {part.where}" for count, part in zip(counts, parts, strict=True))
    _log.info("task.train: %s", ", ".join(told))
    return Mixed(tuple(parts), tuple(taken[place] for place in draw_rows(len(taken), len(taken), seed)))

"""Conversations as examples: a model learns the answers in them, as a server asks for these."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError
from keeptune.data.chat_template import ChatOptions, ChatTemplate, template_text
from keeptune.data.completions import TaskExamples
from keeptune.data.examples import Conversation, LanguageExamples, TokenRow, Truncate

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Conversations(LanguageExamples):
    """Conversations, and what is learned of them.

    Args:
        conversations: The messages.
        options: What is learned, and through which chat template.
        where: The recipe key, for error messages.
        truncate: What examples that are too long lose.
        plain: What a model without a chat template reads instead; None for conversations that need one.
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

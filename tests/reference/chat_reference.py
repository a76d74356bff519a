"""What of a conversation is learned, found in the rendering by searching for the texts of the answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.data.chat_template import ChatTemplate


def header_of_answers(chat: ChatTemplate) -> str:
    """The text that the template puts before an answer that is asked for."""
    asked = [{"role": "user", "content": "Q1"}]
    plain = chat.text(asked)
    whole = chat.text(asked, ask=True)
    return whole[len(os.path.commonprefix([plain, whole])) :]


def learned_texts(rendering: str, answers: Sequence[str], header: str, end: str) -> list[str]:
    """For each answer, what stands between the header before it and the end of its turn, where it comes right after."""
    rendering, header, found = bare(rendering), bare(header), []
    for answer in map(bare, answers):
        place = rendering.index(answer)
        start = rendering.rfind(header, 0, place) + len(header) if header else place
        stop = place + len(answer)
        found.append(rendering[start:stop] + (end if rendering.startswith(end, stop) else ""))
    return found


def spans(chat: ChatTemplate, ids: Sequence[int], learned: Sequence[bool]) -> list[str]:
    """The texts of runs of learned tokens."""
    texts: list[list[int]] = [[]]
    for token, own in zip(ids, learned, strict=True):
        if own:
            texts[-1].append(token)
        elif texts[-1]:
            texts.append([])
    return [bare(str(chat.tokenizer.decode(text))) for text in texts if text]


def bare(text: str) -> str:
    """A text without white space: a small tokenizer puts some around each marker."""
    return "".join(text.split())


def user(content: str, **more: Any) -> Mapping[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content, **more}


def assistant(content: str | None, **more: Any) -> Mapping[str, Any]:
    """An answer."""
    return {"role": "assistant", "content": content, **more}

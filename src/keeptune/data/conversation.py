"""A conversation: messages by role, and the tools that the model may call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them, plain JSON objects.

    Args:
        messages: Each with ``role`` and ``content`` (text, or None beside ``tool_calls``); optional are ``tool_calls``,
            ``name``, ``tool_call_id``, ``reasoning_content``, and ``train``: False where a message is not learned.
        tools: JSON schemas of the functions that the model may call.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

"""The Modelfile of Ollama, and its template where the chat template is not the one that the base's file brings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from keeptune.core.errors import ExportError

_SAID = ("<<1>>", "<<2>>", "<<3>>")  # marks in place of what is said
_MARK = re.compile("<<[123]>>")


def modelfile(name: str, base: str | None, tokenizer: Any = None, bos: str = "") -> str:
    """Returns the Modelfile for a file in its folder.

    Args:
        name: ``adapter.gguf``, or the whole model.
        base: The GGUF file of the base; None for a whole model.
        tokenizer: Its chat template is written; None leaves the one that Ollama finds in the file.
        bos: What the server puts before a text by itself.
    """
    lines = [f"FROM ./{name}"] if base is None else [f"FROM {Path(base).absolute()}", f"ADAPTER ./{name}"]
    if tokenizer is not None:
        lines.append(f'TEMPLATE """{go_template(tokenizer, bos)}"""')
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Any, bos: str = "") -> str:
    """Returns a chat template in Ollama's language (Go's), read off conversations that the tokenizer renders.

    Law: with or without a system prompt, of users and answers in turn, it writes what the chat template writes.

    Raises:
        ExportError: What is said does not come back as it was.
    """
    turns = [{"role": role, "content": said} for role, said in zip(("user", "assistant", "user"), _SAID, strict=True)]
    start, to_answer, to_next, to_end = _between(tokenizer, turns, bos)
    user = _if('eq $last "assistant"', to_next, start)
    try:
        before, after, _ = _between(tokenizer, [{"role": "system", "content": _SAID[1]}, turns[0]], bos)
    except TemplateError:  # it takes no system prompt
        said = _if('eq .Role "user"', user, to_answer)
    else:
        user = _if('eq $last "system"', after, user)
        said = _if('eq .Role "system"', before, _if('eq .Role "user"', user, to_answer))
    return f'{{{{ $last := "" }}}}{{{{ range .Messages }}}}{said}{{{{ .Content }}}}{{{{ $last = .Role }}}}{{{{ end }}}}{to_end}'


def _if(condition: str, then: str, otherwise: str) -> str:
    return f"{{{{ if {condition} }}}}{then}{{{{ else }}}}{otherwise}{{{{ end }}}}"


def _between(tokenizer: Any, turns: list[dict[str, str]], bos: str) -> list[str]:
    """Returns what a chat template writes before, between and after what is said."""
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    parts = _MARK.split(text.removeprefix(bos))
    if len(parts) != len(turns) + 1:
        raise ExportError(
            "the chat template",
            got="a template that repeats or leaves out what is said",
            wanted="one that writes each message once",
            next_step="Write TEMPLATE in the Modelfile by hand, in Go's template language.",
        )
    return parts

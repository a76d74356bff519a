"""Chat templates are programs of strangers: each is tried in a process of its own, within limits, before it is used."""

import contextlib
import os
import signal
import warnings
from functools import cache
from typing import Any

import jinja2
import psutil  # type: ignore[import-untyped]
from transformers.utils.chat_template_utils import render_jinja_template

from keeptune.core.errors import DataError

REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_SECONDS, _MEMORY = 5, 2**30
_TURNS: list[Any] = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
_TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"properties": {}}}}]


def refuse_endless(tokenizer: Any, where: str) -> None:
    """Raises DataError where a tokenizer's chat template takes too much time or memory for a few words."""
    found = tokenizer.chat_template or ()
    if not all(map(_ends, found.values() if isinstance(found, dict) else [found] if found else ())):
        got = f"a chat template that takes more than {_SECONDS} s or {_MEMORY >> 30} GB for a few words"
        advice = "Correct it in the tokenizer's folder; a template that loops for ever may be an attack."
        raise DataError(where, got=got, wanted="one that ends", next_step=advice)


@cache
def _ends(template: str) -> bool:
    if not hasattr(os, "fork"):  # Windows
        return True
    import resource

    with warnings.catch_warnings(action="ignore"):  # that there are threads: the child needs none of them
        child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    try:
        limits = {resource.RLIMIT_AS: psutil.Process().memory_info().vms + _MEMORY, resource.RLIMIT_CPU: _SECONDS}
        for kind, most in limits.items():
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most, most) if hard == resource.RLIM_INFINITY else (min(most, hard), hard))
        signal.alarm(20 * _SECONDS)
        for turns in (_TURNS[1:2], _TURNS[1:], _TURNS):
            for tools in (None, _TOOLS):
                with contextlib.suppress(*REFUSALS):
                    render_jinja_template([turns], tools=tools, chat_template=template, add_generation_prompt=True)
    except MemoryError:
        os._exit(1)
    finally:
        os._exit(0)

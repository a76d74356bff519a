"""Secrets in texts: what looks like an access token, a password in an address, a value under a name of secrets."""

import os
import re

# By how it begins (a search for that takes no time), what follows.
_TOKENS = {
    **dict.fromkeys(("hf_", "api_org_", "ghp_", "gho_", "ghu_", "ghs_", "gsk_", "r8_"), "[A-Za-z0-9]{20,}"),
    **dict.fromkeys(("github_pat_", "glpat-", "xoxb-", "xoxp-", "nvapi-", "wandb_v1_", "AIza", "AKIA"), r"[\w-]{16,}"),
    "sk-": r"(?=[\w-]*\d)[\w-]{20,}",
    "eyJ": r"[\w-]{10,}\.[\w-]{10,}\.[\w-]*",
}
_ADDRESS = r"""://[^\s/:@"'\\]*:[^\s/@"'\\]+(?=@)"""
_WORDS = [form for word in ("key", "token", "secret", "password") for form in (word, word.upper(), word.title())]
_VALUE = r"""((?:\\*["'])?\s*[:=]\s*(?:\\*["'])?)(?!\d+\b)[^\s"'\\,;{}\[\]()<>]{8,}"""
_BEFORE = re.compile(r"(?:(?i:api|auth|access|hub|hf|wandb|secret|private|client)[_-]?|[A-Z]_)$")
_VARIABLES = re.compile("TOKEN|KEY|SECRET|PASSWORD")


def redacted(text: str) -> str:
    """Returns a text with ``***`` for each secret in it; those in the environment are known whatever they look like.

    >>> redacted("https://me:pass@host/v1?eos_token=</s>"), redacted('{"wandb_api_key": "0123456789abcdef"}')
    ('https://***@host/v1?eos_token=</s>', '{"wandb_api_key": "***"}')
    """
    for name, value in os.environ.items():
        if len(value) >= 16 and _VARIABLES.search(name) and "/" not in value and value in text:
            text = text.replace(value, "***")
    for begin, rest in _TOKENS.items():
        if begin in text:
            text = re.sub(rf"{begin}(?:(?<!\w{begin})|(?<=\\[nrt]{begin})){rest}", "***", text)  # in JSON after \\n too
    for word in _WORDS:
        if word in text:
            text = re.sub(word + _VALUE, _without_value, text)
    return re.sub(_ADDRESS, "://***", text)


def _without_value(match: re.Match[str]) -> str:
    word = match[0][: match.start(1) - match.start()]
    named = word.lower() == "password" or _BEFORE.search(match.string[max(match.start() - 9, 0) : match.start()])
    return f"{word}{match[1]}***" if named else match[0]

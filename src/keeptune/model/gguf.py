"""Base models in GGUF files: where Transformers finds them, and the errors that they can raise.

Transformers dequantises such a file when it loads it; what is trained on is an ordinary float model.
"""

from __future__ import annotations

from pathlib import Path

from transformers.integrations.gguf import GGUF_ARCHS
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.utils import is_gguf_available

from keeptune.core.errors import ModelError

_ARCHITECTURES = sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_ARCHS} - {"general", "tokenizer"})


def is_gguf(name: str) -> bool:
    """Returns whether a model's name is that of a GGUF file: ``folder/file.gguf``, or ``org/name/file.gguf``."""
    return name.lower().endswith(".gguf")


def place_of(name: str) -> tuple[str, dict[str, str]]:
    """Returns a folder or hub id, and where the model is a GGUF file its name there, as ``from_pretrained`` takes both.

    Args:
        name: A folder, a hub id, a GGUF file, or a hub id and a GGUF file in it.
    """
    path = Path(name).expanduser()
    if not is_gguf(name):
        return str(path) if name.startswith("~") else name, {}
    if path.is_file() or not _is_on_hub(name):
        return str(path.parent.absolute()), {"gguf_file": path.name}
    return "/".join(path.parts[:2]), {"gguf_file": "/".join(path.parts[2:])}


def _is_on_hub(name: str) -> bool:
    return name.count("/") >= 2 and not name.startswith((".", "/", "~"))


def check_gguf(name: str) -> None:
    """Checks that a GGUF file is there, or may be on the hub, and that what reads it is installed.

    Raises:
        ModelError: It is not.
    """
    if not Path(name).expanduser().is_file() and not _is_on_hub(name):
        raise ModelError(
            f"model {name}",
            got="no such file",
            wanted="a GGUF file, or one on the hub: org/name/file.gguf",
            next_step="Check the path; relative paths start at the current directory, then at the recipe's folder.",
        )
    if not is_gguf_available():
        raise ModelError(
            f"model {name}",
            got="no package gguf",
            wanted="the package that reads GGUF files",
            next_step="Install it: pip install 'keeptune[quantised]'.",
        )


def gguf_error(name: str, error: Exception) -> ModelError:
    """Returns the error to raise for a GGUF file that Transformers could not load."""
    text, wanted = str(error).strip().split("\n")[0], "a whole GGUF file of a causal language model"
    if "architecture" in text:
        wanted = f"an architecture that Transformers reads from GGUF: {', '.join(_ARCHITECTURES)}"
    return ModelError(
        f"model {name}",
        got=f"{type(error).__name__}: {text}",
        wanted=wanted,
        next_step="The file is cut or damaged, or of a type that Transformers cannot read: get it again, or take the "
        "model's folder of safetensors.",
    )

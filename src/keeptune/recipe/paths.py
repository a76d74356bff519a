"""Where a recipe's files and models are: beside it, in atlas, or on the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keeptune import atlas, data
from keeptune.core.errors import RecipeError
from keeptune.data import hub

_HERE = Path(data.__file__).parent / "general"
_GENERAL = (
    {"file": str(_HERE / "texts.jsonl"), "text": "{text}"},
    {"file": str(_HERE / "chats.jsonl"), "prompt": "{prompt}\n", "completion": "{completion}", "chat": True},
)
Fetch = Callable[[str], Path | str]  # from the name of a file on the hub to where it is, or to the name itself

_SECTIONS, _FILES = ("knowledge", "task", "evaluate"), ("file", "prompts", "train", "data")


def resolve_paths(values: Mapping[str, Any], folder: Path, fetch: Fetch = hub.fetch) -> dict[str, Any]:
    """Returns a recipe's values with paths in the place of the names of files and of the model.

    Args:
        values: As a YAML file holds them.
        folder: Where a file is looked for that is not in the current directory.
        fetch: Gets the files of the hub.

    Raises:
        RecipeError: atlas has no such file.
    """

    def resolved(section: Any) -> Any:
        if isinstance(section, list):
            return [resolved(part) for part in section]
        if not isinstance(section, Mapping):
            return section
        files = {key: value for key, value in section.items() if key in _FILES}
        found = {key: resolve_file(f, folder, fetch) if isinstance(f, str) else resolved(f) for key, f in files.items()}
        return {**section, **found}

    paths = dict(values)
    if "knowledge" in paths:
        paths["knowledge"] = _with_general(paths["knowledge"])
    paths |= {section: resolved(paths[section]) for section in _SECTIONS if section in paths}
    for key in ("model", "original"):
        if isinstance(paths.get(key), str):
            paths[key] = resolve_model(paths[key], folder)
    return paths


def _with_general(knowledge: Any) -> Any:
    """Puts the two files of the mixture that ships in the place of the word ``general``, the second one at the end."""
    named = knowledge if isinstance(knowledge, list) else [knowledge]
    wrong = next((part for part in named if isinstance(part, str) and part != "general"), None)
    if wrong is not None:
        raise RecipeError(
            "recipe, key knowledge",
            got=wrong,
            wanted="general, the one set with a name, or a section such as {generate: 256}",
            next_step="Write {file: " + wrong + "} for a file.",
        )
    if "general" not in named:
        return knowledge
    return [_GENERAL[0] if part == "general" else part for part in named] + [_GENERAL[1]] * named.count("general")


def resolve_file(name: str, folder: Path = Path(), fetch: Fetch = hub.fetch) -> str:
    """Returns the path of the data file that a name stands for; there need be no such file.

    Args:
        name: A path, ``atlas:facts.jsonl``, ``hf://datasets/org/name/file.jsonl`` or ``org/name``.
        folder: Where a file is looked for that is not in the current directory.
        fetch: Gets the files of the hub.

    Raises:
        RecipeError: atlas has no such file.
    """
    if name.startswith("atlas:"):
        try:
            return str(atlas.data_path(name.removeprefix("atlas:")))
        except FileNotFoundError as error:
            raise RecipeError(name, got=str(error), wanted="a file of atlas", next_step="Pick one of them.") from error
    if name.startswith(hub.PREFIX):
        return str(fetch(name))
    path = _present(name, folder)
    dataset = None if path.exists() else hub.dataset_named(name)
    return str(path.absolute()) if dataset is None else str(fetch(dataset))


def resolve_model(name: str, folder: Path = Path()) -> str:
    """Returns the path or hub id of the model that a name stands for: ``atlas``, a folder, a GGUF file or a hub id."""
    if name == "atlas":
        return str(atlas.model_path())
    path = _present(name, folder)
    return name if path == Path(name).expanduser() else str(path.absolute())


def _present(name: str, folder: Path) -> Path:
    try:
        path = Path(name).expanduser()
        return folder / path if not path.exists() and (folder / path).exists() else path
    except (OSError, RuntimeError) as error:  # names that are too long, or of a user that is not there
        raise RecipeError(name, got=f"{error}", wanted="a path", next_step="Correct it.") from error

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

_FILES = (
    *(("knowledge", "file"), ("knowledge", "prompts"), ("task", "train"), ("task.train", "file")),
    *(("evaluate", "file"), ("evaluate", "data")),
)


def resolve_paths(values: Mapping[str, Any], folder: Path, fetch: Fetch = hub.fetch) -> dict[str, Any]:
    """Returns a recipe's values with paths in the place of the names of files and of the model.

    Args:
        values: As a YAML file holds them.
        folder: Where a file is looked for that is not in the current directory.
        fetch: Gets the files of the hub.

    Raises:
        RecipeError: atlas has no such file.
    """

    def resolved(section: Any, key: str) -> Any:
        if isinstance(section, list):
            return [resolved(part, key) for part in section]
        if isinstance(section, Mapping) and isinstance(section.get(key), str):
            return {**section, key: resolve_file(section[key], folder, fetch)}
        return section

    paths = dict(values)
    if "knowledge" in paths:
        paths["knowledge"] = _with_general(paths["knowledge"])
    for section, key in _FILES:
        outer, _, inner = section.partition(".")
        if inner and isinstance(paths.get(outer), Mapping) and inner in paths[outer]:
            paths[outer] = {**paths[outer], inner: resolved(paths[outer][inner], key)}
        elif outer in paths and not inner:
            paths[outer] = resolved(paths[outer], key)
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
    """Returns a path as it is, or in a folder where it is only there."""
    try:
        path = Path(name).expanduser()
        return folder / path if not path.exists() and (folder / path).exists() else path
    except (OSError, RuntimeError) as error:  # names that are too long, or of a user that is not there
        raise RecipeError(name, got=f"{error}", wanted="a path", next_step="Correct it.") from error

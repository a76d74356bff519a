"""Whatever became of a file of keeptune's own: a result, or one error whose advice can be followed.

The gate tries a part of (file x damage) with `keeptune report`; `KEEPTUNE_EXAMPLES=1 pytest -n0
tests/pipeline/test_own_files.py` tries every pair with every command that reads a run, as `make attack` does.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.support import keeptune, values, write_recipe
from typer.main import get_command

import keeptune as package
from keeptune.cli import main as cli
from keeptune.core.errors import KeeptuneError
from keeptune.recipe.schema import Recipe
from keeptune.statistics.store import StatStore
from keeptune.statistics.store_use import listing

EVERYTHING = "KEEPTUNE_EXAMPLES" in os.environ
Damage = Callable[[Path], object]
FILES = (
    *("plan/plan.json", "plan/seconds.json", "plan/factors.safetensors", "trained/train.json", "recipe.json"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/export.json"),
    *("adapter/keeptune.json", "adapter/README.md", "evaluation/sums.json", "evaluation/sums.items.jsonl"),
    *("report.json", "report.html"),
)


def put(text: str | bytes) -> Damage:
    return lambda path: path.write_bytes(text.encode() if isinstance(text, str) else text)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link(target: str) -> Damage:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return link


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in JSON, with what holds it; of a list the first."""
    for key in list(value) if isinstance(value, dict) else range(min(1, len(value))) if isinstance(value, list) else ():
        yield value, key
        yield from spots(value[key])


def every_leaf(new: Any, step: int) -> Damage:
    """Replace every ``step``-th value; of what is no JSON, a byte."""

    def edit(path: Path) -> None:
        if path.suffix != ".json":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            return
        record = json.loads(path.read_text("utf-8"))
        for holder, key in list(spots(record))[step % 2 :: step]:
            holder[key] = new
        path.write_text(json.dumps(record), "utf-8")

    return edit


DAMAGES: dict[str, Damage] = {
    "no file": Path.unlink,
    "a folder": a_folder,
    "a dangling link": a_link("/nowhere/at/all"),
    "a link to itself": lambda path: a_link(path.name)(path),
    "nothing in it": put(""),
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "null": put("null"),
    "no object": put("[1]"),
    "an empty object": put("{}"),
    "nested": put("[" * 100_000 + "]" * 100_000),
    "no UTF-8": put(b'{"key": "\xff\xfe"}'),
    "a huge number": put('{"key": 1e400, "plan": ' + "9" * 5000 + "}"),
    "null in it": every_leaf(None, 3),
    "texts in it": every_leaf("text", 2),
    "large numbers in it": every_leaf(10**400, 5),
}


def chosen(number: int) -> list[str]:
    """Damages to try on a file: all, or every fifth, others for each file."""
    return [name for at, name in enumerate(DAMAGES) if EVERYTHING or at % 5 == number % 5]


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_of_a_run_ends_in_a_result_or_one_error(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, data: Path
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", values(data, run, tmp_path / "store"))
    commands: list[list[object]] = [["report", run]]
    if EVERYTHING:
        commands += [
            ["push", run, "org/name", "--dry-run", "--base", "org/base"],
            ["change", run, "--output", tmp_path / "change.png"],
            ["merge", run / "adapter", tmp_path / "merged"],
            ["check", run / "adapter", "--suite", recipe, "--max-loss", "9"],
            ["export", run, "--to", "gguf"],
            ["evaluate", recipe],
            ["run", recipe],
        ]
    for name in chosen(FILES.index(file)):
        for words in commands:
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(finished("lora"), run)
            DAMAGES[name](run / file)
            said = keeptune(*words, capsys=capsys)  # fails the test where there is a traceback
            assert said.code in {0, 2}, (file, name, words, said)
            told = said.err.strip().splitlines()
            assert said.code == 0 or (told[-1].startswith("error: ") and ", wanted " in told[-1]), (file, name, told)


@pytest.mark.parametrize("file", ["evaluation/sums.items.jsonl", "trained/train.json"])
def test_the_advice_of_a_damaged_run_mends_it(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, data: Path
) -> None:
    run = Path(shutil.copytree(finished("lora"), tmp_path / "run"))
    recipe = write_recipe(tmp_path / "recipe.yaml", values(data, run, tmp_path / "store"))
    every_leaf(None, 3)(run / file)
    said = keeptune("report", run, capsys=capsys)
    assert said.code == 2
    assert f"{run / file}: got " in said.err
    assert "or `keeptune run`: what is missing or damaged is done again" in said.err
    assert keeptune("run", recipe, capsys=capsys).code == 0
    assert keeptune("report", run, capsys=capsys).code == 0
    for name in ("report.json", "report.html", "adapter/README.md"):  # a copy prints its own place
        assert f"tuned={run / 'adapter'}" in (run / name).read_text("utf-8")


def test_a_damaged_file_of_a_store_is_no_entry(tmp_path: Path) -> None:
    recipe = {"class": "Covariance", "source": {"model": "m", "data": "d"}}
    for number, (name, damage) in enumerate(DAMAGES.items()):
        folder = tmp_path / str(number)
        store = StatStore(folder)
        store.put(recipe, torch.ones(2))
        store.note_model("m", "a model")
        (value,) = folder.glob("*/*/value.safetensors")
        (users,) = folder.glob("use/users/*.user")
        if not name.startswith("a "):  # a lock is in use: it is no file that a disk damages
            damage(users)
        for file in (value.with_name("recipe.json"), folder / "use/size", folder / "use/models/m"):
            damage(file)
        with contextlib.suppress(KeeptuneError):  # of what cannot be written
            found = StatStore(folder).get(recipe)
            whole = name in {"null in it", "texts in it", "large numbers in it"}  # the checksum is as it was
            assert (found is not None) == whole, name
        assert len(listing(folder)) <= 1


# Advice


@cache
def sources() -> dict[str, ast.Module]:
    paths = sorted(Path(package.__file__).parent.rglob("*.py"))
    return {str(path): ast.parse(path.read_text("utf-8")) for path in paths}


def advice() -> list[tuple[str, str]]:
    """Every text of the source that names a command or an option of keeptune: where, and the words."""
    found = []
    for path, tree in sources().items():
        for node in ast.walk(tree):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "run" for part in parts]
            text = "".join(map(str, texts)) if isinstance(node, ast.JoinedStr | ast.Constant) else ""
            found += [(f"{path}:{node.lineno}", words) for words in re.findall(r"`(keeptune [a-z][^`]*)`", text)]
    return found


def options(command: Any) -> set[str]:
    own = {option for parameter in command.params for option in parameter.opts}
    return own.union(*map(options, getattr(command, "commands", {}).values()))


def test_every_command_that_a_text_names_is_one() -> None:
    group, texts = get_command(cli.app), advice()
    assert len(texts) > 20
    for where, text in texts:
        command: Any = group
        words = text.split()[1:]
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert command is not group, f"{where}: no such command: {text}"
        with command.context_class(command, ignore_unknown_options=True, allow_extra_args=True) as context:
            _, left, _ = command.make_parser(context).parse_args([word.strip(".,;)") for word in words])
        keys = [word[2:].split(".")[0] for word in left if word.startswith("--")]
        assert not set(keys) - Recipe.model_fields.keys(), f"{where}: no such option: {text}"


def test_every_option_that_advice_names_is_one() -> None:
    known = options(get_command(cli.app)) | {f"--{key}" for key in Recipe.model_fields} | {"--help"}
    other = {"--no-deps", "--extra-index-url", "--head", "--lora", "--token"}  # of pip, ray, llama.cpp and hf
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "next_step":
                text = ast.unparse(node.value)
                named = {word.split(".")[0] for word in re.findall(r"(?<![\w-])--[a-z][\w.-]*[\w]", text)}
                assert not named - known - other, f"{path}:{node.value.lineno}: {named - known}"

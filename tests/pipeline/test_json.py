"""--json: every command has it, prints the numbers behind its table, and nothing else on stdout."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from tests.pipeline.support import METHODS, keeptune, write_recipe
from typer.main import get_command

from keeptune.cli.main import app
from keeptune.cli.shared import Commands, Ended

# What starts another command, which prints what it prints.
STARTS_ANOTHER = {"launch", "llamafactory"}
Values = Callable[..., dict[str, Any]]


def leaves(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for word, below in getattr(command, "commands", {}).items():
        yield from leaves(below, f"{name} {word}".strip())
    if not getattr(command, "commands", {}) or name == "store":  # which lists by itself
        yield name, command


COMMANDS = dict(leaves(get_command(app)))


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - STARTS_ANOTHER))
def test_every_command_returns_what_json_prints(name: str) -> None:
    command = COMMANDS[name]
    assert [option.is_flag for option in command.params if "--json" in option.opts] == [True]
    assert inspect.signature(inspect.unwrap(command.callback)).return_annotation not in (None, "None", inspect._empty)


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("run {recipe} --train.max_steps 1", {"methods", "base"}),
        ("run {recipe} --dry-run", {"memory", "needs", "train"}),
        ("stats {recipe}", {"statistics", "targets", "store"}),
        ("plan {recipe}", {"targets", "notes"}),
        ("train {recipe} --train.max_steps 1", {"trained"}),
        ("data {recipe}", {"kept", "tokens", "shown"}),
        ("store --store {store}", {"folder", "bytes", "limit", "parts"}),
        ("store clear --store {store} --older-than 9w --yes", {"removed", "bytes", "in_use"}),
        ("sweep {recipe} --dry-run --seeds [0,1] --sweep.grid {{method.rank:[1,2]}}", {"points", "seeds", "runs"}),
        ("launch {recipe} --processes 1 --command plan", {"targets", "notes"}),
    ],
)
def test_stdout_is_json_alone(
    words: str, keys: set[str], recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = recipe_values(method=METHODS["lora-null-v2"], evaluate=[], store=tmp_path / "store")
    places = {"recipe": write_recipe(tmp_path / "recipe.yaml", given), "store": tmp_path / "store"}
    said = keeptune(*words.format(**places).split(), "--json", capsys=capsys)
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert keys & set(found) == keys, sorted(found)


def test_a_record_keeps_its_exit_code_and_a_table_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    own = Commands()

    @own.command()
    def weigh(fail: bool = False) -> Any:
        print("a table")
        return Ended({"at": Path("a")}, 3) if fail else {"at": Path("a")}

    @own.command()
    def nothing() -> None:
        print("a table")

    def said(*words: str) -> tuple[str, int]:
        with pytest.raises((SystemExit, click.exceptions.Exit)) as ended:
            own(list(words))
        return capsys.readouterr().out, ended.value.code

    record = '{\n  "at": "a"\n}\n'
    assert said("weigh") == ("a table\n", 0)
    assert said("weigh", "--json") == (record, 0)
    assert said("weigh", "--json", "--fail") == (record, 3)
    assert said("nothing", "--json") == ("", 0)
    assert isinstance(own, typer.Typer)

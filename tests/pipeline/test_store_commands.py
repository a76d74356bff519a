"""keeptune store: what is there, by model, data and kind; and clearing it."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.support import METHODS, MODEL, keeptune, write_recipe

from keeptune.statistics.store import StatStore
from keeptune.statistics.store_use import Entry, entries


def entry_of(model: str, data: str, kind: str, site: str) -> dict[str, Any]:
    source = {"model": model * 64, "data": data * 64, "dtype": "torch.float32"}
    return {"class": kind, "version": 1, "request": {}, "site": site, "source": source}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models: one of two statistics, used 40 days ago, and one of single texts."""
    store = StatStore(tmp_path / "store", 10**6)
    for kind, site in (("InputCovariance", "a"), ("InputCovariance", "b"), ("InputMean", "a")):
        store.put(entry_of("a", "d", kind, site), torch.zeros(1000))
    for entry in entries(store.folder):
        old(entry, 40)
    text = {"class": "Attribution", "version": 1, "request": {}, "text": [1, 2], "model": "b" * 64, "dtype": "x"}
    store.put(text, torch.zeros(100))
    store.note_model("a" * 64, "/models/first")
    return store.folder


def old(entry: Entry, days: float) -> None:
    used = time.time() - days * 86400
    os.utime(entry.folder / "recipe.json", (used, used))


def listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    said = keeptune("store", "--store", folder, "--json", capsys=capsys)
    assert said.code == 0
    record: dict[str, Any] = json.loads(said.out)
    return record


def test_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = listed(folder, capsys)
    assert (record["folder"], record["limit"]) == (str(folder), 10**6)
    assert record["bytes"] == sum(file.stat().st_size for file in folder.glob("??/*/*"))
    first, second, third = record["parts"]
    assert (first["kind"], first["entries"], first["name"], first["data"]) == (
        "InputCovariance",
        2,
        "/models/first",
        "d" * 64,
    )
    assert (second["kind"], second["entries"]) == ("InputMean", 1)
    assert (third["kind"], third["model"], third["data"], third["name"]) == ("Attribution", "b" * 64, "", "")
    assert sum(part["bytes"] for part in record["parts"]) == record["bytes"]
    assert first["used"] < third["used"]
    said = keeptune("store", "--store", folder, capsys=capsys)
    assert "first" in said.out
    assert "of 1.0 MB in" in said.out


def test_a_store_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("store", "--store", tmp_path / "none", capsys=capsys)
    assert said.out == f"0 B of 20.0 GB in {tmp_path / 'none'}\n"
    assert keeptune("store", "clear", "--store", tmp_path / "none", "--yes", capsys=capsys).code == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], 0),
        (["--older-than", "30d"], 1),
        (["--older-than", "60d"], 4),
        (["--model", "first"], 1),
        (["--model", "/models/first"], 1),
        (["--model", "bbb"], 3),
        (["--model", "c"], 4),
        (["--model", "bbb", "--older-than", "1h"], 4),
    ],
    ids=str,
)
def test_a_part_is_cleared(words: list[str], left: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert keeptune("store", "clear", "--store", folder, "--yes", *words, capsys=capsys).code == 0
    assert len(entries(folder)) == left


def test_clearing_asks_first(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    said = keeptune("store", "clear", "--store", folder, capsys=capsys)
    assert (said.code, "Remove 4 entries" in said.err) == (1, True)
    assert len(entries(folder)) == 4


def test_what_is_in_use_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user = StatStore(folder)
    assert user.holds(entry_of("a", "d", "InputMean", "a"))
    said = keeptune("store", "clear", "--store", folder, "--yes", capsys=capsys)
    assert "3 entries removed" in said.out
    assert "1 are in use and stay" in said.out
    assert len(entries(folder)) == 1


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["store", "--store", __file__], "wanted a folder"),
        (["store", "clear", "--store", __file__, "--yes"], "wanted a folder"),
        (["store", "clear", "--older-than", "a month", "--yes"], "wanted a time such as 30d"),
        (["store", "clear", "--model", "", "--yes"], "wanted a name or a key"),
    ],
    ids=["list", "clear", "time", "no model"],
)
def test_wrong_input(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune(*words, capsys=capsys)
    assert (said.code, wanted in said.err) == (2, True)


def test_the_commands_name_the_model_of_a_plan(
    recipe_values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another limit than the default, which `store` shows from then on."""
    given = recipe_values(method=METHODS["lora-null-v1"], store=tmp_path / "store", store_limit="10MB")
    recipe = write_recipe(tmp_path / "recipe.yaml", given)
    assert keeptune("plan", recipe, capsys=capsys).code == 0
    record = listed(tmp_path / "store", capsys)
    assert record["limit"] == 10**7
    assert {part["name"] for part in record["parts"]} == {str(MODEL)}
    assert {part["kind"] for part in record["parts"]} == {"InputCovariance"}

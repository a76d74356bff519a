from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from keeptune.core.errors import DataError
from keeptune.data import hub
from keeptune.data.sources import read_jsonl
from keeptune.recipe.paths import resolve_file


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf://datasets/org/name/file.jsonl", ("org/name", "file.jsonl", None)),
        ("hf://datasets/org/name@v1/data/train.jsonl", ("org/name", "data/train.jsonl", "v1")),
    ],
)
def test_the_name_says_repository_revision_and_file(
    name: str, asked: tuple[str, str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(repo: str, file: str, **options: Any) -> str:
        calls.append((repo, file, options["revision"]))
        assert options["repo_type"] == "dataset"
        return "/cache/file.jsonl"

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert hub.fetch(name) == Path("/cache/file.jsonl")
    assert calls == [asked]


@pytest.mark.parametrize("name", ["hf://datasets/org", "hf://models/org/name/file", "hf://datasets/org/"])
def test_another_form_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="hf://datasets/org/name/file.jsonl"):
        hub.fetch(name)


def test_without_a_network_the_error_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="Check the name, .* the network"):
        hub.fetch("hf://datasets/nobody/nothing/file.jsonl")


def test_a_cached_file_is_found_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, file, **_: f"/cache/{repo}/{file}")
    assert hub.cached("hf://datasets/org/name/file.jsonl") == Path("/cache/org/name/file.jsonl")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    assert hub.cached("hf://datasets/org/name/file.jsonl") == "hf://datasets/org/name/file.jsonl"
    with pytest.raises(DataError, match="another form"):
        hub.cached("hf://datasets/org")


# Whole datasets

CALL = {"role": "assistant", "content": None, "calls": [{"n": 1}]}
ROWS: list[dict[str, Any]] = [
    {"a": "é 🌍", "turns": [{"role": "user", "content": "x"}, CALL]},
    {"a": "b", "turns": [{**CALL, "calls": [{"m": 2}]}]},
]


def folder_of_files(folder: Path) -> None:
    for split, rows in (("train", ROWS), ("test", ROWS[1:])):
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def saved(folder: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(folder)


def saved_splits(folder: Path) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[1:])}).save_to_disk(folder)


def plain(value: Any) -> Any:
    """A value without nulls: files of JSON keep those that are written, tables do not have them."""
    return json.loads(json.dumps(value), object_hook=lambda one: {k: v for k, v in one.items() if v is not None})


@pytest.mark.parametrize("write", [folder_of_files, saved, saved_splits])
def test_a_folder_that_datasets_reads_is_rows(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "data")
    assert plain(read_jsonl(tmp_path / "data", where="task.train")) == plain(ROWS)
    assert write is folder_of_files or read_jsonl(tmp_path / "data", where="task.train") == plain(ROWS)
    if write is not saved:
        assert plain(read_jsonl(tmp_path / "data", where="task.train", split="test")) == plain(ROWS[1:])
    with pytest.raises(DataError, match=r"task\.train .*nothing.*train"):
        read_jsonl(tmp_path / "data", where="task.train", split="nothing")


def test_a_dataset_of_the_hub_is_asked_for_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*given: Any, **options: Any) -> Dataset:
        calls.append((*given, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(hub, "load_dataset", load)
    name = resolve_file("org/name-v1.5@main")
    assert name == "hf://datasets/org/name-v1.5@main"
    assert read_jsonl(name, where="x", split="test", config="en") == plain(ROWS)
    read_jsonl("hf://datasets/org/name", where="x", revision="v2")
    assert calls == [
        ("org/name-v1.5", "en", {"split": "test", "revision": "main"}),
        ("org/name", None, {"split": "train", "revision": "v2"}),
    ]


def test_a_dataset_that_the_hub_does_not_give_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"x hf://datasets/nobody/nothing: got .*hf auth login"):
        read_jsonl("hf://datasets/nobody/nothing", where="x")


def test_a_path_is_no_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_file("org/name") == str(tmp_path / "org" / "name")
    for name in ("data/train.jsonl", "./org/other", "one.jsonl", "a/b/c"):
        assert resolve_file(name) == str((tmp_path / name).absolute())


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="got split: test for a file"):
        read_jsonl(tmp_path / "rows.jsonl", where="x", split="test")

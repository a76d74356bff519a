from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keeptune.core.errors import DataError
from keeptune.data import hub


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


@pytest.mark.parametrize("name", ["hf://datasets/org", "hf://models/org/name/file", "hf://datasets/org/name"])
def test_another_form_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="hf://datasets/org/name/file.jsonl"):
        hub.fetch(name)


def test_without_a_network_the_error_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="Check the name, the network"):
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

"""Uploads to the hub, against a mock of its HTTP: which files, which card, and what is refused."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from tests.pipeline.support import MODEL, keeptune

from keeptune import push
from keeptune.core.errors import ExportError, RecipeError

Finished = Callable[[str], Path]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "keeptune.json"]
TOKEN = "hf_" + "a" * 34
REVISION = "b" * 40
REPO = "https://huggingface.co/org/tuned"


class Hub(BaseHTTPRequestHandler):
    """What the hub answers when a repository is made and files are committed; ``asked`` holds the requests."""

    asked: list[tuple[str, str, bytes]]
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append((self.path, self.headers["authorization"], body))
        if self.refuses:
            self.reply({"error": "no rights"}, 403)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply({"files": [{"path": file["path"], **how} for file in files]})
        elif "/commit/" in self.path:
            self.reply(
                {"success": True, "commitUrl": "https://huggingface.co/org/tuned/commit/1", "commitOid": "1" * 40}
            )
        else:
            self.reply({"url": REPO, "name": "org/tuned", "id": "org/tuned"})

    def do_GET(self) -> None:
        self.asked.append((self.path, "", b""))
        self.reply({"id": "org/tuned", "sha": "0" * 40, "siblings": []})

    def reply(self, value: Any, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Own", (Hub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield handler
    server.shutdown()
    server.server_close()


def committed(hub: type[Hub]) -> dict[str, bytes]:
    """Return the files of the one commit."""
    (lines,) = [body for path, _, body in hub.asked if "/commit/" in path]
    entries = [json.loads(line) for line in lines.splitlines()]
    return {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}


def test_the_adapter_and_its_card_are_uploaded_and_nothing_else(finished: Finished, hub: type[Hub]) -> None:
    run = finished("lora")
    done = push(run, "org/tuned", base=f"org/tiny@{REVISION}", private=True)
    made = json.loads(next(body for path, _, body in hub.asked if path == "/api/repos/create"))
    assert (made["name"], made["visibility"], made["organization"]) == ("tuned", "private", "org")
    files = committed(hub)
    tokenizer = [path.name for path in (run / "adapter").iterdir() if path.name not in (*FILES, "export.json")]
    assert sorted(files) == sorted([*FILES, *tokenizer]) == sorted(done["files"])
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", REVISION)
    assert done["url"] == f"{REPO}/commit/1"
    card = ModelCard(done["card"])
    assert card.data.base_model == "org/tiny"
    assert {result.dataset_name for result in card.data.eval_results}
    assert f"`org/tiny` at `{REVISION}`" in card.text
    assert "| benchmark | role | items | base | tuned |" in card.text
    local = [name for name in FILES for path in (MODEL, run / "adapter") if str(path).encode() in files[name]]
    assert not local
    assert not any(TOKEN.encode() in data for data in files.values())
    assert all(token == f"Bearer {TOKEN}" for path, token, _ in hub.asked if token)


def test_a_dry_run_lists_files_and_prints_the_card_and_asks_nothing(
    finished: Finished, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    said = keeptune("push", finished("lora"), "org/tuned", "--base", "org/tiny", "--dry-run", capsys=capsys)
    assert said.code == 0, said.err
    assert all(name in said.out for name in [*FILES, "model-index:", "not uploaded"])
    assert hub.asked == []


def test_offline_and_refusals_are_told(finished: Finished, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuses = True
    with pytest.raises(ExportError, match="no rights"):
        push(finished("lora"), "org/tuned", base="org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE"):
        push(finished("lora"), "org/tuned", base="org/tiny")


def test_nobody_logged_in(finished: Finished, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(RecipeError, match="hf auth login"):
        push(finished("lora"), "org/tuned", base="org/tiny")
    assert hub.asked == []


@pytest.mark.parametrize("secret", [TOKEN, "wandb_api_key: 0123456789abcdef", "https://me:pass-word@host"])
def test_a_file_with_a_token_stays_here(finished: Finished, hub: type[Hub], tmp_path: Path, secret: str) -> None:
    adapter = Path(shutil.copytree(finished("lora") / "adapter", tmp_path / "adapter"))
    (adapter / "notes.txt").write_text(f"by {secret}", "utf-8")
    with pytest.raises(RecipeError, match=r"notes\.txt"):
        push(adapter, "org/tuned", base="org/tiny")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("run", "repo", "base", "words"),
    [
        ("{run}", "tuned", "org/tiny", '"org/name"'),
        ("{run}", "org/a b", "org/tiny", '"org/name"'),
        ("{run}", "org/tuned", None, "the base's name on the hub"),
        ("{run}", "org/tuned", "tiny model", '"org/name"'),
        ("{empty}", "org/tuned", "org/tiny", "keeptune export"),
        ("nowhere", "org/tuned", "org/tiny", "nowhere"),
    ],
)
def test_wrong_input(
    run: str,
    repo: str,
    base: str | None,
    words: str,
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty" / "plan").mkdir(parents=True)
    folder = run.format(run=finished("lora"), empty=tmp_path / "empty")
    said = keeptune("push", folder, repo, *(["--base", base] if base else []), "--dry-run", capsys=capsys)
    assert (said.code, words in said.err) == (2, True), said.err

"""keeptune serve: which server is started with what, and that it ends with the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.assets import STORIES
from tests.forks import Forks
from tests.gguf_files import write_base
from tests.pipeline.support import METHODS, keeptune, recipe_of
from tests.pipeline.test_gguf_export import needs_server

from keeptune.core.errors import ExportError
from keeptune.model.pretrained import load_model
from keeptune.pipeline import serving
from keeptune.pipeline.run import run
from studies.served import post

# It writes its words and its number, answers on the port that it is given, and goes on when it is asked to end.
FAKE = """#!{python}
import http.server, json, os, pathlib, signal, sys
place = pathlib.Path(__file__).parent
(place / "words.json").write_text(json.dumps([os.getpid(), *sys.argv[1:]]))
if (place / "dies").exists():
    sys.exit(7)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if (place / "loads").exists() else 200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a server of a name on the PATH, where else there is none, and returns its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(serving, "find_spec", lambda _: None)

    def put(name: str) -> Path:
        (folder / name).write_text(FAKE.replace("{python}", sys.executable))
        (folder / name).chmod(0o755)
        return folder

    return put


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(load_model(str(STORIES)), tmp_path_factory.mktemp("gguf") / "base.gguf", "llama")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lines_of(file: Path, count: int) -> list[str]:
    """The first lines of a file, once they are there."""
    until = time.monotonic() + 60
    while not file.exists() or file.read_text().count("\n") < count:
        assert time.monotonic() < until, file.read_text()
        time.sleep(0.02)
    return file.read_text().splitlines()[:count]


def is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"


def test_vllm_gets_the_rank_of_the_export(
    servers: Callable[[str], Path], finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = servers("vllm")
    servers("llama-server")  # vLLM comes first
    output = finished("lora-null-v1")
    words = ("serve", output, "--port", 1234, "--dry-run", "--json", "--gpu-memory-utilization", 0.5)
    found = json.loads(keeptune(*words, capsys=capsys).out)["command"]
    assert found == [
        *[str(folder / "vllm"), "serve", str(STORIES), "--enable-lora", "--max-lora-rank", "8"],
        *["--lora-modules", f"tuned={output / 'adapter'}", "--host", "127.0.0.1", "--port", "1234"],
        *["--gpu-memory-utilization", "0.5"],
    ]
    whole = keeptune("serve", finished("full"), "--dry-run", "--using", "vllm", capsys=capsys)
    assert f"vllm serve {finished('full') / 'merged'} --served-model-name tuned" in whole.out


def test_llama_cpp_gets_the_files_that_are_written_once(
    servers: Callable[[str], Path],
    base: Path,
    recipe_values: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, given = servers("llama-server"), recipe_values(method=METHODS["lora"])
    run(recipe_of(given))
    output = Path(given["output"])
    line = (
        f"{folder}/llama-server -m {base} --lora {output}/gguf/adapter.gguf --alias tuned --host 127.0.0.1 --port 8000"
    )
    said = keeptune("serve", output, "--base", base, "--dry-run", capsys=capsys)
    assert (said.code, "keeptune export" in said.err, (output / "gguf").exists()) == (2, True, False)
    options = serving.ServeOptions(base=str(base))
    assert " ".join(serving.server_line(output, options)) == line
    assert keeptune("serve", output, "--base", base, "--dry-run", capsys=capsys).out.split("\n")[0] == line
    before = (output / "gguf" / "adapter.gguf").stat().st_mtime_ns
    assert " ".join(serving.server_line(output, serving.ServeOptions())) == line  # its base is known now
    assert (output / "gguf" / "adapter.gguf").stat().st_mtime_ns == before


def test_what_is_missing_is_said(
    servers: Callable[[str], Path],
    finished: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = finished("lora")
    for words, says in (
        ([], r"got no vllm, no llama-server and no package xllamacpp"),
        (["--using", "tgi"], '--using: got "tgi"'),
        (["--using", "vllm"], "got no such server"),
    ):
        said = keeptune("serve", output, *words, capsys=capsys)
        assert said.code == 2
        assert says in said.err
    assert "pip install vllm" in keeptune("serve", output, capsys=capsys).err
    servers("llama-server")
    with pytest.raises(ExportError, match=r"no GGUF file of the base.*--base"):
        serving.server_line(shutil.copytree(output, tmp_path / "run"), serving.ServeOptions())
    servers("vllm")
    assert keeptune("serve", output / "adapter", "--dry-run", capsys=capsys).code == 0


def test_a_port_that_is_taken_and_a_server_that_ends_or_is_silent_are_said(
    servers: Callable[[str], Path], finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output, port = servers("vllm"), finished("lora"), free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        said = keeptune("serve", output, "--port", port, capsys=capsys)
    assert said.code == 2
    assert f"--port {port}: got Address already in use" in said.err
    assert said.out.startswith(str(folder / "vllm"))  # the line that would have run
    (folder / "dies").touch()
    said = keeptune("serve", output, "--port", port, capsys=capsys)
    assert (said.code, "server vllm: got exit code 7" in said.err) == (2, True)
    (folder / "dies").unlink()
    (folder / "loads").touch()
    said = keeptune("serve", output, "--port", port, "--wait", 1, capsys=capsys)
    assert (said.code, "got no answer in 1 s" in said.err) == (2, True)
    assert not is_alive(json.loads((folder / "words.json").read_text())[0])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_server_ends_with_the_command(
    how: signal.Signals, servers: Callable[[str], Path], finished: Callable[[str], Path], forks: Forks, tmp_path: Path
) -> None:
    folder, port, out = servers("vllm"), free_port(), tmp_path / "out"
    environment = {"PATH": os.environ["PATH"]}
    number = forks.start("serve", finished("lora"), "--port", port, folder=tmp_path, out=out, env=environment)
    line, ready = lines_of(out, 2)
    assert line.startswith(str(folder / "vllm"))
    assert ready == f"ready: http://127.0.0.1:{port}/v1, model `tuned`"
    server = json.loads((folder / "words.json").read_text())[0]
    assert is_alive(server)
    os.kill(number, how)
    assert forks.wait(number) == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[how]
    until = time.monotonic() + 5
    while is_alive(server) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(server)


@needs_server
def test_llama_cpp_answers_a_chat(base: Path, finished: Callable[[str], Path], forks: Forks, tmp_path: Path) -> None:
    """The one that is installed, over HTTP, in the form of OpenAI."""
    port, out, files = free_port(), tmp_path / "out", ("--using", "llama.cpp", "--base", base)
    number = forks.start("serve", finished("lora"), *files, "--port", port, "-t", 1, folder=tmp_path, out=out)
    try:
        line, *_, ready = [line for line in lines_of(out, 3) if "Writing" not in line]
        assert "keeptune.pipeline.llama_server" in line
        assert ready.startswith("ready: ")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
            assert json.load(answer)["data"][0]["id"] == "tuned"
        body = {"model": "tuned", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 4}
        assert post(f"http://127.0.0.1:{port}/v1/chat/completions", body)["usage"]["completion_tokens"] == 4
    finally:
        os.kill(number, signal.SIGTERM)
        assert forks.wait(number) == 143

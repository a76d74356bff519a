"""keeptune serve: a run's adapter or model on the server that is installed, vLLM or llama.cpp's, until it is ended."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from keeptune.adapter.load import read_sidecar
from keeptune.core.errors import ExportError, ProcessError, RecipeError, need_known
from keeptune.core.processes import end_with_parent
from keeptune.pipeline.gguf_export import NAME_IT, GgufOptions, export_gguf, written
from keeptune.pipeline.trained_changes import TrainedModel

Server = Literal["auto", "vllm", "llama.cpp"]
_INSTALL = "pip install vllm (a GPU), pip install 'keeptune[serve]' (llama.cpp), or put llama-server on the PATH."


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a run is served.

    Args:
        using: ``"vllm"`` or ``"llama.cpp"``; ``"auto"`` takes the first of them that is installed.
        base: The GGUF file of the base, for llama.cpp; None: the one the run was exported with or trained on.
        host: Address.
        port: Port.
        wait: Seconds until a server that does not answer is given up.
        more: Further options of the server, as it takes them.
    """

    using: Server = "auto"
    base: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    wait: float = 600.0
    more: Sequence[str] = ()


def server_line(run: Path | str, options: ServeOptions, *, write: bool = True) -> list[str]:
    """Returns the command that serves a run under the name ``tuned``.

    Args:
        run: A run folder, or what it exported.
        options: How.
        write: Export it as GGUF where llama.cpp needs that and it is not done; False raises then.

    Raises:
        RecipeError: No server is installed, or not the one asked for.
        ExportError: The export has no form that the server takes, or llama.cpp has no file of the base.
    """
    need_known(options.using, get_args(Server), "--using", "auto, vllm or llama.cpp")
    own = [sys.executable, "-m", "keeptune.pipeline.llama_server"] if find_spec("xllamacpp") else None
    found = {"vllm": _command("vllm"), "llama.cpp": _command("llama-server") or own}
    place = ["--host", options.host, "--port", str(options.port), *options.more]
    for name, words in found.items():
        if words and options.using in {"auto", name}:
            return [*words, *(_vllm_words(run) if name == "vllm" else _llama_words(run, options.base, write)), *place]
    got = "no vllm, no llama-server and no package xllamacpp" if options.using == "auto" else "no such server"
    raise RecipeError(f"serve --using {options.using}", got=got, wanted="a server", next_step=_INSTALL)


def _command(name: str) -> list[str] | None:
    beside = Path(sys.executable).with_name(name)  # in an environment that is not activated
    found = shutil.which(name) or (str(beside) if beside.is_file() else None)
    return None if found is None else [found]


def _vllm_words(run: Path | str) -> list[str]:
    """Returns the words of an export's own line, with its rank, for its place now."""
    folder = TrainedModel.of(str(run)).folder
    record = read_sidecar(folder).get("export", {})
    line = str(record.get("serve", ""))
    if not line.startswith("vllm serve "):
        step = "Merge it (`keeptune merge`) and serve the folder, or take --using llama.cpp."
        raise ExportError(f"serve {run}", got=line or "no export of ours", wanted="one for vLLM", next_step=step)
    words = shlex.split(line)[1:]
    return words if "--enable-lora" in words else [*words, "--served-model-name", "tuned"]


def _llama_words(run: Path | str, base: str | None, write: bool) -> list[str]:
    done = written(run, base) or (export_gguf(run, GgufOptions(base)) if write else {"base": ""})
    if not done["base"]:
        step = NAME_IT if "serve" in done else "Run `keeptune export` with --to gguf, or serve without --dry-run."
        got, wanted = f"no GGUF file of {'the base' if 'serve' in done else 'it'}", "one for llama.cpp to serve"
        raise ExportError(f"serve {run}", got=got, wanted=wanted, next_step=step)
    return shlex.split(done["serve"])[1:]


def serve(words: Sequence[str], options: ServeOptions, ready: Callable[[str], object]) -> None:
    """Starts a server, calls a function with its address when it answers, and waits for its end; it ends with this one.

    Raises:
        ProcessError: The port is taken, or the server ended by itself or does not answer.
    """
    try:
        socket.create_server((options.host, options.port)).close()
    except OSError as error:
        where, wanted = f"--port {options.port}", f"a free port on {options.host}"
        raise ProcessError(where, got=str(error.strerror), wanted=wanted, next_step="Take another one.") from error
    url, until = f"http://{options.host}:{options.port}", time.monotonic() + options.wait
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    server = subprocess.Popen(words, start_new_session=True, preexec_fn=end_with_parent)
    try:
        while server.poll() is None and time.monotonic() < until and not _answers(url):
            time.sleep(0.2)
        if server.poll() is None and time.monotonic() < until:
            ready(url)
            server.wait()
        got = f"no answer in {options.wait:.0f} s" if server.poll() is None else f"exit code {server.returncode}"
        where, wanted = f"server {Path(words[0]).name}", f"a server that answers: {shlex.join(words)}"
        step = "Its messages are above; --wait gives more time."
        raise ProcessError(where, got=got, wanted=wanted, next_step=step)
    finally:
        signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.terminate()
            server.wait(10)
        with contextlib.suppress(ProcessLookupError):  # what is left of its processes
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):  # still loading, or not there yet
        return False

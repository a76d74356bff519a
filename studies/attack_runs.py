"""What the attacks share: commands in forks of this process, small recipes, the run that nobody attacked, and the laws.

A fork has all libraries, so that a run of stories260K takes a second or two. What a command works for and how often it
changes a file is measured in the run that is not attacked: moments are shares of both.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from keeptune.cli.main import main as keeptune

ASSETS = Path(__file__).parents[1] / "assets"
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"}
_LEFT = re.compile(r"\.(.+)\.[0-9a-f]{8}")
# What says when a run was and how long it took, and checksums of records that do.
_TIMES = re.compile(
    r'"(?:\w*seconds|plan|train|evaluate|num_tokens)": [\d.e+-]+|"created": "[^"]*"|training time: [\d.]+ \w+'
    r'|Versions when this card was written: .*|"checksum": "[0-9a-f]{64}"'
)
# Of these only that they are there: times, pickled paths, sets of PEFT's; statistics have a law of their own.
_UNLIKE = re.compile(
    r"(log\.txt|seconds\.json|report\.html|runs\.parquet|training_args\.bin)$|^store/"
    r"|/checkpoints/.*(README\.md|checksums\.json|adapter_config\.json)$"
)
OTHERS = r"store/|.*/checkpoints/"  # what another recipe leaves in a folder
_WRONG = 2  # the exit code of what the user can correct


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (-9: killed), what it said, seconds of CPU, changes of files, bytes it took."""

    code: int
    said: str
    cpu: float
    changes: int
    taken: int


@dataclass(frozen=True)
class Limits:
    """When a command is killed, after seconds of CPU or before a change of a file, and what it may have at most.

    That is bytes of each file, bytes of memory beside what this process has, and seconds.
    """

    cpu: float | None = None
    change: int | None = None
    file_size: int | None = None
    memory: int | None = None
    seconds: float = 180


class Started:
    """A command that runs in a fork of this process."""

    def __init__(self, words: Iterable[object], folder: Path, limits: Limits = Limits()) -> None:  # noqa: B008
        self.limits, self.folder = limits, folder
        self.said = folder.with_name(f"{folder.name}.{time.monotonic_ns()}.txt")
        self._counter = mmap.mmap(-1, 8)
        self.begun = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._prepare()
                sys.argv = ["keeptune", *map(str, words)]
                keeptune()
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            except BaseException:  # noqa: BLE001 - as Python does with what is not caught
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def _prepare(self) -> None:
        os.setsid()
        os.chdir(self.folder)
        file = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
        if self.limits.file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limits.file_size, resource.RLIM_INFINITY))
        if self.limits.memory is not None:
            pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
            most = pages * resource.getpagesize() + self.limits.memory
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        inside, count = str(self.folder), 0

        def look(event: str, given: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event == "open" and isinstance(given[1], str) and given[1][:1] in tuple("wax")
            if (writes or event in _CHANGES) and str(given[0]).startswith(inside):
                count += 1
                self._counter[:8] = count.to_bytes(8, "little")
                if count == self.limits.change:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)

    def wait(self) -> Ended:
        """Wait for the end, kill when the limits say so, and remove what was said."""
        clock = (~self.pid << 3) | 2  # of the process's CPU time
        killed = False
        while not (ended := os.wait4(self.pid, os.WNOHANG))[0]:
            late = time.monotonic() - self.begun > self.limits.seconds
            due = self.limits.cpu is not None and not killed and time.clock_gettime(clock) >= self.limits.cpu
            if late or due:
                killed = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.001)
        said = self.said.read_text(encoding="utf-8", errors="replace") if self.said.is_file() else ""
        self.said.unlink(missing_ok=True)
        if time.monotonic() - self.begun > self.limits.seconds:
            said += "\nit hangs"
        changes = int.from_bytes(self._counter[:8], "little")
        _, status, used = ended
        cpu = used.ru_utime + used.ru_stime
        return Ended(os.waitstatus_to_exitcode(status), said, cpu, changes, used.ru_maxrss * 1024)


def command(*words: object, folder: Path, limits: Limits = Limits()) -> Ended:  # noqa: B008
    """Run ``keeptune WORDS`` in a folder to its end."""
    return Started(words, folder, limits).wait()


def _benchmark(name: str, role: str, file: str, text: str) -> dict[str, Any]:
    given = {"file": str(ASSETS / "data" / file), "text": text, "examples": 3, "max_length": 64}
    return {"name": name, "role": role, "metric": "cross_entropy", **given}


def recipe(kind: str, folder: Path, steps: int = 4) -> dict[str, Any]:
    """Return the recipe of ``run``, ``loki``, ``compare`` or ``stages``: a few steps of a storyteller."""
    problems = {"train": str(ASSETS / "data/gsm8k/train.jsonl"), "completion": " {question}\n{answer}", "examples": 16}
    texts = {"file": str(ASSETS / "data/tinystories_train_piece/stories.jsonl"), "text": "{text}"}
    given: dict[str, Any] = {
        "model": str(ASSETS / "models/stories260K"),
        "method": {"name": "keep", "rank": 4},
        "knowledge": {**texts, "examples": 8, "max_length": 48},
        "task": {"prompt": "Problem:", **problems},
        "train": {
            "max_steps": steps, "save_steps": 1, "per_device_train_batch_size": 4, "max_length": 48, "seed": 0,
            "learning_rate": 5e-3,
        },
        "evaluate": [
            _benchmark("stories", "knowledge", "tinystories/stories.jsonl", "{text}"),
            _benchmark("problems", "task", "gsm8k/test.jsonl", "Problem: {question}\n{answer}"),
        ],
        "output": str(folder / "out"),
        "store": str(folder / "store"),
        "device": "cpu",
    }  # fmt: skip
    null, loki = {"name": "lora-null", "rank": 4}, {"name": "loki", "q": 10}
    if kind == "compare":
        labels = [{"label": "loki", "method": loki}, {"label": "null", "method": null}]
        del given["method"]
        return given | {"compare": {"methods": labels, "seeds": [0], "resources": None, "baselines": False}}
    if kind == "loki":
        return given | {"method": loki}
    if kind == "stages":
        first, second = ({"name": name, "task": given["task"]} for name in ("first", "problems"))
        return {k: v for k, v in given.items() if k != "task"} | {"method": null, "stages": [first, second]}
    return given


def written(given: Mapping[str, Any], folder: Path) -> Path:
    """Write a recipe into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(given), encoding="utf-8")  # JSON is YAML
    return path


def verb(kind: str) -> str:
    """Return the command of a kind of recipe."""
    return "compare" if kind == "compare" else "run"


def whole(kind: str, work: Path, steps: int = 4) -> tuple[Path, Ended]:
    """Return the folder of a run that nobody attacked, made once, and how it ended.

    It was made in ``work/here``, where attacks work: paths in records are the same.
    """
    folder, about = work / f"{kind}-{steps}", work / f"{kind}-{steps}.json"
    if not about.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        here = fresh(work)
        ended = command(verb(kind), written(recipe(kind, here, steps), here), folder=here)
        if ended.code:
            raise RuntimeError(f"the run that nobody attacks ended with {ended.code}: {ended.said}")
        here.rename(folder)
        about.write_text(json.dumps(vars(ended)), encoding="utf-8")
    return folder, Ended(**json.loads(about.read_text(encoding="utf-8")))


def fresh(work: Path) -> Path:
    """Return the empty folder in which attacks work."""
    here = work / "here"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    return here


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a finished command wrote, file by file, without times and what holds nothing but times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name == "recipe.yaml" or "/use/users/" in name:
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".md"):
            data = _TIMES.sub("the time", data.decode(errors="replace")).encode()
        found[name] = b"" if _UNLIKE.search(name) else data
    return found


def differences(found: Path, wanted: Path, may_stay: str = "") -> list[str]:
    """Return in what a folder differs from that of the run that nobody attacked; laws 1 to 3.

    (1) Every file of it is there with its bytes, times aside; statistics of a text are measured with other texts beside
    it where a kill fell between, and are the same to rounding; (2) there is no other file, so no temporary one, but for
    those whose names match ``may_stay`` and are not temporary; (3) pages are whole, and of the record beside them.
    """
    one, other = contents(found), contents(wanted)
    said = [f"{name}: missing" for name in other if name not in one]
    others = [name for name in one if name not in other]
    said += [f"{name}: left over" for name in others if not re.match(may_stay or "$", name) or _is_temporary(name)]
    said += [f"{name}: other bytes" for name in one if name in other and one[name] != other[name]]
    said += [name for name in other if name in one and name.startswith("store/") and not _is_close(name, found, wanted)]
    for page in found.rglob("report.html"):
        text = page.read_text(encoding="utf-8")
        records = [page.with_name(name) for name in ("report.json", "sequence.json", "runs.json")]
        made = [json.loads(path.read_text(encoding="utf-8"))["created"] for path in records if path.is_file()]
        if not text.rstrip().endswith("</html>") or not made or made[0] not in text:
            said.append(f"{page.relative_to(found)}: not whole, or not of its record")
    return said


def _is_close(name: str, found: Path, wanted: Path) -> bool:
    if not name.endswith("/value.safetensors"):
        return True
    try:
        value, right = (load_file(folder / name)["value"] for folder in (found, wanted))
    except (SafetensorError, KeyError):
        return False
    return bool((value - right).abs().max() <= 1e-6 * right.abs().max())


def _is_temporary(name: str) -> bool:
    return any(map(_LEFT.fullmatch, Path(name).parts))


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files and folders that are below a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if _LEFT.fullmatch(path.name)]


def done_as(ended: Ended, found: Path, wanted: Path, may_stay: str = "") -> list[str]:
    """Return what is wrong with a command that had to end as the one that nobody attacked."""
    failed = [f"exit code {ended.code}: {ended.said[-600:]}"] if ended.code else []
    return failed or differences(found, wanted, may_stay)


def told(ended: Ended, *, longest: int = 3000) -> list[str]:
    """Return what is wrong with a refusal: it is exit code 2 and one line that says what is wrong and what to do."""
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    problems = [] if ended.code == _WRONG else [f"exit code {ended.code}"]
    if len(errors) != 1 or ": got " not in errors[0] or ", wanted " not in errors[0]:
        problems.append(f"not one message, but {ended.said[-600:]!r}")
    problems += [f"a message of {len(line)} characters" for line in errors if len(line) > longest]
    return problems + ["a traceback"] * ("Traceback" in ended.said)

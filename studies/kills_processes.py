"""Kill launches of two processes with SIGKILL at random moments, start them again, and compare what they end with.

A part of `make attack`. A small job on atlas is run once to its end, and then one of two processes is killed in turn,
their launcher, and the second of two agents of `torchrun --nnodes 2` (static, and c10d) at moments between the first
thing that they write and the end. What was killed must leave no process and no held lock, and the same command must end
with the adapter of the run that nobody killed, to 1e-5.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from keeptune.core.errors import ArtefactError
from keeptune.core.locks import owned

KINDS = ("process", "launcher", "machine", "machine, c10d")
RECIPE: dict[str, Any] = {
    "model": "atlas",
    "method": {"name": "keep", "rank": 4, "alpha": 8},
    "knowledge": {"file": "atlas:calibration.jsonl", "prompt": "{question}\nAnswer:", "completion": " {answer}"},
    "task": {"train": "atlas:topics.train.jsonl", "prompt": "{text}\nTopic:", "completion": " {topic}"},
    "train": {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_steps": 3},
    "evaluate": [
        {
            "name": "facts", "role": "knowledge", "file": "atlas:facts.jsonl", "prompt": "{question}\nAnswer:",
            "answer": "{answer}", "metric": "exact_match", "max_new_tokens": 16, "examples": 40,
        }
    ],
    "device": "cpu",
}  # fmt: skip
BOUND = 1e-5


def started(kind: str, recipe: Path) -> list[subprocess.Popen[bytes]]:
    """Start the launcher of one machine, or the agents of two."""
    run = ["-m", "keeptune", "run", str(recipe)]
    if kind in ("process", "launcher"):
        commands = [["-m", "keeptune", "launch", str(recipe), "--processes", "2"]]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meet = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        if kind.endswith("c10d"):
            meet = ["--rdzv-backend", "c10d", "--rdzv-id", str(port), "--rdzv-endpoint", f"127.0.0.1:{port}"]
        agent = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meet]
        commands = [[*agent, "--node-rank", str(rank), *run] for rank in range(2)]
    with (recipe.parent / "said.txt").open("ab") as said:
        return [
            subprocess.Popen([sys.executable, *words], cwd=recipe.parent, stdout=said, stderr=said)
            for words in commands
        ]


def left(folder: Path) -> list[psutil.Process]:
    """Processes that work in a folder."""
    return [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(folder)]


def is_held(output: Path) -> bool:
    """Whether a process, or a thread of one that is ending, holds an output's lock."""
    try:
        with owned(output):
            return False
    except ArtefactError:
        return True


def kill(kind: str, agents: list[subprocess.Popen[bytes]], drawn: random.Random) -> None:
    """Kill what the kind says: a process of a launcher, the launcher, or the second agent."""
    victim = psutil.Process(agents[-1].pid)
    if kind == "process":
        workers = [child for child in victim.children(recursive=True) if "run" in child.cmdline()]
        victim = drawn.choice(workers) if workers else victim
    victim.kill()


def reached(output: Path) -> str:
    """Name the last thing that is there."""
    steps = sorted(int(path.name.partition("-")[2]) for path in output.glob("checkpoints/*/checkpoint-*"))
    there = [name for name in ("plan", "trained", "adapter", "evaluation", "report.json") if (output / name).exists()]
    if not there:
        return f"{len(list(output.with_name('store').rglob('value.safetensors')))} statistics"
    return f"step {steps[-1]}" if steps and there[-1] == "plan" else there[-1]


def written_first(agents: list[subprocess.Popen[bytes]], folder: Path) -> float:
    """Wait until a run writes; return when that was."""
    while not (folder / "store").exists() and all(agent.poll() is None for agent in agents):
        time.sleep(0.01)
    return time.monotonic()


def trial(kind: str, share: float, folder: Path, seconds: float, drawn: random.Random) -> dict[str, Any]:
    """Kill a run after a share of what a whole one takes, and start it again."""
    shutil.rmtree(folder, ignore_errors=True)
    recipe = written(folder)
    agents = started(kind, recipe)
    written_first(agents, folder)
    time.sleep(share * seconds)
    ended = all(agent.poll() is not None for agent in agents)
    if not ended:
        kill(kind, agents, drawn)
    killed, at = time.monotonic(), reached(folder / "out")
    codes = [agent.wait(timeout=400) for agent in agents]  # an agent waits 300 s for one that is gone at the end
    while (left(folder) or is_held(folder / "out")) and time.monotonic() < killed + 60:
        time.sleep(0.02)
    gone, orphans = time.monotonic() - killed, len(left(folder)) + is_held(folder / "out")
    again = [agent.wait(timeout=600) for agent in started(kind, recipe)]
    return {
        "at": at, "ended": ended, "codes": codes, "gone": gone, "orphans": orphans, "again": again,
        "gap": gap(folder, folder.parent / "whole"),
    }  # fmt: skip


def written(folder: Path) -> Path:
    """Write the recipe of a run in a folder."""
    folder.mkdir(parents=True)
    given = RECIPE | {"output": str(folder / "out"), "store": str(folder / "store")}
    given["knowledge"] = given["knowledge"] | {"examples": 64}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(given), encoding="utf-8")
    return path


def gap(one: Path, other: Path) -> float:
    """Return the largest difference of two runs' adapters."""
    found, wanted = (load_file(at / "out/adapter/adapter_model.safetensors") for at in (one, other))
    assert found.keys() == wanted.keys()
    return max(float((found[name] - value).abs().max()) for name, value in wanted.items())


def kill_launch(number: int, seed: int, work: Path) -> tuple[list[str], dict[str, Any]]:
    """Kill one of several processes, which one by turns; the work is measured in a launch that nobody kills."""
    folder = work / "launches"
    took = folder / "whole" / "seconds.json"
    if not took.is_file():
        shutil.rmtree(folder / "whole", ignore_errors=True)
        agents = started("process", written(folder / "whole"))
        begun = written_first(agents, folder / "whole")
        codes = [agent.wait() for agent in agents]
        if any(codes):
            raise RuntimeError(f"the launch that nobody kills ended with {codes}")
        took.write_text(json.dumps(time.monotonic() - begun), encoding="utf-8")
    seconds = json.loads(took.read_text(encoding="utf-8"))
    drawn = random.Random(f"{seed} {number}")
    kind, share = KINDS[number % len(KINDS)], drawn.random()
    said = trial(kind, share, folder / "killed", seconds, drawn)
    problems = [f"the adapter is {said['gap']:g} off"] * (said["gap"] > BOUND)
    problems += ["a process or a held lock is left"] * bool(said["orphans"])
    problems += [f"exit codes {said['again']}"] * any(said["again"])
    return problems, said | {"kind": kind, "kills": int(not said["ended"])}

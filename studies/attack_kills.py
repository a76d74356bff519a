"""Attacks on a command that works: kill -9, a disk that fills up, a second process in the same folder."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from studies.attack_runs import (
    OTHERS,
    Ended,
    Limits,
    Started,
    command,
    differences,
    done_as,
    fresh,
    leftovers,
    recipe,
    told,
    verb,
    whole,
    written,
)

Found = tuple[list[str], dict[str, Any]]  # what did not hold, and what was done
_KILLED = -9


def moment(drawn: random.Random, of: Ended, most: float) -> Limits:
    """Draw when to kill: after a share of the CPU time of a whole run, or before one of its changes of files."""
    if drawn.random() < 0.5:
        return Limits(cpu=most * drawn.random() * of.cpu)
    return Limits(change=drawn.randint(1, max(1, round(most * of.changes))))


def kill(kind: str, number: int, seed: int, work: Path) -> Found:
    """Kill a command at one to three moments, start it again each time, and let the last start end.

    One in four works in a folder where another recipe has ended, whose checkpoints stay.
    """
    drawn = random.Random(f"{seed} kill {kind} {number}")
    reference, of = whole(kind, work)
    before = whole(kind, work, 3)[0] if drawn.random() < 0.25 else None
    here = fresh(work)
    if before is not None:
        shutil.copytree(before, here, dirs_exist_ok=True)
    words = (verb(kind), written(recipe(kind, here), here))
    moments, kills = [], 0
    for most in (1, 0.7, 0.5)[: drawn.choice((1, 1, 1, 2, 3))]:
        limits = moment(drawn, of, most)
        ended = command(*words, folder=here, limits=limits)
        kills += ended.code == _KILLED
        at = f"{limits.cpu:.3f} s" if limits.change is None else f"change {limits.change}"
        moments.append(at if ended.code == _KILLED else f"{at}: ended before, with {ended.code}")
        if ended.code not in (0, _KILLED):
            return [f"exit code {ended.code}: {ended.said[-600:]}"], {"at": moments, "kills": kills}
    last = command(*words, folder=here)
    problems = done_as(last, here, reference, OTHERS if before else "")
    return problems, {"at": moments, "kills": kills, "another before": before is not None}


def kill_run(number: int, seed: int, work: Path) -> Found:
    """Kill `keeptune run`: of keep, and of LoKI, which keeps statistics in the store."""
    return kill(("run", "loki")[number % 2], number, seed, work)


def kill_compare(number: int, seed: int, work: Path) -> Found:
    """Kill `keeptune compare` of LoKI and LoRA-Null."""
    return kill("compare", number, seed, work)


def kill_stages(number: int, seed: int, work: Path) -> Found:
    """Kill `keeptune run` of two stages."""
    return kill("stages", number, seed, work)


def _mount(folder: Path, size: int, *, again: bool = False) -> bool:
    """Mount a file system of a size in a folder, or give the one that is there another; return whether that may be."""
    folder.mkdir(parents=True, exist_ok=True)
    how = f"remount,size={size}" if again else f"size={size}"
    return not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder], stderr=subprocess.DEVNULL
    ).returncode


def unmount(work: Path) -> None:
    """Unmount what a killed attack left mounted."""
    subprocess.run(["umount", "-q", "-l", work / "here"], stderr=subprocess.DEVNULL)


def full_disk(number: int, seed: int, work: Path) -> Found:
    """Run on a file system of few bytes, from 8 kB to what a run takes, and again once it has room."""
    drawn = random.Random(f"{seed} disk {number}")
    kind = ("loki", "run", "compare", "stages")[number % 4]
    reference, _ = whole(kind, work)
    needed = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    size = round(8_000 * (needed / 8_000) ** drawn.random() if number % 8 < 4 else needed * drawn.random())
    here = fresh(work)
    if not _mount(here, size):
        return ["no file system can be mounted here: this was not tried"], {}
    try:
        path = written(recipe(kind, here), here)
    except OSError:  # not even room for the recipe
        _mount(here, needed * 2, again=True)
        path = written(recipe(kind, here), here)
        _mount(here, size, again=True)
    try:
        return _room_again(kind, path, Limits(), needed, reference)
    finally:
        unmount(work)


def file_size(number: int, seed: int, work: Path) -> Found:
    """Run with a limit on the size of each file (``ulimit -f``), and again without."""
    drawn = random.Random(f"{seed} file size {number}")
    kind = ("loki", "run", "compare", "stages")[number % 4]
    reference, _ = whole(kind, work)
    here = fresh(work)
    limits = Limits(file_size=round(100 * 50_000 ** drawn.random()))
    return _room_again(kind, written(recipe(kind, here), here), limits, None, reference)


def _room_again(kind: str, path: Path, limits: Limits, needed: int | None, reference: Path) -> Found:
    here = path.parent
    first = command(verb(kind), path, folder=here, limits=limits)
    done = {"kind": kind, "size": limits.file_size or sum(1 for _ in here.rglob("*")), "code": first.code}
    problems = [] if first.code == 0 else [f"full: {text}" for text in _refused(kind, first)]
    problems += [f"full: left over: {name}" for name in leftovers(here)]
    if needed is not None:
        _mount(here, needed * 2, again=True)
    return problems + done_as(command(verb(kind), path, folder=here), here, reference), done


def _refused(kind: str, ended: Ended) -> list[str]:
    """Return what is wrong with a refusal; a comparison goes on where a run of it fails, and ends with 1."""
    if kind == "compare" and ended.code == 1 and "Traceback" not in ended.said:
        return []
    return told(ended)


def two_processes(number: int, seed: int, work: Path) -> Found:
    """Start a second command on the same folder: the same recipe, another one, or another folder with the same store.

    The second waits or is refused before it trains; what stands there at the end is one of the two, whole.
    """
    drawn = random.Random(f"{seed} two {number}")
    kind, how = ("loki", "compare", "stages")[number % 3], ("same", "other", "store")[number // 3 % 3]
    reference, of = whole(kind, work)
    here = fresh(work)
    given = recipe(kind, here)
    other = given | {"train": given["train"] | {"max_steps": 3}} if how == "other" else given
    if how == "store":
        other = given | {"output": str(here / "second" / "out")}
    paths = [written(given, here), written(other, here / "second")]
    first = Started((verb(kind), paths[0]), here)
    time.sleep(drawn.random() * of.cpu)
    second = Started((verb(kind), paths[1]), here)
    said = [first.wait(), second.wait()]
    done = {"kind": kind, "how": how, "codes": [ended.code for ended in said]}
    problems = [text for ended in said if ended.code for text in told(ended)]
    if 0 not in done["codes"] or (how == "store" and any(done["codes"])):
        problems.append(f"exit codes {done['codes']}: {[ended.said[-300:] for ended in said]}")
    if how == "other":  # the first recipe again: whatever the second made of the folder
        paths[1].unlink()
        return problems + done_as(command(verb(kind), paths[0], folder=here), here, reference, OTHERS), done
    if how == "store":
        one, two = (adapters(folder) for folder in (reference / "out", here / "second" / "out"))
        problems += [] if one == two and one else ["another adapter beside the shared store"]
    paths[1].unlink()
    found = differences(here, reference)
    return problems + [text for text in found if not text.startswith("second/")], done


def adapters(folder: Path) -> dict[str, bytes]:
    """Return the weights of the adapters below a folder, without those of checkpoints."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("adapter_model.safetensors")}
    return {name: path.read_bytes() for name, path in found.items() if "checkpoints/" not in name}

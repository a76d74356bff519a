"""Attack keeptune: kills, full disks, damages, hostile files and texts; what held, and what reproduces what did not.

`make attack` makes all tries that are not made yet, and then the page `docs/results/attack.md` of its record. Every
try has a number, of which with the seed all follows; its result is written at once, and a stopped attack goes on. To
attack another commit, remove the folder. One try again:
`python -m studies.attack FOLDER --only "kill compare" --numbers 17 --again`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keeptune.core.artefact import read_json, write_json, write_text
from studies import attack_files, attack_kills, attack_texts
from studies.cells import read_rows
from studies.kills_processes import kill_launch

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/results/attack.json"
_PROPERTIES = ROOT / "tests"  # of which those that read KEEPTUNE_EXAMPLES are run with many examples
_LIBRARIES = (  # what forks find loaded
    "keeptune.pipeline.run", "keeptune.experiments.run_comparison", "keeptune.experiments.sequence.run_stages",
    "keeptune.report.pages.run_page", "keeptune.pipeline.dry_run.describe", "peft", "trl", "pyarrow.parquet",
)  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """An attack: its function of a number, the seed and a folder, how often it is tried, and what must hold."""

    attempt: Callable[[int, int, Path], attack_kills.Found]
    tries: int
    law: str


SAME = (
    "The same command ends; adapter, scores and records have the bytes of a run never attacked, statistics its "
    "numbers to rounding, and nothing is left"
)
MENDED = (
    "Attacks of commit e053f81 and of those up to cd470f2 found, and these mended: temporary files of killed writes "
    "that stayed; a sequence killed after its page, without its figures for ever; target modules in an order that a "
    "process's hashes decide; tracebacks where a disk fills up while a tokenizer is saved, and of a pickle in a "
    "checkpoint with right checksums; names as HTML in the heading of a card."
)
TOLD = "One message, exit code 2, no traceback"
ATTACKS: dict[str, Attack] = {
    "kill run": Attack(attack_kills.kill_run, 100, f"{SAME}."),
    "kill compare": Attack(attack_kills.kill_compare, 100, f"{SAME}."),
    "kill stages": Attack(attack_kills.kill_stages, 100, f"{SAME}."),
    "kill launch": Attack(kill_launch, 4, "No process or lock is left; the same launch ends with the adapter to 1e-5."),
    "full disk": Attack(attack_kills.full_disk, 48, f"{TOLD}, no temporary file. {SAME}, once there is room."),
    "file size": Attack(attack_kills.file_size, 16, f"{TOLD}, no temporary file. {SAME}, once files may be larger."),
    "two processes": Attack(attack_kills.two_processes, 18, f"One waits, or is refused. {SAME}."),
    "damaged store": Attack(attack_files.damage_store, 36, f"What is damaged is computed again. {SAME}."),
    "damaged run": Attack(attack_files.damage_output, 72, f"What is damaged is computed again. {SAME}."),
    "pickles": Attack(attack_files.pickles, 12, "No code runs; a result is that of the true files."),
    "remote code": Attack(attack_files.remote_code, 6, "No code runs; a result is that of the true files."),
    "YAML": Attack(attack_texts.yaml, 100, f"{TOLD}, in 10 s of CPU and 1 GB; no code runs, nothing is written."),
    "HTML": Attack(attack_texts.html, 30, "No element, attribute or script of pages and cards is the attacker's."),
    "chat templates": Attack(attack_texts.templates, 48, f"{TOLD}, in 10 s of CPU and 1 GB; no code runs."),
}  # fmt: skip


def attempts(folder: Path, name: str, seed: int) -> dict[int, dict[str, Any]]:
    """Return the tries of an attack that are recorded, by number, the last of each."""
    path = folder / "tries.jsonl"
    rows = read_rows(path) if path.is_file() else []
    return {row["number"]: row for row in rows if (row["attack"], row["seed"]) == (name, seed)}


def attempt(name: str, number: int, seed: int, folder: Path, attacks: Mapping[str, Attack]) -> dict[str, Any]:
    """Make one try, and record it at once with what reproduces it."""
    begun = time.monotonic()
    try:
        problems, told = attacks[name].attempt(number, seed, folder / "work")
    except Exception as error:  # noqa: BLE001 - an attack that breaks is a try that did not hold
        problems, told = [f"the attack itself: {type(error).__name__}: {error}"], {}
    finally:
        attack_kills.unmount(folder / "work")
    again = f"python -m studies.attack FOLDER --only '{name}' --numbers {number} --seed {seed} --again"
    row = {"attack": name, "number": number, "seed": seed, "held": not problems, "problems": problems, "told": told}
    row |= {"seconds": round(time.monotonic() - begun, 2), "commit": commit()}
    row |= {} if row["held"] else {"reproduce": again}
    with (folder / "tries.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def commit() -> str:
    """Return the last commit that changed what is attacked, with a plus sign where files differ from it."""

    def said(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return said("log", "-1", "--format=%h", "--abbrev=10", "--", "src") + "+" * bool(
        said("status", "--porcelain", "--", "src")
    )


def properties(folder: Path, examples: int) -> dict[str, Any]:
    """Run the property tests with many examples; each test is a try."""
    files = [
        str(path) for path in sorted(_PROPERTIES.rglob("test_*.py")) if "KEEPTUNE_EXAMPLES" in path.read_text("utf-8")
    ]
    told = {"examples": examples, "files": [str(Path(file).relative_to(ROOT)) for file in files]}
    row: dict[str, Any] = {"attack": "properties", "number": 0, "seed": 0, "commit": commit(), "told": told}
    if not files:
        return row | {"held": False, "problems": ["no such tests"], "tests": {}, "seconds": 0}
    begun = time.monotonic()
    environment = os.environ | {"KEEPTUNE_EXAMPLES": str(examples), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "pytest", "-n0", "-q", "-rA", "-p", "no:cacheprovider", *files]
    said = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    counts = Counter(line.split()[0] for line in said.splitlines() if line.startswith(("PASSED ", "FAILED ", "ERROR ")))
    failed = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    row |= {"held": not failed and bool(counts), "problems": failed, "tests": dict(counts)}
    row["seconds"] = round(time.monotonic() - begun, 2)
    with (folder / "tries.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def summary(folder: Path, seed: int, attacks: Mapping[str, Attack] = ATTACKS) -> dict[str, Any]:
    """Return the record of all tries: of each attack how many there were, how many held, and those that did not."""
    rows = {name: list(attempts(folder, name, seed).values()) for name in attacks}
    told = {}
    for name, own in rows.items():
        if not own:
            continue
        kills = sum(row["told"].get("kills", 0) for row in own)
        told[name] = {
            "law": attacks[name].law,
            "tries": len(own),
            "planned": attacks[name].tries,
            "held": sum(row["held"] for row in own),
            **({"kills": kills} if kills else {}),
            "seconds": round(sum(row["seconds"] for row in own)),
            "failures": [row for row in own if not row["held"]],
        }
    tests = attempts(folder, "properties", 0)
    return {
        "seed": seed,
        "commits": sorted({row["commit"] for own in rows.values() for row in own}),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, one at work",
        "attacks": told,
        "properties": tests[0] if tests else None,
    }


def page(record: Mapping[str, Any]) -> str:
    """Return the page of a record."""
    lines = [
        "# Attacks: what was tried, and what held",
        "",
        "Made by `make attack` from [the record](attack.json), which has what reproduces each try that did not hold. "
        "The model is stories260K; a command runs in a fork that has all libraries, so that kills meet the work and "
        "not its start: half of them at moments of CPU time, half before the nth change of a file, one to three a try, "
        "and one try in four in a folder where another recipe has ended.",
        "",
        f"Commit {', '.join(record['commits'])}; {record['date']}; {record['machine']}; seed {record['seed']}.",
        "",
        "| attack | tries | held | minutes | what must hold |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, found in record["attacks"].items():
        tries = f"{found['tries']} of {found['planned']}" + (f", {found['kills']} kills" if "kills" in found else "")
        lines.append(f"| {name} | {tries} | {found['held']} | {found['seconds'] / 60:.1f} | {found['law']} |")
    tests = record["properties"]
    if tests is not None:
        passed, count = tests["tests"].get("PASSED", 0), sum(tests["tests"].values())
        law = f"Property tests with {tests['told']['examples']:,} examples each: {', '.join(tests['told']['files'])}."
        lines.append(f"| properties | {count} | {passed} | {tests['seconds'] / 60:.1f} | {law} |")
    lines += [
        "",
        "Of the planned tries those are in it that fitted into the time; `make attack` makes the others.",
        "",
        MENDED,
    ]
    failures = [row for found in record["attacks"].values() for row in found["failures"]]
    lines += ["", "## What did not hold", ""]
    for row in failures:
        what = "; ".join(row["problems"])[:300].replace("\n", " ").replace("`", "'")
        lines.append(f"- {row['attack']}, {row['number']}: `{what}`")
    lines += [f"- `{problem}`" for problem in (tests or {}).get("problems", ())]
    return "\n".join(lines + ["Nothing."] * (lines[-1] == "")) + "\n"


def prepare() -> None:
    """Load what forks need, and keep it out of their garbage collections."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)  # a fork has no threads but its own
    for name in _LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def run_attacks(folder: Path, chosen: Sequence[tuple[str, int]], seed: int, until: float) -> int:
    """Make tries until a time; returns how many did not hold."""
    bad = 0
    for name, number in chosen:
        if time.monotonic() > until:
            print("the time is over: the same command goes on from here", flush=True)
            break
        row = attempt(name, number, seed, folder, ATTACKS)
        bad += not row["held"]
        print(f"{name} {number}: {'held' if row['held'] else row['problems']} {row['told']}", flush=True)
    return bad


def main() -> int:
    """Make the tries that are asked for, and write record and page; the exit code says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/attack"))
    parser.add_argument("--only", nargs="*", choices=[*ATTACKS, "properties"], default=[*ATTACKS, "properties"])
    parser.add_argument("--tries", type=int, help="of each attack; default: its own number")
    parser.add_argument("--numbers", type=int, nargs="*", help="of these tries alone")
    parser.add_argument("--again", action="store_true", help="make tries that are recorded once more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--examples", type=int, default=10_000, help="of each property test")
    parser.add_argument("--page", action="store_true", help="write the page from its record alone")
    given = parser.parse_args()
    folder = given.folder.resolve()
    if not given.page:
        os.environ["OMP_NUM_THREADS"] = "1"
        until = time.monotonic() + 60 * given.minutes
        prepare()
        (folder / "work").mkdir(parents=True, exist_ok=True)
        chosen = []
        for name in (name for name in given.only if name in ATTACKS):
            done = {} if given.again else attempts(folder, name, given.seed)
            numbers = given.numbers or range(given.tries or ATTACKS[name].tries)
            chosen += [(number / len(numbers), name, number) for number in numbers if number not in done]
        # In turns, so that a part of the time holds a part of each attack.
        run_attacks(folder, [(name, number) for _, name, number in sorted(chosen)], given.seed, until)
        if "properties" in given.only and (given.again or not attempts(folder, "properties", 0)):
            properties(folder, given.examples)
        if given.numbers is not None:
            return 0
        write_json(RECORD, summary(folder, given.seed))
    record = read_json(RECORD)
    write_text(RECORD.with_suffix(".md"), page(record))
    for name, found in record["attacks"].items():
        print(f"{name}: {found['held']} of {found['tries']} held")
    return int(any(found["held"] < found["tries"] for found in record["attacks"].values()))


if __name__ == "__main__":
    sys.exit(main())

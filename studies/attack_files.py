"""Attacks on files: damages in the store and in a run folder, pickles in the place of weights, code beside models."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keeptune.core.artefact import file_checksum
from studies.attack_kills import Found, adapters
from studies.attack_runs import ASSETS, Limits, command, done_as, fresh, recipe, told, verb, whole, written

_CODE = "import pathlib\npathlib.Path({mark!r}).write_text('run')\n"
_EVIL = "evil"  # the name of the module, and of the classes


def _flip(path: Path, drawn: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, drawn: random.Random) -> None:
    os.truncate(path, drawn.randrange(max(1, path.stat().st_size)))


def _append(path: Path, drawn: random.Random) -> None:
    path.write_bytes(path.read_bytes() + drawn.randbytes(drawn.randint(1, 64)))


def _zero(path: Path, drawn: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = drawn.randrange(len(data) + 1)
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def _remove(path: Path, _: random.Random) -> None:
    path.unlink()


def _null(path: Path, _: random.Random) -> None:
    path.write_text("null", encoding="utf-8")


def _deep(path: Path, _: random.Random) -> None:
    path.write_text("[" * 100_000, encoding="utf-8")


def _folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    _flip, _cut, _append, _zero, _remove, _null, _deep, _folder, _dangling,
)  # fmt: skip


def damage_store(number: int, seed: int, work: Path) -> Found:
    """Damage one file of the store in one of nine ways, and run again without the run folder: it is computed anew."""
    return _damage("store", number, seed, work)


def damage_output(number: int, seed: int, work: Path) -> Found:
    """Damage one file of a finished run folder in one of nine ways, and run again: its stage runs again."""
    return _damage("out", number, seed, work)


def _damage(part: str, number: int, seed: int, work: Path) -> Found:
    drawn = random.Random(f"{seed} damage {part} {number}")
    kind = ("loki", "run", "compare", "stages")[number % 4] if part == "out" else ("loki", "compare")[number % 2]
    reference, _ = whole(kind, work)
    here = fresh(work)
    shutil.copytree(reference, here, dirs_exist_ok=True)
    if part == "store":
        shutil.rmtree(here / "out")
    path = written(recipe(kind, here), here)
    files = sorted(file for file in (here / part).rglob("*") if file.is_file())
    file, damage = drawn.choice(files), DAMAGES[number // 4 % len(DAMAGES)]
    done = {"kind": kind, "file": str(file.relative_to(here)), "damage": damage.__name__.strip("_")}
    damage(file, drawn)
    if "/checkpoints/" in str(file):  # which are read where training goes on
        shutil.rmtree(Path(str(file).partition("/checkpoints/")[0], "trained"))
        for result in here.glob("out/after/*/stage.json"):
            result.unlink()
        for mark in here.glob("out/runs/*/run.json"):
            mark.unlink()
    ended = command(verb(kind), path, folder=here)
    done["code"] = ended.code
    if damage in (_folder, _dangling) and ended.code == 2:  # it is named, for its owner to remove
        return told(ended), done
    problems = done_as(ended, here, reference)
    if part == "store":  # an entry that a result made of it stands for is not read, and stays damaged
        problems = [text for text in problems if not text.startswith("store/") or text.endswith("left over")]
    if "/checkpoints/" in str(file):  # nor an older one, nor one that is not whole
        problems = [text for text in problems if "/checkpoints/" not in text]
    return problems, done


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (_CODE.format(mark=str(self.mark)),)  # what is attacked with: it writes a file


def _model(here: Path) -> Path:
    shutil.copytree(ASSETS / "models/stories260K", here / "model", copy_function=shutil.copyfile)
    return here / "model"


def _bin_only(here: Path, pickled: bytes) -> None:
    (_model(here) / "model.safetensors").unlink()
    (here / "model/pytorch_model.bin").write_bytes(pickled)


def _bin_named_safetensors(here: Path, pickled: bytes) -> None:
    (_model(here) / "model.safetensors").write_bytes(pickled)


def _bin_in_index(here: Path, pickled: bytes) -> None:
    _bin_only(here, pickled)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (here / "model/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _pickled_checkpoint(here: Path, pickled: bytes) -> None:
    """Whoever can write a checkpoint can write its checksums too."""
    for folder in here.glob("out/checkpoints/*/checkpoint-*"):
        for path in (*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")):
            path.write_bytes(pickled)
        sums = {path.name: file_checksum(path) for path in folder.iterdir() if path.name != "checksums.json"}
        (folder / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")
    shutil.rmtree(here / "out/trained")


def _pickled_adapter(here: Path, pickled: bytes) -> None:
    shutil.copytree(here / "out/adapter", here / "theirs")
    (here / "theirs/adapter_model.bin").write_bytes(pickled)
    (here / "theirs/adapter_model.safetensors").unlink()


def _pickled_entries(here: Path, pickled: bytes) -> None:
    shutil.rmtree(here / "out")
    for path in here.glob("store/*/*/value.safetensors"):
        path.write_bytes(pickled)
        record = json.loads(path.with_name("recipe.json").read_text(encoding="utf-8"))
        record["sha256"] = file_checksum(path)
        path.with_name("recipe.json").write_text(json.dumps(record), encoding="utf-8")


_PICKLES = (
    _bin_only, _bin_named_safetensors, _bin_in_index, _pickled_checkpoint, _pickled_adapter, _pickled_entries,
)  # fmt: skip


def pickles(number: int, seed: int, work: Path) -> Found:
    """Put a pickle that runs code where weights, states, adapters or statistics are read; it must not run."""
    place, protocol = _PICKLES[number % len(_PICKLES)], (0, 2, 4, 5)[number // len(_PICKLES) % 4]
    return _with_code(lambda here, mark: place(here, pickle.dumps(_Payload(mark), protocol)), place.__name__, work)


def _with_code(place: Callable[[Path, Path], Any], name: str, work: Path) -> Found:
    """Run on what an attacker placed; the law is that its code did not, and that a command ends well or says why."""
    reference, _ = whole("loki", work)
    here = fresh(work)
    shutil.copytree(reference, here, dirs_exist_ok=True)
    mark = work / "code-ran"
    mark.unlink(missing_ok=True)
    place(here, mark)
    given = recipe("loki", here)
    if (here / "model").is_dir():
        shutil.rmtree(here / "out")
        given |= {"model": str(here / "model")}
    words = ("evaluate", "--adapter", here / "theirs") if (here / "theirs").is_dir() else ("run",)
    ended = command(words[0], written(given, here), *words[1:], folder=here, limits=Limits(seconds=120))
    problems = ["the code ran"] if mark.exists() else []
    if ended.code:
        problems += told(ended)
    elif adapters(here / "out") != adapters(reference / "out"):
        problems.append("another adapter")
    return problems, {"place": name.strip("_"), "code": ended.code}


def _edit(path: Path, **fields: Any) -> None:
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(old | fields), encoding="utf-8")


def _evil_model(here: Path, mark: Path) -> Path:
    folder = _model(here)
    (folder / f"{_EVIL}.py").write_text(_CODE.format(mark=str(mark)), encoding="utf-8")
    return folder


def _config_map(here: Path, mark: Path) -> None:
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    _edit(_evil_model(here, mark) / "config.json", auto_map=dict.fromkeys(kinds, f"{_EVIL}.Evil"))


def _unknown_type(here: Path, mark: Path) -> None:
    _config_map(here, mark)
    _edit(here / "model/config.json", model_type="evil", architectures=["EvilForCausalLM"])


def _trusts_itself(here: Path, mark: Path) -> None:
    _unknown_type(here, mark)
    _edit(here / "model/config.json", trust_remote_code=True)
    _edit(here / "model/tokenizer_config.json", trust_remote_code=True)


def _tokenizer_map(here: Path, mark: Path) -> None:
    map_ = {"AutoTokenizer": [f"{_EVIL}.Evil", f"{_EVIL}.Evil"]}
    _edit(_evil_model(here, mark) / "tokenizer_config.json", auto_map=map_, tokenizer_class="Evil")


def _custom_generate(here: Path, mark: Path) -> None:
    folder = _evil_model(here, mark)
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / f"{_EVIL}.py", folder / "custom_generate/generate.py")
    _edit(folder / "generation_config.json", custom_generate=str(folder), trust_remote_code=True)


def _adapter_mapping(here: Path, mark: Path) -> None:
    shutil.copytree(here / "out/adapter", here / "theirs")
    (here / "theirs" / f"{_EVIL}.py").write_text(_CODE.format(mark=str(mark)), encoding="utf-8")
    mapping = {"base_model_class": "Evil", "parent_library": _EVIL}
    config = here / "theirs/adapter_config.json"
    _edit(config, auto_mapping=mapping, peft_type="EVIL", megatron_config={}, megatron_core=_EVIL)


_CODES = (
    _config_map, _unknown_type, _trusts_itself, _tokenizer_map, _custom_generate, _adapter_mapping,
)  # fmt: skip


def remote_code(number: int, seed: int, work: Path) -> Found:
    """Bring Python code in a model's or an adapter's folder; it must not run."""
    place = _CODES[number % len(_CODES)]
    return _with_code(place, place.__name__, work)

"""Canonical JSON, content keys, fingerprints and atomic writes: what makes a run resumable.

Functions that write raise ArtefactError where the disk is full or read-only; functions that read, where a file is
missing or damaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import UndefinedError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from keeptune.core.errors import ArtefactError, KeeptuneError
from keeptune.core.offload import stored_value
from keeptune.core.redaction import redacted

_log = logging.getLogger(__name__)
_AGAIN = "Remove it and run again what wrote it."
_CHECKSUM = "checksum"
_ILL_FORMED = (
    *(ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError),
    *(SafetensorError, UndefinedError),
)
EXPORT = "export.json"  # in the folder of an adapter or a model that keeptune wrote
_DISK_CODES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_PLACE_CODES = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
# safetensors and tokenizers report the operating system's error only in their text, torch.save not even there.
_OS_ERROR = re.compile(r"(?:\(os error|Os \{ code:) (\d+)")
_DISK_TEXTS = ("No space left", "failed writing file", "PytorchStreamWriter", "unexpected pos", "iostream error")
_LEFT, _ENTRY = re.compile(r"\..+\.[0-9a-f]{8}"), re.compile(r"\.?[0-9a-f]{64}(\.[0-9a-f]{8})?")
_NOT_THE_FUNCTION = (  # config fields that do not change what a model computes of given tokens
    {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "return_dict", "use_cache"}
    | {"id2label", "label2id", "problem_type", "task_specific_params"}
    | {"architectures", "name_or_path", "transformers_version"}
)


def canonical_json(value: Any) -> str:
    """Returns built-in types, frozen dataclasses, sets and paths as JSON in its only form: sorted keys, no NaN.

    >>> canonical_json({"b": 1, "a": (1, 2)})
    '{"a":[1,2],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"canonical_json: cannot write a {type(value).__name__}")


def content_key(value: Any) -> str:
    """Returns the SHA-256 of a value's canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def tensor_fingerprint(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's dtype, shape and bytes; of one that other packages pack, of its parts'."""
    if hasattr(tensor, "__tensor_flatten__") and not type(tensor).__module__.startswith("torch."):
        parts, about = tensor.__tensor_flatten__()
        return content_key([str(about), {part: tensor_fingerprint(getattr(tensor, part)) for part in parts}])
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """Returns the content key of what a base model computes: every weight, and the config that says how it is used.

    Modules of ``without``, such as a head with random weights, are left out.
    """
    named = tqdm(model.state_dict().items(), desc="fingerprint", delay=2, disable=None, leave=False)
    left_out = tuple(f"{module}." for module in without)
    kept = ((name, value) for name, value in named if not name.startswith(left_out))
    weights = {name: tensor_fingerprint(stored_value(model, name, value)) for name, value in kept}
    config = getattr(model, "config", None)
    fields = {} if config is None else config.to_dict()
    used = {key: value for key, value in fields.items() if key not in _NOT_THE_FUNCTION and not key.startswith("_")}
    return content_key([weights, json.loads(json.dumps(used, default=str))])


def file_fingerprint(paths: Iterable[Path]) -> str:
    """Returns the SHA-256 of files' bytes, in the order given, whatever their names."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(file_checksum(path)))
    return digest.hexdigest()


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Raises an ArtefactError for a full or read-only disk, whichever library meets it."""
    try:
        yield
    except KeeptuneError:
        raise
    except Exception as error:  # which is all that tokenizers raises
        named = _OS_ERROR.search(str(error))
        code = getattr(error, "errno", None) or (named and int(named[1]))
        where = str(getattr(error, "filename2", None) or getattr(error, "filename", None) or path)
        if code in _PLACE_CODES or (code == errno.ENOENT and Path(where).is_symlink()):
            raise ArtefactError(
                where,
                got=os.strerror(code),
                wanted="a place for a file or folder of keeptune's",
                next_step="Remove or rename what stands there, or choose another output.",
            ) from error
        if code not in _DISK_CODES and not any(text in str(error) for text in _DISK_TEXTS):
            raise
        raise ArtefactError(
            str(path),
            got=getattr(error, "strerror", None) or f"a failed write ({str(error).splitlines()[0]})",
            wanted="room to write",
            next_step="Free space or choose another output; nothing was left half-written. "
            "The same command goes on from here.",
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and makes its folder."""
    _write_whole(path, lambda fresh: fresh.write_bytes(data))


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = _beside(path)  # unlike tempfile's, with the modes that the user's umask leaves
        try:
            write(fresh)
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes text whole or not at all, without secrets (:func:`redacted`), as every text of keeptune's own."""
    write_bytes(path, redacted(text).encode())


def write_json(path: Path, value: Any, *, checked: bool = False) -> None:
    """Writes readable JSON whole or not at all; a ``checked`` object with a checksum, for :func:`read_json`."""
    plain = json.loads(redacted(json.dumps(json.loads(canonical_json(value)), indent=2, ensure_ascii=False)))
    own = {_CHECKSUM: content_key(plain)} if checked else {}
    write_bytes(path, f"{json.dumps(plain | own if own else plain, indent=2, ensure_ascii=False)}\n".encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Writes a safetensors file with metadata whole or not at all, and returns the SHA-256 of its bytes."""
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # Without tensors, safetensors writes a broken header for empty metadata.
    _write_whole(path, lambda fresh: save_file(ready, fresh, metadata=dict(metadata) if metadata else None))
    return file_checksum(path)


def file_checksum(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with as_written(path, "the file as it was written"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need_files(folder: Path, sums: Mapping[str, str], next_step: str) -> None:
    """Raises ArtefactError unless a folder's files, by their names, have the checksums that they were written with."""
    for name, checksum in sums.items():
        there = (folder / name).is_file()
        if not there or file_checksum(folder / name) != checksum:
            got = "bytes that do not match their checksum" if there else "no such file"
            raise ArtefactError(str(folder / name), got=got, wanted="the file as it was written", next_step=next_step)


def seal(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the record of what a folder holds, with the checksums of its files; the README may change."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name not in (EXPORT, "README.md")]
    write_json(folder / EXPORT, {**record, "files": {path.name: file_checksum(path) for path in files}}, checked=True)


def checked(folder: Path) -> Path:
    """Returns a folder; ArtefactError where keeptune exported it and it is not as it was written."""
    advice = f"Export it again (`keeptune export`, or what wrote it); without its {EXPORT} it is taken as it is."
    record = read_json(folder / EXPORT, advice) if (folder / EXPORT).is_file() else {}
    with as_written(folder / EXPORT, again=advice):
        need_files(folder, record.get("files", {}), advice)
    return folder


def read_json(path: Path, again: str = _AGAIN) -> Any:
    """Reads an object of JSON that keeptune wrote, as it was written if it says so; ``again`` is what else to do."""
    with as_written(path, "a JSON file", again):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}, no object")
        checksum = record.pop(_CHECKSUM, None)
        if checksum is not None and checksum != content_key(record):
            raise ValueError("content that does not match its checksum")
        return record


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Reads a safetensors file to the CPU and checks it against the SHA-256 that :func:`write_tensors` returned."""
    with as_written(path, "the file as it was written", "Remove its folder and run the stage again."):
        if file_checksum(path) != sha256:
            raise ValueError("bytes that do not match their checksum")
        return load_file(path, backend="pread")  # a mapped file would be lost with the folder that holds it


@contextlib.contextmanager
def as_written(where: object, wanted: str = "the records that keeptune wrote", again: str = _AGAIN) -> Iterator[None]:
    """Turns what reading damaged or incomplete files raises into an error that says where, and what to do."""
    try:
        yield
    except _ILL_FORMED as error:
        plain = isinstance(error, OSError) or type(error) is ValueError
        got = str(error) if plain else f"{type(error).__name__}: {error}"
        raise ArtefactError(str(where), got=got, wanted=wanted, next_step=again) from error


def has_key(path: Path, key: str) -> bool:
    """Returns whether a stage's record, JSON with a ``key``, exists and has this key."""
    try:
        return bool(read_json(path)["key"] == key)
    except (ArtefactError, KeyError):
        return False


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that takes a folder's place at the end, whole or not at all."""
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = _beside(path)
        fresh.mkdir()
        try:
            yield fresh
            _readable(fresh)
            if path.exists():
                _exchange(fresh, path)
            else:
                fresh.replace(path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise


def _readable(folder: Path) -> None:
    """Gives files the modes that the umask left the folder: safetensors writes for the user's eyes only."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def remove_leftovers(path: Path) -> None:
    """Removes what killed writes left below a folder that this process holds, and beside it for it; logs it.

    A store that lies in it has other users, and looks after itself.
    """
    for left in [*path.parent.glob(f".{path.name}.*"), *path.rglob(".*")]:
        if _LEFT.fullmatch(left.name) and not any(
            _ENTRY.fullmatch(part) for part in left.relative_to(path.parent).parts
        ):
            _log.info("%s: left over by a killed run, removed", left)
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _exchange(fresh: Path, path: Path) -> None:
    """Replaces a folder by another; when that fails, the old one is put back."""
    beside = _beside(path)
    beside.mkdir()
    old = beside / path.name
    try:
        path.replace(old)
        try:
            fresh.replace(path)
        except BaseException:
            old.replace(path)
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            beside.rmdir()  # the empty folder only: if the old one could not be put back, it is still in there
        raise
    shutil.rmtree(beside)

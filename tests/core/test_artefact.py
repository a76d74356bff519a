from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from tests.models import MODELS, full_disk, names_in

from keeptune.core.artefact import (
    atomic_directory,
    canonical_json,
    content_key,
    explain_full_disk,
    file_fingerprint,
    has_key,
    model_fingerprint,
    read_json,
    read_tensors,
    tensor_fingerprint,
    write_bytes,
    write_json,
    write_tensors,
)
from keeptune.core.errors import ArtefactError
from keeptune.core.redaction import redacted

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
).filter(lambda value: "\\ud" not in ascii(value))
quick = settings(max_examples=60, deadline=None, derandomize=True)


def full_disk_at(call: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """Fail at the given call only; what a clean-up does afterwards works again."""
    count = 0

    def replace(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        return full_disk() if count == call else real(*arguments, **named)

    return replace


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(list(value))}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


# Canonical JSON and keys


@quick
@given(json_values)
def test_canonical_json_does_not_depend_on_key_order(value: Any) -> None:
    assert canonical_json(reversed_keys(value)) == canonical_json(value)


@quick
@given(json_values, json_values)
def test_different_contents_have_different_keys(a: Any, b: Any) -> None:
    assert (content_key(a) == content_key(b)) == (canonical_json(a) == canonical_json(b))


@dataclass(frozen=True)
class _Point:
    x: int
    y: tuple[int, ...]


def test_canonical_json_writes_dataclasses_sets_and_paths_as_plain_values() -> None:
    value = {"point": _Point(1, (2, 3)), "set": frozenset({"b", "a"}), "path": Path("a/b")}
    assert canonical_json(value) == '{"path":"a/b","point":{"x":1,"y":[2,3]},"set":["a","b"]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_canonical_json_refuses_numbers_that_json_lacks(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(value)


def test_canonical_json_refuses_objects_without_one_written_form() -> None:
    with pytest.raises(TypeError, match="object"):
        canonical_json(object())


# Fingerprints


def test_tensor_fingerprint_tells_value_shape_and_dtype_apart() -> None:
    base = torch.arange(6.0)
    others = [base + 1e-6, base.reshape(2, 3), base.to(torch.float64), base.to(torch.bfloat16), base.flip(0)]
    assert len({tensor_fingerprint(t) for t in [base, *others]}) == 6


def test_tensor_fingerprint_does_not_depend_on_memory_layout() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    assert tensor_fingerprint(base.T.contiguous().T) == tensor_fingerprint(base)


@pytest.mark.parametrize("architecture", MODELS)
def test_model_fingerprint_changes_with_any_one_weight(architecture: str) -> None:
    model = MODELS[architecture]()
    start = model_fingerprint(model)
    seen = {start}
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        kept = flat[-1].item()
        flat[-1] += 1e-3
        seen.add(model_fingerprint(model))
        flat[-1] = kept
    assert len(seen) == 1 + len(list(model.parameters()))
    assert model_fingerprint(model) == start


def test_model_fingerprint_does_not_depend_on_requires_grad_or_mode() -> None:
    model = MODELS["llama"]()
    start = model_fingerprint(model)
    assert model_fingerprint(model.train().requires_grad_(False)) == start


def test_file_fingerprint_is_of_bytes_in_order_not_of_names(tmp_path: Path) -> None:
    for name, data in {"a": b"1", "b": b"2", "c": b"1"}.items():
        (tmp_path / name).write_bytes(data)
    a, b, c = (tmp_path / name for name in "abc")
    assert file_fingerprint([a, b]) == file_fingerprint([c, b])
    assert file_fingerprint([a, b]) != file_fingerprint([b, a])
    assert file_fingerprint([a]) != file_fingerprint([a, c])


# Files


@quick
@given(value=json_values)
def test_json_reads_back_as_written(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    for checked in (False, True):
        write_json(path, {"value": value}, checked=checked)
        assert canonical_json(read_json(path)) == canonical_json({"value": value})


def test_tensors_read_back_bit_for_bit(tmp_path: Path) -> None:
    wanted = {"a": torch.randn(3, 4).T, "b": torch.randn(5).to(torch.bfloat16), "empty": torch.zeros(0, 2)}
    found = read_tensors(tmp_path / "t", write_tensors(tmp_path / "t", wanted))
    assert {name: tensor_fingerprint(t) for name, t in found.items()} == {
        name: tensor_fingerprint(t) for name, t in wanted.items()
    }


@pytest.mark.parametrize("damage", ["flip", "truncate", "replace", "remove"])
def test_tensors_that_are_not_the_ones_written_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t"
    sha256 = write_tensors(path, {"a": torch.arange(8.0)})
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-4])
    elif damage == "replace":
        write_tensors(path, {"a": torch.arange(9.0)})
    else:
        path.unlink()
    with pytest.raises(ArtefactError, match="the file as it was written"):
        read_tensors(path, sha256)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\xfd"], ids=["missing", "empty", "cut", "binary"])
def test_json_that_cannot_be_read_is_an_artefact_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"x\.json"):
        read_json(path)


def test_written_files_and_folders_can_be_read_by_others(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"1")
    with atomic_directory(tmp_path / "folder") as fresh:
        write_bytes(fresh / "file", b"1")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


# Whole or not at all

WRITERS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: write_bytes(path, b"new"),
    "json": lambda path: write_json(path, {"new": 1}),
    "tensors": lambda path: write_tensors(path, {"new": torch.zeros(3)}),
}


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("old", [None, b"old"], ids=["fresh", "over-old"])
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, writer: str, old: bytes | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(ArtefactError, match="No space left on device"):
        WRITERS[writer](path)
    assert names_in(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "over-old"])
def test_an_exception_while_filling_a_folder_leaves_the_old_one(tmp_path: Path, old: bool) -> None:
    folder = tmp_path / "folder"
    if old:
        write_json(folder / "a.json", {"of": "old"})
    with pytest.raises(KeyError, match="mine"), atomic_directory(folder) as fresh:
        write_json(fresh / "a.json", "new")
        raise KeyError("mine")
    assert names_in(tmp_path) == (["folder"] if old else [])
    assert not old or read_json(folder / "a.json") == {"of": "old"}


@pytest.mark.parametrize("call", [1, 2])
def test_a_full_disk_while_a_folder_is_exchanged_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    folder = tmp_path / "folder"
    write_json(folder / "a.json", {"of": "old"})
    with pytest.raises(ArtefactError, match="No space left on device"), atomic_directory(folder) as fresh:
        (fresh / "b.json").write_text("1")
        monkeypatch.setattr(os, "replace", full_disk_at(call, os.replace))
    assert names_in(tmp_path) == ["folder"]
    assert names_in(folder) == ["a.json"]
    assert read_json(folder / "a.json") == {"of": "old"}


def test_a_full_disk_before_a_first_folder_appears_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtefactError, match="No space left on device"), atomic_directory(tmp_path / "folder") as fresh:
        (fresh / "b.json").write_text("1")
        monkeypatch.setattr(os, "replace", full_disk)
    assert names_in(tmp_path) == []


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "folder" / "stale.json", 1)
    with atomic_directory(tmp_path / "folder") as fresh:
        write_json(fresh / "fresh.json", 2)
        assert names_in(tmp_path / "folder") == ["stale.json"]
    assert names_in(tmp_path) == ["folder"]
    assert names_in(tmp_path / "folder") == ["fresh.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.EACCES, "Permission denied"),
        RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos: PytorchStreamWriter failed writing file"
        ),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("File too large (os error 27)"),
    ],
    ids=["read-only", "forbidden", "torch", "safetensors", "tokenizers"],
)
def test_a_disk_that_cannot_be_written_is_one_error_whoever_met_it(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="room to write") as caught, explain_full_disk(tmp_path):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "gone"), Exception("(os error 2)"), KeyError("x")])
def test_other_errors_pass_unchanged(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, explain_full_disk(tmp_path):
        raise error
    assert caught.value is error


def test_model_fingerprint_changes_with_the_config_that_changes_the_function() -> None:
    model = MODELS["llama"]()
    start = model_fingerprint(model)
    model.config.use_cache = not model.config.use_cache
    assert model_fingerprint(model) == start
    model.config.rms_norm_eps *= 10
    assert model_fingerprint(model) != start


def test_has_key_holds_only_for_a_whole_record_of_that_key(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert not has_key(path, "a")
    write_json(path, {"key": "a"})
    assert has_key(path, "a")
    assert not has_key(path, "b")
    for damaged in ('{"other": 1}', "[1]", '{"key": "a"'):
        path.write_text(damaged, encoding="utf-8")
        assert not has_key(path, "a")


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022])
def test_files_and_folders_have_the_modes_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "folder") as fresh:
            write_json(fresh / "record.json", {})
        with atomic_directory(tmp_path / "folder") as fresh:
            write_json(fresh / "record.json", {"again": True})
            write_tensors(fresh / "part" / "value.safetensors", {"value": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    for file in ("record.json", "part/value.safetensors"):
        assert (tmp_path / "folder" / file).stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("token", ["hf_" + "aB3" * 10, "sk-proj-" + "aB3" * 10, "github_pat_" + "aB3" * 8])
def test_no_access_token_is_written(token: str, tmp_path: Path) -> None:
    record = {"url": f"https://user:{token}@hub", "task": "disk-labelling-of-everything", "said": f"mine:\n{token}\n"}
    write_json(tmp_path / "record.json", record)
    written = (tmp_path / "record.json").read_text(encoding="utf-8")
    assert token[8:] not in written
    assert "***@hub" in written
    assert "disk-labelling-of-everything" in written


NAMES = ["api_key", "WANDB_API_KEY", "hub_token", "auth-token", "clientSecret", "password", "S_TOKEN"]
SECRET = st.text(st.sampled_from("abcXYZ019-_.~+/"), min_size=20, max_size=40).map("x{}".format)


@given(SECRET, st.sampled_from(NAMES))
def test_what_stands_under_a_name_of_secrets_is_written_in_no_form(secret: str, name: str) -> None:
    written = json.dumps({name: secret})
    for text in (written, f"{name}: {secret}", f"{name}={secret}", json.dumps(written)):
        assert secret not in redacted(text)
        assert redacted(redacted(text)) == redacted(text)
        assert not text.startswith("{") or json.loads(redacted(text)) == {name: "***"}


def test_a_secret_of_the_environment_is_known_whatever_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    assert redacted(f"run {'0123456789abcdef' * 2} of x") == "run *** of x"


@pytest.mark.parametrize(
    "text",
    [
        *('{"eos_token": "<|endoftext|>"}', '{"key": "' + "0a" * 32 + '"}', '"api_key": null', "the secret: "),
        *("hf://datasets/org/name@revision", "http://127.0.0.1:8000/v1", "/data/hf_models_of_mine_in_2026/x"),
        *("a sk-learn-compatible-estimator", "https://hub.co/a@b:c", "max_tokens=1000000000", "keys: [q_proj, k_proj]"),
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_a_tensor_that_another_package_packs_is_told_by_its_parts() -> None:
    class Packed(torch.Tensor):
        """As torchao's: it has no bytes of its own."""

        @staticmethod
        def __new__(cls, data: torch.Tensor, scale: float, layout: str = "rows") -> Packed:
            made = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)
            made.data_, made.scale_, made.layout_ = data, torch.tensor(scale), layout
            return made

        @classmethod
        def __torch_dispatch__(cls, *_: object) -> None:
            raise NotImplementedError

        def __tensor_flatten__(self) -> tuple[list[str], list[str]]:
            return ["data_", "scale_"], [self.layout_]

    def prints(value: int, scale: float = 1.0, layout: str = "rows") -> str:
        return tensor_fingerprint(Packed(torch.full((2, 3), value), scale, layout))

    assert prints(1) == prints(1)
    assert len({prints(1), prints(2), prints(1, 2.0), prints(1, layout="columns")}) == 4

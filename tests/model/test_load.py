from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets import STORIES
from tests.models import MODELS, save

from keeptune.core.artefact import model_fingerprint
from keeptune.core.errors import DataError, ModelError
from keeptune.data import template_limits
from keeptune.model.pretrained import LoadOptions, load_model, load_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(MODELS["llama"](), tmp_path_factory.mktemp("base") / "llama").folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Callable[[Callable[[Path], None]], Path]:
    """A copy of the saved model after something was done to its folder."""

    def make(change: Callable[[Path], None]) -> Path:
        folder = tmp_path / "broken"
        folder.mkdir()
        for path in saved.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change(folder)
        return folder

    return make


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(MODELS["llama"]().state_dict(), folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


def test_a_folder_is_loaded_as_it_was_saved_in_evaluation_mode(saved: Path) -> None:
    model = load_model(str(saved))
    assert model_fingerprint(model) == model_fingerprint(MODELS["llama"]())
    assert not model.training


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_dtype_is_the_one_asked_for(saved: Path, dtype: str, wanted: torch.dtype) -> None:
    assert {p.dtype for p in load_model(str(saved), LoadOptions(dtype=dtype)).parameters()} == {wanted}  # type: ignore[arg-type]


def test_auto_takes_the_dtype_that_was_saved(tmp_path: Path) -> None:
    found = save(MODELS["llama"](dtype=torch.bfloat16), tmp_path / "half").load()
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}


def test_a_home_folder_is_written_with_a_tilde(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load_model("~/llama").config.hidden_size == 32


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"a folder without config\.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "a folder without weights"),
        (pickle_weights, r"pickled weights only \(pytorch_model\.bin\)"),
        (lambda folder: (folder / "config.json").write_text("{"), "got"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "unheard-of"}'), "unheard-of"),
        (cut_weights, "Safetensor"),
        (other_shapes, "other shapes"),
    ],
    ids=["no-config", "no-weights", "pickled", "config-cut", "unknown-type", "weights-cut", "weights-of-another"],
)
def test_a_folder_that_cannot_be_used_is_a_model_error(
    broken: Callable[[Callable[[Path], None]], Path], change: Callable[[Path], None], got: str
) -> None:
    folder = broken(change)
    with pytest.raises(ModelError, match=got) as caught:
        load_model(str(folder))
    assert caught.value.where == f"model {folder}"


@pytest.mark.parametrize(
    "change",
    [
        *({"num_hidden_layers": 10**6}, {"num_hidden_layers": 900_000}, {"num_labels": 2**70}, {"vocab_size": 2**40}),
        *({"hidden_size": 10**6}, {"num_key_value_heads": 999_999}, {"vocab_size": -1}, {"hidden_size": 0}),
        *({"num_hidden_layers": "two"}, {"rms_norm_eps": [1]}, {"rope_parameters": "x"}, {"dtype": 3}),
    ],
    ids=str,
)
def test_a_config_that_no_model_has_is_one_error_before_memory_is_taken(
    broken: Callable[[Callable[[Path], None]], Path], change: dict[str, Any]
) -> None:
    def changed(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))

    folder = broken(changed)
    with pytest.raises(ModelError, match=str(folder)):
        load_model(str(folder))


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% if tools %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
        "{{ messages[0]['content'] * 10**10 }}",
    ],
    ids=["loops", "loops-with-tools", "gigabytes"],
)
def test_a_chat_template_that_does_not_end_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(template_limits, "_SECONDS", 1)
    folder = Path(shutil.copytree(STORIES, tmp_path / "model", copy_function=shutil.copyfile))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError, match=r"model .* a chat template that takes more than 1 s or 1 GB"):
        load_tokenizer(str(folder))


def test_pickled_weights_are_read_when_allowed(broken: Callable[[Callable[[Path], None]], Path]) -> None:
    found = load_model(str(broken(pickle_weights)), LoadOptions(allow_pickle=True))
    assert model_fingerprint(found) == model_fingerprint(MODELS["llama"]())


@pytest.mark.parametrize("name", ["/absent/model", "./absent", "~/absent", "a/b/c"])
def test_a_path_that_is_no_folder_is_told_as_a_path(name: str) -> None:
    with pytest.raises(ModelError, match="got no such folder"):
        load_model(name)


@pytest.mark.parametrize("name", ["absent-model", "org/absent-model"])
def test_a_name_that_the_hub_does_not_give_is_a_model_error(name: str) -> None:
    with pytest.raises(ModelError, match=f"model {name}: got OSError"):
        load_model(name)


def test_a_folder_without_a_tokenizer_is_a_model_error(saved: Path) -> None:
    with pytest.raises(ModelError, match="model"):
        load_tokenizer(str(saved))

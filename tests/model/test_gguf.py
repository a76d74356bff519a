from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tests.gguf_files import gguf_llama, write_gguf
from tests.models import logits

from keeptune.core.errors import ModelError
from keeptune.model import quantization as module
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import LoadOptions, load_model, load_positions, load_tokenizer
from keeptune.model.quantization import place_of
from keeptune.pipeline.dry_run.estimate import model_shape


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(gguf_llama(), path, q8=True)
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("q8", [False, True])
def test_a_file_is_loaded_as_the_float_model_whose_weights_it_holds(tmp_path: Path, tied: bool, q8: bool) -> None:
    path = tmp_path / "model.gguf"
    kept = write_gguf(gguf_llama(tied=tied), path, q8=q8)
    found = load_model(str(path))
    state = found.state_dict()
    assert kept.keys() == state.keys() - ({"lm_head.weight"} if tied else set())
    for name, weight in kept.items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=0, msg=name)
    same = gguf_llama(tied=tied)
    if q8:  # it is the dequantised model, not the one before it was quantised
        assert not torch.equal(state["model.layers.0.mlp.up_proj.weight"], same.model.layers[0].mlp.up_proj.weight)
    same.load_state_dict(kept, strict=not tied)
    ids = torch.arange(3, 60)[None]
    torch.testing.assert_close(logits(found, ids), logits(same, ids), rtol=1e-4, atol=1e-5)
    assert not found.training


def test_what_is_loaded_is_an_ordinary_model_that_can_be_saved(file: Path, tmp_path: Path) -> None:
    found = load_model(str(file))
    found.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    assert body_fingerprint(again) == body_fingerprint(found)
    assert getattr(again.config, "quantization_config", None) is None


def test_the_dtype_is_the_one_asked_for_and_the_log_says_that_it_is_dequantised(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "keeptune"):
        found = load_model(str(file), LoadOptions(dtype="bfloat16"))
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert "dequantised from GGUF to torch.bfloat16" in caplog.text


def test_the_tokenizer_and_the_shape_come_from_the_file(file: Path) -> None:
    tokenizer = load_tokenizer(str(file))
    assert tokenizer.decode(tokenizer("say a word")["input_ids"]) == "say a word"
    assert load_positions(str(file)) == 64
    shape = model_shape(str(file))
    assert shape.source == "a GGUF file"
    assert shape.parameters == sum(p.numel() for p in load_model(str(file)).parameters())


@pytest.mark.parametrize("left", [0, 3, 10, 30, 700, -5000, -1])
def test_a_cut_file_is_one_clear_error(file: Path, tmp_path: Path, left: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:left])
    for load in (load_model, load_positions, load_tokenizer, model_shape):
        with pytest.raises(ModelError, match="cut or damaged"):
            load(str(path))


def test_an_unknown_architecture_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    write_gguf(gguf_llama(), path, architecture="unheard-of")
    for load in (load_model, load_positions, load_tokenizer, model_shape):
        with pytest.raises(ModelError, match=r"unheard-of.*wanted an architecture.*llama"):
            load(str(path))


def test_a_missing_file_or_package_is_a_clear_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_model(str(file.with_name("absent.gguf")))
    monkeypatch.setattr(module, "is_gguf_available", lambda: False)
    for load in (load_model, load_positions, load_tokenizer, model_shape):
        with pytest.raises(ModelError, match=r"no package gguf.*pip install 'keeptune\[quantised\]'"):
            load(str(file))


@pytest.mark.parametrize(
    ("name", "place", "inner"),
    [
        ("org/name/model.Q4_K_M.gguf", "org/name", "model.Q4_K_M.gguf"),
        ("org/name/sub/model.gguf", "org/name", "sub/model.gguf"),
        ("/models/model.gguf", "/models", "model.gguf"),
    ],
)
def test_a_file_on_the_hub_is_named_after_its_repository(name: str, place: str, inner: str) -> None:
    assert place_of(name) == (place, {"gguf_file": inner})
    assert place_of(place) == (place, {})

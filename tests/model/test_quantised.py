"""Loading quantised bases: by the recipe's fields, or as a checkpoint is stored; targets, fingerprints, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS, NF4, Saved, logits, relative, save, tokens, wide

from keeptune.core.errors import ModelError, RecipeError
from keeptune.core.weights import is_quantised, read_weight
from keeptune.model import quantization
from keeptune.model.blocks import find_targets
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import LoadOptions, load_model, refuse_not_finite
from keeptune.model.quantization import check_quantization, stays_quantised

INT8 = {"load_in_8bit": True}
KINDS = {
    "nf4": NF4,
    "fp4 once": NF4 | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "nf4 in floats": NF4 | {"bnb_4bit_quant_storage": "float32"},
    "int8": INT8,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", params=["llama", "roberta"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(wide(MODELS[request.param]), tmp_path_factory.mktemp("base") / "base")


@every_kind
def test_targets_are_those_of_the_plain_base_with_weights_near_its_own(saved: Saved, kind: str) -> None:
    plain, packed = saved.load(), saved.load(quantization=KINDS[kind])
    assert is_quantised(packed) and not is_quantised(plain)
    assert find_targets(packed) == find_targets(plain)
    for target in find_targets(packed):
        error = relative(read_weight(packed, target), read_weight(plain, target))
        assert 1e-4 < error < (0.02 if kind == "int8" else 0.15)


@every_kind
def test_the_head_stays_in_floats(saved: Saved, kind: str) -> None:
    model = saved.load(quantization=KINDS[kind])
    head: Any = model.lm_head if saved.head is None else model.classifier.out_proj
    assert type(head) is torch.nn.Linear and head.weight.dtype == torch.float32


@every_kind
def test_a_quantised_checkpoint_loads_as_it_is_stored(saved: Saved, kind: str, tmp_path: Path) -> None:
    if saved.head is not None:
        pytest.skip("a classifier's head is drawn")
    model = saved.load(quantization=KINDS[kind])
    wanted, fingerprint = logits(model, tokens()), body_fingerprint(model)
    model.save_pretrained(tmp_path / "packed")
    found = load_model(str(tmp_path / "packed"))
    assert is_quantised(found)
    assert torch.equal(logits(found, tokens()), wanted)
    assert body_fingerprint(found) == fingerprint != body_fingerprint(saved.load())
    with pytest.raises(ModelError, match=r"quantised already \(bitsandbytes\).*Leave `quantization` out"):
        load_model(str(tmp_path / "packed"), LoadOptions(quantization=NF4))


@every_kind
def test_neither_passes_nor_reads_change_the_fingerprint(saved: Saved, kind: str) -> None:
    model = saved.load(quantization=KINDS[kind])
    before, wanted = body_fingerprint(model), logits(model, tokens())
    for target in find_targets(model):
        read_weight(model, target)
    refuse_not_finite(model)
    assert body_fingerprint(model) == before
    assert torch.equal(logits(model, tokens()), wanted)


def test_another_weight_or_another_quantisation_is_another_fingerprint(saved: Saved) -> None:
    found = {kind: body_fingerprint(saved.load(quantization=fields)) for kind, fields in KINDS.items()}
    assert len(set(found.values())) == len(KINDS)


@pytest.mark.parametrize("part", ["scales", "embedding"])
def test_numbers_that_are_not_finite_are_found(saved: Saved, part: str) -> None:
    model = saved.load(quantization=KINDS["fp4 once"])
    target = find_targets(model)[0]
    with torch.no_grad():
        if part == "scales":
            model.get_submodule(target.name).weight.quant_state.absmax[3] = float("nan")  # type: ignore[union-attr]
        else:
            model.get_input_embeddings().weight[1, 1] = float("inf")
    with pytest.raises(ModelError, match=target.name if part == "scales" else "embed"):
        refuse_not_finite(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"quantization\.quant_method: got nothing"),
        ({"quant_method": "gptx"}, 'Did you mean "gptq"'),
        ({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, 'Did you mean "bnb_4bit_quant_type"'),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, 'got "nf5", wanted nf4 or fp4'),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat17"}, "bfloat17"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "only one can be used"),
        ({"load_in_4bit": "yes"}, "boolean"),
        ({"quant_method": "gptq", "bits": 5}, "bits"),
        ({"quant_method": "mxfp4", "dequantise": True}, 'Did you mean "dequantize"'),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_quantization(fields)


@pytest.mark.parametrize("fields", [NF4, INT8, {"quant_method": "mxfp4", "dequantize": True}, {"quant_method": "awq"}])
def test_fields_of_transformers_configs_are_taken(fields: dict[str, Any]) -> None:
    check_quantization(fields)
    assert stays_quantised(fields) == ("dequantize" not in fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "dataset": "c4"}, "Run `pip install optimum`"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "Run `pip install torchao`"),
        ({"quant_method": "eetq"}, "wanted a quantisation that runs here. Run `pip install kernels`"),
    ],
)
def test_a_package_that_is_not_installed_is_named_once(saved: Saved, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        saved.load(quantization=fields)


def test_a_missing_bitsandbytes_is_named(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError, match=r"Run `pip install .*bitsandbytes"):
        saved.load(quantization=NF4)


def test_a_quantised_checkpoint_for_another_device_is_refused_with_one_error(saved: Saved, tmp_path: Path) -> None:
    saved.load().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "spqr", "beta1": 1, "beta2": 1, "bits": 3, "shapes": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="wanted a quantisation that runs here"):
        load_model(str(tmp_path))


def test_a_checkpoint_that_is_dequantised_as_it_is_loaded_is_not_quantised() -> None:
    class Config:
        quantization_config = {"quant_method": "mxfp4"}

    assert stays_quantised(None, Config()) and not stays_quantised({"dequantize": True}, Config())
    assert quantization.loading(None, object(), "cpu") == {}


def test_rows_that_bitsandbytes_misreads_are_refused_with_the_way_out(tmp_path: Path) -> None:
    narrow = save(MODELS["llama"](), tmp_path / "narrow")
    if not torch.cpu.get_capabilities().get("avx512_f"):  # bitsandbytes' other code reads them rightly
        assert is_quantised(narrow.load(quantization=NF4))
        return
    with pytest.raises(ModelError, match=r"32 inputs in four bits.*misreads on the cpu.*multiple of 64"):
        narrow.load(quantization=NF4)
    skipped = ["lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    with pytest.raises(ModelError, match=r"48 inputs.*llm_int8_skip_modules: \[lm_head, down_proj\]"):
        narrow.load(quantization=NF4 | {"llm_int8_skip_modules": skipped})
    assert not is_quantised(narrow.load(quantization=NF4 | {"llm_int8_skip_modules": [*skipped, "down_proj"]}))

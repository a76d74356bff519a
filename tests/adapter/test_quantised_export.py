"""Exports of trainings on quantised bases: for which base, both gaps, merges into the original."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tests.models import MODELS, NF4, Saved, handmade_plan, logits, off_by, save, tokens, train_steps, wide

import keeptune
from keeptune.adapter.export import Base, ExportOptions, export
from keeptune.adapter.install import install
from keeptune.adapter.load import SIDECAR, load_adapter
from keeptune.adapter.probe import random_probe
from keeptune.core.artefact import read_json
from keeptune.core.errors import ExportError, ModelError, PlanError
from keeptune.core.plan import Plan
from keeptune.core.weights import is_quantised, read_weight
from keeptune.methods.lora import Lora
from keeptune.model.pretrained import LoadOptions, load_floats, load_model
from keeptune.pipeline.merge import merge_adapter
from keeptune.pipeline.originals import weight_reader
from keeptune.pipeline.planning import PlanOptions, plan_for
from keeptune.statistics.store import StatStore

Trained = tuple[PeftModel, Plan, Saved, Base]


@pytest.fixture(params=["llama", "qwen2"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Trained:
    saved = save(wide(MODELS[request.param]).to(torch.bfloat16), tmp_path / "base")
    load = partial(saved.load, quantization=NF4)
    model, name = load(), str(saved.folder)
    plan = handmade_plan(model)
    tuned = install(model, plan)
    train_steps(tuned, steps=3)
    assert isinstance(tuned, PeftModel)
    return tuned.eval(), plan, saved, Base(name, load, partial(load_floats, options=LoadOptions()), name, NF4)


def test_an_adapter_says_its_base_and_both_gaps_are_what_they_say(trained: Trained, tmp_path: Path) -> None:
    model, plan, saved, base = trained
    done = export(model, plan, tmp_path / "out", base=base)
    probe = random_probe(model)
    wanted = logits(model, probe)
    on_packed = logits(load_adapter(base.load(), tmp_path / "out"), probe)
    on_floats = logits(load_adapter(saved.load(), tmp_path / "out"), probe)
    assert done.gap == pytest.approx(float((on_packed - wanted).abs().max()), abs=1e-6)
    assert done.original_gap == pytest.approx(float((on_floats - wanted).abs().max()), rel=1e-5)
    assert done.original_gap > 3 * done.gap  # W - dequant(W4)
    record, config = read_json(tmp_path / "out" / SIDECAR), read_json(tmp_path / "out" / "adapter_config.json")
    assert config["base_model_name_or_path"] == base.name == record["base"]
    assert record["quantization"] == NF4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "quantised as it is loaded" in card and '"load_in_4bit": true' in card and "On the original" in card
    assert "--quantization bitsandbytes" in done.serve


def test_a_merge_is_that_of_the_change_into_the_original_weights(trained: Trained, tmp_path: Path) -> None:
    model, plan, saved, base = trained
    done = export(model, plan, tmp_path / "merged", ExportOptions("merged"), base=base)
    adapter = export(model, plan, tmp_path / "adapter", base=base)
    merged, probe = load_model(str(tmp_path / "merged")), tokens(4)
    assert not is_quantised(merged) and merged.dtype == torch.bfloat16
    wanted = logits(load_adapter(saved.load(), tmp_path / "adapter"), probe)
    assert off_by(logits(merged, probe), wanted) < 0.05
    assert off_by(logits(model, probe), wanted) > 2 * off_by(logits(merged, probe), wanted)  # not what four bits give
    assert done.original_gap == pytest.approx(adapter.original_gap)
    assert (done.original, done.rank) == (base.name, 0)
    record = read_json(tmp_path / "merged" / SIDECAR)
    assert record["trained_on"] == {"base": base.name, "quantization": NF4}
    assert "quantization" not in record
    tied = merged.config.tie_word_embeddings
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied


def test_a_merge_without_the_original_is_refused_and_leaves_nothing(trained: Trained, tmp_path: Path) -> None:
    model, plan, _, base = trained
    for floats in (None, base.floats):
        with pytest.raises(ExportError, match=r"which is quantised.*wanted the original weights.*`original:`"):
            export(model, plan, tmp_path / "out", ExportOptions("merged"), base=Base(base.name, base.load, floats))
    assert not (tmp_path / "out").exists()


def test_a_cut_change_is_held_against_itself_on_the_quantised_base(trained: Trained, tmp_path: Path) -> None:
    model, plan, _, base = trained
    done = export(model, plan, tmp_path / "out", ExportOptions(rank=1), base=base)
    assert done.rank == 1 and 0 < done.error < 1


def test_keeptune_merge_puts_an_adapter_into_the_original(trained: Trained, tmp_path: Path) -> None:
    model, plan, saved, base = trained
    export(model, plan, tmp_path / "adapter", base=base)
    save_tokenizer(saved)
    gap = merge_adapter(tmp_path / "adapter", tmp_path / "merged").gap
    merged = load_model(str(tmp_path / "merged"))
    wanted = logits(load_adapter(saved.load(), tmp_path / "adapter"), tokens(4))
    assert off_by(logits(merged, tokens(4)), wanted) < 0.05 and gap < 1
    assert not is_quantised(merged)


def test_keeptune_merge_asks_for_the_original_of_a_base_that_is_stored_quantised(
    trained: Trained, tmp_path: Path
) -> None:
    model, plan, saved, base = trained
    packed = tmp_path / "packed"
    base.load().save_pretrained(packed)
    save_tokenizer(Saved(packed))
    export(model, plan, tmp_path / "adapter", base=Base(str(packed), lambda: load_model(str(packed))))
    assert "keeptune merge" not in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(ModelError, match=r"stored quantised.*--original"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", original=str(saved.folder))
    wanted = logits(load_adapter(saved.load(), tmp_path / "adapter"), tokens(4))
    assert off_by(logits(load_model(str(tmp_path / "merged")), tokens(4)), wanted) < 0.05


def test_the_python_interface_quantises_the_base_again_and_finds_the_original(trained: Trained, tmp_path: Path) -> None:
    model, plan, saved, base = trained
    done = keeptune.export(model, plan, tmp_path / "out", base=base.name)
    assert done.original == base.name and done.original_gap > done.gap
    again = read_json(tmp_path / "out" / SIDECAR)["quantization"]
    assert {key: again[key] for key in NF4} == NF4
    torch.testing.assert_close(
        logits(saved.load(quantization=again), tokens(1)), logits(base.load(), tokens(1)), rtol=0, atol=0
    )


# start_from


class _Plain:
    name, statistics = "plain", frozenset[Any]()


def test_a_start_reads_the_original_weights_one_at_a_time_or_the_dequantised_ones(trained: Trained) -> None:
    _, plan, saved, base = trained
    packed, method = base.load(), _Plain()
    target = plan.targets[0].target
    own = weight_reader(packed, method, "quantised", None)(target)  # type: ignore[arg-type]
    original = weight_reader(packed, method, "original", base.name)(target)  # type: ignore[arg-type]
    assert torch.equal(own, read_weight(packed, target))
    assert torch.equal(original, read_weight(saved.load(), target))
    assert not torch.equal(own, original)


def test_another_model_is_no_original(trained: Trained, tmp_path: Path) -> None:
    _, plan, saved, base = trained
    model = wide(MODELS[saved.load().config.model_type])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter[torch.randperm(len(parameter))])
    other = save(model, tmp_path / "other")
    read = weight_reader(base.load(), _Plain(), "original", str(other.folder))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="not near those of the quantised base"):
        read(plan.targets[0].target)
    with pytest.raises(PlanError, match="without the original"):
        weight_reader(base.load(), _Plain(), "original", None)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="original that is quantised"):
        weight_reader(base.load(), _Plain(), "original", base.load())  # type: ignore[arg-type]


@pytest.mark.real
def test_smollm2_in_four_bits_and_in_its_original(smollm2_short: Path, tmp_path: Path) -> None:
    fields = NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}
    name, load = str(smollm2_short), partial(load_model, str(smollm2_short), LoadOptions(quantization=fields))
    model = load()
    plan = plan_for(model, Lora(rank=4), StatStore(tmp_path / "store"), data={}, options=PlanOptions(layers=[2, 3]))
    tuned = install(model, plan)
    train_steps(tuned, steps=2)
    base = Base(name, load, partial(load_floats, options=LoadOptions()), name, fields)
    options = ExportOptions("merged", probe=torch.arange(5, 69)[None])
    done = export(tuned.eval(), plan, tmp_path / "merged", options, base=base)
    print(
        f"gap of the merge to the adapter on bf16 {done.relative_gap:.1e}; nf4 to bf16 {done.original_relative_gap:.1e}"
    )
    assert done.relative_gap < 0.05 < done.original_relative_gap < 1
    config = read_json(tmp_path / "merged" / "config.json")
    assert "quantization_config" not in config and config["tie_word_embeddings"]
    with (
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file,
        safe_open(smollm2_short / "model.safetensors", "pt") as own,
    ):
        assert set(file.keys()) == set(own.keys())
        names = list(file.keys())
        moved = {key for key in names if not torch.equal(file.get_tensor(key), own.get_tensor(key))}
    assert moved == {t.target.parameter for t in plan.targets}


def save_tokenizer(saved: Saved) -> None:
    from keeptune import atlas
    from keeptune.model.pretrained import load_tokenizer

    load_tokenizer(str(atlas.model_path())).save_pretrained(saved.folder)

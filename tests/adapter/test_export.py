from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from tests.models import (
    MODELS,
    Saved,
    full_disk,
    handmade_plan,
    logits,
    names_in,
    off_by,
    relative,
    save,
    tokens,
    train_steps,
    trained_factors,
)
from tests.reference.export_reference import change, tuned_weight
from transformers import PreTrainedModel

from keeptune.adapter.export import Base, ExportOptions, export
from keeptune.adapter.install import install
from keeptune.adapter.load import SIDECAR, check_base
from keeptune.adapter.merging import merge
from keeptune.adapter.probe import logits_of, random_probe
from keeptune.adapter.trained_change import change_of
from keeptune.adapter.trained_head import trained_head
from keeptune.core.artefact import EXPORT, model_fingerprint, read_json
from keeptune.core.errors import ArtefactError, ExportError, ModelError
from keeptune.core.plan import Plan
from keeptune.model.pretrained import LoadOptions, load_model

every_model = pytest.mark.parametrize("architecture", MODELS)


@dataclass(frozen=True)
class Trained:
    """A trained model with its plan and its base on disk."""

    model: Any
    plan: Plan
    saved: Saved

    def export(self, folder: Path, **options: Any) -> Any:
        base = Base(str(self.saved.folder), options.pop("load_base", self.saved.load))
        fields = {"base": base} | {name: options.pop(name) for name in ("tokenizer",) if name in options}
        return export(self.model, self.plan, folder, ExportOptions(**options), **fields)


TrainedFactory = Callable[..., Trained]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Saved]:
    @cache
    def make(architecture: str, dtype: torch.dtype) -> Saved:
        return save(MODELS[architecture](dtype=dtype), tmp_path_factory.mktemp("base") / architecture)

    return make


@pytest.fixture
def trained(bases: Callable[[str, torch.dtype], Saved]) -> TrainedFactory:
    """Train a hand-made plan; its ranks and scales differ from target to target."""

    def make(
        architecture: str = "llama",
        *,
        anchor: Any = "twin",
        dtype: torch.dtype = torch.float32,
        provenance: bool = False,
        rate: float = 1e-2,
        **plan: Any,
    ) -> Trained:
        saved = bases(architecture, dtype)
        base = saved.load()
        made = handmade_plan(base, **plan)
        if provenance:
            made = dataclasses.replace(made, provenance={"model": model_fingerprint(base)})
        model = install(base, made, anchor=anchor)
        train_steps(model, steps=3, rate=rate)
        return Trained(model.eval(), made, saved)

    return make


def on_fresh_base(made: Trained, folder: Path) -> Any:
    return PeftModel.from_pretrained(made.saved.load(), str(folder)).eval()


def test_logits_are_compared_without_a_trainers_mixed_precision(trained: TrainedFactory) -> None:
    model = trained().model
    wanted = logits_of(model, probe := random_probe(model))
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert not torch.equal(logits(prepared, probe), wanted)
    assert torch.equal(logits_of(prepared, probe), wanted)
    assert not torch.equal(logits(prepared, probe), wanted), "the trainer goes on as it was"


# What is exported


@every_model
@pytest.mark.parametrize("anchor", ["twin", "residual"])
@pytest.mark.parametrize("anchored", [True, False])
def test_a_change_is_that_of_dense_algebra(
    architecture: str, anchor: str, anchored: bool, trained: TrainedFactory
) -> None:
    made = trained(architecture, anchor=anchor, anchored=anchored)
    now = trained_factors(made.model, made.plan)
    changes = change_of(made.model, made.plan).weights
    for name, found in changes.items():
        assert relative(found.dense(), change(made.plan[name], now[name].B, now[name].A)) < 1e-5
    assert list(now) == list(changes) == [t.target.name for t in made.plan.targets]


@every_model
def test_a_merged_model_has_the_weights_of_dense_algebra(
    architecture: str, trained: TrainedFactory, tmp_path: Path
) -> None:
    made = trained(architecture)
    made.export(tmp_path / "out", format="merged")
    base, merged = made.saved.load(), load_model(str(tmp_path / "out"), LoadOptions(head=made.saved.head))
    now = trained_factors(made.model, made.plan)
    head = trained_head(made.model, made.plan)
    tuned = {f"{name}.weight": name for name in now}
    for key, stored in base.named_parameters():
        found = merged.get_parameter(key)
        if key in tuned:
            name = tuned[key]
            assert relative(found, tuned_weight(stored, made.plan[name], now[name].B, now[name].A)) < 1e-6
        else:
            assert torch.equal(found, head.get(key, stored)), key


@every_model
@pytest.mark.parametrize("format", ["portable", "peft"])
@pytest.mark.parametrize("anchored", [True, False])
def test_other_ranks_and_scales_per_target_come_through(
    architecture: str, format: Any, anchored: bool, trained: TrainedFactory, tmp_path: Path
) -> None:
    """fan_in_fan_out too: GPT-2 stores W as (n, m)."""
    made = trained(architecture, anchored=anchored)
    made.export(tmp_path / "out", format=format)
    found = on_fresh_base(made, tmp_path / "out")
    wanted = logits(made.model, tokens(9))
    assert off_by(logits(made.saved.load(), tokens(9)), wanted) > 1e-2
    assert off_by(logits(found, tokens(9)), wanted) < 1e-5
    assert found.peft_config["default"].fan_in_fan_out is (architecture == "gpt2")


# Ranks and files


@pytest.mark.parametrize(
    ("ranks", "trainable", "portable", "peft"),
    [
        ((4,), "B", 8, 4),  # v2: A is shared with the start, the rank stays
        ((4,), "A", 8, 4),
        ((4,), "AB", 8, 8),  # v1: the rank doubles
        ((8,), "B", 8, 8),
        ((5, 8), "AB", 16, 16),
        ((2, 7, 3), "B", 8, 7),
        ((1,), "B", 1, 1),
        ((9,), "AB", 32, 18),
    ],
)
def test_the_rank_is_what_the_change_needs_padded_to_one_that_servers_allow(
    ranks: tuple[int, ...], trainable: str, portable: int, peft: int, trained: TrainedFactory, tmp_path: Path
) -> None:
    made = trained(ranks=ranks, trainable=trainable)
    for format, rank in (("portable", portable), ("peft", peft)):
        folder = tmp_path / format
        assert made.export(folder, format=format).rank == rank
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
        found = {tensor.shape[0] for name, tensor in _factors(folder).items() if "lora_A" in name}
        if format == "portable":
            assert found == {rank}
        else:
            assert found == {r if trainable != "AB" else 2 * r for r in ranks}


def _factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_start_of_zero_exports_at_its_own_rank(trained: TrainedFactory, tmp_path: Path) -> None:
    assert trained(ranks=(4,), anchored=False).export(tmp_path / "out", format="peft").rank == 4


def test_a_portable_adapter_is_plain_lora_with_the_scale_folded_in(trained: TrainedFactory, tmp_path: Path) -> None:
    made = trained()
    made.export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["init_lora_weights"] is True
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == str(made.saved.folder)
    assert sorted(config["target_modules"]) == sorted(t.target.name for t in made.plan.targets)
    tensors = _factors(tmp_path / "out")
    for name, found in change_of(made.model, made.plan).weights.items():
        B = tensors[f"base_model.model.{name}.lora_B.weight"]
        A = tensors[f"base_model.model.{name}.lora_A.weight"]
        assert relative(B @ A, found.dense()) < 1e-6
    assert len(tensors) == 2 * len(made.plan.targets)


@pytest.mark.parametrize(
    ("format", "files"),
    [
        ("portable", ["README.md", "adapter_config.json", "adapter_model.safetensors", EXPORT, SIDECAR]),
        ("peft", ["README.md", "adapter_config.json", "adapter_model.safetensors", EXPORT, SIDECAR]),
        ("merged", ["README.md", "config.json", EXPORT, "generation_config.json", SIDECAR, "model.safetensors"]),
    ],
)
def test_a_folder_holds_the_files_that_others_read_and_two_of_ours(
    format: Any, files: list[str], trained: TrainedFactory, tmp_path: Path
) -> None:
    trained().export(tmp_path / "out", format=format)
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == sorted(files)


def test_the_sidecar_says_what_was_made_of_what_and_how_well(trained: TrainedFactory, tmp_path: Path) -> None:
    made = trained(provenance=True)
    done = made.export(tmp_path / "out")
    found = read_json(tmp_path / "out" / SIDECAR)
    assert found == {
        "base": str(made.saved.folder),
        "labels": None,
        "method": "by-hand",
        "options": {},
        "provenance": {"model": model_fingerprint(made.saved.load())},
        "plan": made.plan.key,
        "export": dataclasses.asdict(done),
    }
    assert done.folder == str(tmp_path / "out")
    assert (done.format, done.rank, done.bound) == ("portable", 16, 1e-4)
    assert 0 <= done.relative_gap < 1e-5
    assert f"--max-lora-rank {done.rank}" in done.serve
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {made.saved.folder}\nlibrary_name: peft\n")


# The check


def test_the_gap_is_the_largest_difference_in_logits_on_the_probe(trained: TrainedFactory, tmp_path: Path) -> None:
    made = trained(anchor="residual", dtype=torch.bfloat16)
    probe = tokens(11)
    done = made.export(tmp_path / "out", probe=probe)
    wanted = logits(made.model, probe)
    gap = float((logits(on_fresh_base(made, tmp_path / "out"), probe) - wanted).abs().max())
    assert done.gap == pytest.approx(gap)
    assert done.relative_gap == pytest.approx(gap / float(wanted.abs().max()))
    assert done.gap > 0


def loading(saved: Saved) -> Callable[[str], PreTrainedModel]:
    return lambda folder: Saved(Path(folder), saved.head).load()


def other_base() -> PreTrainedModel:
    return MODELS["llama"](seed=1)


@pytest.mark.parametrize("format", ["portable", "peft", "merged"])
def test_a_gap_above_the_bound_fails_and_leaves_nothing(format: Any, trained: TrainedFactory, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="logits that differ from the trained model"):
        trained().export(tmp_path / "out", format=format, load_base=other_base)
    assert names_in(tmp_path) == []


def test_a_gap_above_the_bound_keeps_the_previous_export(trained: TrainedFactory, tmp_path: Path) -> None:
    made = trained()
    made.export(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for options in ({"load_base": other_base}, {"max_gap": -1.0}, {"format": "merged", "load_base": other_base}):
        with pytest.raises(ExportError, match="Nothing was written"):
            made.export(tmp_path / "out", **options)
    assert names_in(tmp_path) == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_stated_bound_replaces_the_usual_one(trained: TrainedFactory, tmp_path: Path) -> None:
    assert trained().export(tmp_path / "out", load_base=other_base, max_gap=100.0).bound == 100.0


def test_logits_that_are_no_numbers_fail_whatever_the_bound(trained: TrainedFactory, tmp_path: Path) -> None:
    made = trained()
    next(p for p in made.model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(ExportError):
        made.export(tmp_path / "out", max_gap=float("inf"))
    assert names_in(tmp_path) == []


def test_a_full_disk_keeps_the_previous_export(
    trained: TrainedFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained()
    made.export(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ArtefactError, match="No space left"):
        made.export(tmp_path / "out", format="peft")
    assert names_in(tmp_path) == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("content", ["a file", "a folder"])
def test_what_keeptune_did_not_write_is_not_replaced(content: str, trained: TrainedFactory, tmp_path: Path) -> None:
    made = trained()
    mine = tmp_path / "out" if content == "a file" else tmp_path / "out" / "thesis.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ExportError, match="something that keeptune did not write"):
        made.export(tmp_path / "out")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("trainable", ["AB", "B"])
def test_on_a_bfloat16_base_a_residual_loses_more_than_a_twin(
    architecture: str, trainable: str, trained: TrainedFactory, tmp_path: Path
) -> None:
    gaps = {}
    for anchor in ("twin", "residual"):
        made = trained(architecture, anchor=anchor, dtype=torch.bfloat16, trainable=trainable, rate=1e-3)
        done = made.export(tmp_path / anchor)
        assert done.bound == 0.1
        gaps[anchor] = done.relative_gap
    assert gaps["twin"] < gaps["residual"] < 0.1


def test_exporting_leaves_the_model_as_it_was(trained: TrainedFactory, tmp_path: Path) -> None:
    made = trained()
    wanted = logits(made.model, tokens())
    made.model.train()
    made.export(tmp_path / "out")
    assert made.model.training
    assert {name for name, p in made.model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{t.target.name}.lora_{f}.default.weight" for t in made.plan.targets for f in t.trainable
    }
    assert torch.equal(logits(made.model.eval(), tokens()), wanted)


def test_the_probe_is_the_same_tokens_each_time() -> None:
    model = MODELS["llama"]()
    probe = random_probe(model)
    assert probe.shape == (4, 32)
    assert torch.equal(random_probe(model), probe)
    assert not torch.equal(random_probe(model, seed=1), probe)
    assert int(probe.min()) >= 0
    assert int(probe.max()) < model.config.vocab_size


# check_base and merge


def test_an_adapter_for_another_base_is_refused(trained: TrainedFactory, tmp_path: Path) -> None:
    made = trained(provenance=True)
    made.export(tmp_path / "out")
    check_base(tmp_path / "out", model_fingerprint(made.saved.load()))
    with pytest.raises(ModelError, match="got a base whose weights are not the ones it was made for"):
        check_base(tmp_path / "out", model_fingerprint(other_base()))


@pytest.mark.parametrize("sidecar", [None, "{}", '{"base": "x", "gap": 0.0}'], ids=["none", "empty", "merged"])
def test_an_adapter_that_names_no_base_is_not_checked(sidecar: str | None, tmp_path: Path) -> None:
    if sidecar is not None:
        (tmp_path / SIDECAR).write_text(sidecar)
    check_base(tmp_path, "any")


@every_model
@pytest.mark.parametrize("format", ["portable", "peft"])
def test_merge_writes_a_model_with_the_logits_of_adapter_on_base(
    architecture: str, format: Any, trained: TrainedFactory, tmp_path: Path
) -> None:
    made = trained(architecture)
    made.export(tmp_path / "adapter", format=format)
    gap = merge(tmp_path / "adapter", tmp_path / "merged", base=str(made.saved.folder), load=loading(made.saved)).gap
    merged = load_model(str(tmp_path / "merged"), LoadOptions(head=made.saved.head))
    assert off_by(logits(merged, tokens(9)), logits(made.model, tokens(9))) < 1e-5
    probe = random_probe(made.model)
    measured = logits(merged, probe) - logits(on_fresh_base(made, tmp_path / "adapter"), probe)
    assert gap == pytest.approx(float(measured.abs().max()), rel=1e-3, abs=1e-9)


def test_merge_refuses_an_adapter_of_another_architecture(trained: TrainedFactory, tmp_path: Path) -> None:
    trained().export(tmp_path / "adapter")
    with pytest.raises(ModelError, match="adapter"):
        merge(tmp_path / "adapter", tmp_path / "merged", base="", load=lambda _: MODELS["gpt2"]())
    assert names_in(tmp_path) == ["adapter"]


def test_merge_refuses_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapter"):
        merge(tmp_path / "absent", tmp_path / "merged", base="", load=lambda _: other_base())
    assert names_in(tmp_path) == []


def test_full_tuning_of_a_16_bit_base_trains_in_float32_and_is_written_in_the_bases_dtype(tmp_path: Path) -> None:
    saved = save(MODELS["llama"](dtype=torch.bfloat16), tmp_path / "base")
    base = str(saved.folder)
    tuned = install(load_model(base), Plan("full", {}, (), scope="all"))
    assert tuned.dtype == torch.float32
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 2**-12)  # a step that bfloat16 would round away
    done = export(
        tuned,
        Plan("full", {}, (), scope="all"),
        tmp_path / "merged",
        ExportOptions("merged"),
        base=Base(base, lambda: load_model(base)),
    )
    assert load_model(str(tmp_path / "merged")).dtype == torch.bfloat16
    assert 0 < done.relative_gap <= done.bound == 1e-1

"""Modules and rows of tokens trained beside the factors: of tied and untied bases, trained, resumed, exported."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.models import MODELS, Bench, Saved, asking, handmade_plan, logits, off_by, save, tokens, train_steps

from keeptune.adapter.export import Base, ExportOptions, export
from keeptune.adapter.install import check_frozen, install, restore_state, trained_names, trained_state
from keeptune.adapter.merging import merge
from keeptune.adapter.trained_head import is_tied, trained_beside
from keeptune.core.errors import DataError, PlanError, TrainError
from keeptune.core.plan import Plan
from keeptune.data.calibration import Calibration
from keeptune.model.pretrained import LoadOptions, load_model, load_offloaded
from keeptune.statistics.covariance import InputCovariance

# qwen2's head is tied to the embedding, llama's is not.
CASES: dict[str, tuple[list[str] | None, list[int] | None]] = {
    "embedding": (["embed_tokens"], None),
    "head": (["lm_head"], None),
    "tokens": (None, [3, 7, 40]),
    "norm and tokens": (["model.norm"], [5, 9]),
}
on_disk = partial(load_offloaded, options=LoadOptions())
every_case = pytest.mark.parametrize("case", CASES)
both_bases = pytest.mark.parametrize("architecture", ["llama", "qwen2"])


def made(saved: Saved, case: str, *, anchored: bool = False) -> Plan:
    model = saved.load()
    plan = handmade_plan(model, anchored=anchored)
    modules, ids = CASES[case]
    return dataclasses.replace(plan, peft=trained_beside(model, modules, ids, [t.target.name for t in plan.targets]))


def trained(saved: Saved, plan: Plan, anchor: Any = "auto") -> PeftModel:
    model = install(saved.load(), plan, anchor=anchor)
    assert isinstance(model, PeftModel)
    check_frozen(model, plan)
    start = trained_state(model, plan)
    train_steps(model)
    check_frozen(model, plan)
    state = trained_state(model, plan)
    beside = [name for name in state if not name.endswith((".A", ".B"))]
    assert beside
    assert not any(torch.equal(state[name], start[name]) for name in beside)
    return model


@every_case
@both_bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exports_give_the_trained_logits_on_a_fresh_base(
    case: str, architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Both forms: the whole model, and PEFT's adapter; vLLM would refuse the latter, and so portable is merged."""
    saved = save(MODELS[architecture](dtype=dtype), tmp_path / "base")
    plan = made(saved, case)
    model, bound = trained(saved, plan), 1e-5 if dtype == torch.float32 else 5e-2
    wanted = logits(model, tokens())
    for format in ("portable", "peft"):
        folder = tmp_path / format
        done = export(model, plan, folder, ExportOptions(format), base=Base(str(saved.folder), saved.load))  # type: ignore[arg-type]
        assert done.relative_gap < bound
        assert (done.format == "merged") == (format == "portable")
        assert ("vLLM refuses" in done.note) == (format == "portable")
    adapter = PeftModel.from_pretrained(saved.load(), str(tmp_path / "peft"))
    assert off_by(logits(adapter, tokens()), wanted) < bound
    merge(tmp_path / "peft", tmp_path / "whole", base=str(saved.folder), load=load_model)
    for folder in ("portable", "whole"):
        whole = type(saved.load()).from_pretrained(tmp_path / folder, dtype=dtype)
        assert is_tied(whole) == (architecture == "qwen2")
        assert off_by(logits(whole, tokens()), wanted) < bound
    assert off_by(logits(saved.load(), tokens()), wanted) > 5e-2  # the change is no small one


@every_case
@both_bases
def test_a_resumed_model_is_the_trained_one(case: str, architecture: str, tmp_path: Path) -> None:
    saved = save(MODELS[architecture](), tmp_path / "base")
    plan = made(saved, case, anchored=True)
    for anchor in ("residual", "twin"):
        model = trained(saved, plan, anchor)
        again = install(saved.load(), plan, anchor=anchor)  # type: ignore[arg-type]
        assert off_by(logits(again, tokens()), logits(saved.load(), tokens())) < 1e-5
        restore_state(again, plan, trained_state(model, plan))  # type: ignore[arg-type]
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))


@every_case
@both_bases
def test_a_base_whose_weights_are_on_disk_is_merged_alike(case: str, architecture: str, tmp_path: Path) -> None:
    saved = save(MODELS[architecture](), tmp_path / "base")
    plan = made(saved, case)
    model = trained(saved, plan)
    base = Base(str(saved.folder), lambda: on_disk(str(saved.folder)))
    export(model, plan, tmp_path / "whole", ExportOptions("merged"), base=base)
    whole = load_model(str(tmp_path / "whole"))
    assert off_by(logits(whole, tokens()), logits(model, tokens())) < 1e-5


def test_small_updates_of_a_16_bit_base_are_kept(tmp_path: Path) -> None:
    saved = save(MODELS["qwen2"](dtype=torch.bfloat16), tmp_path)
    for case in CASES:
        plan = made(saved, case)
        model = install(saved.load(), plan)
        parameters = dict(model.named_parameters())
        assert {parameters[name].dtype for name in trained_names(model, plan)} == {torch.float32}  # type: ignore[arg-type]
        with torch.no_grad():
            assert model(input_ids=tokens()).logits.dtype == torch.bfloat16


def test_what_is_frozen_by_hand_is_found(tmp_path: Path) -> None:
    saved = save(MODELS["qwen2"](), tmp_path)
    plan = made(saved, "tokens")
    model = install(saved.load(), plan)
    model.get_input_embeddings().token_adapter.requires_grad_(False)  # type: ignore[operator, union-attr]
    with pytest.raises(TrainError, match="trainable_tokens_delta"):
        check_frozen(model, plan)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modules", "ids", "message"),
    [
        (["embed_token"], None, 'Did you mean "embed_tokens"'),
        (["mlp"], None, "a module with the target"),
        (None, [3, 64], "resize_token_embeddings"),
        (None, [3, 3], "different ids"),
        (["embed_tokens"], [3], "each weight once"),
        (None, {"embed_tokens": [3], "lm_head": [4]}, "each weight once"),
    ],
)
def test_wrong_names_and_tokens_are_refused(modules: Any, ids: Any, message: str) -> None:
    model = MODELS["qwen2"]()
    targets = [t.target.name for t in handmade_plan(model).targets]
    with pytest.raises(PlanError, match=message):
        trained_beside(model, modules, ids, targets)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("load", [load_model, on_disk])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@both_bases
def test_a_foreign_lora_on_the_head_or_the_embedding_is_merged_right(
    target: str, architecture: str, load: Any, tmp_path: Path
) -> None:
    """Of a tied base each weight then is its own: merged into the one they share, the other would change too."""
    saved = save(MODELS[architecture](), tmp_path / "base")
    model = get_peft_model(saved.load(), LoraConfig(r=4, target_modules=[target, "q_proj"], init_lora_weights=False))
    wanted = logits(model, tokens())
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    gap = merge(tmp_path / "adapter", tmp_path / "whole", base=str(saved.folder), load=load).gap
    whole = type(saved.load()).from_pretrained(tmp_path / "whole")
    assert not is_tied(whole)
    assert gap < 1e-4
    assert off_by(logits(whole, tokens()), wanted) < 1e-5
    naive = PeftModel.from_pretrained(saved.load(), str(tmp_path / "adapter")).merge_and_unload()
    assert (off_by(logits(naive, tokens()), wanted) > 0.1) == (architecture == "qwen2")


def test_tokens_without_rows_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    bench = Bench(model, tmp_path, Calibration(((5, 9, 63), (7, 64)), 0))
    with pytest.raises(DataError, match=r"the token 64(.|\n)*ids below 64(.|\n)*resize_token_embeddings"):
        bench.collect(asking(InputCovariance("knowledge")))

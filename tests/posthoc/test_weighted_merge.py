"""Adapters joined into one: PEFT's schemes on dense algebra, and files that scores, repairs and mergekit take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.pipeline.support import MODEL, keeptune
from transformers import AutoModelForCausalLM

from keeptune import Merging, Repair, merge, repair
from keeptune.core.artefact import read_json
from keeptune.core.errors import ModelError

Finished = Callable[[str], Path]
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a plain PEFT adapter of random factors for the tests' model."""

    @cache
    def make(seed: int, rank: int = 4, rslora: bool = False, base: Path = MODEL) -> Path:
        folder = tmp_path_factory.mktemp("adapter") / f"{seed}"
        config = LoraConfig(
            r=rank, lora_alpha=12, target_modules=["q_proj", "down_proj"], use_rslora=rslora, task_type="CAUSAL_LM"
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        draws = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=draws)
        model.save_pretrained(str(folder))
        return folder

    return make


def change(folder: Path, name: str = NAME) -> torch.Tensor:
    """Compute a target's change as stock PEFT applies it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), folder)
    layer: Any = model.get_base_model().get_submodule(name)
    return layer.get_delta_weight("default").detach()


def factors(folder: Path) -> list[torch.Tensor]:
    stored = load_file(folder / "adapter_model.safetensors")
    return [stored[f"base_model.model.{NAME}.lora_{part}.weight"] for part in "BA"]


@pytest.mark.parametrize(("ranks", "rslora"), [((4, 4), False), ((4, 7), False), ((4, 4), True)])
def test_svd_is_the_weighted_sum_of_the_changes(
    ranks: tuple[int, int], rslora: bool, adapters: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = (adapters(seed, rank, rslora) for seed, rank in enumerate(ranks))
    record = merge([a, b], tmp_path / "joined", Merging([0.7, -0.3]))
    wanted = 0.7 * change(a) - 0.3 * change(b)
    assert torch.allclose(change(tmp_path / "joined"), wanted, atol=1e-5)
    assert not torch.allclose(change(a), wanted, atol=1e-2)
    assert record["distance"] < 1e-5


def test_linear_joins_factors_and_its_distance_to_the_sum_is_told(
    adapters: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = adapters(0), adapters(1)
    record = merge([a, b], tmp_path / "joined", Merging([0.7, 0.3], scheme="linear"))
    (B, A), (other_B, other_A), s = factors(a), factors(b), 12 / 4
    v, w = (0.7 * s) ** 0.5, (0.3 * s) ** 0.5
    assert torch.allclose(change(tmp_path / "joined"), (v * B + w * other_B) @ (v * A + w * other_A), atol=1e-5)
    apart = whole = 0.0
    for name in {
        key.split(".lora_")[0].removeprefix("base_model.model.") for key in load_file(a / "adapter_model.safetensors")
    }:
        total = 0.7 * change(a, name) + 0.3 * change(b, name)
        apart += float((change(tmp_path / "joined", name) - total).square().sum())
        whole += float(total.square().sum())
    assert record["distance"] == pytest.approx((apart / whole) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("scheme", "ranks", "named"),
    [
        ("ties", (4, 4), "ties"),
        ("ties", (4, 7), "ties_svd"),
        ("dare_linear", (4, 4), "dare_linear"),
        ("dare_ties", (4, 7), "dare_ties_svd"),
        ("linear", (4, 7), "svd"),
    ],
)
def test_a_scheme_is_pefts_and_its_seed_repeats_it(
    scheme: Any, ranks: tuple[int, int], named: str, adapters: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = (adapters(seed, rank) for seed, rank in enumerate(ranks))
    record = merge([a, b], tmp_path / "joined", Merging([0.7, 0.3], scheme=scheme, seed=5))
    assert record["scheme"] == named
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), a, adapter_name="a")
    model.load_adapter(b, adapter_name="b")
    torch.manual_seed(5)
    how = {"combination_type": named, "density": 0.5, "svd_rank": sum(ranks)}
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "own", **how)
    layer: Any = model.get_base_model().get_submodule(NAME)
    assert torch.allclose(change(tmp_path / "joined"), layer.get_delta_weight("own"), atol=1e-5)
    merge([a, b], tmp_path / "other", Merging([0.7, 0.3], scheme=scheme, seed=6))
    assert torch.equal(change(tmp_path / "joined"), change(tmp_path / "other")) == ("dare" not in scheme)
    sidecar = read_json(tmp_path / "joined" / "keeptune.json")
    assert sidecar["options"] == {"weights": [0.7, 0.3], "scheme": named, "density": 0.5, "rank": None, "seed": 5}
    assert [made["folder"] for made in sidecar["provenance"]["adapters"]] == [str(a), str(b)]


def test_a_joined_adapter_can_be_scored_and_repaired(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = finished("lora"), finished("lora-null-v1")
    joined = tmp_path / "joined"
    said = keeptune("merge", a, b / "adapter", "--weights", "0.5,0.5", "--output", joined, capsys=capsys)
    assert (said.code, "distance to the weighted sum" in said.out) == (0, True), said.err
    scored = keeptune("evaluate", a / "recipe.json", "--adapter", joined, capsys=capsys)
    assert scored.code == 0, scored.err
    little = Repair(drift=1e-4, store=tmp_path / "store")
    record = repair(
        joined, tmp_path / "repaired", little, knowledge=["Once upon a time there was a dog.", "The sun is hot."]
    )
    assert record["drift"] < record["drift_before"]


def test_an_export_is_in_the_layout_that_mergekit_reads(finished: Finished) -> None:
    # mergekit/common.py, ModelReference.merged (a6e4028): PeftModel.from_pretrained(model, lora) and merge_and_unload;
    # mergekit/scripts/extract_lora.py writes adapter_config.json and adapter_model.safetensors, of tensors
    # base_model.model.NAME.lora_A.weight (r, n) and lora_B.weight (m, r), or lora_embedding_A and lora_embedding_B.
    folder = finished("lora-null-v1") / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    modules = dict(AutoModelForCausalLM.from_pretrained(MODEL).named_modules())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", str(MODEL))
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        m, n = modules[name].weight.shape
        shapes = {"A.weight": (config["r"], n), "B.weight": (m, config["r"])}
        assert tuple(tensor.shape) == shapes[part]
        assert name.rsplit(".", 1)[-1] in {target.rsplit(".", 1)[-1] for target in config["target_modules"]}


# Wrong input


def test_adapters_of_other_bases_are_refused(finished: Finished, adapters: Callable[..., Path], tmp_path: Path) -> None:
    a = finished("lora") / "adapter"
    other = Path(shutil.copytree(MODEL, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.01 * value for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="fingerprint"):
        merge([a, finished("lora-null-v1") / "adapter"], tmp_path / "joined", Merging([1, 1]), base=str(other))
    foreign = adapters(3, base=other)
    with pytest.raises(ModelError, match="an adapter for"):
        merge([a, foreign], tmp_path / "joined", Merging([1, 1]))
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{a}"], "got 1 adapter"),
        (["{a}", "{a}", "{a}"], "got 3 adapter"),
        (["{a}", "{a}"], "--weights"),
        (["{a}", "--weights", "1"], "at least two adapters"),
        (["{a}", "{a}", "--weights", "0.5"], "a weight for each"),
        (["{a}", "{a}", "--weights", "a,b"], "wanted numbers"),
        (["{a}", "{a}", "--weights", "1,1", "--scheme", "tie"], 'Did you mean "ties"'),
        (["{a}", "{a}", "--weights", "1,1", "--density", "0"], "a density in"),
        (["{a}", "{a}", "--weights", "1,-1", "--output", "{out}"], "a change of zero"),
        (["{a}", "nowhere", "--weights", "1,1"], "nowhere"),
    ],
)
def test_wrong_input(
    arguments: list[str], said: str, adapters: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"a": adapters(0), "out": tmp_path / "out"}
    result = keeptune("merge", *(part.format(**places) for part in arguments), capsys=capsys)
    assert (result.code, said in result.err) == (2, True), result.err


def test_more_than_lora_is_refused(tmp_path: Path, adapters: Callable[..., Path]) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(target_modules=["q_proj"], use_dora=True)
    )
    model.save_pretrained(str(tmp_path / "more"))
    with pytest.raises(ModelError, match="LoRA of linear maps alone"):
        merge([adapters(0), tmp_path / "more"], tmp_path / "joined", Merging([1, 1]))

"""keeptune change gives the norm of what merging would add to each weight, for adapters and models of any kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tests.models import MODELS, Saved, save
from tests.pipeline.support import keeptune
from tests.studies.adapters import LORA_KINDS, drawn_adapter, merged_changes, refused
from torch import Tensor

from keeptune.core.artefact import read_json
from keeptune.core.errors import ModelError, PlanError, RecipeError
from keeptune.core.low_rank import LowRank
from keeptune.core.weights import read_weight
from keeptune.model.blocks import find_targets
from keeptune.model.pretrained import load_model
from keeptune.studies.change import change, weight_changes

KINDS: dict[str, dict[str, Any]] = LORA_KINDS | {
    "dora": {"r": 3, "use_dora": True},
    "head in full": {"r": 2, "modules_to_save": ["lm_head"]},
    "weight in full": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["up_proj"]},
    "pissa": {"r": 3, "init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(MODELS["llama"](), tmp_path_factory.mktemp("base"))


def differences(base: Saved, adapter: Path) -> dict[str, float]:
    return {name: float(change.norm()) for name, change in merged_changes(base, adapter).items()}


def norms(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {row["target"]: row["norm"] for row in rows}


@pytest.mark.parametrize("kind", KINDS)
def test_stock_adapters(kind: str, base: Saved, tmp_path: Path) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj", "down_proj"], **KINDS[kind]})
    adapter = drawn_adapter(base, tmp_path / "a", config)
    _, rows = weight_changes(str(adapter), base=str(base.folder))
    wanted = differences(base, adapter)
    assert norms(rows) == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    moved = {name for name, norm in wanted.items() if norm > 0}
    assert 2 <= len(moved) < len(rows), "some are left alone"
    weights = {t.name: float(read_weight(base.load(), t).norm()) for t in find_targets(base.load())}
    assert {r["target"]: r["weight"] for r in rows} == pytest.approx(weights, rel=1e-5)
    assert all(r["relative"] == pytest.approx(r["norm"] / r["weight"]) for r in rows)


def test_transposed_weights(tmp_path: Path) -> None:
    base = save(MODELS["gpt2"](), tmp_path / "base")
    for name, more in (("lora", {}), ("dora", {"use_dora": True})):
        config = LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **more)
        adapter = drawn_adapter(base, tmp_path / name, config)
        _, rows = weight_changes(str(adapter), base=str(base.folder))
        assert norms(rows) == pytest.approx(differences(base, adapter), rel=1e-5, abs=1e-7)


def test_another_kind_of_adapter_is_merged_to_be_measured(base: Saved, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapter = drawn_adapter(base, tmp_path / "a", config)
    _, rows = weight_changes(str(adapter), base=str(base.folder))
    assert norms(rows) == pytest.approx(differences(base, adapter), rel=1e-5, abs=1e-7)
    assert any(row["norm"] > 0 for row in rows)


def test_no_product_is_formed_for_factors(base: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = drawn_adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))

    def dense(_: LowRank) -> Tensor:
        raise AssertionError("the product was formed")

    monkeypatch.setattr(LowRank, "dense", dense)
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.get_delta_weight", dense)
    assert any(row["norm"] > 0 for row in weight_changes(str(adapter), base=str(base.folder))[1])


@pytest.mark.parametrize("name", ["lora", "dora", "lora-null-v1", "full"])
def test_runs_of_keeptune_name_their_base(name: str, finished: Callable[[str], Path]) -> None:
    run = finished(name)
    base, rows = weight_changes(str(run))
    fresh = load_model(base)
    if (run / "merged").is_dir():
        tuned: Any = load_model(str(run / "merged"))
    else:
        tuned = PeftModel.from_pretrained(load_model(base), str(run / "adapter")).merge_and_unload()
    wanted = {t.name: float((read_weight(tuned, t) - read_weight(fresh, t)).norm()) for t in find_targets(fresh)}
    assert norms(rows) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert max(wanted.values()) > 0.01


def test_a_classifier_of_unknown_labels_is_refused(tmp_path: Path) -> None:
    base = save(MODELS["roberta"](), tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapter = drawn_adapter(base, tmp_path / "a", config)
    with pytest.raises(ModelError, match="labels"):
        weight_changes(str(adapter), base=str(base.folder))


def test_several_side_by_side(base: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "one" / "adapter", tmp_path / "two"
    drawn_adapter(base, first, LoraConfig(r=2, target_modules=["q_proj"]))
    drawn_adapter(base, second, LoraConfig(r=2, target_modules=["down_proj"]), seed=1)
    output = tmp_path / "new" / "c.png"
    words = (first, second, "--base", base.folder, "--output", output, "--targets", "q_proj,down_proj")
    said = keeptune("change", *words, capsys=capsys)
    assert said.code == 0, said.err
    record = read_json(output.with_suffix(".json"))
    assert [source["label"] for source in record["sources"]] == ["one", "two"]
    one, two = record["sources"]
    assert len(one["rows"]) == len(two["rows"]) == 4
    assert one["roles"]["down_proj"]["norm"] == 0 == two["roles"]["q_proj"]["norm"]
    layer = [row for row in one["rows"] if row["layer"] == 1]
    total = sum(row["norm"] ** 2 for row in layer) ** 0.5, sum(row["weight"] ** 2 for row in layer) ** 0.5
    assert one["layers"]["1"]["relative"] == pytest.approx(total[0] / total[1])
    assert f"{100 * total[0] / total[1]:.2f}" in said.out
    assert "one: change relative to the weights, %" in said.out
    assert output.stat().st_size > 10_000


def test_labels_are_whole_paths_where_folders_are_alike(base: Saved, tmp_path: Path) -> None:
    sources = [drawn_adapter(base, tmp_path / n / "a", LoraConfig(r=1, target_modules=["q_proj"])) for n in ("x", "y")]
    record = change([str(s) for s in sources], tmp_path / "c.png", base=str(base.folder))
    assert [source["label"] for source in record["sources"]] == [str(s) for s in sources]


def test_an_adapter_on_the_head_is_left_out_with_a_word(
    base: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = drawn_adapter(base, tmp_path / "a", LoraConfig(r=1, target_modules=["q_proj", "lm_head"]))
    _, rows = weight_changes(str(adapter), base=str(base.folder))
    assert "lm_head" in caplog.text
    assert not any("lm_head" in row["target"] for row in rows)


def test_wrong_sources(base: Saved, tmp_path: Path, finished: Callable[[str], Path]) -> None:
    out, known = tmp_path / "c.png", str(base.folder)
    adapter = str(drawn_adapter(base, tmp_path / "a", LoraConfig(r=1, target_modules=["q_proj"])))
    refused(lambda: change([adapter], tmp_path / "c.pdf", base=known), RecipeError, ".png")
    refused(lambda: change([adapter, f"{adapter}/"], out, base=known), RecipeError, "twice")
    refused(lambda: change([adapter], out, base=known, roles=["q_prj"]), PlanError, '"q_proj"')
    refused(lambda: change([adapter], out, base=known, device="cuda:99"), RecipeError, "cuda:99")
    refused(lambda: change([known], out), ModelError, "names no base", "--base")
    refused(lambda: change([str(tmp_path / "nothing")], out), ModelError, "no such folder")
    refused(lambda: change([str(tmp_path / "nothing")], out, base=known), ModelError, "no such folder")
    other = save(MODELS["gpt2"](), tmp_path / "other")
    refused(lambda: change([str(other.folder)], out, base=known), ModelError, "model.layers.0", "--base")
    wide = save(MODELS["llama"](head_dim=16), tmp_path / "wide")
    refused(lambda: change([str(wide.folder)], out, base=known), ModelError, "shape")
    refused(lambda: change([str(finished("lora"))], out, base=known), ModelError, "fingerprint")
    (tmp_path / "run" / "plan").mkdir(parents=True)
    refused(lambda: change([str(tmp_path / "run")], out), ModelError, "keeptune export")
    assert not out.exists()


def test_what_changes_no_weight_is_refused(base: Saved, tmp_path: Path) -> None:
    wrapped = get_peft_model(base.load(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    wrapped.save_pretrained(tmp_path / "a")
    refused(lambda: weight_changes(str(tmp_path / "a"), base=str(base.folder)), ModelError, "PROMPT_TUNING")


def test_a_change_that_is_no_number_is_refused(base: Saved, tmp_path: Path) -> None:
    wrapped = get_peft_model(base.load(), LoraConfig(r=1, target_modules=["q_proj"]))
    with torch.no_grad():
        wrapped.get_submodule("base_model.model.model.layers.1.self_attn.q_proj.lora_B.default").weight.fill_(torch.nan)
    wrapped.save_pretrained(tmp_path / "a")
    refused(
        lambda: change([str(tmp_path / "a")], tmp_path / "c.png", base=str(base.folder)),
        ModelError,
        "layers.1.self_attn.q_proj",
        "NaN",
    )

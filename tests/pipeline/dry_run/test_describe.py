"""A dry run on atlas tells what the run does; nothing is fetched and nothing is written."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.support import keeptune

from keeptune import atlas
from keeptune.core.errors import DataError, KeeptuneError, ModelError, PlanError, RecipeError, StatisticsError
from keeptune.data import hub
from keeptune.pipeline.dry_run.describe import DryRun, describe
from keeptune.pipeline.dry_run.estimate import ModelShape
from keeptune.pipeline.run import run
from keeptune.recipe.schema import make_recipe

REMOTE = "hf://datasets/meta-math/MetaMathQA/MetaMathQA-395K.json"
ATLAS: dict[str, Any] = {
    "model": "atlas",
    "method": {"name": "lora-null", "rank": 4},
    "knowledge": {"file": "atlas:calibration.jsonl", "text": "{question} {answer}", "examples": 8, "max_length": 32},
    "task": {"train": "atlas:topics.train.jsonl", "prompt": "{text}\nTopic:", "completion": " {topic}", "examples": 16},
    "train": {"max_steps": 2, "per_device_train_batch_size": 4},
    "evaluate": [
        {
            "name": "facts",
            "role": "knowledge",
            "file": "atlas:facts.jsonl",
            "prompt": "{question}\nAnswer:",
            "answer": "{answer}",
            "metric": "exact_match",
            "examples": 5,
        }
    ],
}
LLAMA: dict[str, Any] = {
    "model": "meta-llama/Llama-2-7b-hf",
    "method": {"name": "lora", "rank": 128},
    "task": {"train": REMOTE, "prompt": "{query}", "completion": "{response}", "examples": 100_000},
    "train": {"num_train_epochs": 1, "gradient_accumulation_steps": 16, "max_length": 512},
    "evaluate": ["gsm8k", "triviaqa"],
}
CRAMPED: dict[str, Any] = {
    "method": {"name": "lora-null", "rank": 8},
    "knowledge": ATLAS["knowledge"],
    "store_limit": "40MB",
}


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DryRun]:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked the network")

    monkeypatch.setattr(hub, "hf_hub_download", refused)
    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))

    def described(values: dict[str, Any], shape: ModelShape | None = None, **changes: Any) -> DryRun:
        given = {**values, "output": str(tmp_path / "out"), "store": str(tmp_path / "store"), **changes}
        return describe(make_recipe(given, folder=tmp_path, where="recipe", fetch=hub.cached), shape)

    return described


def test_runs_that_share_a_shape_are_counted_in_their_own_quantisation(dry: Callable[..., DryRun]) -> None:
    """As in a comparison: the account of the first run gives the shape to the others."""
    packed = dry(LLAMA, quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    beside, alone = dry(LLAMA, shape=packed.shape), dry(LLAMA)
    assert packed.quantization and not beside.quantization and not alone.quantization
    assert beside.plain() == alone.plain()
    assert packed.memory["training"]["weights"] < 0.4 * alone.memory["training"]["weights"]


def written(path: Path) -> int:
    files = [path] if path.is_file() else list(path.rglob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def test_the_account_is_what_the_run_does(dry: Callable[..., DryRun], tmp_path: Path) -> None:
    account = dry(ATLAS)
    assert not (tmp_path / "out").exists()
    folders = {"output": str(tmp_path / "out"), "store": str(tmp_path / "store")}
    recipe = make_recipe({**ATLAS, **folders}, folder=tmp_path, where="recipe")
    run(recipe)
    record = json.loads((tmp_path / "out" / "trained" / "train.json").read_text())
    assert account.train.numbers == record["trained_parameters"]
    assert account.train.steps == max(point["step"] for point in record["loss"]) == 2
    [scored] = account.score
    items = (tmp_path / "out" / "evaluation" / "facts.items.jsonl").read_text().splitlines()
    assert scored.items == len(items) == 5
    assert all(named.at_hand for named in account.needs)
    # An input covariance for each input group of every block, in float64.
    inputs = {target.input_group: target.in_features for target in account.shape.linear}
    squares = sum(n * n for n in inputs.values())
    assert account.memory["statistics"]["sums"] == 8 * squares
    # What the run wrote, means in float64; files have a header each.
    assert sum(account.disk["store"].values()) == 8 * squares
    assert written(tmp_path / "store") == pytest.approx(8 * squares, rel=0.02)
    assert written(tmp_path / "out" / "plan" / "factors.safetensors") == pytest.approx(
        sum(account.disk["plan"].values()), rel=0.1
    )


def test_the_trained_model_is_free_when_the_export_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the account of an export has one base."""
    from keeptune.adapter import export as adapters
    from keeptune.pipeline import export as stage

    load_trained, load_adapter = stage.load_trained, adapters.load_adapter
    trained: list[Any] = []
    alive: list[bool] = []

    def loaded(*given: Any) -> Any:
        model = load_trained(*given)
        trained.append(weakref.ref(model.base_model.model))
        return model

    def checked(*given: Any) -> Any:
        alive.append(trained[0]() is not None)
        return load_adapter(*given)

    monkeypatch.setattr(stage, "load_trained", loaded)
    monkeypatch.setattr(adapters, "load_adapter", checked)
    folders = {"output": str(tmp_path / "out"), "store": str(tmp_path / "store"), "evaluate": []}
    run(make_recipe({**ATLAS, **folders}, folder=tmp_path, where="recipe"))
    assert alive == [False]


def test_a_hub_model_and_data_are_described_without_the_network(dry: Callable[..., DryRun]) -> None:
    account = dry(LLAMA)
    assert account.shape.source == "known shapes"
    assert [(named.what, named.at_hand) for named in account.needs] == [
        ("model", False),
        ("task", False),
        ("benchmark", False),
        ("benchmark", False),
    ]
    assert account.needs[0].size == 2 * 6_738_415_616
    assert account.train.numbers == 319_815_680
    assert account.train.examples == 100_000
    assert account.train.steps == 782  # of 8 x 16 = 128
    assert account.train.tokens == 782 * 128 * 512
    assert [one.items for one in account.score] == [1_319, 17_944]
    assert "train" in account.bounds
    weights, factors = 2 * 6_738_415_616, 4 * 319_815_680
    parts = account.memory["training"]
    assert (parts["weights"], parts["adapter"]) == (weights, factors)
    assert (parts["gradients"], parts["optimiser"]) == (factors, 2 * factors)


def test_a_folder_with_a_config_is_enough(dry: Callable[..., DryRun], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((atlas.model_path() / "config.json").read_text())
    bare, whole = dry(ATLAS, model=str(tmp_path / "model")), dry(ATLAS)
    assert not bare.needs[0].at_hand
    assert bare.train.numbers == whole.train.numbers
    assert bare.memory["training"]["weights"] == whole.memory["training"]["weights"]
    assert (bare.train.measured, whole.train.measured) == (False, True)  # without a tokenizer


def test_steps_and_work_are_unknown_where_examples_are(dry: Callable[..., DryRun]) -> None:
    unknown = dry(LLAMA, task={**LLAMA["task"], "examples": None})
    assert (unknown.train.examples, unknown.train.steps, unknown.train.tokens) == (None, None, None)
    assert unknown.work["train"] is None


def test_replay_adds_examples_and_blockwise_holds_the_sums_of_a_block(dry: Callable[..., DryRun]) -> None:
    assert dry(ATLAS, replay=0.2).train.examples == 20
    method = {"name": "lalora", "curvature": "delta-kfac"}
    whole, block = (dry(ATLAS, memory=way, method=method) for way in ("resident", "blockwise"))
    blocks, at = whole.shape.blocks, [one.memory["statistics"] for one in (whole, block)]
    for part in ("sums", "activations"):
        assert at[0][part] == pytest.approx(blocks * at[1][part], rel=1e-3)
    maps = sum(t.out_features * t.in_features for t in whole.shape.linear) * whole.shape.size
    assert at[0]["weights"] - at[1]["weights"] == pytest.approx(maps * (1 - 1 / blocks), rel=1e-3)
    assert block.memory["training"] == whole.memory["training"]
    # What measures a model by passes of its own goes through all of its blocks at once.
    loki = [dry(ATLAS, memory=way, method={"name": "loki"}) for way in ("resident", "blockwise")]
    activations = [one.memory["statistics"]["activations"] for one in loki]
    assert activations[0] == activations[1]


def test_checkpointing_trades_memory_for_work(dry: Callable[..., DryRun]) -> None:
    plain, saving = dry(LLAMA), dry(LLAMA, train={**LLAMA["train"], "gradient_checkpointing": True})
    assert saving.memory["training"]["activations"] < plain.memory["training"]["activations"] / 5
    assert plain.work["train"] is not None
    assert saving.work["train"] == pytest.approx(1.5 * plain.work["train"], rel=0.1)


@pytest.mark.parametrize(
    ("changes", "kind", "account"),
    [
        ({"model": "org/unheard-of"}, ModelError, "no config at hand"),
        ({"model": "./nowhere"}, ModelError, "no config at hand"),
        ({"targets": ["q_prj"]}, PlanError, "q_proj"),
        ({"layers": [32]}, PlanError, "0 to 31"),
        ({"method": {"name": "lora", "rank": 5000}}, PlanError, "rank 5000"),
        ({"method": "lorra"}, RecipeError, "lora"),
        ({"knowledge": {"file": "missing.jsonl"}}, DataError, "no such file"),
        ({"evaluate": ["gsm9k"]}, RecipeError, "gsm8k"),
        ({"train": {"learning_rat": 1}}, RecipeError, "learning_rate"),
        (CRAMPED, StatisticsError, "store_limit: got 40.0 MB .* one entry of"),
    ],
)
def test_wrong_recipes_give_the_usual_errors(
    changes: dict[str, Any], kind: type[KeeptuneError], account: str, dry: Callable[..., DryRun]
) -> None:
    with pytest.raises(kind, match=account):
        dry(LLAMA, **changes)


def test_the_command_prints_all_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: Callable[..., DryRun]
) -> None:
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**LLAMA, "output": str(tmp_path / "out")}), encoding="utf-8")
    said = keeptune("run", path, "--dry-run", "--flops", "4e14", capsys=capsys)
    assert said.code == 0, said
    for part in (
        "model meta-llama/Llama-2-7b-hf, about 13.5 GB",
        f"task {REMOTE}\n",
        "319,815,680 trained parameters",
        "782 steps of 128 over 100,000 examples, at most 51,249,152 tokens",
        "gsm8k (task, exact_match): 1,319 items",
        "at 4.0e+14 operations a second (given)",
    ):
        assert part in said.out, said
    assert not (tmp_path / "out").exists()
    wrong = keeptune("run", path, "--dry-run", "--flops", "-1", capsys=capsys)
    assert (wrong.code, "--flops" in wrong.err) == (2, True)
    if not torch.cuda.is_available():
        wrong = keeptune("run", path, "--dry-run", "--device", "cuda", capsys=capsys)
        assert (wrong.code, "which this machine lacks" in wrong.err) == (2, True)


def test_json_has_bytes_and_operations_by_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: Callable[..., DryRun]
) -> None:
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**LLAMA, "output": str(tmp_path / "out")}), encoding="utf-8")
    said = keeptune("run", path, "--dry-run", "--json", capsys=capsys)
    assert said.code == 0, said.err
    account = json.loads(said.out)
    for part in (account["memory"]["training"], account["memory"]["scoring"], account["disk"]["store"]):
        assert part["total"] == sum(part["parts"].values())
    largest = max((stage["total"], name) for name, stage in account["memory"].items() if name != "peak")
    assert (account["memory"]["peak"]["total"], account["memory"]["peak"]["stage"]) == largest
    assert account["operations"]["total"] == sum(account["operations"]["parts"].values())
    assert account == json.loads(json.dumps(dry(LLAMA).plain()))

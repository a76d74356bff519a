"""keeptune curvature measures a run's updates, and others', against the curvature that the run's plan holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.pipeline.support import keeptune, recipe_of, values
from tests.studies.adapters import refused
from torch import Tensor

from keeptune.core.artefact import read_json
from keeptune.core.errors import ArtefactError, ModelError, RecipeError
from keeptune.core.plan import Plan
from keeptune.model.pretrained import load_model
from keeptune.pipeline.run import run
from keeptune.studies.curvature import curvature, profiles_of

HELD = {"name": "lalora", "rank": 2, "curvature": "delta-kfac", "batches": 1, "batch_size": 4}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(data: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Run a method on two roles of two layers, three steps, once."""
    folder = tmp_path_factory.mktemp("runs")

    def output(place: str, /, **method: Any) -> Path:
        if not (folder / place).is_dir():
            given = values(data, folder / place, store, method=method, targets=["q_proj", "k_proj"])
            given["layers"] = None if method["name"] == "full" else [0, 3]
            given["train"] = given["train"] | {"max_steps": 3, "learning_rate": 0.05}
            run(recipe_of(given | {"evaluate": []}))
        return folder / place

    return output


def changed(folder: Path, target: str, base: str) -> Tensor:
    """W' - W by PEFT."""
    fresh = load_model(base)
    merged: Any = PeftModel.from_pretrained(load_model(base), str(folder / "adapter")).merge_and_unload()
    return (merged.get_submodule(target).weight - fresh.get_submodule(target).weight).detach().double()


def test_shares_and_curvature_felt_are_those_of_the_dense_change(make: Make, tmp_path: Path) -> None:
    held, plain = make("held", **HELD), make("plain", name="lora", rank=2)
    record = curvature(held, [str(plain)], tmp_path / "c.png")
    assert record["penalty"]["options"]["curvature"] == "delta-kfac"
    assert [source["label"] for source in record["sources"]] == ["held", "plain"]
    tensors, base = Plan.load(held / "plan").penalties[0].tensors, read_json(held / "recipe.json")["model"]
    for source, folder in zip(record["sources"], (held, plain), strict=True):
        assert len(source["targets"]) == 4
        for row in source["targets"]:
            E = changed(folder, row["target"], base)
            group = row["target"].replace("k_proj", "q_proj")
            assert row["norm"] == pytest.approx(float(E.norm()), rel=1e-4)
            factors = {
                "input": (E, tensors[f"Omega:{group}:matrix"]),
                "output": (E.T, tensors[f"Gamma:{row['target']}:matrix"]),
            }
            for side, (transposed, factor) in factors.items():
                F = factor.double()
                felt = float((transposed @ F @ transposed.T).trace() / transposed.square().sum() / (F.trace() / len(F)))
                measured = row["sides"][side]
                assert measured["felt"] == pytest.approx(felt, rel=1e-3)
                assert sum(measured["curvature"]) == pytest.approx(1)
                along = (transposed @ torch.linalg.eigh(F).eigenvectors.flip(1)).square().sum(
                    0
                ) / transposed.square().sum()
                tenth, part = divmod(len(F), 10)  # 64 and 32 directions: the first tenth ends inside one
                first = float(along[:tenth].sum() + part / 10 * along[tenth])
                assert measured["directions"][0] == pytest.approx(first, rel=1e-3)
        mean = sum(row["sides"]["input"]["felt"] for row in source["targets"]) / 4
        assert source["sides"]["input"]["felt"] == pytest.approx(mean)
        tenths = [row["sides"]["output"]["curvature"][3] for row in source["targets"]]
        assert source["sides"]["output"]["curvature"][3] == pytest.approx(sum(tenths) / 4)


def test_the_command_prints_and_draws(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "c.png"
    held = make("held", **HELD)
    said = keeptune("curvature", held, make("plain", name="lora", rank=2), "--output", output, capsys=capsys)
    assert said.code == 0, said.err
    record = read_json(output.with_suffix(".json"))
    for source in record["sources"]:
        assert f"{source['sides']['input']['felt']:.2f}" in said.out
    assert output.stat().st_size > 10_000


def test_a_form_with_inputs_only_has_one_side(make: Make, tmp_path: Path) -> None:
    held = make("inputs", **HELD | {"curvature": "delta-act"})
    record = curvature(held, [], tmp_path / "c.png")
    assert list(record["sources"][0]["sides"]) == ["input"]


def test_models_and_rescaled_changes_are_measured_too(make: Make, tmp_path: Path) -> None:
    held = make("held", **HELD)
    whole, rows = make("whole", name="full"), make("rows", name="dora", rank=2)
    record = curvature(held, [str(whole), str(rows)], tmp_path / "c.png")
    assert [len(source["targets"]) for source in record["sources"]] == [4, 4, 4], "of the targets with curvature"


def test_a_change_along_the_stiffest_direction_lies_there(make: Make) -> None:
    plain = make("plain", name="lora", rank=2)
    base = read_json(plain / "recipe.json")["model"]
    target = "model.layers.0.self_attn.q_proj"
    E = changed(plain, target, base)
    curves: dict[Any, dict[str, Tensor]] = {"input": {target: E.T @ E}, "output": {target: E @ E.T}}
    (row,) = profiles_of(str(plain), curves, base=base)
    for side in ("input", "output"):
        # Its own second moment as curvature: in proportion to it, each tenth the same.
        assert row["sides"][side]["curvature"] == pytest.approx([0.1] * 10, abs=1e-3)
        assert row["sides"][side]["directions"][0] > 0.99
    none: dict[Any, dict[str, Tensor]] = {"input": {target: torch.zeros_like(E.T @ E)}}
    assert profiles_of(str(plain), none, base=base) == []


def test_wrong_runs(make: Make, tmp_path: Path, finished: Callable[[str], Path]) -> None:
    held, plain, out = make("held", **HELD), make("plain", name="lora", rank=2), tmp_path / "c.png"
    refused(lambda: curvature(plain, [], out), ArtefactError, "plan of lora", "lalora")
    refused(lambda: curvature(tmp_path, [], out), ArtefactError, "plan.json")
    refused(lambda: curvature(held, [str(held)], out), RecipeError, "twice")
    refused(lambda: curvature(held, [], tmp_path / "c.pdf"), RecipeError, ".png")
    refused(lambda: curvature(held, [], out, device="cuda:99"), RecipeError, "cuda:99")
    target = "model.layers.0.self_attn.q_proj"
    wrong: dict[Any, dict[str, Tensor]] = {"input": {target: torch.eye(3)}}
    base = read_json(plain / "recipe.json")["model"]
    refused(lambda: profiles_of(str(plain), wrong, base=base), ModelError, target, "shape")
    assert not out.exists()


def test_a_training_of_other_targets_is_refused(make: Make, data: Path, store: Path, tmp_path: Path) -> None:
    held = make("held", **HELD)
    given = values(data, tmp_path / "other", store, targets=["down_proj"]) | {"evaluate": []}
    given["train"] = given["train"] | {"max_steps": 1}
    run(recipe_of(given))
    refused(lambda: curvature(held, [str(tmp_path / "other")], tmp_path / "c.png"), ModelError, "other", "no change")

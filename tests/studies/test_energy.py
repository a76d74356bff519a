"""keeptune energy, from a model to a table, a figure and numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.pipeline.support import MODEL, keeptune

from keeptune.core.artefact import read_json
from keeptune.model.pretrained import load_model


def test_energy_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "energy.png"
    words = ("energy", MODEL, "--top", 2, "--targets", "q_proj, down_proj", "--output", output)
    said = keeptune(*words, capsys=capsys)
    assert said.code == 0
    record = read_json(output.with_suffix(".json"))
    assert (record["top"], len(record["rows"])) == (2, 10)
    weight = load_model(str(MODEL)).get_submodule("model.layers.3.mlp.down_proj").weight
    squares = torch.linalg.svdvals(weight.detach().double()) ** 2
    (row,) = (row for row in record["rows"] if row["target"] == "model.layers.3.mlp.down_proj")
    assert (row["layer"], row["role"]) == (3, "down_proj")
    assert row["energy"] == pytest.approx(float(squares[:2].sum() / squares.sum()), abs=1e-9)
    own = [row["energy"] for row in record["rows"] if row["layer"] == 3]
    assert record["mean"]["3"] == pytest.approx(sum(own) / 2)
    assert said.out.splitlines()[0].split() == ["layer", "q_proj", "down_proj", "mean"]
    assert f"{row['energy']:.3f}" in said.out
    assert output.stat().st_size > 10_000


def test_energy_of_atlas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("energy", "atlas", "--targets", "[k_proj]", "--output", tmp_path / "e.png", capsys=capsys)
    assert said.code == 0
    assert len(read_json(tmp_path / "e.json")["rows"]) == 4


@pytest.mark.parametrize(
    ("words", "mark"),
    [
        (["--targets", "q_prj"], '"q_proj"'),
        (["--output", "e.pdf"], ".png"),
        (["--output", f"{__file__}/e.png"], "wanted a folder"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--top", "0"], "top"),
    ],
)
def test_wrong_words(words: list[str], mark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("energy", MODEL, "--output", tmp_path / "e.png", *words, capsys=capsys)
    assert said.code == 2
    assert mark in said.err
    assert not list(tmp_path.iterdir())

"""Laws of several processes: the statistics and the plans of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.contract.processes import collect_all, main, plan_all
from tests.forks import Forks
from tests.models import MODELS

from keeptune.core.artefact import read_json
from keeptune.model.blocks import find_targets

COUNTS = [3]


@pytest.fixture(scope="module")
def folder(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves, and two, and three."""
    folder = tmp_path_factory.mktemp("processes")
    collect_all(folder / "one")
    for number, plan in enumerate(plan_all(folder / "one").values()):
        plan.save(folder / "plans-one" / str(number))
    for count in COUNTS:
        forks.together(main, count, folder)
    return folder


def entries(store: Path) -> Mapping[str, Path]:
    return {path.parent.name: path for path in store.rglob("value.safetensors")}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("part", ["dense", "experts", "blocks"])
def test_statistics_do_not_depend_on_the_number_of_processes(folder: Path, count: int, part: str) -> None:
    one, several = entries(folder / "one" / part), entries(folder / f"of-{count}" / part)
    assert several.keys() <= one.keys()  # plans collected more there
    assert len(several) > 7
    for key, found_at in several.items():
        found, wanted = (load_file(at)["value"].double() for at in (found_at, one[key]))
        gap = (found - wanted).norm() / wanted.norm().clamp_min(1e-30)
        assert gap <= 1e-6, read_json(found_at.parent / "recipe.json")


@pytest.mark.parametrize("count", COUNTS)
def test_plans_are_bit_equal_to_those_of_one_process(folder: Path, count: int) -> None:
    one = sorted(path for path in (folder / "plans-one").rglob("*") if path.is_file())
    assert len(one) > 40
    for path in one:
        several = folder / f"plans-{count}" / path.relative_to(folder / "plans-one")
        if path.suffix == ".safetensors":
            found, wanted = load_file(several), load_file(path)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], value) for name, value in wanted.items())
        else:
            assert several.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("count", COUNTS)
def test_a_statistic_is_sent_once_in_float64(folder: Path, count: int) -> None:
    """Eight bytes for each number of a sum, and eight for its tokens, whatever the data."""
    sites = {target.input_group: target.in_features for target in find_targets(MODELS["llama"]())}
    assert json.loads((folder / f"sent-{count}.json").read_text("utf-8")) == [
        part for n in sites.values() for part in (8 * n * n, 8)
    ]

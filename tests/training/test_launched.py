"""Processes that a launcher started train what one does, under DDP, FSDP2 and ZeRO, also from checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from tests.forks import Forks
from tests.training.launched import BACKENDS, CASES, SHARD, Found, goes_on, learned, main, resumed
from tests.training.support import every, here

from keeptune.core.plan import Plan
from keeptune.training.output_passes import Outputs

ZERO = [f"{name} 2" for name in here(BACKENDS) if name.startswith("zero")]
OF_THREE = ("keep", "kl", "lora-null v2, residual")
# Who wrote a checkpoint, and who goes on from it; three processes write theirs as whole files, two in shards.
FROM = {"one": (2,), "ddp 2": (1, 2, 3), "fsdp2 2": (1, 2, 3), "fsdp2 3": (1,), **dict.fromkeys(ZERO, (2,))}
PAIRS = [(name, size) for size in (2, 3) for name in (CASES if size == 2 else OF_THREE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launched")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Found]:
    """What one process trains, by case."""
    found = {}
    for name, case in CASES.items():
        plan = case.plan(folder / "store")
        plan.save(folder / name)
        found[name] = learned(case, plan, folder / ("one" if name == "keep" else "unused"))
    # ZeRO has the task's gradient too late
    with patch.object(Outputs, "limited", lambda _, tensors, gradients, scale: gradients):
        found["keep, zero"] = learned(CASES["keep"], Plan.load(folder / "keep"), folder / "late")
    return found


def wanted_of(alone: Mapping[str, Found], name: str, backend: str) -> Found:
    return alone[f"{name}, zero" if name == "keep" and backend.startswith("zero") else name]


@pytest.fixture(scope="module")
def together(forks: Forks, folder: Path, alone: Mapping[str, Found]) -> dict[str, Found]:
    """What several processes train: ``"keep, ddp 2"``, ``"keep from one, ddp 2"`` and the like."""
    for size, names in ((2, list(CASES)), (3, [*OF_THREE])):
        names += [f"keep from {source}" for source, sizes in FROM.items() if size in sizes]
        forks.together(main, size, folder, *names)
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def check(found: Found, wanted: Found) -> None:
    """Compares what was trained, and the losses of the steps that were taken."""
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-5 if name != "loss" else 1e-5)


@pytest.mark.parametrize("backend", every(BACKENDS))
@pytest.mark.parametrize(("name", "size"), PAIRS)
def test_processes_train_what_one_does(
    name: str, size: int, backend: str, alone: Mapping[str, Found], together: Mapping[str, Found]
) -> None:
    """Losses of all steps, the ends of epochs among them, where examples are left for some processes only."""
    found, wanted = dict(together[f"{name}, {backend} {size}"]), wanted_of(alone, name, backend)
    shard = found.pop(SHARD, None)
    check(found, wanted)
    assert (shard is not None) == (backend == "fsdp2")
    if shard is not None:  # a state of the first process's shards only would not pass
        assert all(shard.shape != value.shape or not torch.equal(shard, value) for value in wanted.values())


@pytest.mark.parametrize("name", ["keep", "l2", "laplace", "ewc", "kl"])
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_what_a_step_of_penalties_sends(name: str, backend: str, folder: Path, together: Mapping[str, Found]) -> None:
    """DDP: nothing, for KL one sum of gradients (keep: at every second step, and one of checks); FSDP2: each factor."""
    assert together
    plan, counts = Plan.load(folder / name), json.loads((folder / f"{name}, {backend} 2.json").read_text("utf-8"))
    factors = 2 * len(plan.targets)
    if backend == "ddp":
        assert {*counts} == {"kl": {1}, "keep": {0, 1, 2}}.get(name, {0})
    elif name == "keep":
        assert min(counts) == 0 and max(counts) > factors
    elif name == "kl":
        assert min(counts) > factors  # and blocks, for its own pass
    else:
        assert {*counts} == {factors}


@pytest.mark.parametrize(
    ("name", "other"), [("kl", "replay"), ("keep", "l2"), ("laplace", "ewc"), ("keep", "keep, zero")]
)
def test_what_is_compared_tells_penalties_apart(name: str, other: str, alone: Mapping[str, Found]) -> None:
    with pytest.raises(AssertionError):
        check(alone[name], alone[other])


@pytest.mark.parametrize(
    ("source", "size", "backend"),
    [
        (one, size, backend)
        for one, sizes in FROM.items()
        for size in sizes
        for backend in here(BACKENDS)
        if size > 1 and goes_on(one, backend, size)
    ],
)
def test_another_number_of_processes_goes_on_from_a_checkpoint(
    source: str, size: int, backend: str, alone: Mapping[str, Found], together: Mapping[str, Found]
) -> None:
    found = dict(together[f"keep from {source}, {backend} {size}"])
    found.pop(SHARD, None)
    check(found, wanted_of(alone, "keep", backend))


@pytest.mark.parametrize("source", [one for one, sizes in FROM.items() if 1 in sizes])
def test_one_process_goes_on_from_the_checkpoint_of_several(
    source: str, folder: Path, alone: Mapping[str, Found], together: Mapping[str, Found]
) -> None:
    assert together
    check(resumed(Plan.load(folder / "keep"), folder, source), alone["keep"])

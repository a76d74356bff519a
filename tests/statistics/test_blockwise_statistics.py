"""Statistics and plans one block at a time: the same, resumed at the block that raised, from an offloaded base."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import Bench, asking, deep, llama, save

from keeptune.core.errors import RecipeError
from keeptune.methods.lalora import Lalora
from keeptune.model.blocks import find_targets
from keeptune.model.blockwise import BlockwiseRunner
from keeptune.model.pretrained import LoadOptions, load_offloaded
from keeptune.pipeline import originals as placement
from keeptune.pipeline.planning import PlanOptions, plan_for
from keeptune.statistics.covariance import GradientCovariance, InputCovariance
from keeptune.statistics.store import StatStore

BOTH = (InputCovariance("knowledge"), GradientCovariance("knowledge", "sampled"))


def test_a_pass_goes_on_at_the_block_that_raised(tmp_path: Path) -> None:
    model = deep(llama)
    whole = Bench(model, tmp_path / "whole").collect(asking(*BOTH))
    bench, runner = Bench(model, tmp_path / "blocks"), BlockwiseRunner(model)
    broken = model.get_submodule("model.layers.1.mlp.down_proj")
    calls: list[int] = []

    def breaks(*_: Any) -> None:
        calls.append(1)
        if torch.is_grad_enabled():
            raise ConnectionError("the disk is gone")

    handle = broken.register_forward_pre_hook(breaks)
    with pytest.raises(ConnectionError):
        bench.collect(asking(*BOTH), runner=runner)
    handle.remove()
    stored = {path: path.stat().st_mtime_ns for path in bench.folder.glob("*/*/value.safetensors")}
    assert len(stored) == 2 * (4 + 7)  # blocks 3 and 2: inputs of four groups, gradients of seven maps
    found = bench.collect(asking(*BOTH), runner=runner)
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    for target in bench.targets():
        for request in BOTH:
            assert torch.equal(found.view(target)[request], whole.view(target)[request])


@pytest.mark.parametrize("memory", ["resident", "blockwise", "auto"])
def test_plans_are_equal_whole_and_block_by_block_from_disk(memory: Any, tmp_path: Path) -> None:
    model = deep(llama)
    bench = Bench(model, tmp_path / "a")
    data = {"knowledge": bench.data, "task": bench.task}
    wanted = plan_for(
        model,
        Lalora(curvature="delta-kfac"),
        StatStore(tmp_path / "a"),
        data=data,
        options=PlanOptions(memory="resident"),
    )
    held = load_offloaded(str(save(model, tmp_path / "base").folder), LoadOptions())
    found = plan_for(
        held, Lalora(curvature="delta-kfac"), StatStore(tmp_path / "b"), data=data, options=PlanOptions(memory=memory)
    )
    assert found.key == wanted.key


def test_auto_takes_blocks_where_sums_do_not_fit_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = deep(llama)
    requests = {target: frozenset(BOTH) for target in find_targets(model)}
    runner = Bench(model, tmp_path)
    plain = placement.Runner(runner.model)
    with caplog.at_level(logging.INFO):
        assert placement.placed_runner(plain, requests, "auto", None) == (plain, None)
        monkeypatch.setattr(placement, "free_bytes", lambda device: 100_000)
        chosen, limit = placement.placed_runner(plain, requests, "auto", None)
        assert isinstance(chosen, BlockwiseRunner) and limit is None
        assert placement.placed_runner(plain, requests, "resident", None) == (plain, 80_000)
    assert "takes resident" in caplog.messages[0] and "takes blockwise" in caplog.messages[1]
    with pytest.raises(RecipeError, match="resident, blockwise or auto"):
        placement.placed_runner(plain, requests, "low", None)  # type: ignore[arg-type]
    folder = str(save(model, tmp_path / "base").folder)
    assert placement.is_offloaded(placement.load_base(folder, LoadOptions(), "auto"))
    assert not placement.is_offloaded(placement.load_base(folder, LoadOptions(), "resident"))

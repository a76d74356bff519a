"""The bottom of Ω: what LoRA-Null's directions let through, against the least that any could."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.models import MODELS, Bench, asking, relative
from torch import Tensor

from keeptune.core.target import Target
from keeptune.methods.corda import Corda
from keeptune.methods.lora_null import LoraNull, null_factors, null_space
from keeptune.statistics.covariance import InputCovariance

N, WIDTH, RANK = 1500, 192, 16
SINGLE, DOUBLE = InputCovariance("knowledge"), InputCovariance("knowledge", precision="double")


def inputs(smallest: float) -> Tensor:
    """Rows, float32, whose singular values fall evenly from 1 to the smallest one."""
    draw = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, WIDTH, generator=draw, dtype=torch.float64))[0] for n in (N, WIDTH))
    sizes = torch.logspace(0, torch.tensor(smallest).log10(), WIDTH, dtype=torch.float64)
    return (U * sizes @ V.T).float()


def leaks(X: Tensor, request: InputCovariance) -> tuple[float, float]:
    """The energy of X in the directions, and in the rows of the start's A, over the least there is."""
    total = request.accumulator(Target("t", 0, "t", 96, WIDTH, "t"), torch.device("cpu"), Tensor)
    for rows in X.split(256):
        total.add(rows)
    U = null_space(total.result(), RANK)[1]
    A = null_factors(torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(1)), U)[0].A
    least = torch.linalg.svdvals(X.double())[-RANK:].square().sum()
    spans = (U, torch.linalg.qr(A.double().T)[0])
    return tuple(float((X.double() @ span).square().sum() / least) for span in spans)  # type: ignore[return-value]


@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-6, 1e-7])
def test_in_double_precision_the_directions_let_through_the_least_there_is(smallest: float) -> None:
    assert max(leaks(inputs(smallest), DOUBLE)) < 1.05


@pytest.mark.parametrize(("smallest", "times"), [(1e-5, 3), (1e-6, 100)])
def test_in_single_precision_they_do_not(smallest: float, times: float) -> None:
    assert min(leaks(inputs(smallest), SINGLE)) > times


def test_methods_that_take_the_bottom_ask_for_double_precision() -> None:
    assert LoraNull(rank=4).statistics == {DOUBLE}
    assert Corda(rank=4, damping=0.0).statistics == {DOUBLE}
    assert Corda(rank=4).statistics == {SINGLE}  # the damping is far above what float32 rounds away
    assert Corda(rank=4, mode="ipm", damping=0.0).statistics == {InputCovariance("task")}


def test_the_store_keeps_both_precisions_apart(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path)
    target = bench.targets()[0]
    view = bench.collect(asking(SINGLE, DOUBLE)).view(target)
    assert (view[SINGLE].dtype, view[DOUBLE].dtype) == (torch.float32, torch.float64)
    assert relative(view[SINGLE], view[DOUBLE]) < 1e-6
    assert not torch.equal(view[SINGLE].double(), view[DOUBLE])
    kinds = []
    for file in tmp_path.rglob("value.safetensors"):
        with safe_open(file, "pt") as entry:
            kinds.append(entry.get_tensor("value").dtype)
    assert kinds.count(torch.float64) == kinds.count(torch.float32) == len({t.input_group for t in bench.targets()})

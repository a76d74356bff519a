"""EWC on the weight change: its definition, autograd, chunks, and F from the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS, Bench, asking, relative
from tests.penalties.test_kronecker import draw
from tests.reference.curvature_reference import text_gradients
from tests.reference.penalty_reference import ewc_lora
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, TargetPlan
from keeptune.data.calibration import Calibration
from keeptune.penalties.base import Site
from keeptune.penalties.ewc import Ewc, diagonal_change

M, N, R = 11, 9, 3
FISHER = draw(M, N, seed=1).square()
START = LowRank(draw(M, R, seed=7), draw(R, N, seed=8))
DELTA = LowRank(draw(M, R, seed=5), draw(R, N, seed=6))
every_start = pytest.mark.parametrize("start", [None, START], ids=["B_0 = 0", "B_0 A_0"])
every_chunk = pytest.mark.parametrize("numbers", [1, 4 * N, M * N, 1 << 20])


def dense_value(start: LowRank | None, B: Tensor, A: Tensor) -> Tensor:
    E = 1.7 * (B @ A if start is None else B @ A - start.dense())
    return 0.6 * (FISHER * E.square()).sum()


@every_start
@every_chunk
def test_value_and_gradient_are_those_of_the_dense_change(start: LowRank | None, numbers: int) -> None:
    penalty = diagonal_change(FISHER, 1.7, 0.6, start, numbers)
    B, A = DELTA.B.clone().requires_grad_(), DELTA.A.clone().requires_grad_()
    for wanted in (dense_value(start, B, A), penalty(LowRank(B, A))[0]):
        to_B, to_A = torch.autograd.grad(wanted, (B, A))
        value, found = penalty(DELTA)
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.B, to_B, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.A, to_A, rtol=1e-10, atol=1e-12)


@every_start
def test_another_split_of_the_same_change_has_the_same_value(start: LowRank | None) -> None:
    penalty, G = diagonal_change(FISHER, 1.7, 0.6, start), draw(R, R, seed=9) + 3 * torch.eye(R)
    other = LowRank(DELTA.B @ torch.linalg.inv(G), G @ DELTA.A)
    torch.testing.assert_close(penalty(other)[0], penalty(DELTA)[0], rtol=1e-10, atol=0)


def test_at_the_start_value_and_gradient_are_zero() -> None:
    for start, delta in ((START, START), (None, LowRank(torch.zeros_like(DELTA.B), DELTA.A))):
        value, grad = diagonal_change(FISHER, 1.7, 0.6, start)(delta)
        assert float(value) == 0.0
        assert not grad.B.any()
        assert not grad.A.any()


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and "slice" not in str(func):
            self.numbers = max(self.numbers, made.numel())
        return made


@contextmanager
def largest() -> Iterator[_Largest]:
    with _Largest() as found:
        yield found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_weight_is_formed(dtype: torch.dtype) -> None:
    m, n = 64, 48
    penalty = diagonal_change(torch.rand(m, n).to(dtype), 1.0, 1.0, None, numbers=4 * n)
    with torch.no_grad(), largest() as found:
        penalty(LowRank(torch.randn(m, 2), torch.randn(2, n)))
    assert found.numbers <= 4 * n


def of_texts(folder: Path, one_token: bool, scale: float, init: LowRank, delta: LowRank) -> tuple[Tensor, Tensor, int]:
    """From the model to the value of the bound penalty; the gradients of its texts one by one, and its tokens."""
    bench = Bench(MODELS["llama"](), folder, roles=["o_proj"])
    bench.data = bench.task  # with prompts
    if one_token:
        bench.data = Calibration.of_answers(*_but_last(bench.task))
    penalty = Ewc(strength=3.0, labels="true", batches=2, batch_size=3)
    target = bench.targets()[1]
    weight = bench.model.get_submodule(target.name).weight.detach()
    plan = TargetPlan(target, Decision(2), init, trainable=frozenset({"A", "B"}), scale=scale)
    view = bench.collect(asking(*penalty.requests(plan))).view(target)
    used = bench.data.first(6)
    tensors = penalty.tensors(Site(plan, weight, view, targets=2, blocks=2))  # type: ignore[arg-type]
    value, _ = penalty.bind(plan, tensors)({"B": delta.B, "A": delta.A})
    return value, text_gradients(bench.model, target.name, used), used.learned_tokens


def _but_last(data: Calibration) -> tuple[Any, int, tuple[int, ...]]:
    return data.sequences, data.pad_id, tuple(len(ids) - 1 for ids in data.sequences)


INIT = LowRank(0.1 * draw(32, 2).float(), 0.1 * draw(2, 32, seed=1).float())
MOVED = LowRank(draw(32, 2, seed=2).float(), draw(2, 32, seed=3).float())


def test_f_is_the_exact_diagonal_per_learned_token(tmp_path: Path) -> None:
    value, gradients, tokens = of_texts(tmp_path, False, 0.5, INIT, MOVED)
    E = 0.5 * (MOVED.dense() - INIT.dense())
    assert relative(value, 1.5 * (gradients.square().sum(0) / tokens * E.square()).sum()) < 1e-4


def test_it_is_ewc_lora_as_released_at_a_text_a_batch(tmp_path: Path) -> None:
    """Of texts with a label each; batches of three, whose texts cancel each other, are another penalty."""
    value, gradients, _ = of_texts(tmp_path, True, 1.0, LowRank(torch.zeros(32, 2), INIT.A), MOVED)
    alone, together = (ewc_lora(gradients, batch, MOVED.B, MOVED.A, 3.0) for batch in (1, 3))
    assert relative(value, alone) < 1e-4 and relative(together, alone) > 0.1


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"batches": 0}, {"batch_size": 0}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=f"penalty ewc, {next(iter(options))}"):
        Ewc(**options)

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from tests.methods.support import SHAPES, UNIQUE, WEIGHTS, built, normal, residual, weight, with_singular_values
from tests.models import GivenStats, calibration, llama, relative
from tests.reference.corda_reference import peft_covariance, start
from tests.reference.peft_reference import OneLinear, start_of
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.methods.corda import Corda, conditioned, oriented_factors
from keeptune.methods.milora import Milora
from keeptune.methods.pissa import Pissa
from keeptune.statistics.covariance import InputCovariance

R = 4
Mode = Literal["kpm", "ipm"]
shapes = pytest.mark.parametrize("shape", SHAPES)
modes = pytest.mark.parametrize("mode", ["kpm", "ipm"])

# Covariances of n inputs; the last three have less than full rank.
COVARIANCES: dict[str, Callable[[int], Tensor]] = {
    "random": lambda n: _gram(normal(4 * n, n, seed=3)),
    "falling": lambda n: _gram(with_singular_values((4 * n, n), torch.logspace(0, -2, n), seed=4)),
    "outlier": lambda n: _gram(normal(4 * n, n, seed=5) * torch.cat([torch.full((1,), 30.0), torch.ones(n - 1)])),
    "few tokens": lambda n: _gram(normal(n // 3, n, seed=6)),
    "constant": lambda n: _gram(normal(1, n, seed=7).expand(9, n)),
    "zero": lambda n: torch.zeros(n, n, dtype=torch.float64),
}
SAFE = ["random", "falling", "outlier"]
covariances = pytest.mark.parametrize("inputs", COVARIANCES)


def _gram(X: Tensor) -> Tensor:
    return X.T @ X / len(X)


def stats(C: Tensor) -> GivenStats:
    double = InputCovariance("knowledge", precision="double")
    C = C.float()
    return GivenStats({InputCovariance("knowledge"): C, InputCovariance("task"): C, double: C.double()})


def planned(W: Tensor, C: Tensor, **options: Any) -> Any:
    return built(Corda(**{"rank": R} | options), W, stats=stats(C))


@modes
@shapes
@pytest.mark.parametrize("name", WEIGHTS)
@covariances
@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_the_factors_are_finite_whatever_the_weight_and_the_inputs(
    mode: str, shape: str, name: str, inputs: str, alpha: float | None, damping: float
) -> None:
    W = weight(name, shape)
    plan = planned(W, COVARIANCES[inputs](W.shape[1]), mode=mode, alpha=alpha, damping=damping)
    assert torch.isfinite(plan.init.A).all()
    assert torch.isfinite(plan.init.B).all()


@modes
@shapes
@pytest.mark.parametrize("inputs", SAFE)
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_the_factors_are_those_of_the_definition(
    mode: str, shape: str, inputs: str, damping: float, alpha: float | None
) -> None:
    """With the inverse of C, in float64."""
    W = weight("random", shape)
    C = conditioned(COVARIANCES[inputs](W.shape[1]).float(), damping)
    plan = planned(W, COVARIANCES[inputs](W.shape[1]), mode=mode, damping=damping, alpha=alpha)
    B, A = start(W, C, R, mode)
    signs = (plan.init.A.double() * A).sum(1).sign()
    root = plan.scale**0.5
    assert relative(root * plan.init.B, B * signs) < 1e-6
    assert relative(root * plan.init.A, A * signs[:, None]) < 1e-6


@modes
@shapes
@covariances
def test_the_start_is_the_part_of_the_weight_that_writes_into_B(mode: str, shape: str, inputs: str) -> None:
    W = weight("random", shape)
    plan = planned(W, COVARIANCES[inputs](W.shape[1]), mode=mode, damping=0.0)
    Q = torch.linalg.qr(plan.init.B.double())[0]
    assert relative(plan.init.dense(), Q @ Q.T @ W.double()) < 1e-5
    assert float((Q.T @ residual(W, plan)).norm()) < 1e-5 * float(W.norm())


@shapes
@pytest.mark.parametrize("name", UNIQUE)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_white_inputs_reduce_it_to_pissa_and_milora(shape: str, name: str, size: float) -> None:
    W = weight(name, shape)
    C = size * torch.eye(W.shape[1], dtype=torch.float64)
    for mode, plain in (("ipm", Pissa(rank=R, alpha=6.0)), ("kpm", Milora(rank=R, alpha=6.0))):
        found, wanted = planned(W, C, mode=mode, alpha=6.0, damping=0.0).init, built(plain, W).init
        assert relative(found.A, wanted.A) < 1e-5
        assert relative(found.B, wanted.B) < 1e-5


@modes
@pytest.mark.parametrize("inputs", [name for name in COVARIANCES if name != "zero"])
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**10])
def test_the_size_of_the_inputs_changes_nothing(mode: str, inputs: str, factor: float) -> None:
    """Powers of two, so that float32 holds both covariances alike; the factors have the same bits."""
    W, C = weight("random"), COVARIANCES[inputs](40)
    one, other = planned(W, C, mode=mode), planned(W, factor * C, mode=mode)
    assert torch.equal(one.init.B, other.init.B)
    assert torch.equal(one.init.A, other.init.A)


@modes
def test_the_modes_ask_for_the_right_data(mode: Mode) -> None:
    role: Literal["knowledge", "task"] = "knowledge" if mode == "kpm" else "task"
    (request,) = Corda(mode=mode).requests(None)  # type: ignore[arg-type]
    assert request == InputCovariance(role)


def test_knowledge_mode_writes_least_on_the_data_and_the_other_most() -> None:
    W, C = weight("random", "square"), COVARIANCES["falling"](24)

    def written(mode: str) -> float:
        D = planned(W, C, mode=mode).init.dense().double()
        return float((D @ C @ D.T).trace())

    assert written("kpm") < 1e-3 * written("ipm")


# Precision


def steep() -> tuple[Tensor, Tensor]:
    """W, and C of inputs whose singular values fall from 1 to 1e-3, so that their variances fall from 1 to 1e-6."""
    n = 96
    C = _gram(with_singular_values((4 * n, n), torch.logspace(0, -3, n), seed=8))
    return with_singular_values((n, n), torch.logspace(0, -1, n), seed=9).float(), conditioned(C.float(), 0.0)


def test_knowledge_mode_is_right_on_a_steep_spectrum() -> None:
    W, C = steep()
    B, A = start(W, C, R, "kpm")
    S = torch.linalg.svdvals(W.double() @ C)
    assert float(S[-1]) < 1e-6 * float(S[0])
    assert relative(oriented_factors(W, C, R, "bottom", "up")[0].dense(), B @ A) < 1e-3


def test_negative_control_in_float32_it_picks_noise() -> None:
    """The same definition in float32, as PEFT and the released code do it."""
    W, C = steep()
    B, A = start(W, C, R, "kpm")
    P, Q = start(W, C, R, "kpm", dtype=torch.float32)
    assert relative(P @ Q, B @ A) > 0.3


# Zeros


@shapes
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("inputs", ["few tokens", "constant", "zero"])
@modes
def test_singular_values_of_zero_leave_A_bounded(shape: str, name: str, inputs: str, mode: str) -> None:
    W = weight(name, shape)
    plan = planned(W, COVARIANCES[inputs](W.shape[1]), mode=mode, damping=0.0)
    A, B = plan.init.A.norm(dim=1), plan.init.B.norm(dim=0)
    assert (A <= 1.001e4 * B + 1e-4).all()


@shapes
def test_damping_bounds_A_by_itself(shape: str) -> None:
    W = weight("falling", shape)
    plan = planned(W, COVARIANCES["few tokens"](W.shape[1]), mode="kpm", damping=0.01)
    assert (plan.init.A.norm(dim=1) <= 1 / 0.0099 * plan.init.B.norm(dim=0)).all()


def test_inputs_of_zero_leave_the_choice_to_the_weight() -> None:
    W = weight("random")
    found = planned(W, COVARIANCES["zero"](40), mode="ipm").init
    assert relative(found.A, built(Pissa(rank=R), W).init.A) < 1e-6


# PEFT


def samples(n: int, count: int = 6, *, spread: float = 1.0) -> list[Tensor]:
    """Inputs ``(T, n)`` of different lengths; a small spread makes them near-white."""
    sizes = torch.linspace(1, spread, n, dtype=torch.float64)
    return [normal(40 + 10 * i, n, seed=20 + i) * sizes for i in range(count)]


def _config(role: str, mode: Any, alpha: Any) -> LoraConfig:
    corda = CordaConfig(corda_method=mode)
    return LoraConfig(r=R, lora_alpha=alpha, target_modules=[role], init_lora_weights="corda", corda_config=corda)


def by_peft(W: Tensor, data: list[Tensor], mode: str, alpha: float) -> tuple[Any, Tensor, float]:
    model = OneLinear(W)
    run: Any = lambda: [model(x.float()[None]) for x in data]  # noqa: E731
    preprocess_corda(model, _config("up", mode, alpha), run_model=run)
    return start_of(model, "corda", R, alpha, corda_config=CordaConfig(corda_method=mode))  # type: ignore[arg-type]


@modes
@shapes
@pytest.mark.parametrize(("spread", "damping"), [(1.0, 0.01), (0.3, 0.01), (1.0, 0.0)])
@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_the_start_is_pefts_for_one_example_at_a_time(
    mode: str, shape: str, spread: float, damping: float, alpha: float
) -> None:
    """From PEFT's statistic, which divides each example by its largest value; white inputs need no damping to agree."""
    W = weight("random", shape)
    data = samples(W.shape[1], spread=spread)
    peft, left, scale = by_peft(W, data, mode, alpha)
    plan = planned(W, peft_covariance(data), mode=mode, damping=damping, alpha=alpha)
    bound = 1e-3 if damping else 0.05
    assert plan.scale == scale
    assert relative(plan.init.dense(), peft.dense()) < bound
    assert relative(residual(W, plan), left) < bound
    # How B and A share the size of B A depends on the size of PEFT's statistic; ours does not.
    ratio = plan.init.B.norm(dim=0) / peft.B.norm(dim=0)
    assert float(ratio.max() / ratio.min()) < 1 + 10 * bound


def on_llama(pad_to: int | None, batch: int = 1) -> Any:
    """PEFT's start for a whole model, from examples that are padded or not."""
    model, rows = llama(), calibration().sequences
    config = _config("o_proj", "ipm", R)

    def run() -> None:
        for first in range(0, len(rows), batch):
            some = rows[first : first + batch]
            length = pad_to or max(map(len, some))
            ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in some])
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in some])
            model(input_ids=ids, attention_mask=mask)

    preprocess_corda(model, config, run_model=run)
    layer = get_peft_model(model, config).base_model.model.model.layers[0].self_attn.o_proj
    return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()


def test_pefts_statistic_counts_padding() -> None:
    """The mask is given, and does not help; ours is checked against padding by the contract."""
    assert relative(on_llama(60), on_llama(None)) > 0.1


def test_pefts_statistic_takes_no_batches() -> None:
    with pytest.raises(RuntimeError, match="2 dimensions"):
        on_llama(None, batch=2)


@pytest.mark.parametrize(
    ("options", "where"), [({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout"), ({"damping": -0.1}, "damping")]
)
def test_options_out_of_range_are_refused(options: dict[str, float], where: str) -> None:
    with pytest.raises(PlanError, match=rf"method\.{where}"):
        Corda(**options)  # type: ignore[arg-type]


def test_dropout_is_handed_to_peft() -> None:
    assert Corda(dropout=0.05).peft() == {"lora_dropout": 0.05}

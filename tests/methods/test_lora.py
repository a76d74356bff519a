from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models import MODELS, Bench

from keeptune.core.plan import Plan
from keeptune.methods.lora import Lora


def made(folder: Path, method: Lora, roles: list[str] | None = None, architecture: str = "llama") -> Plan:
    return Bench(MODELS[architecture](), folder, roles=roles).plan(method)


def test_training_starts_from_the_base(tmp_path: Path) -> None:
    for target_plan in made(tmp_path, Lora(rank=4)).targets:
        assert not target_plan.init.B.any()
        assert not target_plan.anchored
        assert target_plan.trainable == {"A", "B"}


@pytest.mark.parametrize("architecture", MODELS)
def test_A_is_uniform_within_one_over_the_square_root_of_n(tmp_path: Path, architecture: str) -> None:
    for target_plan in made(tmp_path, Lora(rank=16), architecture=architecture).targets:
        A = target_plan.init.A * target_plan.target.in_features**0.5
        assert A.shape == (16, target_plan.target.in_features)
        assert 0.95 < float(A.abs().max()) <= 1.0
        assert abs(float(A.mean())) < 0.15
        assert float(A.var()) == pytest.approx(1 / 3, rel=0.2)


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (Lora(rank=4), 2.0),
        (Lora(rank=8), 2.0),
        (Lora(rank=4, alpha=4), 1.0),
        (Lora(rank=8, alpha=4), 0.5),
        (Lora(rank=4, alpha=4, use_rslora=True), 2.0),
        (Lora(rank=9, alpha=12, use_rslora=True), 4.0),
        (Lora(rank=4, use_rslora=True), 4.0),
    ],
    ids=str,
)
def test_the_scale_is_alpha_over_r_or_over_its_square_root(tmp_path: Path, method: Lora, scale: float) -> None:
    assert {t.scale for t in made(tmp_path, method).targets} == {scale}


def test_seeds_change_every_A(tmp_path: Path) -> None:
    for a, b in zip(made(tmp_path, Lora(seed=0)).targets, made(tmp_path, Lora(seed=1)).targets, strict=True):
        assert not torch.equal(a.init.A, b.init.A)


def test_no_two_targets_have_the_same_A(tmp_path: Path) -> None:
    starts = [t.init.A.flatten()[:8] for t in made(tmp_path, Lora()).targets]
    assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


def test_a_targets_A_does_not_depend_on_which_others_are_tuned(tmp_path: Path) -> None:
    every, some = made(tmp_path, Lora()), made(tmp_path, Lora(), ["v_proj", "down_proj"])
    assert len(some.targets) == 4
    for target_plan in some.targets:
        assert torch.equal(every[target_plan.target.name].init.A, target_plan.init.A)


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first = made(tmp_path, Lora())
    assert torch.equal(torch.rand(3), wanted)
    torch.manual_seed(6)
    assert made(tmp_path, Lora()).key == first.key


def test_dropout_is_handed_to_peft(tmp_path: Path) -> None:
    assert made(tmp_path, Lora(dropout=0.1)).peft == {"lora_dropout": 0.1}
    assert made(tmp_path, Lora()).peft == {}

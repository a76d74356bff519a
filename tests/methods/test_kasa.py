from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from tests.models import MODELS, Bench, copies, logits, off_by, relative, tokens, train_steps
from tests.reference import kasa_reference

from keeptune.adapter.install import install, lora_layer, trained_state
from keeptune.adapter.trained_change import change_of
from keeptune.core.errors import PlanError
from keeptune.core.plan import Plan
from keeptune.core.target import Target
from keeptune.core.weights import read_weight
from keeptune.methods.kasa import Kasa, dropped_part
from keeptune.penalties.kasa_regularizers import KasaRegularizers, Regularizer, orthogonality, regularizers
from keeptune.training.penalty_engine import Penalties

every_model = pytest.mark.parametrize("architecture", MODELS)
every_form = pytest.mark.parametrize("form", ["gram", "released"])


def planned(folder: Path, architecture: str = "llama", **options: Any) -> Plan:
    return Bench(MODELS[architecture](), folder).plan(Kasa(**{"rank": 4} | options))


def installed(plan: Plan, architecture: str = "llama", anchor: Any = "twin") -> Any:
    return install(MODELS[architecture](), plan, anchor=anchor)


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


# What is dropped


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
@pytest.mark.parametrize("r", [1, 3, 7])
def test_what_is_left_of_W_is_its_truncated_svd(shape: tuple[int, int], r: int) -> None:
    W = matrix(*shape)
    dropped, S = dropped_part(W, r, "up")
    assert relative(W - dropped.dense(), kasa_reference.truncated(W, r)) < 1e-6
    torch.testing.assert_close(S, torch.linalg.svdvals(W)[-r:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dropped.A @ dropped.A.T, torch.eye(r), rtol=0, atol=1e-6)
    torch.testing.assert_close(dropped.B.T @ dropped.B, torch.diag(S**2), rtol=0, atol=1e-5)


@every_model
def test_the_plan_takes_the_dropped_part_out_whatever_the_scale(tmp_path: Path, architecture: str) -> None:
    model = MODELS[architecture]()
    for alpha in (None, 6.0):
        for t in planned(tmp_path, architecture, alpha=alpha).targets:
            W = read_weight(model, t.target)
            assert t.removed is not None
            assert relative(W - t.scale * t.removed.dense(), kasa_reference.truncated(W, 4)) < 1e-6
            wanted = float((torch.linalg.svdvals(W)[-4:] ** 2).sum() / (W**2).sum())
            assert float(t.evidence["dropped_energy"]) == pytest.approx(wanted, rel=1e-4)


def test_a_rank_that_would_drop_all_of_W_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"k_proj: got rank 16, which drops all of W, wanted 1 to 15"):
        planned(tmp_path, rank=16)


def test_the_diagonal_is_drawn_for_each_target_and_seed(tmp_path: Path) -> None:
    first, other = planned(tmp_path, rank=8), planned(tmp_path, rank=8, seed=1)
    draws = [t.vectors["diag"] for plan in (first, other) for t in plan.targets]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert 0.8 < float(torch.cat(draws).std()) < 1.2
    assert torch.equal(planned(tmp_path, rank=8)[first.targets[2].target.name].vectors["diag"], draws[2])


# As in PEFT


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("anchor", ["twin", "residual"])
def test_it_trains_as_pefts_kasa_does(tmp_path: Path, architecture: str, anchor: str) -> None:
    """PEFT decomposes and overwrites the base weights itself; GPT-2's layers it refuses."""
    plan = planned(tmp_path, architecture, alpha=6.0, beta=0.3, gamma=0.2)
    names = [t.target.name for t in plan.targets]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=names, kasa_config=KasaConfig(beta=0.3, gamma=0.2))
    theirs: Any = get_peft_model(MODELS[architecture](), config)
    with torch.no_grad():
        for t in plan.targets:
            layer = lora_layer(theirs, t.target.name)
            layer.lora_A["default"].weight.copy_(t.init.A)
            layer.lora_diag["default"].copy_(t.vectors["diag"])
    ours = installed(plan, architecture, anchor)
    for model in (theirs, ours):
        train_steps(model, steps=4, rate=3e-3)
    a, b = trained_state(ours, plan), trained_state(theirs, plan)
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=2e-4)
    assert off_by(logits(ours, tokens(9)), logits(theirs, tokens(9))) < 1e-4
    mean = theirs.base_model._get_kasa_loss() / len(names)
    torch.testing.assert_close(Penalties(theirs, plan).step(), mean.detach())
    torch.testing.assert_close(ours.base_model._get_kasa_loss(), mean * len(names), rtol=1e-3, atol=0)


@every_model
def test_a_twin_leaves_the_base_weights_as_they_were(tmp_path: Path, architecture: str) -> None:
    before = copies(MODELS[architecture]())
    plan = planned(tmp_path, architecture)
    model = installed(plan, architecture)
    train_steps(model)
    for t in plan.targets:
        found = lora_layer(model, t.target.name).get_base_layer().weight
        assert torch.equal(found, before[f"{t.target.name}.weight"])


@every_model
def test_the_change_is_that_of_dense_algebra(tmp_path: Path, architecture: str) -> None:
    """Rank 2 r on the untouched base: [A; V_rᵀ], [s B diag(d), -U_r S_r]."""
    plan = planned(tmp_path, architecture, alpha=6.0)
    model = installed(plan, architecture)
    train_steps(model, steps=3)
    state, fresh = trained_state(model, plan), MODELS[architecture]()
    for name, change in change_of(model, plan).weights.items():
        W = read_weight(fresh, plan[name].target).double()
        B, d, A = (state[f"{name}.{part}"].double() for part in ("B", "diag", "A"))
        wanted = kasa_reference.truncated(W, 4) + 1.5 * B @ torch.diag(d) @ A - W
        assert relative(change.dense(), wanted) < 1e-5
        assert change.rank == 8


def test_the_diagonal_is_trained_and_kept_by_peft(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    model = installed(plan)
    train_steps(model)
    model.save_pretrained(tmp_path / "out")
    fresh = installed(plan)
    fresh.load_adapter(str(tmp_path / "out"), "default", is_trainable=True)
    for name, value in trained_state(model, plan).items():
        assert torch.equal(trained_state(fresh, plan)[name], value)
        if name.endswith("diag"):
            assert not torch.equal(value, plan[name.removesuffix(".diag")].vectors["diag"])


def test_the_diagonal_is_frozen_and_unfrozen_with_the_factors(tmp_path: Path) -> None:
    model = installed(planned(tmp_path))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_diag" in name for name in trained)
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


# Regularisers


@every_form
def test_at_the_start_and_at_orthonormal_factors_gradients_are_finite(form: Regularizer) -> None:
    """B = 0 at the first step; the norm of zero has no derivative."""
    eye = torch.eye(9)
    for B, A in ((torch.zeros(9, 3), matrix(3, 7)), (eye[:, :3].clone(), eye[:3, :7].clone())):
        _, found = regularizers(1.0, 1.0, form)({"A": A, "B": B, "diag": torch.ones(3)})
        assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())


def test_of_orthonormal_factors_the_gram_form_is_zero_and_the_released_one_is_not() -> None:
    Q = torch.linalg.qr(matrix(9, 3))[0]
    assert float(orthogonality(Q, "gram")[0]) < 1e-5
    assert float(orthogonality(Q, "released")[0]) == pytest.approx(6**0.5)


@every_form
def test_the_penalty_is_the_mean_over_targets_of_both_terms(tmp_path: Path, form: Regularizer) -> None:
    plan = planned(tmp_path, beta=0.3, gamma=0.2, regularizer=form)
    model = installed(plan)
    train_steps(model, steps=2)
    assert isinstance(model, PeftModel)
    state, total = trained_state(model, plan), 0.0
    for t in plan.targets:
        B, d, A = (state[f"{t.target.name}.{part}"].double() for part in ("B", "diag", "A"))
        total += 0.3 * float((d * d).sum()) + 0.2 * float(kasa_reference.orthogonality(B, A, form))
    model.zero_grad()
    found = Penalties(model, plan).step()
    assert float(found) == pytest.approx(total / len(plan.targets), rel=1e-5)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@every_form
def test_value_and_gradient_of_both_terms_are_those_of_the_definition(form: Regularizer) -> None:
    B, A = matrix(11, 3).double().requires_grad_(), matrix(3, 7, 1).double().requires_grad_()
    d = matrix(1, 3, 2)[0].double().requires_grad_()
    wanted = 0.3 * d.square().sum() + 0.2 * kasa_reference.orthogonality(B, A, form)
    wanted.backward()
    with torch.no_grad():
        value, found = regularizers(0.3, 0.2, form)({"A": A, "B": B, "diag": d})
    torch.testing.assert_close(value, wanted.detach())
    for factor, wanted_grad in (("A", A.grad), ("B", B.grad), ("diag", d.grad)):
        torch.testing.assert_close(found[factor], wanted_grad)  # type: ignore[index]


@pytest.mark.parametrize("option", ["beta", "gamma"])
@pytest.mark.parametrize("value", [-1e-4, float("nan"), float("inf")])
def test_weights_that_make_no_sense_are_refused(option: str, value: float) -> None:
    with pytest.raises(PlanError, match=f"method.{option}"):
        Kasa(**{option: value})  # type: ignore[arg-type]


def test_the_plan_asks_for_the_penalty_and_the_key_depends_on_it(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert Kasa().penalties() == (KasaRegularizers(1e-4, 1e-3, "gram"),)
    (penalty,) = plan.penalties
    assert (penalty.name, penalty.options["gamma"]) == ("kasa", 1e-3)
    keys = {planned(tmp_path, **options).key for options in ({}, {"beta": 0.1}, {"gamma": 0.1})}
    assert len(keys) == 3
    assert Kasa().requests(Target("up", 0, "up", 8, 8, input_group="up")) == frozenset()

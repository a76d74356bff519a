from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest

import keeptune.core.registry as registry
from keeptune.core.errors import PlanError, RecipeError
from keeptune.core.plan import Plan
from keeptune.core.target import Target
from keeptune.methods.base import allot_rank, make_plan, method_named, methods
from keeptune.methods.full import Full
from keeptune.methods.lora import Lora
from keeptune.methods.lora_null import LoraNull

TARGET = Target("model.layers.0.self_attn.k_proj", 0, "k_proj", 16, 32, input_group="q")


@dataclass(frozen=True)
class Foreign(Lora):
    """A method of another package."""

    name: ClassVar[str] = "foreign"


@dataclass(frozen=True)
class Impostor(Lora):
    """A method of another package that takes a name that is taken."""

    name: ClassVar[str] = "lora-null"


def points(*classes: type) -> object:
    return lambda group: [SimpleNamespace(load=lambda cls=cls: cls) for cls in classes if group == "keeptune.methods"]


def test_every_file_of_the_package_is_found_sorted_by_name() -> None:
    found = methods()
    assert {"full": Full, "lora": Lora, "lora-null": LoraNull}.items() <= found.items()
    assert list(found) == sorted(found)


def test_a_method_is_looked_up_by_its_name() -> None:
    assert method_named("lora-null") is LoraNull


@pytest.mark.parametrize(("name", "meant"), [("lora_null", "lora-null"), ("LORA", "lora"), ("lora-nul", "lora-null")])
def test_an_unknown_name_is_refused_with_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f'method.name: got "{name}".*Known: .*full, .*lora, .*lora-null') as caught:
        method_named(name)
    assert f'Did you mean "{meant}"' in caught.value.next_step


def test_an_installed_package_adds_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", points(Foreign))
    assert method_named("foreign") is Foreign
    assert list(methods()) == sorted({*methods(), "foreign"})


def test_two_methods_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", points(Impostor))
    with pytest.raises(RecipeError, match="method lora-null: got two of that name"):
        methods()


def test_the_same_method_registered_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", points(LoraNull, Foreign, Foreign))
    assert methods()["lora-null"] is LoraNull


@pytest.mark.parametrize("rank", [1, 16])
def test_a_rank_that_fits_is_allotted(rank: int) -> None:
    assert allot_rank(TARGET, rank, "lora").rank == rank


@pytest.mark.parametrize("rank", [-1, 0, 17])
def test_a_rank_that_does_not_fit_is_refused_with_target_and_role(rank: int) -> None:
    with pytest.raises(PlanError) as caught:
        allot_rank(TARGET, rank, "lora")
    error = caught.value
    assert error.where == "method lora, target model.layers.0.self_attn.k_proj"
    assert (error.got, error.wanted) == (f"rank {rank}", "1 to 16 for a 16 x 32 map")
    assert "k_proj" in error.next_step


def test_full_tuning_plans_every_weight_and_no_adapter() -> None:
    plan = make_plan(Full(), [TARGET], lambda _: None, lambda _: None)  # type: ignore[arg-type, return-value]
    assert isinstance(plan, Plan)
    assert (plan.scope, plan.targets, plan.options) == ("all", (), {})
    with pytest.raises(NotImplementedError):
        Full().build(TARGET, None, None, None)  # type: ignore[arg-type]

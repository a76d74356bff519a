"""The methods and models that every law is checked on, and one saved base and one plan of each."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.models import MODELS, Bench, Saved, calibration, save
from transformers import PreTrainedModel

from keeptune.core.plan import Plan
from keeptune.methods.base import methods

# The options a method is checked with; one that is not listed is checked with its defaults at rank 4.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "corda": [{"rank": 4, "mode": "kpm"}, {"rank": 4, "mode": "ipm", "alpha": 6.0}, {"rank": 4, "damping": 0.0}],
    "dora": [{"rank": 4, "use_rslora": True, "alpha": 6.0}],
    "farss": [
        {"rank": 4, "boundary": 1, "r_max": 4, "r_avg": 3},
        {"rank": 4, "boundary": 1, "r_max": 4, "r_avg": 3, "scores": "streaming", "alpha": 6.0},
        {"rank": 4, "variant": "farss-init", "labels": "sampled"},
    ],
    "keep": [{"rank": 4}],
    # A classifier has no labels for knowledge, so no Fisher: the other forms are checked in test_penalties.py.
    "lalora": [{"rank": 4, "curvature": "delta-act", "batches": 1}],
    "loki": [{"q": 10.0}, {"q": 30.0, "rank": 4}, {"q": 20.0, "rank": 2, "selection": "global-high"}],
    "lora": [{"rank": 4}, {"rank": 4, "use_rslora": True, "alpha": 6.0}],
    "lora-fa": [{"rank": 4, "alpha": 6.0}],
    "lora-null": [
        {"rank": 4, "variant": "v1"},
        {"rank": 4, "variant": "v2"},
        {"rank": 4, "covariance": "released"},
    ],
    "milora": [{"rank": 4, "alpha": 6.0}],
    "oplora": [{"rank": 4, "k": 3, "alpha": 6.0}],
    "pissa": [{"rank": 4, "alpha": 6.0}],
}


def options_of(cls: type[Any]) -> list[dict[str, Any]]:
    """The options to check a method with."""
    has_rank = any(field.name == "rank" for field in dataclasses.fields(cls))
    return OPTIONS.get(cls.name, [{"rank": 4} if has_rank else {}])


CASES = {
    " ".join([name, *(f"{k}={v}" for k, v in options.items())]): cls(**options)
    for name, cls in methods().items()
    for options in options_of(cls)
}
# Methods whose ranks at one target depend on the others.
COUPLED = {case for case, method in CASES.items() if method.name == "farss"}
ADAPTERS = {name: method for name, method in CASES.items() if method.scope == "adapter"}
# A declared exemption with a law of its own in test_adapters.py: what is no low-rank change, so has no portable form.
RESCALING = {name: method for name, method in ADAPTERS.items() if method.name == "dora"}
LOW_RANK = {name: method for name, method in ADAPTERS.items() if name not in RESCALING}
# What is measured on the next token, which a classifier has none of.
CAUSAL = {name for name in CASES if name.startswith(("loki", "keep"))}
WHOLE = {name: method for name, method in CASES.items() if method.scope == "all"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a classifier cannot be planned with; tests/methods has the refusal."""
    given = [getattr(item, "callspec", None) for item in items]
    parameters = [{} if spec is None else spec.params for spec in given]
    out = [p.get("world") == "roberta" and p.get("case") in CAUSAL for p in parameters]
    config.hook.pytest_deselected(items=[item for item, skipped in zip(items, out, strict=True) if skipped])
    items[:] = [item for item, skipped in zip(items, out, strict=True) if not skipped]


@dataclass(frozen=True)
class World:
    """A tiny architecture on disk, the same loaded once, and the store that all its plans share."""

    saved: Saved
    store: Path
    loaded: PreTrainedModel

    def bench(self, store: Path | None = None) -> Bench:
        return Bench(self.base(), store or self.store, calibration())

    def base(self) -> PreTrainedModel:
        """A fresh base; copying the loaded one is faster than loading it again."""
        return copy.deepcopy(self.loaded)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    @cache
    def make(architecture: str) -> World:
        folder = tmp_path_factory.mktemp(architecture)
        saved = save(MODELS[architecture](), folder / "base")
        return World(saved, folder / "store", saved.load())

    return make


@pytest.fixture(scope="session")
def plans(worlds: Callable[[str], World]) -> Callable[[str, str], Plan]:
    """The plan of a case on an architecture, made once."""

    @cache
    def make(case: str, architecture: str) -> Plan:
        return worlds(architecture).bench().plan(CASES[case])

    return make


# Qwen2 is Llama with biases and a tied head.
@pytest.fixture(params=[name for name in MODELS if name != "llama"])
def world(request: pytest.FixtureRequest, worlds: Callable[[str], World]) -> Iterator[World]:
    """One architecture; the bytes of its base on disk must be the same afterwards."""
    made = worlds(request.param)
    before = {path.name: path.read_bytes() for path in made.saved.folder.iterdir()}
    yield made
    assert {path.name: path.read_bytes() for path in made.saved.folder.iterdir()} == before


@pytest.fixture
def plan_of(request: pytest.FixtureRequest, world: World, plans: Callable[[str, str], Plan]) -> Callable[[str], Plan]:
    return lambda case: plans(case, request.node.callspec.params["world"])

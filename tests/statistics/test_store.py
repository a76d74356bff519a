from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.models import MODELS, Bench, asking, calibration, counted_passes, relative
from transformers import PreTrainedModel

import keeptune.statistics.collect as collecting
from keeptune.core.artefact import content_key
from keeptune.core.errors import StatisticsError
from keeptune.core.target import Target
from keeptune.data.completions import joined_knowledge
from keeptune.methods.lora import Lora
from keeptune.methods.lora_null import LoraNull
from keeptune.model.runner import Runner
from keeptune.statistics.collect import collect
from keeptune.statistics.covariance import GradientCovariance, InputCovariance, ReleasedCovariance
from keeptune.statistics.store import Source, StatStore

TARGET = Target("h.1.k", 1, "k", 4, 6, input_group="h.1.q")
SOURCE = Source(model="m", data="d", dtype="torch.float32")
KNOWLEDGE = InputCovariance("knowledge")
(NULL,) = LoraNull(rank=1).statistics  # what LoRA-Null asks for


@dataclasses.dataclass(frozen=True, slots=True)
class Later(InputCovariance):
    """The same statistic after its mathematics changed."""

    version: ClassVar[int] = 2


Later.__name__ = "InputCovariance"


def recipe(request: Any = KNOWLEDGE, target: Target = TARGET, **source: str) -> dict[str, Any]:
    return request.entry(target, dataclasses.replace(SOURCE, **source))


def entries(store: StatStore) -> list[Path]:
    return sorted(path.parent for path in store.folder.glob("*/*/recipe.json"))


# The store


def test_what_was_put_is_got_bit_for_bit(tmp_path: Path) -> None:
    store, value = StatStore(tmp_path / "s"), torch.randn(4, 4)
    assert store.get(recipe()) is None
    store.put(recipe(), value)
    found = store.get(recipe())
    assert found is not None
    assert torch.equal(found, value)
    assert store.get(recipe(data="other")) is None


def test_an_entry_can_be_put_again(tmp_path: Path) -> None:
    store = StatStore(tmp_path / "s")
    for value in (torch.zeros(2), torch.ones(2)):
        store.put(recipe(), value)
    found = store.get(recipe())
    assert found is not None
    assert torch.equal(found, torch.ones(2))
    assert len(entries(store)) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: recipe(model="m2"),
        lambda: recipe(data="d2"),
        lambda: recipe(dtype="torch.bfloat16"),
        lambda: recipe(Later("knowledge")),
        lambda: recipe(InputCovariance("task")),
        lambda: recipe(ReleasedCovariance("knowledge")),
        lambda: recipe(target=dataclasses.replace(TARGET, input_group="h.2.q")),
    ],
    ids=["weights", "data", "dtype", "version", "role", "statistic", "place"],
)
def test_the_key_changes_with_all_that_determines_the_value(other: Callable[[], dict[str, Any]]) -> None:
    assert content_key(other()) != content_key(recipe())


@pytest.mark.parametrize(
    ("request_", "key"),
    [
        (InputCovariance("knowledge"), "9e907d8cd3b2023bda736a24e37695a790fe8a69b2dcd56486216af91d0478d0"),
        (GradientCovariance("task", "sampled"), "68b4855781348b487ed751dc327508bf769c0cde835e905c7f0700d0b284e6db"),
    ],
    ids=str,
)
def test_the_keys_are_those_of_earlier_versions(request_: Any, key: str) -> None:
    """Stores that users have filled stay warm."""
    assert content_key(recipe(request_)) == key


def test_some_examples_of_each_set(tmp_path: Path) -> None:
    """The key is that of the examples, so that the same ones alone are found again."""
    parts = [calibration(1, (6, 9, 4)), calibration(2, (12, 5))]
    few = joined_knowledge([part.first(2) for part in parts])
    some, every = InputCovariance("knowledge", examples=2), InputCovariance("knowledge")
    made = Bench(MODELS["llama"](), tmp_path / "store", data=joined_knowledge(parts))
    both = made.collect(asking(some, every))
    alone = Bench(made.model, tmp_path / "alone", data=few).collect(asking(every))
    again = Bench(made.model, tmp_path / "store", data=few)
    for target in made.targets():
        wanted = alone.view(target)[every]
        assert torch.equal(both.view(target)[some], wanted)
        assert relative(both.view(target)[every], wanted) > 1e-2
    stored = len(entries(StatStore(tmp_path / "store")))
    again.collect(asking(every))
    assert len(entries(StatStore(tmp_path / "store"))) == stored


def test_the_key_does_not_change_with_what_does_not() -> None:
    """k_proj asks for the covariance that q_proj, fed by the same tensor, has already got."""
    twin = dataclasses.replace(TARGET, name="h.1.q", role="q", out_features=9)
    assert content_key(recipe(target=twin)) == content_key(recipe())


# Damage


def cut(entry: Path) -> None:
    path = entry / "value.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def flip(entry: Path) -> None:
    path = entry / "value.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "flipped": flip,
    "no value": lambda entry: (entry / "value.safetensors").unlink(),
    "no recipe": lambda entry: (entry / "recipe.json").unlink(),
    "garbage": lambda entry: (entry / "recipe.json").write_bytes(b"\x00\xffgarbage"),
    "list": lambda entry: (entry / "recipe.json").write_text("[]"),
    "no checksum": lambda entry: (entry / "recipe.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_computed_again_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store")
    first = made.plan(LoraNull(rank=2))
    damaged = entries(StatStore(made.folder))[0]
    DAMAGES[damage](damaged)
    with caplog.at_level(logging.WARNING), counted_passes(made.model) as passes:
        again = made.plan(LoraNull(rank=2))
    assert again.key == first.key
    assert passes[0] >= 1
    (told,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert str(damaged) in told
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        made.collect(LoraNull(rank=2))
    assert caplog.records == []


# collect


def test_a_second_collection_computes_nothing(tmp_path: Path) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store")
    for wanted in (True, False):
        targets = made.targets()  # finding input groups is a pass of its own
        with counted_passes(made.model) as passes:
            collect_for(made, targets)
        assert bool(passes[0]) is wanted


def collect_for(made: Any, targets: list[Target], **options: Any) -> Any:
    return collect(
        Runner(made.model),
        {target: frozenset({KNOWLEDGE}) for target in targets},
        {"knowledge": made.data},
        StatStore(made.folder),
        model_fingerprint="m",
        **options,
    )


def test_a_method_that_asks_for_nothing_costs_no_pass(tmp_path: Path) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store")
    targets = made.targets()
    with counted_passes(made.model) as passes:
        collect(
            Runner(made.model),
            {target: Lora().requests(target) for target in targets},
            {},
            StatStore(made.folder),
            model_fingerprint="m",
        )
    assert passes[0] == 0


def test_targets_fed_by_one_tensor_share_one_entry(tmp_path: Path) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store")
    made.collect(LoraNull(rank=1))
    assert len(made.targets()) == 14
    assert len(entries(StatStore(made.folder))) == 8


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store", roles=["down_proj"])
    made.collect(LoraNull(rank=1))
    kept = {entry: (entry / "value.safetensors").stat().st_ino for entry in entries(StatStore(made.folder))}
    made.roles = None
    made.collect(LoraNull(rank=1))
    assert len(entries(StatStore(made.folder))) == 8
    assert all((entry / "value.safetensors").stat().st_ino == inode for entry, inode in kept.items())


@pytest.mark.parametrize("change", ["weights", "data", "dtype"])
def test_another_source_is_collected_anew(change: str, tmp_path: Path) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store")
    first = made.collect(LoraNull(rank=1)).view(made.targets()[-1])[NULL]
    if change == "weights":
        made.model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] += 1.0
    elif change == "data":
        made.data = calibration(seed=1)
    else:
        made.model.to(torch.bfloat16)
    second = made.collect(LoraNull(rank=1)).view(made.targets()[-1])[NULL]
    assert len(entries(StatStore(made.folder))) == 16
    assert relative(second, first) > 0


def test_one_sum_at_a_time_gives_the_same_bits(tmp_path: Path) -> None:
    """Six sums of 32 x 32 go two and two into the memory of one of 48 x 48, of which there are two."""
    made = Bench(MODELS["llama"](), tmp_path / "store")
    targets = made.targets()
    wanted = collect_for(made, targets)
    made.folder = tmp_path / "low"
    with counted_passes(made.model) as passes:
        found = collect_for(made, targets, sum_bytes=0)
    assert passes[0] == 3 + 2
    for target in targets:
        assert torch.equal(found.view(target)[KNOWLEDGE], wanted.view(target)[KNOWLEDGE])


# StatsView


def test_reading_what_was_not_requested_is_refused(tmp_path: Path) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store")
    target = made.targets()[0]
    view = made.collect(LoraNull(rank=1)).view(target)
    assert view[NULL].shape == (32, 32)
    for other in (ReleasedCovariance("knowledge"), InputCovariance("task")):
        with pytest.raises(StatisticsError, match=r"q_proj: got a read of"):
            view[other]


def test_a_store_emptied_meanwhile_is_told(tmp_path: Path) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store")
    view = made.collect(LoraNull(rank=1)).view(made.targets()[0])
    for entry in entries(StatStore(made.folder)):
        (entry / "recipe.json").unlink()
    with pytest.raises(StatisticsError, match="Run the stats stage again"):
        view[NULL]


def test_data_that_are_requested_and_not_given_are_named(tmp_path: Path) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store")
    targets = made.targets()
    with pytest.raises(StatisticsError, match=r"Add a `task` section"):
        collect(
            Runner(made.model),
            {target: frozenset({InputCovariance("task")}) for target in targets},
            {"knowledge": made.data},
            StatStore(made.folder),
            model_fingerprint="m",
        )


@pytest.mark.parametrize("architecture", MODELS)
def test_weights_that_are_no_numbers_are_told_with_the_first_module_after_them(
    architecture: str, tmp_path: Path
) -> None:
    model = MODELS[architecture]()
    made = Bench(model, tmp_path / "store")
    targets = [target for target in made.targets() if target.layer == 0]
    model.get_parameter(f"{targets[-1].name}.weight").data[0, 0] = float("nan")
    with pytest.raises(StatisticsError, match=r"got NaN or infinite inputs in batch 1 of 1, ") as caught:
        made.collect(LoraNull(rank=1))
    assert ".1." in caught.value.where


def test_what_two_collect_at_the_same_time_is_collected_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that it is not there; the second waits, and takes what the first has stored."""
    both = threading.Barrier(2)
    seen = collecting._Collection._missing

    def together(*arguments: Any) -> Any:
        found = seen(*arguments)
        both.wait(timeout=60)
        return found

    monkeypatch.setattr(collecting._Collection, "_missing", together)
    models = [MODELS["llama"]() for _ in range(2)]

    def passes(model: PreTrainedModel) -> int:
        with counted_passes(model) as count:
            Bench(model, tmp_path / "store").collect(LoraNull(rank=2))
        return count[0]

    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(passes, models))
    monkeypatch.setattr(collecting._Collection, "_missing", seen)
    assert min(counts) == passes(models[0]) < max(counts)

"""The stored effect of layers: resumable, independent of order, and asked for like any statistic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import counted_passes, llama, shard, task
from torch import Tensor

from keeptune.core.errors import StatisticsError
from keeptune.data.calibration import Calibration
from keeptune.model.blocks import find_targets
from keeptune.model.head import body_fingerprint
from keeptune.model.runner import Runner
from keeptune.statistics.collect import Statistics, collect, source_of
from keeptune.statistics.covariance import GradientCovariance, InputCovariance
from keeptune.statistics.layer_effect import (
    LayerEffect,
    average_effect,
    is_distinct,
    layer_weights,
    normalised_effect,
    normalised_error,
    trace_texts,
)
from keeptune.statistics.request import Request
from keeptune.statistics.store import Source, StatStore

REQUEST = LayerEffect("knowledge", fraction=0.4)


def traced_effects(model: Any, data: Calibration, request: LayerEffect, store: StatStore, source: Source) -> Tensor:
    return request.measure(model, data, store, source)[""]


def gathered(model: Any, data: Calibration, folder: Path, *requests: Request, **options: Any) -> Statistics:
    targets = find_targets(model)
    wanted = {target: frozenset(requests) for target in targets}
    store, key = StatStore(folder), body_fingerprint(model)
    sources = {"knowledge": data, "task": data}
    return collect(Runner(model), wanted, sources, store, model_fingerprint=key, **options)  # type: ignore[arg-type]


def test_every_target_reads_the_one_entry(tmp_path: Path) -> None:
    model, data = llama(), task()
    statistics = gathered(model, data, tmp_path, REQUEST)
    values = [statistics.view(target)[REQUEST] for target in find_targets(model)]
    assert values[0].shape == (len(data.sequences), 2)
    assert all(torch.equal(values[0], value) for value in values[1:])
    found = {(one.tokens, one.prompt): one.effect for one in trace_texts(model, data, REQUEST)}
    wanted = torch.stack([found[text] for text in sorted(found)]).float()
    torch.testing.assert_close(values[0], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sum_bytes", [None, 0])
def test_it_is_collected_beside_other_statistics(sum_bytes: int | None, tmp_path: Path) -> None:
    model, data = llama(), task()
    others = (InputCovariance("knowledge"), GradientCovariance("knowledge", "true"))
    both = gathered(model, data, tmp_path / "both", REQUEST, *others, sum_bytes=sum_bytes)
    alone = gathered(model, data, tmp_path / "alone", *others)
    target = find_targets(model)[3]
    for request in others:
        assert torch.equal(both.view(target)[request], alone.view(target)[request])
    assert torch.equal(
        both.view(target)[REQUEST], gathered(model, data, tmp_path / "one", REQUEST).view(target)[REQUEST]
    )


def test_what_is_stored_is_not_traced_again(tmp_path: Path) -> None:
    model, data = llama(), task()
    gathered(model, data, tmp_path, REQUEST)
    with counted_passes(model) as count:
        gathered(model, data, tmp_path, REQUEST)
    assert count[0] == 1  # finding targets looks at the model once


def test_an_interrupted_trace_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, store = llama(), task(), StatStore(tmp_path)
    source = source_of(model, "model", data)
    whole = traced_effects(model, data, REQUEST, StatStore(tmp_path / "other"), source)
    trace_texts(model, shard(data, slice(0, 6)), REQUEST, store=store, source=source)
    with counted_passes(model) as few:
        again = traced_effects(model, data, REQUEST, store, source)
    with counted_passes(model) as all_of_them:
        traced_effects(model, data, REQUEST, StatStore(tmp_path / "new"), source)
    assert 0 < few[0] < all_of_them[0]
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-6)
    with counted_passes(model) as none:
        traced_effects(model, data, REQUEST, store, source)
    assert none[0] == 0


def test_the_order_of_texts_does_not_matter(tmp_path: Path) -> None:
    model, data = llama(), task()
    source = source_of(model, "model", data)
    back = shard(data, slice(None, None, -1))
    found = [
        traced_effects(model, d, REQUEST, StatStore(tmp_path / str(i)), source) for i, d in enumerate((data, back))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("change", [{"fraction": 0.8}, {"scale": 1.0}, {"seed": 1}, {"reading": "diagonal"}])
def test_every_option_is_a_part_of_the_key(change: dict[str, Any], tmp_path: Path) -> None:
    model, data, store = llama(), task(), StatStore(tmp_path)
    source = source_of(model, "model", data)
    other = dataclasses.replace(REQUEST, **change)
    first, second = (traced_effects(model, data, request, store, source) for request in (REQUEST, other))
    assert not torch.allclose(first, second)
    assert torch.equal(second, traced_effects(model, data, other, StatStore(tmp_path / "new"), source))


def test_another_model_is_another_entry(tmp_path: Path) -> None:
    data, store = task(), StatStore(tmp_path)
    first, second = (
        traced_effects(llama(seed), data, REQUEST, store, source_of(llama(seed), str(seed), data)) for seed in (0, 1)
    )
    assert not torch.allclose(first, second)


def test_texts_without_answers_are_refused(tmp_path: Path) -> None:
    model, data = llama(), task()
    with pytest.raises(StatisticsError, match="templates"):
        gathered(model, Calibration(data.sequences, 0), tmp_path, REQUEST)
    with pytest.raises(StatisticsError, match="no text with a prompt"):
        trace_texts(model, Calibration.of_answers(data.sequences[:2], 0, (0, len(data.sequences[1]))), REQUEST)


def test_plain_texts_among_answers_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model, data = llama(), shard(task(), slice(0, 3))
    assert data.prompts is not None
    mixed = Calibration.of_answers(data.sequences, data.pad_id, (data.prompts[0], 0, data.prompts[2]))
    found = trace_texts(model, mixed, REQUEST)
    assert [one.tokens for one in found] == [data.sequences[0], data.sequences[2]]
    assert "1 texts have no prompt" in caplog.text


def test_some_examples_of_each_set(tmp_path: Path) -> None:
    model, data = llama(), dataclasses.replace(task(), sets=(4, 6))
    few = dataclasses.replace(REQUEST, examples=2)
    found = gathered(model, data, tmp_path, few).view(find_targets(model)[0])[few]
    kept = dataclasses.replace(shard(data, slice(None)), sets=())
    rows = [kept.sequences[i] for i in (0, 1, 4, 5)]
    wanted = {one.tokens: one.effect for one in trace_texts(model, data, REQUEST)}
    torch.testing.assert_close(found, torch.stack([wanted[ids] for ids in sorted(rows)]), rtol=0, atol=1e-6)


def test_the_average_and_its_error() -> None:
    effects = torch.tensor([[1.0, 4.0], [3.0, 4.0], [5.0, 7.0]])
    average, error = average_effect(effects)
    assert average.tolist() == [3.0, 5.0]
    assert error.tolist() == pytest.approx([2 / 3**0.5, 1.0])
    assert average_effect(effects[:1])[1].isnan().all()


def test_normalised_effects() -> None:
    average = torch.tensor([2.0, -1.0, 6.0])
    assert normalised_effect(average).tolist() == pytest.approx([1 / 3, 0.0, 1.0])
    assert normalised_effect(average, "sum").tolist() == pytest.approx([0.25, 0.0, 0.75])
    torch.testing.assert_close(normalised_effect(7 * average), normalised_effect(average))
    with pytest.raises(StatisticsError, match="no layer with a positive effect"):
        normalised_effect(torch.tensor([-1.0, 0.0]))


def test_the_error_of_normalised_effects_is_that_of_many_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    true, count = torch.tensor([2.0, 1.0, -0.5]), 50

    def drawn() -> torch.Tensor:
        shared = torch.randn(count, 1, generator=generator)  # texts differ in all layers at once
        return true * (1 + 0.5 * shared) + 0.3 * torch.randn(count, 3, generator=generator)

    for norm in ("max", "sum"):
        found = [drawn() for _ in range(400)]
        wanted = torch.stack([normalised_effect(average_effect(e)[0], norm) for e in found]).std(dim=0)
        told = torch.stack([normalised_error(e, norm) for e in found]).mean(dim=0)
        torch.testing.assert_close(told, wanted, rtol=0.15, atol=2e-3)
    assert normalised_error(drawn()[:1]).isnan().all()


def test_an_effect_that_is_noise_is_told(caplog: pytest.LogCaptureFixture) -> None:
    noise = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    noise -= noise.mean(dim=0) - 0.01
    assert not is_distinct(noise)
    layer_weights(noise)
    assert "NAIE is noise" in caplog.text
    caplog.clear()
    clear = noise + torch.tensor([0.0, 2.0, 0.0, 1.0])
    assert is_distinct(clear)
    assert layer_weights(clear, "sum").sum() == pytest.approx(1)
    assert not caplog.text

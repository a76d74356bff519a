"""The stored attributions: text by text, resumable, independent of order and shards, read a few at a time."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.forks import Forks
from tests.models import calibration, in_memory, llama, shard, task
from tests.reference.attribution_reference import attribution
from torch import Tensor

from keeptune.core.artefact import read_json
from keeptune.core.errors import StatisticsError
from keeptune.data.calibration import Batch, Calibration
from keeptune.model.blocks import find_targets
from keeptune.model.head import body_fingerprint
from keeptune.model.probes.attribution import Attributor
from keeptune.model.runner import Runner
from keeptune.statistics.collect import StatsView, collect, source_of
from keeptune.statistics.neuron_attribution import (
    Attributions,
    NeuronAttribution,
    layer_profile,
)
from keeptune.statistics.store import StatStore

REQUEST = NeuronAttribution()


def gathered(model: Any, data: Calibration, folder: Path, request: NeuronAttribution = REQUEST) -> StatsView:
    targets = find_targets(model, ["down_proj"])
    wanted = {target: frozenset([request]) for target in targets}
    key = body_fingerprint(model)
    found = collect(Runner(model), wanted, {"knowledge": data}, StatStore(folder), model_fingerprint=key)
    return found.view(targets[0])


def values(view: StatsView, request: NeuronAttribution = REQUEST, size: int = 3) -> Tensor:
    return torch.cat(list(view.attributions(request).chunks(size)))


def test_functions_of_a_statistic_get_attributions(tmp_path: Path) -> None:
    model, data = llama(), calibration()
    view = gathered(model, data, tmp_path)
    found = view.derive(REQUEST, lambda given: given)
    assert isinstance(found, Attributions)
    assert (found.layers, found.nodes, found.samples) == ((0, 1), 32, len(data.sequences))
    assert [tuple(chunk.shape) for chunk in view.attributions(REQUEST).chunks(4)] == [
        (4, 2, 32),
        (4, 2, 32),
        (2, 2, 32),
    ]
    wanted = torch.stack([attribution(model, ids) for ids in sorted(data.sequences)])
    torch.testing.assert_close(values(view), wanted, rtol=0, atol=1e-6)
    assert values(view).dtype == torch.float32


def test_the_profile_is_the_mean_size_of_each_layer_relative_to_the_largest() -> None:
    values = torch.tensor([[[1.0, -2.0], [3.0, 3.0]], [[1.0, 0.0], [-6.0, 0.0]]])  # two texts, two layers, two nodes
    assert layer_profile(in_memory(values)).tolist() == pytest.approx([4 / 12, 1.0])
    with pytest.raises(StatisticsError, match="no attribution above zero"):
        layer_profile(in_memory(torch.zeros(1, 2, 2)))


def folders(store: Path) -> list[Path]:
    return sorted(path.parent for path in store.rglob("value.safetensors"))


def texts_of(store: Path) -> list[Path]:
    """Entries of single texts, not what lists them."""
    return [path for path in folders(store) if read_json(path / "recipe.json")["recipe"]["class"] == "Attribution"]


@pytest.fixture
def attributed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each pass attributes."""
    sizes: list[int] = []
    real = Attributor.attribute

    def attribute(self: Attributor, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        sizes.append(len(batch.input_ids))
        return real(self, batch, wanted)

    monkeypatch.setattr(Attributor, "attribute", attribute)
    return sizes


def test_neither_order_nor_shards_nor_passes_matter(tmp_path: Path, attributed: list[int]) -> None:
    model, data = llama(), calibration()
    wanted = values(gathered(model, data, tmp_path / "one"))
    back = values(gathered(model, shard(data, slice(None, None, -1)), tmp_path / "back"))
    assert torch.equal(back, wanted)
    for some in (slice(0, 4), slice(4, 7), slice(7, 10)):
        gathered(model, shard(data, some), tmp_path / "shards")
    attributed.clear()
    torch.testing.assert_close(values(gathered(model, data, tmp_path / "shards")), wanted, rtol=0, atol=1e-6)
    assert attributed == []
    source = source_of(model, "model", data)
    for chunk in (1, 50):
        store = StatStore(tmp_path / str(chunk))
        parts = REQUEST.measure(model, data, store, source, chunk=chunk)
        found = torch.cat(list(REQUEST.open(store, parts).chunks(2)))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def killed(folder: str) -> None:
    """Attributes, and is killed at the fifth text that it puts."""
    real, count = StatStore.put, [0]

    def put(self: StatStore, recipe: Any, value: Tensor) -> None:
        if count[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        real(self, recipe, value)

    StatStore.put = put  # type: ignore[method-assign]
    gathered(llama(), calibration(), Path(folder))


def test_a_killed_run_goes_on_at_the_text_it_was_at(forks: Forks, tmp_path: Path, attributed: list[int]) -> None:
    model, data = llama(), calibration()
    wanted = values(gathered(model, data, tmp_path / "whole"))
    assert forks.wait(forks.call(killed, tmp_path / "killed", out=tmp_path / "said")) == -signal.SIGKILL
    assert len(texts_of(tmp_path / "killed")) == 4
    attributed.clear()
    torch.testing.assert_close(values(gathered(model, data, tmp_path / "killed")), wanted, rtol=0, atol=1e-6)
    assert sum(attributed) == len(data.sequences) - 4


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone", "recipe"])
def test_a_damaged_file_is_noticed_and_made_again(
    damage: str, tmp_path: Path, attributed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model, data = llama(), calibration()
    view = gathered(model, data, tmp_path)
    wanted, hurt = values(view), texts_of(tmp_path)[3]
    file = hurt / ("recipe.json" if damage == "recipe" else "value.safetensors")
    content = file.read_bytes()
    changed = {"truncated": content[:-40], "recipe": content[:-9], "changed": content[:-1] + b"\7"}
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(changed[damage])
    with pytest.raises(StatisticsError, match="or a damaged one"):
        values(view)
    attributed.clear()
    torch.testing.assert_close(values(gathered(model, data, tmp_path)), wanted, rtol=0, atol=1e-6)
    assert attributed == [1]
    assert "damaged and will be recomputed" in caplog.text


def test_what_is_stored_is_float32_and_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = llama(dtype=torch.bfloat16), calibration()
    view = gathered(model, data, tmp_path)
    entries = texts_of(tmp_path)
    assert len(entries) == len(data.sequences)
    for entry in entries:
        (value,) = load_file(entry / "value.safetensors").values()
        assert (value.dtype, tuple(value.shape)) == (torch.float32, (2, 32))
    # A few at a time are read, never all.
    reads = []
    real = StatStore.read
    monkeypatch.setattr(StatStore, "read", lambda self, key: (reads.append(key), real(self, key))[1])
    found = view.attributions(REQUEST)
    reads.clear()
    chunks = found.chunks(3)
    next(chunks)
    assert len(reads) == 3


def test_prompts_are_read_and_completions_are_not(tmp_path: Path) -> None:
    model, data = llama(), task()
    assert data.prompts is not None
    pairs = sorted(zip(data.sequences, data.prompts, strict=True), key=lambda pair: pair[0][: pair[1]])
    own = values(gathered(model, data, tmp_path))
    wanted = torch.stack([attribution(model, ids[:start]) for ids, start in pairs])
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-6)
    request = dataclasses.replace(REQUEST, answer="gold", target="logit")
    gold = values(gathered(model, data, tmp_path, request), request)
    wanted = torch.stack([attribution(model, ids[:start], ids[start], target="logit") for ids, start in pairs])
    torch.testing.assert_close(gold, wanted, rtol=0, atol=1e-5)


def test_one_prompt_with_two_answers_and_one_text_twice(tmp_path: Path, attributed: list[int]) -> None:
    model = llama()
    twice = Calibration.of_answers(((5, 6, 7, 8), (5, 6, 7, 9), (5, 6, 7, 9)), 0, (3, 3, 3))
    own = values(gathered(model, twice, tmp_path))
    assert sum(attributed) == 1
    assert len(own) == 3 and torch.equal(own[0], own[2])
    request = dataclasses.replace(REQUEST, answer="gold")
    gold = values(gathered(model, twice, tmp_path, request), request)
    assert sum(attributed) == 3
    torch.testing.assert_close(gold[0], attribution(model, (5, 6, 7), 8), rtol=0, atol=1e-6)
    torch.testing.assert_close(gold[1:], attribution(model, (5, 6, 7), 9).expand(2, -1, -1), rtol=0, atol=1e-6)


def test_the_sign_may_be_dropped_in_the_end(tmp_path: Path, attributed: list[int]) -> None:
    model, data = llama(), calibration()
    signed = values(gathered(model, data, tmp_path))
    attributed.clear()
    request = dataclasses.replace(REQUEST, signed=False)
    absolute = values(gathered(model, data, tmp_path, request), request)
    assert (signed < 0).any()
    assert torch.equal(absolute, signed.abs())
    assert attributed == []  # the same numbers, read otherwise


@pytest.mark.parametrize(
    "change",
    [
        {"positions": "all"},
        {"baseline": "pad"},
        {"target": "logit"},
        {"rule": "right"},
        {"steps": 3},
        {"times_activation": False},
        {"baseline": "pad", "pad_token": 9},
    ],
)
def test_every_option_is_a_part_of_the_key(change: dict[str, Any], tmp_path: Path) -> None:
    model, data = llama(), shard(calibration(), slice(1, 4))
    other = dataclasses.replace(REQUEST, **change)
    if "pad_token" in change:
        gathered(model, data, tmp_path, dataclasses.replace(REQUEST, baseline="pad"))
    first = values(gathered(model, data, tmp_path))
    found = values(gathered(model, data, tmp_path, other), other)
    options = {key: value for key, value in change.items() if key != "signed"}
    wanted = torch.stack([attribution(model, ids, **options) for ids in sorted(data.sequences)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(first, found, atol=1e-4)


def test_the_presets() -> None:
    assert NeuronAttribution() == NeuronAttribution(
        positions="last",
        baseline="zero",
        target="probability",
        rule="left",
        times_activation=True,
        signed=True,
        steps=7,
    )
    paper, current = NeuronAttribution.as_paper(), NeuronAttribution.as_current()
    assert (paper.target, paper.times_activation, paper.rule, paper.steps) == ("logit", False, "right", 7)
    assert (current.positions, current.baseline, current.pad_token) == ("all", "pad", 0)
    assert (current.target, current.times_activation, current.rule) == ("probability", True, "trapezoid")


def test_data_that_cannot_be_attributed_are_refused(tmp_path: Path) -> None:
    model, gold = llama(), dataclasses.replace(REQUEST, answer="gold")
    with pytest.raises(StatisticsError, match="no text with a prompt and a completion"):
        gathered(model, calibration(), tmp_path, gold)
    with pytest.raises(StatisticsError, match="texts with labels"):
        gathered(model, dataclasses.replace(calibration(), labels=(0,) * 10), tmp_path)


def test_plain_texts_among_prompts_are_read_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    mixed = Calibration.of_answers(((5, 6, 7, 8), (9, 8, 7)), 0, (2, 0))
    found = values(gathered(model, mixed, tmp_path))
    wanted = torch.stack([attribution(model, (5, 6)), attribution(model, (9, 8, 7))])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    gold = dataclasses.replace(REQUEST, answer="gold")
    assert len(values(gathered(model, mixed, tmp_path, gold), gold)) == 1
    assert "1 texts have no completion" in caplog.text


def test_the_time_of_the_first_texts_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        gathered(llama(), calibration(), tmp_path)
    assert "of 10 texts took" in caplog.text


def test_attributions_at_hand() -> None:
    values = torch.randn(5, 3, 4)
    found = in_memory(values)
    assert (found.layers, found.nodes, found.samples) == ((0, 1, 2), 4, 5)
    assert torch.equal(torch.cat(list(found.chunks(2))), values)

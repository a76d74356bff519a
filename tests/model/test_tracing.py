"""Causal tracing: the fast way against one run per state, and the laws of what is restored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tests.assets import STORIES
from tests.models import HIDDEN, Factory, deep, gpt2, llama, padded_left, qwen2, task, tokens
from tests.reference.tracing_reference import heat, rome
from torch import Tensor

from keeptune.atlas import model_path
from keeptune.core.errors import ModelError, RecipeError, StatisticsError
from keeptune.data.calibration import Batch, Calibration
from keeptune.model.blocks import blocks_of
from keeptune.model.pretrained import load_model, load_tokenizer
from keeptune.model.probes.block_calls import Blocks, Suffix
from keeptune.model.probes.causal_tracing import (
    Noise,
    Reading,
    Traced,
    TracedBatch,
    Tracer,
    embedding_std,
    noise_of,
    restored_answers,
)

READINGS: tuple[Reading, ...] = ("diagonal", "positions")
every_model = pytest.mark.parametrize("make", [llama, qwen2, gpt2])
every_reading = pytest.mark.parametrize("reading", READINGS)


def small(lengths: tuple[int, ...] = (9, 7, 12), prompts: tuple[int, ...] = (4, 5, 5)) -> Calibration:
    made = task(3, lengths)
    return Calibration.of_answers(made.sequences, made.pad_id, prompts)


def traced(model: Any, batch: Batch, tracer: Tracer, noise: Noise | None = None) -> dict[tuple[int, ...], Traced]:
    drawn = noise_of(noise or Noise(), batch, model, embedding_std(model))
    return {one.tokens: one for one in tracer.trace(batch, drawn)}


def wanted(model: Any, one: Traced, reading: str) -> Tensor:
    noise = Noise().values(one.tokens, one.prompt, model.get_input_embeddings().weight.shape[1], embedding_std(model))
    return heat(model, one.tokens, one.prompt, noise, reading)


@every_reading
@pytest.mark.parametrize("side", ["right", "left"])
@every_model
def test_fast_equals_one_run_per_state(make: Factory, side: str, reading: Reading) -> None:
    model = deep(make)
    (batch,) = small().batches(padding_side=side)
    tracer = Tracer(model, reading=reading, chunk=40)
    found = traced(model, batch, tracer)
    assert len(found) == 3
    for one in found.values():
        reference = wanted(model, one, reading)
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(one.heat, reference, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.effect, reference.sum(dim=1), rtol=0, atol=1e-5)


@every_reading
@pytest.mark.parametrize("name", ["stories260K", "atlas"])
def test_fast_equals_one_run_per_state_on_real_models(name: str, reading: Reading) -> None:
    folder = str(STORIES if name == "stories260K" else model_path())
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    texts = {
        "stories260K": ["Once upon a time, there was a little girl named Lily. She", "Tom had a dog. The dog ran"],
        "atlas": [
            "What is the comparative of small?\nAnswer: smaller",
            "What is the opposite of succeed?\nAnswer: fail",
        ],
    }[name]
    rows = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    data = Calibration.of_answers(rows, 0, tuple(len(row) - 3 for row in rows))
    (batch,) = data.batches(padding_side="left")
    tracer = Tracer(model, reading=reading)
    for one in traced(model, batch, tracer).values():
        reference = wanted(model, one, reading)
        assert reference.abs().max() > 1e-2
        torch.testing.assert_close(one.heat, reference, rtol=0, atol=1e-5)


@every_reading
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_sliding_windows_are_kept(family: str, attention: str, reading: Reading) -> None:
    dropped = ("model_type", "architectures", "layer_types", "head_dim", "rope_parameters")
    fields = {key: value for key, value in llama().config.to_dict().items() if key not in dropped}
    fields |= {"sliding_window": 3, "num_hidden_layers": 4}
    if family == "Qwen2":  # some blocks see all
        fields |= {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = getattr(transformers, f"{family}Config")(**fields, attn_implementation=attention)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    (batch,) = small().batches(padding_side="left")
    tracer = Tracer(model, reading=reading)
    found = traced(model, batch, tracer)
    for one in found.values():
        reference = wanted(model, one, reading)
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(one.heat, reference, rtol=0, atol=1e-6)


@every_reading
def test_an_architecture_that_does_not_fit_is_refused(reading: Reading) -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=HIDDEN, n_layer=3, n_head=4, initializer_range=0.2)
    model = transformers.BloomForCausalLM(config).eval()  # its positions are a bias, not an input
    (batch,) = small().batches()
    with pytest.raises(ModelError, match=r"Bloom[^$]*cannot be run on some tokens alone"):
        traced(model, batch, Tracer(model, reading=reading))


@every_reading
@pytest.mark.parametrize("wrong", ["prefix", "positions"])
def test_streams_that_differ_from_the_kept_run_are_found_out(
    reading: Reading, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep(llama)
    (batch,) = small().batches()
    if wrong == "prefix":
        mask = Suffix._mask
        monkeypatch.setattr(Suffix, "_mask", lambda self, given: mask(self, given) & False)
    else:
        cut = Suffix._cut
        monkeypatch.setattr(Suffix, "_cut", lambda self, value: cut(replace(self, columns=self.columns * 0), value))
    with pytest.raises(ModelError, match="numbers differ by"):
        traced(model, batch, Tracer(model, reading=reading))


def test_equals_romes_tracing_of_a_subject() -> None:
    model = deep(gpt2)
    ids, answer, subject = tokens(5, (1, 9))[0].tolist(), 17, range(2, 5)
    sigma, draws = 3 * embedding_std(model), 10
    original = rome(model, ids, answer, subject, sigma, draws)
    data = Calibration.of_answers(((*ids, answer),) * draws, 0, (len(ids),) * draws)
    (batch,) = data.batches()
    noise = torch.zeros(draws, len(ids) + 1, HIDDEN)
    noise[:, subject.start : subject.stop] = original["noise"].float()
    found = Tracer(model, reading="positions").trace(batch, noise)
    scores = torch.stack([one.restored for one in found]).mean(dim=0)
    assert (original["scores"] - original["low"]).abs().max() > 1e-3
    torch.testing.assert_close(scores, original["scores"], rtol=0, atol=1e-6)
    assert float(torch.stack([one.corrupted[0] for one in found]).mean()) == pytest.approx(original["low"], abs=1e-7)


@every_model
def test_the_last_block_at_its_own_position_gives_the_clean_answer(make: Factory) -> None:
    model = deep(make, torch.float64)
    (batch,) = small().batches(padding_side="left")
    for one in traced(model, batch, Tracer(model, reading="diagonal")).values():
        torch.testing.assert_close(one.heat[-1], one.clean - one.corrupted, rtol=0, atol=1e-12)
    for one in traced(model, batch, Tracer(model, reading="positions")).values():
        # Only the last position of the prompt is read by anything, and only for the first answer token.
        assert one.heat[-1, :-1].abs().max() < 1e-12


@every_model
def test_restoring_all_positions_at_any_layer_gives_the_clean_answer(make: Factory) -> None:
    model = deep(make)
    (batch,) = small().batches(padding_side="left")
    sites, texts = Blocks(model, blocks_of(model)), TracedBatch(batch, model.device)
    noise = noise_of(Noise(), batch, model, embedding_std(model))
    with torch.no_grad():
        clean, corrupted = (sites.keep(batch, (), noise=given) for given in (None, noise))
        columns = torch.arange(texts.mask.shape[1]).expand(len(texts), -1)
        found = restored_answers(sites, texts, clean, corrupted, columns, texts.mask.bool()[None], alone=False)
        wanted, damaged = (texts.answers(sites, run) for run in (clean, corrupted))
    assert (wanted - damaged).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted.expand(4, 1, -1, -1), rtol=0, atol=1e-6)


@every_reading
@every_model
def test_without_noise_nothing_has_an_effect(make: Factory, reading: Reading) -> None:
    model = deep(make, torch.float64)
    (batch,) = small().batches()
    for one in traced(model, batch, Tracer(model, reading=reading), Noise(scale=0)).values():
        assert one.heat.abs().max() < 1e-12
        torch.testing.assert_close(one.clean, one.corrupted, rtol=0, atol=1e-12)


@every_reading
@every_model
def test_independent_of_batch_size_padding_and_chunk(make: Factory, reading: Reading) -> None:
    model, data = deep(make, torch.float64), task()
    alone: dict[tuple[int, ...], Traced] = {}
    for batch in data.batches(1):
        alone |= traced(model, batch, Tracer(model, reading=reading, chunk=1))
    (batch,) = data.batches()
    for side in (batch, padded_left(batch)):
        for chunk in (50, 10_000):
            together = traced(model, side, Tracer(model, reading=reading, chunk=chunk))
            assert together.keys() == alone.keys()
            for text, one in together.items():
                assert one.prompt == alone[text].prompt
                torch.testing.assert_close(one.heat, alone[text].heat, rtol=0, atol=1e-7)
                torch.testing.assert_close(one.clean, alone[text].clean, rtol=0, atol=1e-7)


def test_the_same_seed_gives_the_same_trace_and_another_another() -> None:
    model = deep(llama)
    (batch,) = small().batches()
    first, again, other = (
        traced(model, batch, Tracer(model, reading="diagonal"), Noise(seed=seed)) for seed in (0, 0, 1)
    )
    for text, one in first.items():
        assert torch.equal(one.heat, again[text].heat)
        assert not torch.allclose(one.heat, other[text].heat)


def test_noise_is_drawn_per_text_at_the_given_share_and_scale() -> None:
    noise, text = Noise(fraction=0.25, scale=2.0, seed=4), tuple(range(5, 45))
    places = noise.positions(text, 32)
    assert len(places) == len(set(places)) == 8
    assert max(places) < 32
    values = noise.values(text, 32, 4000, 0.5)
    assert values.shape == (40, 4000)
    assert values.any(dim=1).nonzero().flatten().tolist() == places
    assert float(values[places].std()) == pytest.approx(1.0, rel=0.02)
    assert float(values[places].mean()) == pytest.approx(0.0, abs=0.02)
    assert noise.positions(text[::-1], 32) != places
    assert Noise(fraction=0.01).positions(text, 5) == Noise(fraction=0.2).positions(text, 5)


def test_the_unit_of_noise_is_the_spread_of_the_embeddings() -> None:
    model = gpt2()
    weight = model.get_input_embeddings().weight
    assert embedding_std(model) == pytest.approx(float(weight.detach().double().std(unbiased=False)))


def test_the_model_is_left_as_it_was() -> None:
    model = deep(gpt2).train()
    (batch,) = small().batches()
    first = traced(model, batch, Tracer(model, reading="positions"))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    second = traced(model.eval(), batch, Tracer(model, reading="positions"))
    assert all(torch.equal(one.heat, second[text].heat) for text, one in first.items())


def test_what_cannot_be_traced_is_refused() -> None:
    model = deep(llama)
    with pytest.raises(RecipeError, match="fraction"):
        Noise(fraction=0)
    with pytest.raises(RecipeError, match="scale"):
        Noise(scale=-1)
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    (batch,) = small().batches()
    with pytest.raises(StatisticsError, match="NaN"):
        traced(model, batch, Tracer(model, reading="diagonal"))
